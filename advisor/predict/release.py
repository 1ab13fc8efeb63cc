"""What a release of vLLM without engine runs costs more than the fitted one: host time that its GPU waits for.

The fitted release schedules asynchronously: the host prepares a step while the GPU runs the one before. Releases before
0.14 do not, so scheduling, input preparation and output processing come between two steps of the GPU: a time a step and
a time a running sequence, more of both in the V0 engine, whose workers also wait for a broadcast. V0's decode attention
(FlashAttention-2 or its own paged kernels, pages of 16 tokens) also takes a time a layer and cached token beyond the
bytes that it reads. All other kernels are taken as unchanged, which the held-out rows (other models, another card)
support within `error_frac`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from advisor.schema import Deployment, Gpu
from advisor.schema.engine import version_key


@dataclass(frozen=True)
class Range:
    """A value with its 90 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ReleaseFactor:
    """Host time of the releases from `first` to before `until` that the GPU waits for [s], and what it rests on.

    step_s : a step; tp_doubling_s : more for each doubling of the tensor-parallel degree; seq_s : a running sequence;
    context_s : of an H100, a layer and a cached token that decoding attends to, beyond the reads of the fitted release.
    error_frac : error of predictions with it on rows that it was not fitted on, 90th percentile.
    """

    era: str
    first: str
    until: str
    step_s: Range
    tp_doubling_s: Range
    seq_s: Range
    context_s: Range
    error_frac: float
    source: str

    def covers(self, version: str) -> bool:
        """Return whether `version` lies in this era."""
        return version_key(self.first) <= version_key(version) < version_key(self.until)


V0_NON_TORCH_BYTES = Range(1.75 * 2**30, 0.93 * 2**30, 3.58 * 2**30)
"""Memory that NCCL and the driver took of a GPU in V0 releases with tensor parallelism: start-up logs, 2 to 8 GPUs
(vllm-project/vllm#10511 and three stored logs: 0.93, 1.39, 2.1, 3.58 GiB), middle of the two inner ones."""

TIMES = ("step_s", "tp_doubling_s", "seq_s", "context_s")

FACTORS = (
    ReleaseFactor(
        era="V0 engine",
        first="0.4.0",
        until="0.8.0",
        step_s=Range(1.3e-3, 1.1e-3, 1.5e-3),
        tp_doubling_s=Range(0.631e-3, 0.493e-3, 0.769e-3),
        seq_s=Range(18.9e-6, 11.7e-6, 26.0e-6),
        context_s=Range(0.921e-9, 0.701e-9, 1.14e-9),
        error_frac=0.09,
        source="argonne-lcf/LLM-Inference-Bench @4211f5d4, H100: Llama-2-7B and Llama-3-8B (vLLM 0.5.4 to 0.6.2)",
    ),
    ReleaseFactor(
        era="V1 engine without asynchronous scheduling",
        first="0.8.0",
        until="0.14.0",
        step_s=Range(0.429e-3, 0.0, 0.884e-3),
        tp_doubling_s=Range(0.0, 0.0, 0.0),
        seq_s=Range(35.8e-6, 10.7e-6, 60.9e-6),
        context_s=Range(0.0, 0.0, 0.0),
        error_frac=0.05,
        source="ml-energy/leaderboard-v2 @c3af7f31, H100 rows of Qwen3-8B, Qwen3-14B and Llama-3.1-8B (vLLM 0.11.1)",
    ),
)
"""Made by advisor.fit.releases from data/golden/vllm_releases_public.json; a test makes them again."""


V1_FROM_CAPABILITY = (8, 0)
V0_LAST_FALLBACK = "0.11.0"
"""Releases before it run their old V0 engine on cards below compute capability 8.0 (data/engines/vllm.toml, 0.9.2)."""


def factor_of(version: str, compute_capability: str = "") -> ReleaseFactor | None:
    """Return the factor of a release on a card, None for those that schedule like the fitted one."""
    found = next((factor for factor in FACTORS if factor.covers(version)), None)
    is_old_card = bool(compute_capability) and version_key(compute_capability)[:2] < V1_FROM_CAPABILITY
    if found is not None and is_old_card and version_key(version) < version_key(V0_LAST_FALLBACK):
        return FACTORS[0]
    return found


def _factor(deployment: Deployment, gpu: Gpu) -> ReleaseFactor | None:
    if deployment.backend != "vllm":
        return None
    return factor_of(deployment.engine_version, gpu.compute_capability if gpu.vendor == "nvidia" else "")


def at_release(values: Mapping[str, float], deployment: Deployment, gpu: Gpu) -> dict[str, float]:
    """Return step coefficients for the deployment's release of vLLM: the fitted ones with its own host times.

    values : coefficient values by name, host_step_s and seq_s in seconds. Any engine but vLLM gets them unchanged.
    """
    factor = _factor(deployment, gpu)
    if factor is None:
        return dict(values)
    return with_times(values, deployment.tp, times_of(factor))


def times_of(factor: ReleaseFactor) -> dict[str, float]:
    """Return the central times of a factor by name [s], as `with_times` takes them."""
    return {name: getattr(factor, name).value for name in TIMES}


def with_times(values: Mapping[str, float], tp: int, times: Mapping[str, float]) -> dict[str, float]:
    """Return step coefficients with the host time of a step replaced, a sequence's and the context's added [s]."""
    return {
        **values,
        "host_step_s": host_step_s(tp, times["step_s"], times["tp_doubling_s"]),
        "seq_s": values["seq_s"] + times["seq_s"],
        "context_s": times["context_s"],
    }


def host_step_s(tp: int, step_s: float, tp_doubling_s: float) -> float:
    """Return the host time of a step at a tensor-parallel degree [s]."""
    return step_s + tp_doubling_s * math.log2(tp)


def release_rel(deployment: Deployment, gpu: Gpu) -> float:
    """Return the extra relative half-width of an interval for the deployment's release, 0 for the fitted way."""
    factor = _factor(deployment, gpu)
    return factor.error_frac if factor else 0.0


def release_text(deployment: Deployment, gpu: Gpu, fitted: str) -> str:
    """Return one sentence on what the deployment's release adds to the fitted one, empty when it adds nothing."""
    factor = _factor(deployment, gpu)
    if factor is None:
        return ""
    step_s = host_step_s(deployment.tp, factor.step_s.value, factor.tp_doubling_s.value)
    context = f", {factor.context_s.value * 1e9:.1f} ns a layer and cached token" if factor.context_s.value else ""
    return (
        f"vLLM {deployment.engine_version} was not run by us: {fitted} with {step_s * 1e3:.1f} ms of host a step and"
        f" {factor.seq_s.value * 1e3:.2f} ms a running sequence that its GPU waits for{context} ({factor.era};"
        f" published runs, +-{100 * factor.error_frac:.0f} % more)"
    )
