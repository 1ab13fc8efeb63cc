"""The law behind a plan: a Jacobian by finite differences of any prediction of a cell."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.cells import Cell
from calibration.errors import JobError
from calibration.plan import Design

Floats = NDArray[np.float64]
# predict(coefficients, start, cell) -> observables; 'duration_s' is the time that the cell takes
Predict = Callable[[Mapping[str, float], dict[str, Any], Cell], Mapping[str, float]]
STEP = 0.02  # of ln(coefficient): far above the rounding of a simulation, far below its curvature
# relative spread of a measured figure between two runs of a cell, from the records' repeated cells and short cells
NOISE = {"tpot_p50_s": 0.01, "requests_per_s": 0.01, "ttft_p50_s": 0.05, "board_power_mean_w": 0.02}
COLD_START_S = 95.0  # median of the first H100 starts: 62 to 97 s, torch.compile included


class FiniteDifferences:
    """A `Design` from a prediction: d ln(observable) / d ln(coefficient) by central differences."""

    def __init__(
        self,
        predict: Predict,
        values: Mapping[str, float],
        prior_sd: Mapping[str, float],
        noise: Mapping[str, float] = NOISE,
        start_s: float = COLD_START_S,
    ) -> None:
        self.predict, self.noise, self.cold_s = predict, dict(noise), start_s
        self.names = [n for n in values if values[n] > 0 and prior_sd.get(n, 0) > 0]
        if not self.names:
            raise JobError("no coefficient is uncertain: there is nothing to calibrate")
        self.values = dict(values)
        self.prior_sd: Floats = np.array([prior_sd[n] for n in self.names])
        self.known: dict[tuple[str, Cell], Mapping[str, float]] = {}

    def _base(self, start: dict[str, Any], cell: Cell) -> Mapping[str, float]:
        key = str(start["run_id"]), cell
        if key not in self.known:
            self.known[key] = self.predict(self.values, start, cell)
        return self.known[key]

    def rows(self, start: dict[str, Any], cell: Cell) -> tuple[Floats, Floats]:
        """Return one row an observable that the cell has, and the observables' noise."""
        seen = [n for n in self.noise if self._base(start, cell).get(n, 0.0) > 0]
        rows = np.zeros((len(seen), len(self.names)))
        for j, name in enumerate(self.names):
            up = self.predict(self.values | {name: self.values[name] * np.exp(STEP)}, start, cell)
            down = self.predict(self.values | {name: self.values[name] * np.exp(-STEP)}, start, cell)
            rows[:, j] = [np.log(up[n] / down[n]) / (2 * STEP) for n in seen]
        return rows, np.array([self.noise[n] for n in seen])

    def seconds(self, start: dict[str, Any], cell: Cell) -> float:
        """Return the predicted duration of a cell and what lies between two cells."""
        return float(self._base(start, cell)["duration_s"]) + 0.5

    def start_s(self, start: dict[str, Any]) -> float:
        """Return the expected time of an engine start."""
        return self.cold_s


def load_design(name: str, gpu: str) -> Design:
    """Return what `MODULE:FUNCTION` makes for a GPU. Raises JobError when there is no such function."""
    module, _, function = name.partition(":")
    try:
        made: Design = getattr(importlib.import_module(module), function)(gpu)
    except (ImportError, AttributeError) as err:
        raise JobError(
            f"no design '{name}' ({err}): give --design MODULE:FUNCTION, a function of the GPU's name"
        ) from None
    return made
