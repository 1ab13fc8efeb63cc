"""Recorded kernels against the law's terms: what a step's matrices, attention, norms and vocabulary head took.

A client sees the sum of a step's terms only, so many splits of it fit a TPOT equally well. The kernels of a step, timed
on the GPU itself, tell them apart (data/runs/kernels; `calibration.kernel_probe`).
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advisor.errors import BadData, printable
from advisor.fit.records import Cell, has_one_route
from advisor.predict.shapes import shapes_of, stage_layers
from advisor.predict.step import N_EXPERT_GEMMS, TERMS, StepCost, step_cost

ELEMENTWISE = ("triton_", "reshape_and_cache", "prepare_varlen")
MATRICES = ("nvjet", "splitKreduce", "gemm", "Marlin", "machete", "gemv")
ATTENTION = ("Flash", "flash", "attention", "fmha")
EXPERTS = ("fused_moe_kernel",)
REDUCES = ("cross_device_reduce", "nccl", "all_reduce")

WIDTHS = {"matrices": 0.04, "experts": 0.1, "attention": 0.08, "elementwise": 0.08, "head": 0.03, "rest": 0.1}
"""Relative error of each figure that counts as one: what the choice of a kernel changes from one shape to the next."""

FIGURES = {
    "matrices": "matrices",
    "experts": "experts' matrices",
    "attention": "attention",
    "elementwise": "norms, rotary embedding, activation, cache writes",
    "head": "vocabulary head",
    "rest": "between two steps: sampling, preparing the next",
}
"""What tables call the figures."""

LONGEST_UNTHROTTLED = 1024
"""Prompt tokens up to which single prompts ran at full clock: matrices of longer ones took up to 13 % more an operation
(h200 codellama-34b, mistral-small-24b-p), which is the power limit's doing and judged by the engine runs."""
SHORTEST_ELEMENTWISE = 1024
"""Prompt tokens from which norms, rotary embedding and activation take longer than to begin and end."""
LONGEST_IDLE_US = 30.0
"""A longer time without a kernel between two steps means that the GPU waited for its host."""


@dataclass(frozen=True)
class KernelStep:
    """One recorded step: the cell of its engine start whose shapes and deployment it has, and its figures [s]."""

    cell: Cell
    what: str
    n: int
    n_context_tokens: float
    figures: Mapping[str, float]

    @property
    def run_id(self) -> str:
        """Return the engine start that it belongs to."""
        return self.cell.run_id

    @property
    def widths(self) -> list[float]:
        """Return the relative error of each figure that counts as one."""
        return [WIDTHS[name] for name in self.figures]

    def predicted(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return what the law says of its figures [s], for coefficient values of its GPU."""
        cell = self.cell
        cost = step_cost(shapes_of(cell.model), cell.gpu, cell.deployment, values)
        found = law_figures(cost, values, self.what, self.n, self.n_context_tokens)
        if cell.deployment.weight_dtype.endswith("int4"):
            found["matrices"] += cost.n_layers * values["int4_layer_s"]
        return found

    def residuals(self, values: Mapping[str, float]) -> list[float]:
        """Return ln(predicted / recorded) of each figure over the error that counts as one."""
        found = self.predicted(values)
        return [math.log(found[name] / value) / WIDTHS[name] for name, value in self.figures.items()]


def kind_of(kernel: str) -> str:
    """Return what a kernel does: matrices, attention, experts, all-reduce or elementwise.

    Fused kernels are named after what they lie between ('triton_red_fused_add_rms_norm_machete_mm'), cache writes after
    the attention that will read them.
    """
    if any(name in kernel for name in ELEMENTWISE):
        return "elementwise"
    for kind, names in (
        ("attention", ATTENTION),
        ("experts", EXPERTS),
        ("all-reduce", REDUCES),
        ("matrices", MATRICES),
    ):
        if any(name in kernel for name in names):
            return kind
    return "elementwise"


def law_figures(
    cost: StepCost, values: Mapping[str, float], what: str, n: int, n_context_tokens: float
) -> dict[str, float]:
    """Return the law's figures of one step [s]: n decodes of a context, or a prompt of n tokens (`what`).

    Kernels begin and end: `values` (the coefficients of `cost`) say how long that takes.
    """
    is_decode = what == "decode"
    work = (0.0, 0.0, float(n), n * n_context_tokens, float(n)) if is_decode else (n, n * (n + 1) / 2, 0.0, 0.0, 1.0)
    terms = dict(zip(TERMS, cost.terms(*work), strict=True))
    return {
        "matrices": terms["linear"] + cost.n_layers * len(cost.gemms) * values["gemm_s"],
        "experts": terms["experts"] + cost.n_layers * N_EXPERT_GEMMS * values["gemm_s"],
        "attention": terms["decode_attention" if is_decode else "prefill_attention"]
        + cost.n_layers * values["attention_s"],
        "elementwise": terms["elementwise"] + cost.n_layers * values["layer_s"],
        "head": terms["lm_head"] + values["gemm_s"],
        "rest": values["step_s"] + n * values["seq_s"],
    }


def figures_of(line: Mapping[str, Any], cell: Cell) -> dict[str, float]:
    """Return the figures of a condensed line that the law is held to [s], for all layers of the first GPU."""
    n_layers = stage_layers(shapes_of(cell.model).n_layers, cell.deployment.pp)[0]
    layer = _sums(line["layer"])
    is_decode, is_moe = line["what"] == "decode", cell.model.moe is not None
    is_plain = not is_moe and cell.deployment.weight_dtype in ("bf16", "fp16")
    wanted: dict[str, float] = {"attention": layer.get("attention", 0.0) * n_layers}
    if is_moe:
        wanted["experts"] = layer.get("experts", 0.0) * n_layers
    elif is_decode or line["n"] <= LONGEST_UNTHROTTLED:
        wanted["matrices"] = layer.get("matrices", 0.0) * n_layers
    if is_plain and not is_decode and line["n"] >= SHORTEST_ELEMENTWISE:
        wanted["elementwise"] = layer.get("elementwise", 0.0) * n_layers
    if is_decode and "between" in line and cell.deployment.pp == 1:
        head = _sums(line["between"]).get("matrices", 0.0) - layer.get("matrices", 0.0)
        if not is_moe:
            wanted["head"] = head
        if is_plain and cell.deployment.tp == 1 and line["idle_us"] < LONGEST_IDLE_US:
            wanted["rest"] = 1e-6 * (line["between_us"] - line["layer_us"]) - head
    return {name: value for name, value in wanted.items() if value > 0}


def _sums(kernels: Iterable[Sequence[Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, us in kernels:
        kind = kind_of(str(name))
        found[kind] = found.get(kind, 0.0) + 1e-6 * float(us)
    return found


def read_kernels(path: Path, cells: Sequence[Cell]) -> list[KernelStep]:
    """Return the recorded steps of a condensed file that belong to some cells. Raises BadData with the rule broken."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(cell.run_id, cell)
    steps = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [json.loads(text) for text in file]
        for line in lines:
            mine = first.get(line["run_id"])
            if mine is None or has_one_route(mine.record, mine.model):
                continue
            context = float(line.get("n_context_tokens") or 0)
            steps.append(KernelStep(mine, str(line["what"]), int(line["n"]), context, figures_of(line, mine)))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(printable(path), f"not a file of condensed kernels ({type(error).__name__})") from None
    return steps
