"""Is the direction of every published vLLM/DeepSpeed-MII pair right, each engine at the release that was measured?

``python -m benchmarks.vllm_deepspeed_pairs`` needs nothing but data/golden/vllm_releases_public.json: 156 pairs of one
bench with the same cards, model, batch and lengths. We name a winner where the joined interval of both predictions
leaves out a tie, and say "no winner" else, as `advisor compare` does. The bench names one where the two times differ by
more than repeats of one cell do; where they do not, there is no direction to be right about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from advisor.catalog import Catalog, load_catalog
from advisor.errors import DomainError
from advisor.fit.releases import A100, batch_s, read_rows
from advisor.predict.deepspeed_paths import FASTGEN_MAX_SEQS, SPLITFUSE_TOKENS, memory_breakdown
from advisor.predict.deepspeed_step import Rates, StepLaw, kv_bytes_per_token, rates_of
from advisor.predict.release import V0_NON_TORCH_BYTES, ReleaseFactor, factor_of
from advisor.predict.shapes import shapes_of
from advisor.predict.splitfuse import serve_splitfuse
from advisor.schema import Cluster, Deployment

Row = dict[str, Any]
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "vllm_releases_public.json"
BENCH_RELEASE = "0.6.2"
VLLM, MII = "vLLM", "MII"
NOISE_FRAC = 0.03
"""Worst difference between repeats of one cell of the bench."""


@dataclass(frozen=True)
class Judged:
    """One pair: measured and predicted ln(MII time / vLLM time), and the predicted ends with both engines' errors."""

    row: Row
    measured: float
    predicted: float
    low: float
    high: float
    vllm_error: float
    mii_error: float

    @property
    def predicted_winner(self) -> str:
        """Return who is faster by prediction, empty where the interval of the ratio holds a tie."""
        return VLLM if self.low > 0 else MII if self.high < 0 else ""

    @property
    def measured_winner(self) -> str:
        """Return who is faster by measurement, empty where the times differ by no more than repeats of one cell do."""
        if abs(self.measured) <= math.log1p(NOISE_FRAC):
            return ""
        return VLLM if self.measured > 0 else MII

    @property
    def is_covered(self) -> bool:
        """Return whether the interval of the ratio holds the measured one."""
        return self.low <= self.measured <= self.high

    @property
    def is_sign_right(self) -> bool:
        """Return whether the central prediction alone has the measured sign."""
        return (self.measured > 0) == (self.predicted > 0)


def mii_batch_s(catalog: Catalog, row: Row, rates: Rates, is_repeated: bool = True) -> float:
    """Return the time [s] of one batch through FastGen on the A100 40 GB.

    is_repeated : the bench's MII prompts repeat one word, so every token goes to the same experts.
    """
    model, gpu = catalog.model(row["model"])[0], catalog.gpu(A100)
    cluster, shapes = Cluster(gpu=gpu, gpus_per_node=4), shapes_of(catalog.model(row["model"])[0])
    deployment = Deployment(
        backend="deepspeed-fastgen", model=model.name, gpu=gpu.name, tp=row["tp"], weight_dtype="fp16", max_num_seqs=512
    )
    pool = next(
        p.value for p in memory_breakdown(shapes, cluster, deployment, rates, (1, 1)).parts if p.name == "kv_cache"
    )
    law = StepLaw(shapes, cluster, deployment, rates, True, row["tokens"])
    if is_repeated and shapes.n_experts:
        law = law.with_experts(shapes.n_experts_per_token)
    lengths = np.full(row["batch"], row["tokens"], dtype=np.int64)
    served = serve_splitfuse(
        lengths,
        lengths,
        arrivals=None,
        clients=row["batch"],
        budget_tokens=SPLITFUSE_TOKENS,
        max_seqs=FASTGEN_MAX_SEQS,
        kv_tokens=pool / kv_bytes_per_token(shapes, row["tp"]),
        step_s=law.mixed_s,
    )
    return served.duration_s


def _vllm_s(catalog: Catalog, row: Row, factor: ReleaseFactor) -> tuple[float, float, float]:
    """Return (central, fastest, slowest) time of V0; the ends are those of the memory that its cache lacks."""
    host = {
        "step_s": factor.step_s.value,
        "tp_doubling_s": factor.tp_doubling_s.value,
        "seq_s": factor.seq_s.value,
    }
    lost = V0_NON_TORCH_BYTES
    times = []
    for amount in (lost.value, lost.low, lost.high):
        try:
            times.append(batch_s(catalog, row, A100, host, lost_bytes=amount))
        except DomainError:
            times.append(math.inf)  # with so little room the model would not even start
    return times[0], min(times), max(times)


def judge(catalog: Catalog, rows: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Return every pair judged."""
    coefficients = catalog.coefficients("deepspeed")
    rates = rates_of(coefficients, A100)[0]
    factor = factor_of(BENCH_RELEASE)
    assert factor is not None
    width = math.hypot(factor.error_frac, rates["model_error_frac"])
    found = []
    for row in (dict(r) for r in rows):
        central, fastest, slowest = _vllm_s(catalog, row, factor)
        mii = mii_batch_s(catalog, row, rates)
        found.append(
            Judged(
                row=row,
                measured=math.log(row["mii_s"] / row["vllm_s"]),
                predicted=math.log(mii / central),
                low=math.log(mii / slowest) - width if slowest < math.inf else -math.inf,
                high=math.log(mii / fastest) + width,
                vllm_error=math.log(central / row["vllm_s"]),
                mii_error=math.log(mii / row["mii_s"]),
            )
        )
    return found


def _median(values: Sequence[float]) -> float:
    return float(np.median(np.abs(np.asarray(values))))


def main() -> None:
    """Print the verdicts, and each pair whose sign the central prediction misses."""
    found = judge(load_catalog(), read_rows(json.loads(GOLDEN.read_text()), "a100_40gb_pairs"))
    print(f"pairs {len(found)}, vLLM faster in {sum(j.measured > 0 for j in found)}")
    names = {VLLM: VLLM, MII: MII, "": "no winner"}
    print(f"{'we say':<12}" + "".join(f"{'measured ' + name:>20}" for name in names.values()))
    for ours, name in names.items():
        counts = [sum(j.predicted_winner == ours and j.measured_winner == theirs for j in found) for theirs in names]
        print(f"{name:<12}" + "".join(f"{n:>20}" for n in counts))
    named = [j for j in found if j.predicted_winner and j.measured_winner]
    print(
        f"both name a winner: {len(named)}, the same in {sum(j.predicted_winner == j.measured_winner for j in named)}"
    )
    print(f"measured ratio within our interval: {sum(j.is_covered for j in found)} of {len(found)}")
    print(f"sign of the central prediction alone: {sum(j.is_sign_right for j in found)} of {len(found)}")
    print(f"median error: vLLM {_median([j.vllm_error for j in found]):.1%}", end=", ")
    print(f"MII {_median([j.mii_error for j in found]):.1%}")
    for j in found:
        if not j.is_sign_right:
            r = j.row
            print(
                f"  {r['model']} tp {r['tp']} {r['tokens']} x {r['batch']}: measured {math.exp(j.measured):.2f},"
                f" predicted {math.exp(j.predicted):.2f} [{math.exp(j.low):.2f}, {math.exp(j.high):.2f}]"
                f" (vLLM {math.expm1(j.vllm_error):+.0%}, MII {math.expm1(j.mii_error):+.0%})"
            )


if __name__ == "__main__":
    main()
