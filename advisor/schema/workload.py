"""What the users send: lengths, arrivals, targets."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from advisor.schema.base import Fraction, NonNegativeFloat, NonNegativeInt, Noun, PositiveFloat, PositiveInt

MAX_TOKENS = 10**8


class FixedLengths(Noun):
    """Every request has the same prompt and output length."""

    kind: Literal["fixed"] = "fixed"
    prompt_tokens: PositiveInt = Field(le=MAX_TOKENS)
    output_tokens: PositiveInt = Field(le=MAX_TOKENS)


class LognormalLengths(Noun):
    """Lengths drawn from lognormal distributions with the given means, rounded down and clipped."""

    kind: Literal["lognormal"] = "lognormal"
    prompt_tokens_mean: PositiveFloat = Field(le=MAX_TOKENS)
    output_tokens_mean: PositiveFloat = Field(le=MAX_TOKENS)
    sigma: NonNegativeFloat = Field(le=4, description="standard deviation of the logarithm")
    prompt_clip: tuple[PositiveInt, PositiveInt] = (1, MAX_TOKENS)
    output_clip: tuple[PositiveInt, PositiveInt] = (1, MAX_TOKENS)


class TraceLengths(Noun):
    """Lengths of a recorded trace, taken in order (repeated when it ends)."""

    kind: Literal["trace"] = "trace"
    name: str = "trace"
    prompt_tokens: tuple[PositiveInt, ...] = Field(min_length=1)
    output_tokens: tuple[PositiveInt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.prompt_tokens) != len(self.output_tokens):
            raise ValueError("prompt_tokens and output_tokens must have the same length")
        return self


Lengths = Annotated[FixedLengths | LognormalLengths | TraceLengths, Field(discriminator="kind")]


class ClosedLoad(Noun):
    """`concurrency` clients, each sending its next request when its last one ends."""

    kind: Literal["closed"] = "closed"
    concurrency: PositiveInt = Field(le=10**6)
    n_requests: PositiveInt | None = Field(default=None, le=10**8, description="requests in all; None = enough")


class PoissonLoad(Noun):
    """Independent arrivals at a constant mean rate."""

    kind: Literal["poisson"] = "poisson"
    arrivals_per_s: PositiveFloat = Field(le=1e7)
    duration_s: PositiveFloat | None = Field(default=None, le=1e8)
    n_requests: PositiveInt | None = Field(default=None, le=10**8, description="realised count, when known")


class GammaLoad(Noun):
    """Bursty arrivals: gamma-distributed gaps with coefficient of variation `cv` (1 = Poisson)."""

    kind: Literal["gamma"] = "gamma"
    arrivals_per_s: PositiveFloat = Field(le=1e7)
    cv: PositiveFloat = Field(le=100)
    duration_s: PositiveFloat | None = Field(default=None, le=1e8)
    n_requests: PositiveInt | None = Field(default=None, le=10**8)


class ConstantLoad(Noun):
    """Equally spaced arrivals."""

    kind: Literal["constant"] = "constant"
    arrivals_per_s: PositiveFloat = Field(le=1e7)
    duration_s: PositiveFloat | None = Field(default=None, le=1e8)
    n_requests: PositiveInt | None = Field(default=None, le=10**8)


class TraceLoad(Noun):
    """Arrival times of a recorded trace, seconds from its start, ascending."""

    kind: Literal["trace"] = "trace"
    arrival_s: tuple[NonNegativeFloat, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if any(b < a for a, b in zip(self.arrival_s, self.arrival_s[1:], strict=False)):
            raise ValueError("arrival_s must not decrease")
        return self

    @property
    def arrivals_per_s(self) -> float:
        """Return the mean rate of the trace."""
        return len(self.arrival_s) / max(self.arrival_s[-1] - self.arrival_s[0], 1e-9)


OpenLoad = PoissonLoad | GammaLoad | ConstantLoad | TraceLoad
Load = Annotated[ClosedLoad | PoissonLoad | GammaLoad | ConstantLoad | TraceLoad, Field(discriminator="kind")]


class PrefixSharing(Noun):
    """How much of a prompt is already in the KV cache when prefix caching is on."""

    shared_prefix_tokens: NonNegativeInt = Field(default=0, description="system prompt that all requests share")
    conversation_hit_frac: Fraction = Field(
        default=0.0, description="share of the rest of the prompt that an earlier turn left in the cache"
    )
    is_warm: bool = Field(default=False, description="the shared prompt is cached before the first request")


class Workload(Noun):
    """Lengths, arrivals and prefix sharing of one kind of traffic."""

    name: str = "custom"
    lengths: Lengths
    load: Load
    prefix: PrefixSharing = PrefixSharing()


Metric = Literal["ttft", "tpot", "itl", "e2e"]
Statistic = Literal["mean", "p50", "p90", "p95", "p99"]


class Target(Noun):
    """One service-level objective: a statistic of a latency must not exceed a bound."""

    metric: Metric
    statistic: Statistic
    max_s: PositiveFloat

    @property
    def name(self) -> str:
        """Return the name as users write it, such as 'ttft_p99'."""
        return f"{self.metric}_{self.statistic}"


class Slo(Noun):
    """All latency targets together; empty means best effort."""

    targets: tuple[Target, ...] = ()
