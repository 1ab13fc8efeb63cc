"""Judges of published figures: each finds the deciding numbers for one kind of quantity."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from advisor.predict.deepspeed_step import half_peak_flops_per_s, weight_bytes_of
from advisor.predict.shapes import BYTES_PER_WEIGHT, Shapes, shapes_of
from advisor.recommend.audit_search import USUAL_OUTPUT, Auditor, Scenario
from advisor.schema import Cluster, Interval
from advisor.schema.claims import FigureClaim, Finding, Setup, Verdict
from advisor.units import format_bytes, format_rate, format_s, format_w

LATENCIES = {
    "e2e_p99_s": "end to end",
    "ttft_p99_s": "time to first token",
    "tpot_p99_s": "time per output token",
}
"""What a claimed latency can mean, the plain meaning first."""
MEANINGS = {name.split("_")[0]: meaning for name, meaning in LATENCIES.items()}
POWER_MARGIN = 1.05
"""Board power may exceed its limit for milliseconds; means do not by more than the meter's 5 % error."""


def _format(quantity: str, value: float) -> str:
    if quantity.endswith("_frac"):
        return f"{100 * value:.0f} %"
    if quantity.endswith("_bytes_per_gpu"):
        return format_bytes(value)
    if quantity.startswith("board_power"):
        return format_w(value)
    if quantity.endswith("requests_per_s"):
        return format_rate(value, "requests")
    return format_rate(value, "tokens") if quantity.endswith("tokens_per_s") else format_s(value)


def claimed_interval(claim: FigureClaim) -> Interval:
    """Return the claimed figure with its stated tolerance or range."""
    high = claim.high if claim.high is not None else claim.value
    return Interval(value=claim.value, low=claim.value - claim.tolerance, high=high + claim.tolerance)


def finding(
    claim: FigureClaim, verdict: str, why: str, source: str, ours: Interval | None, scenario: str = ""
) -> Finding:
    """Return the finding of one figure."""
    return Finding(
        id=claim.id,
        text=claim.text,
        verdict=verdict,
        why=why,
        claimed=claimed_interval(claim),
        ours=ours,
        quantity=claim.quantity,
        scenario=scenario,
        source=source,
    )


def fastest_s(shapes: Shapes, cluster: Cluster, weight_dtype: str, prompt_tokens: int, output_tokens: int) -> float:
    """Return a bound that no engine beats: prompt FLOPs at peak, then one pass over the weights a token, all GPUs."""
    n, gpu = cluster.n_gpus, cluster.gpu
    prefill = 2 * shapes.n_active_params * prompt_tokens / (half_peak_flops_per_s(gpu) * n)
    share = shapes.n_active_params / max(shapes.n_params, 1) if shapes.all_expert_params else 1.0
    weights = shapes.n_params * BYTES_PER_WEIGHT[weight_dtype] * share
    return prefill + (output_tokens - 1) * weights / (gpu.memory_bandwidth_bytes_per_s * n)


def readings_of(claim: FigureClaim) -> tuple[str, ...]:
    """Return the quantities that a claimed latency may be, the plain reading first."""
    return tuple(LATENCIES) if claim.quantity == "latency_p99_s" else (claim.quantity,)


def _unpredicted(fault: str) -> str:
    return f"we predict no plan of it: {fault}" if fault else "we predict no plan of it"


