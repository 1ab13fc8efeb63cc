"""Is the direction of every published vLLM/DeepSpeed-MII pair right, each engine at the release that was measured?

``python -m benchmarks.vllm_deepspeed_pairs`` needs nothing but data/golden/vllm_releases_public.json: 156 pairs of one
bench with the same cards, model, batch and lengths. We name a winner where the joined interval of both predictions
leaves out a tie, and say "no winner" else, as `advisor compare` does. The bench names one where the two times differ by
more than repeats of one cell do; where they do not, there is no direction to be right about.

An interval joins what is not modelled: the error of old vLLM releases (H100 rows), MII's error on the pairs of all
*other* models (90th percentile), the bench's repeats, the memory that V0 lost with tensor parallelism (start-up logs),
and MII's first call, which the bench timed without a warm-up (twelve of the pairs).
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
from advisor.predict.release import V0_NON_TORCH_BYTES, Range, ReleaseFactor, factor_of, times_of
from advisor.predict.shapes import shapes_of
from advisor.predict.splitfuse import serve_splitfuse
from advisor.schema import Cluster, Deployment

Row = dict[str, Any]
GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden" / "vllm_releases_public.json"
BENCH_RELEASE = "0.6.2"
VLLM, MII = "vLLM", "MII"
NOISE_FRAC = 0.03
"""Worst difference between repeats of one cell of the bench."""
FIRST_CALL_S = Range(0.36, 0.0, 0.88)
"""What MII's first call takes on top: kernels loaded, workspaces made. Median and ends of what Llama-2-7B's twelve
shortest cells (128 tokens, TP 1, 2 and 4) take beyond the law of later calls; `first_call_s` makes it again."""
FIRST_CALL_MODEL, FIRST_CALL_TOKENS = "llama-2-7b", 128
COVERAGE = 0.9


@dataclass(frozen=True)
class Judged:
    """One pair: measured and predicted ln(MII time / vLLM time), and the predicted ends with both engines' errors.

    vllm_error, mii_error : ln(predicted / measured time)
    """

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
    host, lost = times_of(factor), V0_NON_TORCH_BYTES
    times = []
    for amount in (lost.value, lost.low, lost.high):
        try:
            times.append(batch_s(catalog, row, A100, host, lost_bytes=amount))
        except DomainError:
            times.append(math.inf)  # with so little room the model would not even start
    return times[0], min(times), max(times)


def first_call_s(rows: Sequence[Mapping[str, Any]], later_s: Sequence[float]) -> list[float]:
    """Return what the cells that say it take beyond the law of later calls [s], ascending.

    later_s : predicted time of each row without a first call [s]
    """
    return sorted(
        row["mii_s"] - later
        for row, later in zip(rows, later_s, strict=True)
        if row["model"] == FIRST_CALL_MODEL and row["tokens"] == FIRST_CALL_TOKENS
    )


def judge(catalog: Catalog, rows: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Return every pair judged."""
    rates = rates_of(catalog.coefficients("deepspeed"), A100)[0]
    factor = factor_of(BENCH_RELEASE)
    assert factor is not None
    every = [dict(r) for r in rows]
    later = [mii_batch_s(catalog, row, rates) for row in every]
    errors = [math.log((s + FIRST_CALL_S.value) / r["mii_s"]) for s, r in zip(later, every, strict=True)]
    found = []
    for row, later_s, mii_error in zip(every, later, errors, strict=True):
        central, fastest, slowest = _vllm_s(catalog, row, factor)
        mii, first, last = (later_s + s for s in (FIRST_CALL_S.value, FIRST_CALL_S.low, FIRST_CALL_S.high))
        others = [abs(e) for e, r in zip(errors, every, strict=True) if r["model"] != row["model"]]
        width = (factor.error_frac, math.log1p(NOISE_FRAC), float(np.quantile(others, COVERAGE)))
        predicted = math.log(mii / central)
        down = math.hypot(*width, math.log(slowest / central), math.log(mii / first))
        up = math.hypot(*width, math.log(central / fastest), math.log(last / mii))
        found.append(
            Judged(
                row=row,
                measured=math.log(row["mii_s"] / row["vllm_s"]),
                predicted=predicted,
                low=predicted - down,
                high=predicted + up,
                vllm_error=math.log(central / row["vllm_s"]),
                mii_error=mii_error,
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
