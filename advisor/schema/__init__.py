"""Frozen pydantic nouns, the vocabulary of the whole package; no arithmetic, no I/O.

No module of this package postpones its annotations (`from __future__ import annotations`): pydantic would have to
compile and evaluate the text of each, a fifth of what its import takes.
"""

from typing import TYPE_CHECKING, Any

from advisor.schema.base import Noun, first_error
from advisor.schema.coefficients import Coefficient, CoefficientSet, FitReport
from advisor.schema.deployment import Backend, Deployment, KvDtype, Speculative, WeightDtype
from advisor.schema.engine import BatchDefault, EngineFacts
from advisor.schema.hardware import Cluster, Dtype, Gpu, Price
from advisor.schema.model import Mla, Model, Moe, Quantization
from advisor.schema.provenance import Interval, Note, Source
from advisor.schema.request import Objective, Request, Task
from advisor.schema.result import SCHEMA_VERSION, Breakdown, Part, Plan, Prediction, Recommendation, Rejected
from advisor.schema.workload import (
    ClosedLoad,
    ConstantLoad,
    FixedLengths,
    GammaLoad,
    Lengths,
    Load,
    LognormalLengths,
    OpenLoad,
    PoissonLoad,
    PrefixSharing,
    Slo,
    Target,
    TraceLengths,
    TraceLoad,
    Workload,
)

if TYPE_CHECKING:
    from advisor.schema.run_record import RunRecord

__all__ = [
    "SCHEMA_VERSION",
    "Backend",
    "BatchDefault",
    "Breakdown",
    "ClosedLoad",
    "Cluster",
    "Coefficient",
    "CoefficientSet",
    "ConstantLoad",
    "Deployment",
    "Dtype",
    "EngineFacts",
    "FitReport",
    "FixedLengths",
    "GammaLoad",
    "Gpu",
    "Interval",
    "KvDtype",
    "Lengths",
    "Load",
    "LognormalLengths",
    "Mla",
    "Model",
    "Moe",
    "Note",
    "Noun",
    "Objective",
    "OpenLoad",
    "Part",
    "Plan",
    "PoissonLoad",
    "Prediction",
    "PrefixSharing",
    "Price",
    "Quantization",
    "Recommendation",
    "Rejected",
    "Request",
    "RunRecord",
    "Slo",
    "Source",
    "Speculative",
    "Target",
    "Task",
    "TraceLengths",
    "TraceLoad",
    "WeightDtype",
    "Workload",
    "first_error",
]


def __getattr__(name: str) -> Any:
    # fits and validation need it, answers do not, and a model costs a millisecond to build
    if name != "RunRecord":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from advisor.schema.run_record import RunRecord

    return RunRecord
