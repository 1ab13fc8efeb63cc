"""Finds records that should not be trusted: noisy, throttled, contaminated, or at odds with themselves."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.errors import JobError
from calibration.records import Record, percentile

SEVERITIES = ("bad", "doubtful", "note")
NEEDED = ("schema", "run_id", "engine", "engine_version", "gpu", "n_gpus", "model", "hf_config", "measured")
BUSY_BYTES = 2.5e9  # a free GPU holds some 0.5 GB; more belongs to somebody
IDLE_LIMIT_FRAC = 0.2  # of the power limit: an H100 idles at 73 of 700 W, 25 % means that something runs
PAUSE_S, PAUSE_RATIO = 0.8, 6.0
"""A gap between two tokens that is longer, and so many times the 99th percentile, is no step of a serving engine: the
Triton kernels of experts take 1 to 2 s to compile at a batch size that they meet for the first time."""
LITTLE_TOLERANCE = 0.02
ENERGY_TOLERANCE = 0.1
REPEAT_TOLERANCE = 0.03
CLOCK_TOLERANCE = 0.97
MEMORY_TOLERANCE = 0.05
THROTTLED_BAD, THROTTLED_DOUBTFUL = 0.05, 0.01
LIMITER_S = 1.0
CONFIG = (
    "engine",
    "engine_version",
    "gpu",
    "n_gpus",
    "model",
    "tp",
    "pp",
    "dp",
    "weight_dtype",
    "kv_dtype",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "gpu_memory_utilization",
    "prefix_caching",
    "enforce_eager",
    "zero_stage",
    "offload",
    "mode",
    "client",
    "weight_bits",
    "kv_offload",
    "activation_checkpointing",
)
COMPARED: dict[str, Callable[[Record], float | None]] = {
    "requests_per_s": lambda m: m.get("requests_per_s"),
    "tpot_s.p50": lambda m: (m.get("tpot_s") or {}).get("p50"),
    "ttft_s.p50": lambda m: (m.get("ttft_s") or {}).get("p50"),
    "step_s": lambda m: m.get("step_s"),
    "decode_step_s": lambda m: m.get("decode_step_s"),
    "board_power_w.mean": lambda m: (m.get("board_power_w") or {}).get("mean"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one record."""

    severity: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.severity:8s} {self.where}: {self.what}"


def read(path: str) -> tuple[list[Record], list[Finding]]:
    """Return the records of a file and what is wrong with its lines. Raises JobError when it cannot be read."""
    records, findings = [], []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as err:
        raise JobError(f"cannot read '{path}': {err.strerror}") from None
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}:{number}"
        try:
            record = json.loads(line, parse_constant=lambda name: math.nan)
        except ValueError:
            findings.append(Finding("bad", where, "is not a JSON object (a torn line?)"))
            continue
        missing = [k for k in NEEDED if not isinstance(record, dict) or k not in record]
        if missing:
            findings.append(Finding("bad", where, f"lacks {', '.join(missing)}"))
        elif record["schema"] != 1:
            findings.append(Finding("bad", where, f"has schema {record['schema']!r}, this version reads 1"))
        else:
            records.append(record)
    return records, findings


