"""Published claims, and what the audit says about each."""

from typing import Literal, Self

from pydantic import Field, model_validator

from advisor.schema.base import Name, Noun
from advisor.schema.deployment import Backend, WeightDtype
from advisor.schema.provenance import Interval

Verdict = Literal["consistent", "implausible", "impossible", "wrong", "stale", "undecided"]
Quantity = Literal[
    "requests_per_s",
    "output_tokens_per_s",
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "e2e_p50_s",
    "e2e_p99_s",
    "latency_p99_s",
    "memory_bytes_per_gpu",
    "memory_utilization_frac",
    "board_power_w",
    "board_power_w_per_gpu",
    "throughput_gain_frac",
    "memory_saving_frac",
    "power_gain_frac",
]


class Setup(Noun):
    """What a claim was measured on, as far as its text says; unset fields are searched over."""

    model: str = Field(default="", max_length=200, description="model name, empty when a claim names none")
    gpu: str = Field(default="", max_length=200, description="GPU name")
    n_gpus: int = Field(default=1, ge=1, le=100_000)
    backend: Backend | None = None
    weight_dtype: WeightDtype = "fp16"
    tp: int = Field(default=0, ge=0, le=1024, description="0 = not said")
    static_batch: int = Field(default=0, ge=0, le=10**6, description="0 = not said or dynamic")
    prompt_tokens: int = Field(default=0, ge=0, le=10**8, description="0 = not said")
    output_tokens: int = Field(default=0, ge=0, le=10**8, description="0 = not said")


class FigureClaim(Noun):
    """A number that somebody published."""

    kind: Literal["figure"] = "figure"
    id: Name
    text: Name = Field(description="the claim in its own words")
    quantity: Quantity
    value: float
    tolerance: float = Field(default=0.0, ge=0, description="stated plus or minus, same unit")
    high: float | None = Field(default=None, description="upper end where the claim is a range from `value` to `high`")
    setup: Setup | None = Field(default=None, description="overrides the file's setup")
    baseline_setup: Setup | None = Field(default=None, description="what a gain or saving compares with")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.value < 0 and not self.quantity.endswith(("_gain_frac", "_saving_frac")):
            raise ValueError(f"{self.quantity} of claim '{self.id}' cannot be negative, it is {self.value:g}")
        if self.high is not None and self.high < self.value:
            raise ValueError(f"high {self.high:g} of claim '{self.id}' is below its value {self.value:g}; swap them")
        return self


class StatementClaim(Noun):
    """A sentence that a rule can check; `rule` names it, `subject` fills it in."""

    kind: Literal["statement"] = "statement"
    id: Name
    text: Name
    rule: Name = Field(description="name of a rule of advisor.recommend.claims")
    subject: dict[str, str | int | float | bool] = Field(default_factory=dict, description="the rule's parameters")
    setup: Setup | None = None


class ClaimsFile(Noun):
    """All claims of one publication."""

    title: Name
    url: str = ""
    date: str = Field(default="", description="ISO date of the publication")
    setup: Setup = Setup()
    figures: tuple[FigureClaim, ...] = ()
    statements: tuple[StatementClaim, ...] = ()

    @model_validator(mode="after")
    def _unique_ids(self) -> Self:
        ids = [c.id for c in self.figures] + [c.id for c in self.statements]
        if not ids:
            raise ValueError("the file holds no claim; write [[figures]] or [[statements]]")
        twice = sorted({i for i in ids if ids.count(i) > 1})
        if twice:
            raise ValueError(f"claim id '{twice[0]}' appears twice")
        return self


class Finding(Noun):
    """What the audit found out about one claim."""

    id: str
    text: str
    verdict: Verdict
    why: str = Field(description="one or two sentences with the deciding numbers")
    claimed: Interval | None = None
    ours: Interval | None = Field(default=None, description="our number with its 90 % interval, unit as in `quantity`")
    quantity: str = ""
    scenario: str = Field(default="", description="lengths and load under which the figure would hold, if any exist")
    source: str = Field(description="law, run ids or document that the verdict rests on")


class AuditReport(Noun):
    """Verdicts on all claims of one publication."""

    title: str
    url: str = ""
    findings: tuple[Finding, ...]

    def count(self, verdict: Verdict) -> int:
        """Return how many claims got this verdict."""
        return sum(f.verdict == verdict for f in self.findings)
