"""What the advisor answers: predictions with intervals, plans, rejections, reports."""

from typing import Any

from pydantic import Field

from advisor.schema.base import Noun
from advisor.schema.deployment import Deployment
from advisor.schema.provenance import Interval, Note

SCHEMA_VERSION = "1"


class Part(Noun):
    """One part of a breakdown; the parts of one breakdown sum to its whole."""

    name: str
    value: float
    why: str = ""


class Breakdown(Noun):
    """A number taken apart: `total` equals the sum of the parts."""

    name: str
    unit: str
    total: float
    parts: tuple[Part, ...]


class Prediction(Noun):
    """Predicted behaviour of one deployment under one workload; every number with a 90 % interval.

    Keys of `quantities` follow docs/glossary.md, such as ttft_p99_s, requests_per_s, board_power_w.
    """

    quantities: dict[str, Interval]
    breakdowns: tuple[Breakdown, ...] = ()
    is_saturated: bool = Field(default=False, description="the offered load exceeds what the plan can serve")
    method: str = Field(default="steady", description="'steady' (closed form) or 'simulated'")
    notes: tuple[Note, ...] = ()

    def __getitem__(self, name: str) -> float:
        """Return the value of a quantity by its name."""
        return self.quantities[name].value


class Plan(Noun):
    """One feasible deployment with its prediction, its price and what to run."""

    rank: int
    backend: str
    deployment: Deployment
    prediction: Prediction
    meets_slo: bool
    is_pareto: bool = False
    usd_per_h: float
    score: float = Field(description="value of the objective; smaller is better")
    command: str = Field(description="a string that a shell can run")
    reasons: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()


class Rejected(Noun):
    """A deployment that cannot run or misses a hard limit, and the nearest number that would fit."""

    backend: str
    deployment: Deployment
    reason: str
    nearest: str = ""
    count: int = Field(default=1, description="how many enumerated deployments share this reason")


class Recommendation(Noun):
    """The answer to one request; its JSON form is a versioned contract."""

    schema_version: str = SCHEMA_VERSION
    request: dict[str, Any]
    model: str
    model_note: str = ""
    gpus: str
    best: Plan | None
    best_by_backend: dict[str, Plan] = {}
    plans: tuple[Plan, ...]
    rejected: tuple[Rejected, ...]
    why: tuple[str, ...] = ()
    flips: tuple[str, ...] = ()
    accuracy: dict[str, Any] = {}
    notes: tuple[Note, ...] = ()