def _name(record: Record) -> str:
    load, lengths = record.get("load") or {}, record.get("lengths") or {}
    size = [str(lengths[k]) for k in ("prompt_tokens", "prompt_tokens_mean") if k in lengths]
    size += [str(lengths[k]) for k in ("output_tokens", "output_tokens_mean") if k in lengths]
    how = [f"{k} {load[k]:g}" for k in ("concurrency", "arrivals_per_s", "batch_size") if k in load]
    steps = [f"m {record['n_microbatches']}"] if "n_microbatches" in record else []
    return " ".join([str(record["run_id"]), str(load.get("kind", "")), "/".join(size), *how, *steps]).replace("  ", " ")


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path, float(value)
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _numbers(v, f"{path}.{k}" if path else str(k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _numbers(v, f"{path}[{i}]")


def check_record(record: Record) -> list[Finding]:
    """Return what one record says against itself."""
    where, found = _name(record), []

    def add(severity: str, what: str) -> None:
        found.append(Finding(severity, where, what))

    m, n_gpus = record["measured"], record["n_gpus"]
    for path, value in _numbers(m):
        if not math.isfinite(value):
            add("bad", f"measured.{path} is not a number")
        elif value < 0 and "loss" not in path and "frac" not in path:
            add("bad", f"measured.{path} is negative ({value:g})")
    _check_power(record, m, n_gpus, add)
    _check_load(record, m, add)
    host = record.get("host") or {}
    busy = [b for b in host.get("before_used_bytes") or [] if b and b > BUSY_BYTES]
    if busy and record.get("client") != "http":  # what a live server holds is its own
        add("bad", f"another process held {max(busy) / 1e9:.1f} GB of a GPU before the start")
    if m.get("n_short_answers"):
        add("doubtful", f"{m['n_short_answers']} answers have another length than was asked")
    if m.get("is_finite") is False:
        add("doubtful", "the model's outputs are not finite: kernels may be faster or slower than on real data")
    if m.get("n_steps") is not None and m["n_steps"] < 3:
        add("doubtful", f"a median of {m['n_steps']} steps")
    if "step_p90_s" in m and m["step_p90_s"] > 1.3 * m["step_s"]:
        add("doubtful", f"noisy: 90th percentile of the step {m['step_p90_s'] / m['step_s']:.2f} x its median")
    return found


def _check_power(record: Record, m: Record, n_gpus: int, add: Any) -> None:
    power, limit, idle = m.get("board_power_w"), record.get("power_limit_w_per_gpu"), record.get("idle_power_w")
    if idle is not None and limit and idle > IDLE_LIMIT_FRAC * limit * n_gpus:
        add("doubtful", f"idle power of {idle / n_gpus:.0f} W a GPU: something else ran, or an engine had just ended")
    if not power:
        add("note", "no power was sampled")
        return
    if power.get("n_gpus", n_gpus) != n_gpus:
        add("bad", f"power of {power['n_gpus']} GPU(s), the engine has {n_gpus}")
    if limit and power["mean"] > 1.05 * limit * n_gpus:
        # the limiter takes a fraction of a second to act, so a short burst may lie above
        window_s = m.get("duration_s") or (m.get("energy_j") or 10 * power["mean"]) / power["mean"]
        is_short = window_s < LIMITER_S
        add(
            "note" if is_short else "bad", f"mean power {power['mean']:.0f} W above the limit of {limit * n_gpus:.0f} W"
        )
    if power.get("n_samples") is not None and power["n_samples"] < 10:
        add("note", f"only {power['n_samples']} power samples")
    duration, energy = m.get("duration_s"), m.get("energy_j")
    if duration and energy and duration > 2:
        ratio = energy / duration / power["mean"]
        # the one-second average of nvmlDeviceGetPowerUsage lags: there the energy counter is the better figure
        if abs(ratio - 1) > ENERGY_TOLERANCE and power.get("is_instant"):
            add("doubtful", f"the energy counter says {ratio:.2f} x the sampled power")
    throttled, clock = power.get("throttled_frac") or {}, power.get("sm_clock_mhz")
    for name in ("thermal", "hw_slowdown"):
        share = throttled.get(name, 0)
        if share:
            severity = "bad" if share > THROTTLED_BAD else "doubtful" if share > THROTTLED_DOUBTFUL else "note"
            add(severity, f"throttled ({name.replace('_', ' ')}) for {share:.0%} of the samples")
    top = (record.get("host") or {}).get("max_sm_clock_mhz")
    if clock and top and limit and clock < CLOCK_TOLERANCE * top and power["mean"] < 0.8 * limit * n_gpus:
        add("doubtful", f"SM clock {clock:.0f} of {top} MHz well below the power limit: clocks locked, or too hot")


def _check_load(record: Record, m: Record, add: Any) -> None:
    load = record.get("load") or {}
    rate, e2e = m.get("requests_per_s"), (m.get("e2e_s") or {}).get("mean")
    if load.get("kind") == "closed" and rate and e2e:
        inside = rate * e2e  # Little's law: mean number in the system, never above the clients
        if inside > load["concurrency"] * (1 + LITTLE_TOLERANCE):
            add("bad", f"{inside:.1f} requests in the system with {load['concurrency']} clients")
        if m.get("n_requests") not in (None, load["n_requests"]):
            add("bad", f"{m['n_requests']} of {load['n_requests']} requests ended")
    if load.get("kind") == "poisson" and rate and m.get("duration_s"):
        drain = m["duration_s"] / load["duration_s"]
        if drain > 1.5:
            add("note", f"overloaded: it took {drain:.1f} x the arrival time to end")
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        s = m.get(name)
        if s and not s["p50"] <= s["p90"] * (1 + 1e-9) <= s["p95"] * (1 + 2e-9) <= s["p99"] * (1 + 3e-9):
            add("bad", f"the percentiles of {name} are out of order")
    gap, longest = (m.get("itl_s") or {}).get("p99"), (m.get("itl_max_s") or {}).get("p99")
    if gap and longest and longest > PAUSE_S and longest > PAUSE_RATIO * gap:
        why = "kernels compiled during the cell (the engine's log says so), or the host was taken away"
        add(
            "doubtful",
            f"a pause of {longest:.1f} s between two tokens, {longest / gap:.0f} x the 99th percentile: {why}",
        )
    if m.get("duration_s") and m["duration_s"] < 0.5:
        add("note", f"the cell took {m['duration_s']:.2f} s only: its power means little")


def check_startup(record: Record) -> list[Finding]:
    """Return what the start-up figures of one engine start say against each other."""
    s, found = record.get("startup") or {}, []

    def add(severity: str, what: str) -> None:
        found.append(Finding(severity, str(record["run_id"]), what))

    blocks, size, tokens = s.get("n_kv_blocks"), s.get("kv_block_tokens"), s.get("kv_cache_tokens")
    # layers that see a window have block tables of their own: a token then takes several blocks
    has_windows = bool((record.get("hf_config") or {}).get("sliding_window"))
    if blocks and size and tokens and not has_windows and abs(tokens / (blocks * size) - 1) > 0.01:
        add("doubtful", f"{tokens} KV tokens, but {blocks} blocks of {size}")
    parts = [s.get(k) for k in ("weights_bytes", "peak_activation_bytes", "non_torch_bytes", "kv_cache_bytes")]
    total, share = s.get("device_memory_bytes"), record.get("gpu_memory_utilization")
    if all(parts) and total and share:
        used = sum(p for p in parts if p) + (s.get("cuda_graph_bytes") or 0)
        if abs(used / (share * total) - 1) > MEMORY_TOLERANCE:
            add("doubtful", f"its parts fill {used / total:.1%} of the memory, it was given {share:.0%}")
    held = s.get("device_used_bytes") or []
    if total and any(h > total * 1.02 for h in held):
        add("bad", "more memory in use than the device has")
    return found


def _key(record: Record) -> str:
    what = {
        k: record.get(k) for k in (*CONFIG, "load", "lengths", "n_microbatches", "micro_batch_size", "sequence_length")
    }
    said = record.get("cell")  # our runner says everything that it was asked for, `advisor verify` a name
    cell: Any = said
    if isinstance(said, dict):
        cell = {k: v for k, v in said.items() if k in ("shared_prefix_tokens", "n_prefixes")}
    load = what["load"] or {}
    if load.get("kind") == "poisson":  # a share of a measured saturation is never the same number twice
        what["load"] = load | {"arrivals_per_s": float(f"{load['arrivals_per_s']:.2g}")}
    return json.dumps([what, cell, record.get("gradient_accumulation_steps")], sort_keys=True)


def repeats(records: Iterable[Record]) -> list[tuple[str, bool, dict[str, float]]]:
    """Return for each repeated cell: its name, whether over several starts, and the spread of each figure.

    The spread is (highest - lowest) / mean.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[_key(record)].append(record)
    out = []
    for group in groups.values():
        if len(group) < 2:
            continue
        spreads = {}
        for name, pick in COMPARED.items():
            values = [v for r in group if (v := pick(r["measured"]))]
            if len(values) == len(group):
                spreads[name] = (max(values) - min(values)) / (sum(values) / len(values))
        out.append((_name(group[0]), len({r["run_id"] for r in group}) > 1, spreads))
    return out


def check_all(records: list[Record]) -> list[Finding]:
    """Return the findings of all records: each alone, each start, repeats, and order within a start."""
    found = [f for r in records for f in check_record(r)]
    starts = {str(r["run_id"]): r for r in records}
    found += [f for r in starts.values() for f in check_startup(r)]
    for name, is_across, spreads in repeats(records):
        for figure in ("requests_per_s", "tpot_s.p50", "step_s", "decode_step_s"):
            if spreads.get(figure, 0) > REPEAT_TOLERANCE * (2 if is_across else 1):
                where = "engine starts" if is_across else "the same start"
                found.append(
                    Finding("doubtful", name, f"drift: {figure} differs by {spreads[figure]:.1%} within {where}")
                )
    seen = set()
    for r in records:
        ident = (r["run_id"], r.get("cell_id"))
        if r.get("cell_id") and ident in seen:
            found.append(Finding("bad", _name(r), "is there twice"))
        seen.add(ident)
    return found


def noise_floor(records: list[Record]) -> list[str]:
    """Return lines with the median and 95th percentile of the spread of repeated cells, per figure."""
    lines = []
    for is_across, title in ((False, "within one start"), (True, "between starts")):
        chosen = [s for _, across, s in repeats(records) if across is is_across]
        for figure in COMPARED:
            values = [s[figure] for s in chosen if figure in s]
            if values:
                lines.append(
                    f"{title}: {figure} of {len(values)} repeated cells spreads by {percentile(values, 50):.1%} "
                    f"(median), {percentile(values, 95):.1%} (95 %)"
                )
    return lines
