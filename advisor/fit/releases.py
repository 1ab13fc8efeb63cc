"""Release factors of vLLM from published times of old releases, on the card that our own runs used.

``python -m benchmarks.vllm_releases`` prints what they give for data/golden/vllm_releases_public.json: the constants of
advisor/predict/release.py with intervals, and the errors on rows that were not fitted on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from advisor.catalog import Catalog
from advisor.predict.release import TIMES, with_times
from advisor.predict.replica import replica_of
from advisor.predict.simulate import simulate
from advisor.predict.traffic import draw
from advisor.predict.transfer import transferred
from advisor.schema import ClosedLoad, Deployment, EngineFacts, FixedLengths, Gpu, Workload

Floats = NDArray[np.float64]
Raw = dict[str, Any]
SYNC_RELEASE = "0.9.2"
"""Facts of a release without asynchronous scheduling: one batch in flight."""
H100, A100 = "h100-sxm-80gb", "a100-sxm-40gb"
V0_TUNED = ("llama-2-7b", "llama-3-8b")
V1_TUNED = ("qwen3-8b", "qwen3-14b", "llama-3.1-8b")
V1_MAX_BATCH = 33.0
"""Above it a large share of the chat task's steps carries a prompt, of unknown length."""
PROMPT_TOKENS = 300.0
"""Assumed mean prompt of mlenergy's tasks, which are short questions; the answers (600 to 8,000) make the context."""
START = {"step_s": 1e-3, "seq_s": 5e-5, "tp_doubling_s": 5e-4, "context_s": 5e-10}


def read_rows(public: Raw, name: str) -> list[Raw]:
    """Return a table of data/golden/vllm_releases_public.json as one dict a row."""
    return [dict(zip(public[f"{name}_fields"], row, strict=True)) for row in public[name]]


def _values(catalog: Catalog, gpu: Gpu, tp: int, host: Mapping[str, float]) -> dict[str, float]:
    """Return step coefficients on a card with a release's times (`TIMES`)."""
    return with_times(transferred(catalog.coefficients("vllm"), gpu), tp, host)


def batch_s(
    catalog: Catalog,
    row: Raw,
    gpu_name: str,
    host: Mapping[str, float],
    *,
    lost_bytes: float = 0.0,
) -> float:
    """Return the time [s] in which V0 serves one batch: `row` has model, tp, tokens (in = out) and batch.

    host : the release's `TIMES`; lost_bytes : memory that V0 lacks for its cache with
    tensor parallelism. V0 puts whole prompts into a step of at most the model's context.
    """
    model, gpu = catalog.model(row["model"])[0], catalog.gpu(gpu_name)
    lost = lost_bytes if row["tp"] > 1 else 0.0
    deployment = Deployment(
        model=model.name,
        gpu=gpu.name,
        tp=row["tp"],
        max_model_len=min(model.max_context_tokens, max(2 * row["tokens"], 4096)),
        max_num_batched_tokens=max(min(model.max_context_tokens, 8192), 2048),
        engine_version=SYNC_RELEASE,
        gpu_memory_utilization=0.9 - lost / gpu.device_memory_bytes,
    )
    values = _values(catalog, gpu, row["tp"], host)
    facts = EngineFacts.from_table(catalog.engine("vllm"), SYNC_RELEASE)
    workload = Workload(
        name="one batch",
        lengths=FixedLengths(prompt_tokens=row["tokens"], output_tokens=row["tokens"]),
        load=ClosedLoad(concurrency=row["batch"], n_requests=row["batch"]),
    )
    replica = replica_of(model, gpu, deployment, values, facts)
    traffic = draw(workload, 0, prefix_caching=False, block_tokens=deployment.kv_block_tokens)
    return simulate(list(replica.stages), replica.limits, traffic, replica.client).duration_s


def token_gap_s(catalog: Catalog, row: Raw, host: Mapping[str, float]) -> float:
    """Return the decode step [s] of a row of the V1 table on an H100, its context half answered."""
    model, gpu = catalog.model(row["model"])[0], catalog.gpu(H100)
    n = float(math.ceil(row["batch"]))
    deployment = Deployment(
        model=model.name, gpu=gpu.name, tp=row["tp"], max_model_len=8192, engine_version=SYNC_RELEASE
    )
    values = _values(catalog, gpu, row["tp"], host)
    stage = replica_of(model, gpu, deployment, values).stages[0]
    context = n * (PROMPT_TOKENS + row["output_tokens"] / 2)
    return float(stage.seconds(0.0, 0.0, n, context, n) + stage.host_s(0.0, n, n))


def _solved(
    errors: Callable[[Mapping[str, float]], Sequence[float]], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, float], float]:
    """Return times, the half-widths of their 90 % intervals and the median absolute error of the fitted rows."""
    zero = dict.fromkeys(TIMES, 0.0)

    def residuals(x: Floats) -> Floats:
        return np.asarray(errors(zero | dict(zip(names, (float(v) for v in x), strict=True))))

    start = np.array([START[name] for name in names])
    fit = least_squares(residuals, start, x_scale=start, diff_step=0.05, loss="soft_l1", f_scale=0.1)
    freedom = len(fit.fun) - len(names)
    covariance = np.linalg.inv(fit.jac.T @ fit.jac) * float(np.sum(fit.fun**2)) / freedom
    half = 1.7 * np.sqrt(np.diag(covariance))
    found = zero | dict(zip(names, (float(v) for v in fit.x), strict=True))
    widths = zero | dict(zip(names, (float(v) for v in half), strict=True))
    return found, widths, float(np.median(np.abs(fit.fun)))


def v0_factor(catalog: Catalog, public: Raw) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return V0's host times [s], their half-widths and the median and held-out P90 error of its rows."""
    every = read_rows(public, "h100_v0")
    tuned = [r for r in every if r["model"] in V0_TUNED]

    def errors(rows: Sequence[Raw], host: Mapping[str, float]) -> list[float]:
        return [math.log(batch_s(catalog, r, H100, host) / r["latency_s"]) for r in rows]

    host, widths, inside = _solved(lambda h: errors(tuned, h), TIMES)
    held = np.abs(errors([r for r in every if r["model"] not in V0_TUNED], host))
    report = {"tuned": inside, "held out": float(np.median(held)), "held out P90": float(np.quantile(held, 0.9))}
    return host, widths, report


def v1_factor(catalog: Catalog, public: Raw) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Return synchronous V1's host times [s], their half-widths and the errors by kind of row."""
    every = [r for r in read_rows(public, "h100_v1_sync") if r["batch"] <= V1_MAX_BATCH]
    tuned = [r for r in every if r["model"] in V1_TUNED]

    def errors(rows: Sequence[Raw], host: Mapping[str, float]) -> list[float]:
        return [math.log(token_gap_s(catalog, r, host) / (r["itl_ms"] * 1e-3)) for r in rows]

    host, widths, inside = _solved(lambda h: errors(tuned, h), ("step_s", "seq_s"))
    held = np.abs(errors([r for r in every if r["model"] not in V1_TUNED], host))
    report = {"tuned": inside, "held out": float(np.median(held)), "held out P90": float(np.quantile(held, 0.9))}
    return host, widths, report
