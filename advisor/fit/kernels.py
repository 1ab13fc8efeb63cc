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
from advisor.laws.decode_attention import begin_s
from advisor.laws.throttle import mean_stretch
from advisor.predict.shapes import shapes_of, stage_layers
from advisor.predict.step import N_EXPERT_GEMMS, TERMS, StepCost, step_cost

ELEMENTWISE = ("triton_", "reshape_and_cache", "prepare_varlen")
MATRICES = ("nvjet", "splitKreduce", "gemm", "Marlin", "machete", "gemv")
ATTENTION = ("Flash", "flash", "attention", "fmha")
EXPERTS = ("fused_moe_kernel",)
REDUCES = ("cross_device_reduce", "nccl", "all_reduce")

WIDTHS = {
    "matrices": 0.04,
    "experts": 0.1,
    "attention": 0.08,
    "elementwise": 0.08,
    "all-reduce": 0.15,
    "head": 0.03,
    "rest": 0.1,
}
"""Relative error of each figure that counts as one: what the choice of a kernel changes from one shape to the next."""

FIGURES = {
    "matrices": "matrices",
    "experts": "experts' matrices",
    "attention": "attention",
    "elementwise": "norms, activation, cache",
    "all-reduce": "all-reduces",
    "head": "vocabulary head",
    "rest": "between two steps",
}
"""What tables call the figures."""

SHORTEST_ELEMENTWISE = 1024
"""Prompt tokens from which norms, rotary embedding and activation take longer than to begin and end."""
SHORTEST_REDUCED = 4096
"""Prompt tokens from which the GPUs wait for one another in an all-reduce less than they do for their links."""
LONGEST_IDLE_US = 30.0
"""A longer time without a kernel between two steps means that the GPU waited for its host."""


@dataclass(frozen=True)
class Work:
    """What a step computes, as `StepCost.terms` counts it, and whether its figures count."""

    n_prefill: float
    n_pairs: float
    n_decode: float
    n_context: float
    n_sampled: float
    is_counted: bool = True

    @property
    def terms(self) -> tuple[float, float, float, float, float]:
        """Return the arguments of `StepCost.terms`."""
        return self.n_prefill, self.n_pairs, self.n_decode, self.n_context, self.n_sampled


@dataclass(frozen=True)
class KernelStep:
    """Recorded steps: the cell of the engine start whose shapes and deployment they have, and their figures [s].

    `works` : the steps one after the other, so that the board's power limit is met; figures are sums of those counted
    """

    cell: Cell
    what: str
    n: int
    works: tuple[Work, ...]
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
        shapes = shapes_of(cell.model)
        cost = step_cost(shapes, cell.gpu, cell.deployment, values)
        own = {**values, "attention_s": begin_s(values["attention_s"], shapes.d_head)}
        found = law_figures(cost, own, self.works)
        n_layers = cost.n_layers * sum(w.is_counted for w in self.works)
        if cell.deployment.weight_dtype.endswith("int4"):
            found["matrices"] += n_layers * values["int4_layer_s"]
        if cell.model.moe is not None:
            found["matrices"] += n_layers * values["gemm_s"]  # the router
            found["elementwise"] += n_layers * values["moe_layer_s"]
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


def law_figures(cost: StepCost, values: Mapping[str, float], works: Sequence[Work]) -> dict[str, float]:
    """Return the law's figures of some steps that follow on one another [s], summed over those that count.

    Kernels begin and end: `values` (the coefficients of `cost`) say how long that takes. What the processors compute
    takes longer where the board's power limit lowers their clock; what memory and links bring does not.
    """
    found = dict.fromkeys(WIDTHS, 0.0)
    old = 0.0
    for work in works:
        terms = dict(zip(TERMS, cost.terms(*work.terms), strict=True))
        full_s = float(sum(terms.values()))
        n_tokens = work.n_prefill + work.n_decode
        ratio = cost.power_ratio(full_s, n_tokens, work.n_pairs, work.n_context, work.n_sampled)
        new = ratio + (old - ratio) * math.exp(-full_s / cost.throttle_s)
        stretch = mean_stretch(old, new, ratio, full_s / cost.throttle_s, cost.clock_exponent)
        old = new
        if not work.is_counted:
            continue
        found["matrices"] += stretch * terms["linear"] + cost.n_layers * len(cost.gemms) * values["gemm_s"]
        found["experts"] += stretch * terms["experts"] + cost.n_layers * N_EXPERT_GEMMS * values["gemm_s"]
        found["attention"] += terms["decode_attention"] + stretch * terms["prefill_attention"]
        found["attention"] += cost.n_layers * values["attention_s"]
        found["elementwise"] += terms["elementwise"] + cost.n_layers * values["layer_s"]
        found["all-reduce"] += terms["all_reduce"]
        found["head"] += terms["lm_head"] + values["gemm_s"]
        found["rest"] += values["step_s"] + work.n_sampled * values["seq_s"]
    return found