def _judge_latency(auditor: Auditor, claim: FigureClaim, setup: Setup) -> Finding:
    model, _, cluster = auditor.hardware(setup)
    shapes, claimed = shapes_of(model), claimed_interval(claim)
    readings = readings_of(claim)
    per_token = fastest_s(shapes, cluster, setup.weight_dtype, 0, 2)
    most_tokens = 1 + int(claimed.high / per_token)
    bound = (
        f"even at full memory bandwidth {cluster.n_gpus} x {cluster.gpu.label} need {format_s(per_token)} a token,"
        f" so {format_s(claimed.high)} end to end leaves at most {most_tokens} output tokens"
    )
    law = "roofline bound: weight bytes over memory bandwidth"
    if claimed.high < (per_token if claim.quantity.startswith(("e2e", "latency")) else 0.0):
        return finding(claim, "impossible", bound, law, None)
    # one output token has no time per output token; a closed form brings fewer percentiles than a replay
    scenarios = [s for s in auditor.scenarios(setup) if readings[0] in s.prediction.quantities]
    if not scenarios:
        verdict: Verdict = (
            "implausible" if most_tokens < USUAL_OUTPUT and readings[0].startswith("e2e") else "undecided"
        )
        fault = auditor.fault(setup)
        if fault and setup.backend in (None, "vllm"):
            where = "parameter count x bytes of the format; datasheet"
            return finding(claim, "impossible", f"{fault}, so nothing runs without weights from the host", where, None)
        return finding(claim, verdict, f"{bound}; {_unpredicted(fault)}", law, None)
    fits: dict[str, list[Scenario]] = {}
    for reading in readings:
        for s in scenarios:
            found_one = s.prediction.quantities.get(reading)
            if found_one and found_one.low <= claimed.high and found_one.high >= claimed.low:
                fits.setdefault(reading, []).append(s)
    names = MEANINGS
    usual = {r: [s for s in found if s.is_usual] for r, found in fits.items()}
    least = min((s for s in scenarios if s.is_usual), key=lambda s: s.prediction[readings[0]], default=scenarios[0])
    ours = least.prediction.quantities[readings[0]]
    shown = f"at {least} we find at least {format_s(ours.value)} ({names[readings[0].split('_')[0]]})"
    source = "serving model of this project with its 90 % intervals"
    ordinary = [s for s in scenarios if s.is_usual]
    # a latency rises with the clients: what lies between two numbers of them holds for one in between
    gaps = {r: pair for r in readings if not usual.get(r) and (pair := _between(r, claimed, ordinary))}
    places = {r: str(found[0]) for r, found in usual.items() if found}
    places |= {r: f"{few}, up to {many.clients} clients" for r, (few, many) in gaps.items()}
    first = readings[0]
    if first in places:
        held = usual[first][0] if usual.get(first) else gaps[first][0]
        return finding(claim, "consistent", shown, source, held.prediction.quantities[first], places[first])
    others = [r for r in readings[1:] if r in places]
    if others:
        meanings = [names[r.split("_")[0]] for r in others]
        why = f"{bound}; {shown}. It can hold as {' or '.join(meanings)} only"
        return finding(claim, "implausible", why, source, ours, f"as {meanings[0]}: {places[others[0]]}")
    if fits:
        reading, found = next(iter(fits.items()))
        meaning = names[reading.split("_")[0]]
        why = f"{shown}; only unusually short requests match"
        return finding(claim, "implausible", why, source, ours, f"as {meaning}: {found[0]}")
    below = claimed.high < min(
        s.prediction.quantities[r].low for s in scenarios for r in readings if r in s.prediction.quantities
    )
    verdict = "impossible" if below else "implausible"
    return finding(claim, verdict, f"{shown}; no length or load that we searched matches", source, ours)


def _between(quantity: str, claimed: Interval, scenarios: list[Scenario]) -> tuple[Scenario, Scenario] | None:
    """Return two scenarios of one plan and the same lengths, one with more clients, and the claim between them."""
    alike: dict[object, list[Scenario]] = {}
    for x in sorted(scenarios, key=lambda x: x.clients):
        plan = x.deployment.model_copy(update={"max_num_seqs": 1})
        alike.setdefault((x.prompt_tokens, x.output_tokens, plan), []).append(x)
    for some in alike.values():
        for few, many in pairwise(some):
            found = [x.prediction.quantities.get(quantity) for x in (few, many)]
            if found[0] and found[1] and found[0].high < claimed.low <= found[1].high:
                return few, many
    return None


