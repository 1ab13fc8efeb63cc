"""The run record, schema 1: one measured cell of one engine start."""

from itertools import pairwise
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from advisor.errors import DomainError
from advisor.schema.base import Name, NonNegativeFloat, NonNegativeInt, Noun, PositiveFloat, PositiveInt
from advisor.schema.workload import ClosedLoad, TraceLengths, TraceLoad, Workload


class OpenNoun(Noun):
    """A noun that keeps fields it does not know: a record may carry more than the schema names."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class Percentiles(OpenNoun):
    """Statistics of one latency over the requests of a cell [s]."""

    mean: NonNegativeFloat
    p50: NonNegativeFloat
    p90: NonNegativeFloat
    p95: NonNegativeFloat
    p99: NonNegativeFloat


class BoardPower(OpenNoun):
    """Board power summed over the engine's GPUs [W]."""

    mean: NonNegativeFloat
    max: NonNegativeFloat | None = None
    sm_clock_mhz: NonNegativeFloat | None = None
    n_gpus: PositiveInt = 1


class Measured(OpenNoun):
    """What the client and the power meter saw."""

    n_requests: NonNegativeInt | None = None
    duration_s: PositiveFloat | None = None
    requests_per_s: NonNegativeFloat | None = None
    output_tokens_per_s: NonNegativeFloat | None = None
    input_tokens_per_s: NonNegativeFloat | None = None
    ttft_s: Percentiles | None = None
    tpot_s: Percentiles | None = None
    e2e_s: Percentiles | None = None
    itl_max_s: Percentiles | None = None
    board_power_w: BoardPower | None = None
    energy_j: NonNegativeFloat | None = None


class Startup(OpenNoun):
    """The engine's own figures at start, per GPU."""

    weights_bytes: NonNegativeFloat | None = None
    peak_activation_bytes: NonNegativeFloat | None = None
    non_torch_bytes: NonNegativeFloat | None = None
    cuda_graph_bytes: NonNegativeFloat | None = None
    kv_cache_bytes: NonNegativeFloat | None = None
    kv_cache_tokens: NonNegativeInt | None = None
    n_kv_blocks: PositiveInt | None = None
    kv_block_tokens: PositiveInt | None = None
    device_memory_bytes: PositiveFloat | None = None
    startup_s: NonNegativeFloat | None = None


class Sent(Noun):
    """The very requests of a cell in the order in which they were sent; a closed loop has no arrivals of its own."""

    prompt_tokens: tuple[PositiveInt, ...] = Field(min_length=1)
    output_tokens: tuple[PositiveInt, ...] = Field(min_length=1)
    arrival_s: tuple[NonNegativeFloat, ...] | None = Field(default=None, description="ascending, from the first [s]")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        counts = {len(self.prompt_tokens), len(self.output_tokens), len(self.arrival_s or self.prompt_tokens)}
        if len(counts) > 1:
            raise ValueError("prompt_tokens, output_tokens and arrival_s must have the same length")
        if self.arrival_s is not None and any(b < a for a, b in pairwise(self.arrival_s)):
            raise ValueError("arrival_s must not decrease")
        return self

    def within(self, asked: Workload) -> Workload:
        """Return a workload as these requests; raises DomainError where it is an open load and arrivals are missing."""
        lengths = TraceLengths(name="as sent", prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens)
        if isinstance(asked.load, ClosedLoad):
            load: ClosedLoad | TraceLoad = asked.load.model_copy(update={"n_requests": len(self.prompt_tokens)})
        elif self.arrival_s is None:
            raise DomainError("'sent' has no 'arrival_s', which an open load needs")
        else:
            load = TraceLoad(arrival_s=self.arrival_s)
        return asked.model_copy(update={"lengths": lengths, "load": load})


class RunRecord(OpenNoun):
    """One cell. `load` and `lengths` are checked when they become a Workload."""

    schema_: Literal[1] = Field(alias="schema")
    run_id: Name
    engine: Name
    engine_version: Name
    gpu: Name
    n_gpus: PositiveInt
    interconnect: str = "nvlink"
    idle_power_w: NonNegativeFloat | None = None
    power_limit_w_per_gpu: PositiveFloat | None = None
    model: Name
    hf_config: dict[str, Any]
    random_weights: bool | None = Field(default=None, description="None: not known, as of a server behind HTTP")
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: PositiveInt = 1
    api_server_count: PositiveInt = 1
    """vLLM's API server processes, where a client came over HTTP"""
    weight_dtype: Name = "bf16"
    kv_dtype: Name = "bf16"
    max_model_len: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    gpu_memory_utilization: PositiveFloat | None = None
    prefix_caching: bool = False
    enforce_eager: bool = False
    startup: Startup | None = None
    load: dict[str, Any] | None = None
    lengths: dict[str, Any] | None = None
    sent: Sent | None = Field(default=None, description="what the client drew from `load` and `lengths`, where kept")
    measured: Measured
