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
# relative error of each figure that the fit counts as one (advisor.fit.estimate.WEIGHTS)
NOISE = {"tpot_p50_s": 0.02, "requests_per_s": 0.02, "ttft_p50_s": 0.06}
FEW_REQUESTS, SHORT_S = 8, 2.0
COLD_START_S = 78.0  # median of twelve starts, 1B to 70B: 40 to 106 s, torch.compile included (data/runs)
SERVING_VERSION = "0.26.0"
UNKNOWN_SD = 0.5  # of ln(coefficient) where the fit has no prior: a factor of 1.6 either way
METRICS = {"tpot_p50_s": "tpot_s.p50", "requests_per_s": "requests_per_s", "ttft_p50_s": "ttft_s.p50"}


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
        # few requests, or less than two seconds, tell half as much: a burst neither warms clocks nor averages
        is_weak = cell.n_requests < FEW_REQUESTS or self._base(start, cell)["duration_s"] < SHORT_S
        return rows, np.array([self.noise[n] * (2.0 if is_weak else 1.0) for n in seen])

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


def serving_design(gpu_name: str) -> FiniteDifferences:
    """Return the design of the serving law on a GPU: closed cells through the scheduler copy.

    The uncertainty before the runs is the fit's own prior where it has one, else a factor of 1.6.
    Raises JobError for an unknown GPU.
    """
    from advisor.catalog import load_catalog, parse_config
    from advisor.errors import AdvisorError, DomainError
    from advisor.fit.objective import predicted
    from advisor.fit.parameters import PARAMETERS
    from advisor.predict.replica import replica_of
    from advisor.predict.simulate import simulate
    from advisor.predict.traffic import draw
    from advisor.predict.transfer import transferred
    from advisor.schema import ClosedLoad, Deployment, EngineFacts, FixedLengths, Workload
    from calibration.jobs import Job, weight_dtype
    from calibration.models import resolve

    try:
        catalog = load_catalog()
        gpu = catalog.gpu(gpu_name)
    except AdvisorError as err:
        raise JobError(str(err)) from None
    facts = EngineFacts.from_table(catalog.engine("vllm"), SERVING_VERSION)

    def predict(values: Mapping[str, float], start: dict[str, Any], cell: Cell) -> Mapping[str, float]:
        name, config = resolve(start["model"])
        dtype = weight_dtype(Job("plan", quantization=start.get("quantization")), config)
        deployment = Deployment(
            backend="vllm",
            engine_version=SERVING_VERSION,
            model=name,
            gpu=gpu.name,
            tp=start.get("tp", 1),
            pp=start.get("pp", 1),
            weight_dtype=dtype,
            max_model_len=start["max_model_len"],
            max_num_batched_tokens=8192,
            max_num_seqs=start.get("max_num_seqs", 256),
            gpu_memory_utilization=0.9,
        )
        model = parse_config(config, name=name, where="plan").model
        workload = Workload(
            lengths=FixedLengths(kind="fixed", prompt_tokens=cell.prompt_tokens, output_tokens=cell.output_tokens),
            load=ClosedLoad(kind="closed", concurrency=cell.concurrency, n_requests=cell.n_requests),
        )
        try:
            replica = replica_of(model, gpu, deployment, values, facts)
            traffic = draw(workload, 0, prefix_caching=False)
            ran = simulate(list(replica.stages), replica.limits, traffic, replica.client, send_s=replica.send_s)
        except DomainError as err:
            raise JobError(f"{start['run_id']} {cell.label}: {err}") from None
        found = predicted([ran])
        return {ours: found[theirs] for ours, theirs in METRICS.items() if theirs in found} | {
            "duration_s": ran.duration_s
        }

    try:
        values = transferred(catalog.coefficients("vllm"), gpu)
    except AdvisorError:  # nothing fitted yet: the law's own start values
        values = {p.name: p.start for p in PARAMETERS}
    values = {p.name: values.get(p.name, p.start) for p in PARAMETERS}
    prior = {p.name: p.prior_rel or UNKNOWN_SD for p in PARAMETERS if p.is_fitted}
    return FiniteDifferences(predict, values, prior)