def _judge_rate(auditor: Auditor, claim: FigureClaim, setup: Setup) -> Finding:
    claimed = claimed_interval(claim)
    scenarios = auditor.scenarios(setup)
    model, _, cluster = auditor.hardware(setup)
    s = shapes_of(model)
    ceiling = half_peak_flops_per_s(cluster.gpu) * cluster.n_gpus / (2 * s.n_active_params)
    tokens = claimed.low if "tokens" in claim.quantity else claimed.low * 2
    law = "roofline bound: 2 operations a parameter and token"
    if tokens > ceiling:
        why = f"{cluster.n_gpus} x {cluster.gpu.label} cannot compute more than {format_rate(ceiling, 'tokens')}"
        return finding(claim, "impossible", why, law, None)
    if not scenarios:
        fault = auditor.fault(setup)
        if fault and setup.backend in (None, "vllm"):
            where = "parameter count x bytes of the format; datasheet"
            return finding(claim, "impossible", f"{fault}, so nothing runs without weights from the host", where, None)
        most = ceiling / max(claimed.value, 1e-300)
        why = (
            f"peak arithmetic allows {most:.3g} tokens (prompt and output) a request at this rate; lengths are not said"
        )
        return finding(claim, "undecided", f"{why}; {_unpredicted(fault)}", law, None)
    if claimed.low > max(x.prediction.quantities[claim.quantity].high for x in scenarios):
        scenarios = [*scenarios, *auditor.crowded(setup, claim.quantity)]
    fitting = [
        x
        for x in scenarios
        if x.prediction.quantities[claim.quantity].low <= claimed.high
        and x.prediction.quantities[claim.quantity].high >= claimed.low
    ]
    best = max((x for x in scenarios if x.is_usual), key=lambda x: x.prediction[claim.quantity], default=scenarios[0])
    ours = best.prediction.quantities[claim.quantity]
    shown = f"at most {_format(claim.quantity, ours.value)} at {best}"
    source = "serving model of this project with its 90 % intervals"
    usual = [x for x in fitting if x.is_usual]
    if usual:
        x = min(usual, key=lambda x: abs(x.prediction[claim.quantity] - claim.value))
        return finding(claim, "consistent", shown, source, x.prediction.quantities[claim.quantity], str(x))
    between = _between(claim.quantity, claimed, [x for x in scenarios if x.is_usual])
    if between is not None:
        few, many = between
        low, high = (x.prediction.quantities[claim.quantity] for x in between)
        ours = Interval(value=0.5 * (low.value + high.value), low=low.low, high=high.high)
        why = f"{_format(claim.quantity, low.value)} at {few}, {_format(claim.quantity, high.value)} at {many.clients}"
        return finding(claim, "consistent", why, source, ours, f"{few}, up to {many.clients} clients")
    if fitting:
        x = min(fitting, key=lambda x: abs(x.prediction[claim.quantity] - claim.value))
        why = f"{shown}; only short requests reach the claim"
        return finding(claim, "implausible", why, source, ours, str(x))
    if claimed.low > max(x.prediction.quantities[claim.quantity].high for x in scenarios):
        return finding(claim, "impossible", f"{shown}, and no searched length or load reaches the claim", source, ours)
    return finding(claim, "implausible", f"{shown}; a higher load would give more than the claim", source, ours)


def _judge_memory(auditor: Auditor, claim: FigureClaim, setup: Setup) -> Finding:
    model, gpu, cluster = auditor.hardware(setup)
    claimed, s = claimed_interval(claim), shapes_of(model)
    device = gpu.device_memory_bytes
    least = s.n_params * BYTES_PER_WEIGHT[setup.weight_dtype] / cluster.n_gpus
    if claimed.low > device:
        why = f"{gpu.label} has {format_bytes(device)}"
        return finding(claim, "impossible", why, f"datasheet of {gpu.label}", None)
    if claimed.high < least:
        why = f"the weights alone take {format_bytes(least)} a GPU on {cluster.n_gpus}"
        return finding(claim, "impossible", why, "parameter count x bytes of the format", None)
    if setup.backend in (None, "vllm"):
        share = claimed.value / device
        ours = Interval(value=0.9 * device, low=least, high=device)
        token = s.kv_elements_per_token_layer * s.n_layers * 2 / min(cluster.n_gpus, s.n_kv_heads)
        room = (claimed.value - least) / token
        why = (
            f"vLLM takes gpu_memory_utilization x {format_bytes(device)} whatever the load"
            f" ({format_bytes(0.9 * device)} by default), so the figure is a setting of {share:.2f};"
            f" of it {format_bytes(least)} are weights"
        )
        scenario = f"gpu_memory_utilization {share:.2f}: weights and a cache of {room:,.0f} tokens"
        return finding(claim, "consistent", why, "vLLM: cache fills what the setting leaves", ours, scenario)
    fitting = []
    nearest: tuple[float, Scenario] | None = None
    for x in auditor.scenarios(setup):
        ours = x.prediction.quantities["memory_bytes_per_gpu"]
        if ours.low <= claimed.high and ours.high >= claimed.low:
            fitting.append(x)
        gap = abs(math.log(ours.value / claimed.value))
        if nearest is None or gap < nearest[0]:
            nearest = (gap, x)
    source = "memory law of this project (predict/deepspeed_paths.py)"
    if nearest is None:
        return finding(claim, "impossible", "no plan of this backend fits these GPUs", source, None)
    x = next((f for f in fitting if f.is_usual), fitting[0] if fitting else nearest[1])
    ours = x.prediction.quantities["memory_bytes_per_gpu"]
    why = f"weights take {format_bytes(least)} a GPU; with {x} we find {format_bytes(ours.value)}"
    verdict = "consistent" if any(f.is_usual for f in fitting) else "implausible"
    return finding(claim, verdict, why, source, ours, str(x) if fitting else "")


