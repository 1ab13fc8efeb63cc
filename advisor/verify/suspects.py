"""Which coefficient would have to differ for the predictions to become what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import Field

from advisor.schema import Coefficient, Noun, Prediction, Workload
from advisor.verify.compare import Row

Vary = Callable[[str, float, Workload], Prediction]
"""A prediction for a workload with one coefficient times a factor."""

STEP = 1.05
"""Factor by which each coefficient is changed to see what follows."""
CAP = 10.0
"""A coefficient that would have to change by more than this factor is not what is wrong."""
LEAST_EXPLAINED = 0.5
# How well a quantity is measured and predicted (natural log), which is how much a gap in it says.
WEIGHTS = {"tpot_mean_s": 0.02, "tpot_p50_s": 0.02, "ttft_mean_s": 0.06, "ttft_p50_s": 0.06, "e2e_mean_s": 0.03}


class Suspect(Noun):
    """A coefficient, by which factor it would have to differ, and how much of all gaps that explains."""

    name: str
    meaning: str
    factor: float
    explained_frac: float = Field(description="share of the weighted squares of the gaps that the change removes")


def suspects(
    rows: Sequence[Row],
    cells: Mapping[str, Workload],
    coefficients: Mapping[str, Coefficient],
    vary: Vary,
    predict: Callable[[Workload], Prediction],
) -> tuple[Suspect, ...]:
    """Return the coefficients that explain the gaps best, each alone, best first.

    rows : predicted beside measured; cells : the requests that each cell sent. Gaps are ln(measured / predicted) of the
    means and medians, over their error; a coefficient's part is the straight line through its effect at `STEP`, then
    through its effect where that line would have it, in the logarithm for efficiencies, plain for times, which add up.
    """
    used = [r for r in rows if r.name in WEIGHTS and r.cell in cells and r.measured > 0]
    if not used:
        return ()
    weights = np.array([1.0 / WEIGHTS[r.name] for r in used])
    ratios = np.array([r.measured / r.predicted.value for r in used])
    base = {cell: predict(workload) for cell, workload in cells.items()}
    found = []
    for name, coefficient in coefficients.items():
        if "@" in name or coefficient.value <= 0:
            continue
        is_time = coefficient.unit == "s"
        gaps = weights * (ratios - 1.0 if is_time else np.log(ratios))
        factor, explained = STEP, 0.0
        # the line through the effect at a small step says where to look: through the effect there it is drawn again
        for _ in range(2):
            changed = {cell: vary(name, factor, workload) for cell, workload in cells.items()}
            steps = np.array([_ratio(base[r.cell], changed[r.cell], r.name) for r in used])
            effect = weights * ((steps - 1.0) / (factor - 1.0) if is_time else np.log(steps) / math.log(factor))
            norm = float(effect @ effect)
            if norm < 1e-6:
                break
            shift = float(effect @ gaps) / norm
            explained = 1.0 - float(((gaps - shift * effect) ** 2).sum()) / max(float(gaps @ gaps), 1e-12)
            factor = 1.0 + shift if is_time else math.exp(min(max(shift, -9.0), 9.0))
            if not (1.0 / CAP <= factor <= CAP and explained >= LEAST_EXPLAINED and abs(factor - 1.0) > 1e-3):
                break
        if 1.0 / CAP <= factor <= CAP and explained >= LEAST_EXPLAINED:
            share = min(explained, 1.0)
            found.append(Suspect(name=name, meaning=coefficient.meaning, factor=factor, explained_frac=share))
    return tuple(sorted(found, key=lambda s: -s.explained_frac))


def _ratio(before: Prediction, after: Prediction, name: str) -> float:
    a, b = before.quantities.get(name), after.quantities.get(name)
    return b.value / a.value if a is not None and b is not None and a.value > 0 and b.value > 0 else 1.0


def suspect_text(found: Sequence[Suspect]) -> str:
    """Return the best explanation as a sentence, with others that explain nearly as much; empty for none."""
    if not found:
        return ""
    best = found[0]
    text = (
        f"of all coefficients, {best.name} ({best.meaning}) at {best.factor:.2f} times its value explains"
        f" {best.explained_frac:.0%} of the gaps best"
    )
    near = [s.name for s in found[1:4] if s.explained_frac > best.explained_frac - 0.05]
    return text + (
        f"; {', '.join(near)} would do nearly as well: cells of other lengths tell them apart" if near else ""
    )
