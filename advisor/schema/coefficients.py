"""Fitted numbers and what is known about them."""

from typing import Self

from pydantic import Field, model_validator

from advisor.schema.base import Name, NonNegativeInt, Noun
from advisor.schema.provenance import Source


class Coefficient(Noun):
    """One fitted number with its 90 % interval, physical bounds and origin."""

    value: float
    low: float
    high: float
    unit: str = Field(description="SI unit, '1' for a share")
    bounds: tuple[float, float] = Field(description="physical bounds that the fit kept to")
    meaning: str
    source: str = Field(description="run ids, or the citation of a published figure")
    is_at_bound: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.value <= self.high:
            raise ValueError("low <= value <= high must hold")
        return self


class FitReport(Noun):
    """How well a fit is determined: residuals by metric, condition number, data used."""

    run_ids: tuple[str, ...]
    n_cells: NonNegativeInt
    n_coefficients: NonNegativeInt
    condition_number: float
    median_abs_error: dict[str, float] = {}
    notes: tuple[str, ...] = ()


class CoefficientSet(Noun):
    """All coefficients of one engine; `version` changes when the law changes."""

    name: Name
    version: int
    engine: Name
    engine_versions: tuple[str, ...]
    gpu: Name = Field(description="GPU that the fit's runs used; others are transferred")
    coefficients: dict[str, Coefficient]
    transfer: dict[str, dict[str, float]] = Field(
        default={}, description="factors on the efficiencies of other GPUs, by GPU name; 'default' for unknown ones"
    )
    error_q90: dict[str, float] = Field(
        default={}, description="90th percentile of |ln(predicted / measured)| on left-out engine starts, by metric"
    )
    report: FitReport | None = None
    sources: tuple[Source, ...] = ()

    def value(self, name: str) -> float:
        """Return the value of one coefficient; KeyError names a missing one."""
        return self.coefficients[name].value