def _judge_power(auditor: Auditor, claim: FigureClaim, setup: Setup) -> Finding:
    _, gpu, cluster = auditor.hardware(setup)
    n = 1 if claim.quantity.endswith("per_gpu") else cluster.n_gpus
    claimed = claimed_interval(claim)
    low, high = gpu.idle_power_w * n, gpu.board_power_w * n
    ours = Interval(value=0.5 * (low + high), low=low, high=high)
    source = f"datasheet of {gpu.label}: limit {format_w(gpu.board_power_w)}, idle {format_w(gpu.idle_power_w)}"
    if claimed.low > high * POWER_MARGIN or claimed.high < low:
        why = f"{n} boards draw between {format_w(low)} and {format_w(high)}"
        return finding(claim, "impossible", why, source, ours)
    predicted = [x.prediction.quantities.get("board_power_w") for x in auditor.scenarios(setup)]
    scale = n / cluster.n_gpus
    known = [p for p in predicted if p is not None]
    if known:
        ours = Interval(
            value=max(p.value for p in known) * scale,
            low=min(p.low for p in known) * scale,
            high=max(p.high for p in known) * scale,
        )
        if not ours.low <= claimed.high or not claimed.low <= ours.high:
            why = f"over all searched loads we find {format_w(ours.low)} to {format_w(ours.high)}"
            return finding(claim, "implausible", why, f"power law of this project; {source}", ours)
    share = (claimed.value / n - gpu.idle_power_w) / (gpu.board_power_w - gpu.idle_power_w)
    why = f"{format_w(claimed.value / n)} a board is {share:.0%} of the way from idle to the limit"
    return finding(claim, "consistent", why, source, ours)


def _judge_utilization(auditor: Auditor, claim: FigureClaim, setup: Setup) -> Finding:
    _, gpu, _ = auditor.hardware(setup)
    claimed = claimed_interval(claim)
    ours = Interval(value=0.9, low=0.0, high=1.0)
    source = f"datasheet of {gpu.label}"
    if claimed.low > 1:
        return finding(claim, "impossible", "a share of the memory cannot exceed 1", source, ours)
    device = gpu.device_memory_bytes
    why = f"{claimed.value:.0%} of {format_bytes(device)} is {format_bytes(claimed.value * device)}"
    if claimed.value > 0.97:
        why += "; the driver, CUDA context and allocator slack need 2 to 3 %: one larger batch runs out of memory"
        return finding(claim, "implausible", why, source, ours)
    return finding(claim, "consistent", why, source, ours)


def _judge_saving(auditor: Auditor, claim: FigureClaim, setup: Setup) -> Finding:
    model, _, _ = auditor.hardware(setup)
    claimed, weights = claimed_interval(claim), weight_bytes_of(shapes_of(model), "fp16")
    # paging wastes under 4 % of the cache where contiguous allocation wastes 60 to 80 % (arXiv:2309.06180, figure 2)
    ours = Interval(value=0.0, low=0.0, high=0.8)
    if claimed.value < 0.8:
        least = format_bytes(weights * claimed.value / (0.8 - claimed.value))
        needs = f"a total saving of {claimed.value:.0%} needs a cache of at least {least} before"
    else:
        needs = f"a total saving of {claimed.value:.0%} is more than all waste"
    why = (
        f"paging saves cache, not the {format_bytes(weights)} of weights: it turns 60 to 80 % waste of the cache into"
        f" under 4 %, so {needs}"
    )
    verdict: Verdict = "consistent" if claimed.high < 0.8 else "impossible"
    return finding(claim, verdict, why, "arXiv:2309.06180, section 1 and figure 2", ours)


LATENCY_QUANTITIES = ("ttft_p50_s", "ttft_p99_s", "tpot_p50_s", "tpot_p99_s", "e2e_p50_s", "e2e_p99_s", "latency_p99_s")

JUDGES: dict[str, Callable[[Auditor, FigureClaim, Setup], Finding]] = {
    "requests_per_s": _judge_rate,
    "output_tokens_per_s": _judge_rate,
    "memory_bytes_per_gpu": _judge_memory,
    "memory_utilization_frac": _judge_utilization,
    "memory_saving_frac": _judge_saving,
    "board_power_w": _judge_power,
    "board_power_w_per_gpu": _judge_power,
    **dict.fromkeys(LATENCY_QUANTITIES, _judge_latency),
}
