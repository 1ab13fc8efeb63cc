"""One GPU budget for online serving and offline work: what is needed, and who has which GPUs at which hour."""

from typing import Literal, Self

from pydantic import Field, model_validator

from advisor.schema.base import Fraction, Name, NonNegativeFloat, NonNegativeInt, Noun, PositiveFloat, PositiveInt
from advisor.schema.provenance import Note

HOURS = 24
MOST_HOURS = 24 * 366
"""Latest deadline, from the start of a plan."""
START_S = 94.0
"""Time from the start of an engine's process until it serves, weights left out [s]: 90th percentile of the 161 vLLM
starts on H100 and H200 in data/runs that say it (median 57): imports, compilation with a cold cache, CUDA graphs."""


class OnlineNeed(Noun):
    """The online side: requests a second by hour of day, and what one replica serves within its SLO."""

    requests_per_s: tuple[NonNegativeFloat, ...] = Field(min_length=HOURS, max_length=HOURS, description="hour 0 to 23")
    gpus_per_replica: PositiveInt
    capacity_requests_per_s: PositiveFloat = Field(description="largest rate of one replica that meets the SLO")
    headroom_frac: Fraction = Field(default=0.2, description="capacity kept free for bursts within an hour")
    min_replicas: NonNegativeInt = Field(default=1, description="replicas that stay up at night")
    board_power_w_per_gpu: NonNegativeFloat = Field(default=0.0, description="a serving GPU at its SLO capacity")
    backend: Name = "vllm"


class Way(Noun):
    """One way of doing offline work: a group of GPUs with its own engine and parallel plan; groups add up."""

    backend: Name = Field(description="what runs it, such as vllm, deepspeed-zero-inference or deepspeed-train-zero3")
    plan: str = Field(default="", max_length=300, description="how a group works, in words")
    n_gpus: PositiveInt = Field(description="GPUs of one group")
    tokens_per_s: PositiveFloat = Field(description="of one group")
    board_power_w_per_gpu: NonNegativeFloat = 0.0
    is_serving_engine: bool = Field(
        default=False, description="the engines that serve online: those that the load lets go need no restart"
    )


class OfflineJob(Noun):
    """Work with a deadline: a batch queue or a training job, in tokens, and the ways in which GPUs can do it."""

    name: Name
    kind: Literal["batch", "train"] = "batch"
    ways: tuple[Way, ...] = Field(min_length=1, max_length=64)
    total_tokens: PositiveFloat = Field(description="tokens to process in all")
    max_groups: PositiveInt = Field(default=10**6, description="groups that may run at once (1 = one training job)")
    deadline_hour: PositiveInt = Field(default=HOURS, le=MOST_HOURS, description="hours from the start of the plan")


class HourPlan(Noun):
    """Who has which GPUs in one hour."""

    hour: NonNegativeInt = Field(description="hours from the start of the plan")
    n_replicas: NonNegativeInt
    serving_gpus: NonNegativeInt
    job_gpus: dict[str, NonNegativeInt]
    job_groups: dict[str, tuple[NonNegativeInt, ...]] = Field(description="groups of each of the job's ways")
    job_starts: dict[str, NonNegativeInt] = Field(description="groups that start in this hour")
    idle_gpus: NonNegativeInt
    job_tokens: dict[str, NonNegativeFloat] = Field(description="tokens done in this hour")
    unserved_requests_per_s: NonNegativeFloat = Field(default=0.0, description="online load beyond the GPUs there")
    energy_j: NonNegativeFloat = 0.0


class MixedPlan(Noun):
    """A schedule of one way to divide the budget, with what it costs and what it misses."""

    mode: Literal["share", "split"]
    n_gpus: NonNegativeInt
    hours: tuple[HourPlan, ...]
    finish_hour: dict[str, NonNegativeFloat | None] = Field(description="hour a job ends, null = not within the plan")
    shortfall_tokens: dict[str, NonNegativeFloat] = Field(description="tokens not done by the deadline")
    meets_all: bool
    usd: NonNegativeFloat
    energy_j: NonNegativeFloat
    idle_gpu_hours: NonNegativeFloat
    min_gpus: NonNegativeInt | None = Field(default=None, description="fewest GPUs with which this mode meets all")
    notes: tuple[Note, ...] = ()


class MixedAnswer(Noun):
    """Both ways to divide one budget, and which is better."""

    best: Literal["share", "split"]
    why: tuple[str, ...]
    plans: tuple[MixedPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_best(self) -> Self:
        if self.best not in {p.mode for p in self.plans}:
            raise ValueError("plans must contain the best mode")
        return self

    def plan(self, mode: Literal["share", "split"]) -> MixedPlan:
        """Return the plan of one mode; KeyError when it is absent."""
        return {p.mode: p for p in self.plans}[mode]