def works_of(line: Mapping[str, Any]) -> tuple[Work, ...]:
    """Return the steps of a condensed line. Of a burst all after the first count, of a prompt among decodes its own.

    Prompts of a burst are computed one after the other, as many tokens a step as the engine's budget allows.
    """
    n, context = float(line["n"]), float(line.get("n_context_tokens") or 0)
    if line["what"] == "decode":
        return (Work(0.0, 0.0, n, n * context, n),)
    if line["what"] == "prompt":
        return (Work(n, n * (n + 1) / 2, 0.0, 0.0, 1.0),)
    length = int(line["n_tokens"])
    n_decode = n if line["what"] == "mixed" else 0.0
    done = 0
    works = []
    for number, step in enumerate(line["steps"]):
        n_prefill = int(step["n_tokens"] - min(n_decode, step["n_tokens"]))
        pairs = _pairs(done + n_prefill, length) - _pairs(done, length)
        is_counted = n_prefill > 0 and (n_decode > 0 or number > 0 or len(line["steps"]) == 1)
        works.append(Work(n_prefill, pairs, n_decode, n_decode * context, float(step["n_sequences"]), is_counted))
        done += n_prefill
    return tuple(works)


def _pairs(n_tokens: int, length: int) -> float:
    """Return the (query, key) pairs of so many tokens of prompts of a length, one after the other."""
    whole, rest = divmod(n_tokens, length)
    return whole * length * (length + 1) / 2 + rest * (rest + 1) / 2


def figures_of(line: Mapping[str, Any], cell: Cell) -> dict[str, float]:
    """Return the figures of a condensed line that the law is held to [s], for all layers of the first GPU."""
    shapes = shapes_of(cell.model)
    n_layers = stage_layers(shapes.n_layers, cell.deployment.pp)[0]
    is_decode, is_moe = line["what"] == "decode", cell.model.moe is not None
    is_half = cell.deployment.weight_dtype in ("bf16", "fp16")
    is_plain = not is_moe and is_half
    # shared experts' matrices run beside the routed experts' of up to 256 tokens: both take longer then
    is_apart = is_half and not (is_decode and shapes.has_shared_experts)
    is_even = not (shapes.n_sliding_layers and shapes.n_full_layers)  # one layer stands for all
    if shapes.is_mla and line["what"] == "mixed":
        return {}  # prompts and decodes have attention kernels of their own, which cut the layer in two
    works = works_of(line)
    n_tokens = sum(w.n_prefill for w in works if w.is_counted) / max(1, sum(w.is_counted for w in works))
    is_known = is_half or (not is_moe and cell.deployment.weight_dtype == "fp8")
    is_reduced = cell.deployment.tp > 1 and not is_moe
    told = {
        "attention": is_even,
        "experts": is_moe,
        "matrices": is_apart or not is_moe,
        "elementwise": is_known and n_tokens >= SHORTEST_ELEMENTWISE,
        "all-reduce": is_reduced and (is_decode or n_tokens >= SHORTEST_REDUCED),
    }
    names = [name for name, is_told in told.items() if is_told]
    wanted: dict[str, float] = dict.fromkeys(names, 0.0)
    for work, step in zip(works, line.get("steps", [line]), strict=True):
        if work.is_counted:
            layer = _sums(step["layer"]) | {"all-reduce": _least_reduces(step["layer"])}
            for name in names:
                wanted[name] += layer.get(name, 0.0) * n_layers
    if is_decode and "between" in line and cell.deployment.pp == 1:
        head = _sums(line["between"]).get("matrices", 0.0) - _sums(line["layer"]).get("matrices", 0.0)
        if not is_moe:
            wanted["head"] = head
        if is_plain and cell.deployment.tp == 1 and line["idle_us"] < LONGEST_IDLE_US:
            wanted["rest"] = 1e-6 * (line["between_us"] - line["layer_us"]) - head
    return {name: value for name, value in wanted.items() if value > 0}


def _least_reduces(kernels: Iterable[Sequence[Any]]) -> float:
    """Return the time of a layer's all-reduces as if each took what the shortest does: others wait for their peers."""
    times = [1e-6 * float(us) for name, us in kernels if kind_of(str(name)) == "all-reduce"]
    return min(times, default=0.0) * len(times)


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
            if figures := figures_of(line, mine):
                steps.append(KernelStep(mine, str(line["what"]), int(line["n"]), works_of(line), figures))
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(printable(path), f"not a file of condensed kernels ({type(error).__name__})") from None
    return steps
