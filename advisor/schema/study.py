"""A study: one question asked for every combination of models, GPUs, traffic, targets, objectives and seeds."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from advisor.schema.base import Fraction, Name, NonNegativeFloat, NonNegativeInt, Noun, PositiveFloat, PositiveInt
from advisor.schema.deployment import Backend, KvDtype, WeightDtype
from advisor.schema.request import Objective
from advisor.schema.result import SCHEMA_VERSION
from advisor.schema.workload import MAX_TOKENS

MAX_CELLS = 10**7
"""More cells than this are a mistake in the file: at 30 cells a core-second they would take four days of a core."""

Mode = Literal["recommend", "simulate"]
Status = Literal["ok", "infeasible", "error"]


class StudyWorkload(Noun):
    """Traffic of a study: a preset, own lengths, or a recorded trace. Several rates or client counts are several."""

    name: str = Field(default="", max_length=200, description="label in the results; default: made from the fields")
    preset: Name = Field(default="chat", description="chat, rag, summarise, code, agent, batch")
    prompt_tokens: PositiveInt | None = Field(default=None, le=MAX_TOKENS)
    output_tokens: PositiveInt | None = Field(default=None, le=MAX_TOKENS)
    length_sigma: NonNegativeFloat | None = Field(default=None, le=4)
    rate: tuple[PositiveFloat, ...] = Field(default=(), max_length=10**6, description="requests/s, one cell each")
    concurrency: tuple[PositiveInt, ...] = Field(default=(), max_length=10**6, description="clients, one cell each")
    trace: str = Field(default="", max_length=4096, description="CSV with time, prompt tokens and output tokens")
    trace_name: str = Field(default="", max_length=200, description="which trace of a CSV that holds several")
    trace_sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$", description="of the CSV; checked when given")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"trace": value} if value.lower().endswith(".csv") else {"preset": value}
        return value

    @field_validator("rate", "concurrency", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.rate and self.concurrency:
            raise ValueError("give rate or concurrency, not both")
        own = self.model_fields_set & {"preset", "prompt_tokens", "output_tokens", "length_sigma"}
        if self.trace and (own or self.rate or self.concurrency):
            raise ValueError("a trace brings its own lengths and times: give no other traffic beside it")
        return self

    @property
    def label(self) -> str:
        """Return the name that the results show."""
        if self.name:
            return self.name
        if self.trace:
            return self.trace_name or self.trace.replace("\\", "/").rsplit("/", 1)[-1]
        parts = [self.preset]
        if self.prompt_tokens or self.output_tokens:
            parts.append(f"{self.prompt_tokens or '-'}/{self.output_tokens or '-'}")
        parts += [f"{rate:g}/s" for rate in self.rate] + [f"{n} clients" for n in self.concurrency]
        return " ".join(parts)


class StudyDeployment(Noun):
    """The deployment that mode 'simulate' replays; what is not given is the engine's default."""

    backend: Backend = "vllm"
    tp: PositiveInt | None = Field(default=None, le=1024)
    pp: PositiveInt | None = Field(default=None, le=1024)
    dp: PositiveInt | None = Field(default=None, le=65536)
    weight_dtype: WeightDtype | None = None
    kv_dtype: KvDtype | None = None
    max_num_seqs: PositiveInt | None = Field(default=None, le=10**7)
    max_num_batched_tokens: PositiveInt | None = Field(default=None, le=10**9)
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    prefix_caching: bool | None = None
    enforce_eager: bool | None = None
    static_batch: NonNegativeInt | None = None
    offload: Literal["none", "cpu", "nvme"] | None = None


class Study(Noun):
    """A grid of questions; a cell is one of each list."""

    name: str = Field(default="study", max_length=200)
    mode: Mode = Field(default="recommend", description="'recommend' searches, 'simulate' replays one deployment")
    models: tuple[Name, ...]
    gpus: tuple[Name, ...] = Field(description="specs such as '8xA100'; a comma inside one compares pools in a cell")
    workloads: tuple[StudyWorkload, ...] = (StudyWorkload(),)
    slos: tuple[str, ...] = Field(default=("",), description="such as 'ttft_p99=500ms'; '' = usual, 'none' = none")
    objectives: tuple[Objective, ...] = ("cost",)
    seeds: tuple[NonNegativeInt, ...] = Field(default=(0,), description="a list, or a number N for 0 .. N-1")
    deployment: StudyDeployment | None = Field(default=None, description="default: the recommended one of each cell")
    backends: tuple[Backend, ...] = Field(default=(), description="engines that are searched, empty = all")
    n_finalists: NonNegativeInt = Field(default=6, le=100, description="plans that a search simulates")
    engine_version: str = Field(default="0.26.0", max_length=40)

    @field_validator("seeds", mode="before")
    @classmethod
    def _first_n(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 < value <= MAX_CELLS:
                raise ValueError(f"a number of seeds must be 1 to {MAX_CELLS:,}")
            return tuple(range(value))
        return value

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for name in ("models", "gpus", "workloads", "slos", "objectives", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"'{name}' is an empty list; give at least one, or leave the key out")
            if len(set(values)) < len(values):
                raise ValueError(f"'{name}' names a value twice; give each once")
        if self.deployment is not None and self.mode == "recommend":
            raise ValueError("a deployment is given, so nothing is left to recommend; set mode = 'simulate'")
        return self

    @property
    def n_cells(self) -> int:
        """Return the number of combinations."""
        loads = sum(max(1, len(w.rate) + len(w.concurrency)) for w in self.workloads)
        return len(self.models) * len(self.gpus) * loads * len(self.slos) * len(self.objectives) * len(self.seeds)


class StudySummary(Noun):
    """What one run of a study did."""

    schema_version: str = SCHEMA_VERSION
    study: str
    out: str
    shard: str = Field(description="'i/n': this run's part of the grid")
    n_cells: NonNegativeInt = Field(description="cells of this part")
    n_skipped: NonNegativeInt = Field(description="cells whose results were there already")
    n_done: NonNegativeInt = Field(description="cells of this run")
    n_by_status: dict[Status, NonNegativeInt]
    reasons: tuple[tuple[str, NonNegativeInt], ...] = Field(
        default=(), description="why cells have no plan, with counts"
    )
    is_complete: bool
    n_workers: NonNegativeInt = Field(description="0 = all of the cluster")
    elapsed_s: NonNegativeFloat
    busy_frac: Fraction | None = Field(default=None, description="time in cells over elapsed time and workers")
