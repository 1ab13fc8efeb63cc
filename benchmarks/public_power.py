"""Error of the power law on public tables: ``python -m benchmarks.public_power FOLDER [--golden OUT.json]``.

FOLDER holds the reader's own copies of `argonne_power.csv` (argonne-lcf/LLM-Inference-Bench), `mlenergy_v3.csv`
(ml-energy/leaderboard-v2) and `splitwise_perf_model.csv` (Mutinifni/splitwise-sim); a missing file is skipped.
Each row's activity is exact arithmetic on its model, its lengths and its *measured* time, so only power is tested.
`--golden` writes the few rows of each table that data/golden/power_public.json keeps (see `KEPT`).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from advisor.catalog import load_catalog
from advisor.errors import AdvisorError
from advisor.predict.engine import Work
from advisor.predict.shapes import shapes_of
from advisor.predict.spend import Activity, activity_of, power_parts
from advisor.predict.step import step_cost
from advisor.schema import CoefficientSet, Deployment, Gpu

ARGONNE_IDLE_S = 2.0
"""Idle seconds that Argonne's sampling window includes (README of the repository)."""

CHAT_PROMPT_TOKENS = 400
"""Assumed prompt of ML.ENERGY's text tasks, which the table leaves out; see docs/power.md for what that does."""

BYTE_RATES = ("bytes_per_s", "cache_bytes_per_s", "link_bytes_per_s")
SOURCES = {
    "argonne": "argonne-lcf/LLM-Inference-Bench @4211f5d4, Plots/Fig_16_a_b (BSD-3-Clause)",
    "mlenergy": "ml-energy/leaderboard-v2 @c3af7f31 (Apache-2.0)",
    "splitwise": "Mutinifni/splitwise-sim @8f99e7dc (MIT)",
}
KEPT = (
    # table, card, words of a row's name, every n-th row: what the fit of data/fitted/power.json may see
    ("argonne", "a100-sxm-40gb", ("vLLM", "TensorRT"), 1),
    ("argonne", "h100-sxm-80gb", ("vLLM",), 1),
    ("splitwise", "a100-sxm-80gb", ("",), 3),
    ("mlenergy", "h100-sxm-80gb", ("gpqa",), 2),
    ("mlenergy", "b200-sxm-180gb", ("",), 4),
)


@dataclass(frozen=True)
class Row:
    """One published measurement: what a GPU did and the watts it drew."""

    table: str
    name: str
    gpu: Gpu
    kind: str
    activity: Activity
    watts: float
    idle_share: float = 0.0

    def predicted_w(self, coefficients: CoefficientSet) -> float:
        total = float(power_parts(self.activity, self.gpu, coefficients)["total"])
        return total * (1 - self.idle_share) + self.gpu.idle_power_w * self.idle_share


def activity(model: str, gpu: Gpu, weight_dtype: str, tp: int, dp: int, work: Work, duration_s: float) -> Activity:
    """The activity of one GPU. Efficiencies do not matter for the amount of work, so all of them are 1."""
    found = load_catalog().model(model)[0]
    plan = Deployment(model=found.name, gpu=gpu.name, tp=tp, dp=dp, weight_dtype=weight_dtype)
    stage = step_cost(shapes_of(found), gpu, plan, defaultdict(lambda: 1.0))
    return activity_of([stage], work, duration_s, weight_dtype, n_replicas=dp)


def batch_work(batch: int, prompt: int, output: int, n_at_once: float, chunk: int = 2048) -> Work:
    """One static batch: all prompts, then steps of at most `n_at_once` sequences."""
    waves = max(1.0, batch / n_at_once)
    return Work(
        n_steps=(output - 1) * waves + math.ceil(batch * prompt / chunk),
        tokens=float(batch * (prompt + output)),
        pairs=batch * prompt * prompt / 2,
        context_tokens=batch * output * (prompt + output / 2),
        sampled=float(batch * output),
    )


def argonne(path: Path) -> Iterator[Row]:
    gpus = {"A100": "a100-sxm-40gb", "H100": "h100-sxm-80gb", "GH20": "gh200-96gb"}
    for row in csv.DictReader(path.open()):
        if row["backend"] == "TensorRT-LLM" and row["gpu"].startswith("H100"):
            continue  # flat near 449 W: a lower limit than the board's was set
        gpu = load_catalog().gpu(gpus[row["gpu"][:4]])
        shapes = shapes_of(load_catalog().model(row["model"])[0])
        prompt, output, batch = int(row["isl"]), int(row["osl"]), int(row["batch_size"])
        per_token = 2 * shapes.kv_elements_per_token_layer * shapes.n_layers
        room = (0.9 * gpu.device_memory_bytes - 2 * shapes.n_params - 1e9) / per_token / (prompt + output)
        seconds = float(row["latency_s"])
        done = activity(row["model"], gpu, "bf16", 1, 1, batch_work(batch, prompt, output, room), seconds)
        idle = ARGONNE_IDLE_S / (seconds + ARGONNE_IDLE_S)
        name = f"{row['backend']} {row['model'].split('/')[-1]} batch {batch}"
        yield Row("argonne", name, gpu, row["backend"], done, float(row["avg_power_w"]), idle)


def mlenergy(path: Path) -> Iterator[Row]:
    gpus = {"H100": "h100-sxm-80gb", "B200": "b200-sxm-180gb"}
    for row in csv.DictReader(path.open()):
        is_known = row["weight_precision"] in ("bfloat16", "fp8") and row["ep"] in ("", "1")
        if row["task"] not in ("gpqa", "lm-arena-chat") or "Mamba" in row["architecture"] or not is_known:
            continue
        try:
            load_catalog().model(row["model"])
        except AdvisorError:
            continue
        rate, batch, output = (float(row[k]) for k in ("output_tput_tok_s", "avg_batch_size", "avg_output_len"))
        tp, dp = int(row["tp"]), int(row["dp"])
        prefill = rate / output * CHAT_PROMPT_TOKENS
        work = Work(
            n_steps=rate / batch * dp,
            tokens=rate + prefill,
            pairs=prefill * CHAT_PROMPT_TOKENS / 2,
            context_tokens=rate * (CHAT_PROMPT_TOKENS + output / 2),
            sampled=rate,
        )
        gpu = load_catalog().gpu(gpus[row["gpu"]])
        dtype = "bf16" if row["weight_precision"] == "bfloat16" else "fp8"
        kind = f"{row['architecture'].split()[0]} {dtype}"
        done = activity(row["model"], gpu, dtype, tp, dp, work, 1.0)
        name = f"{row['model'].split('/')[-1]} {row['task']} tp{tp} batch {batch:.0f}"
        yield Row("mlenergy", name, gpu, kind, done, float(row["avg_power_w_per_gpu"]))


def splitwise(path: Path) -> Iterator[Row]:
    gpu = load_catalog().gpu("a100-sxm-80gb")
    seen = set()
    for row in csv.DictReader(path.open()):
        key = (row["model"], row["tensor_parallel"], row["batch_size"], row["prompt_size"])
        fraction = float(row["average_power_frac"] or 0)
        prompt, output, batch = int(row["prompt_size"]), int(row["token_size"]), int(row["batch_size"])
        # prompts of 8192 tokens: the power trace (0.17 TDP) does not belong to the timed run
        if not row["hardware"].startswith("a100") or fraction <= 0 or prompt > 4096 or key in seen:
            continue
        seen.add(key)
        model = {"llama2-70b": "llama-2-70b", "bloom-176b": "bloom-176b"}[row["model"]]
        tp = int(row["tensor_parallel"])
        work = batch_work(batch, prompt, output, batch, chunk=10**9)
        done = activity(model, gpu, "bf16", tp, 1, work, float(row["e2e_time_ms"]) / 1e3)
        name = f"{model} tp{tp} {prompt}+{output} batch {batch}"
        yield Row("splitwise", name, gpu, model, done, fraction * gpu.board_power_w)


READERS = {"argonne_power.csv": argonne, "mlenergy_v3.csv": mlenergy, "splitwise_perf_model.csv": splitwise}


def read(folder: Path) -> list[Row]:
    return [row for name, reader in READERS.items() if (folder / name).is_file() for row in reader(folder / name)]


def golden(rows: list[Row]) -> list[dict[str, object]]:
    """Every n-th row of what the fit needs, as rates with their source."""
    out: list[dict[str, object]] = []
    for name, card, words, stride in KEPT:
        found = [r for r in rows if r.table == name and r.gpu.name == card and any(w in r.name for w in words)]
        for row in found[::stride]:
            done = row.activity
            rates = {kind: _short(rate) for kind, rate in done.flops_per_s.items() if rate}
            entry: dict[str, object] = {"gpu": card, "row": row.name, "watts": round(row.watts, 1)}
            entry |= {"idle_share": round(row.idle_share, 4), "flops_per_s": rates}
            entry |= {field: _short(getattr(done, field)) for field in BYTE_RATES}
            out.append(entry | {"source": SOURCES[name]})
    return out


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def table(rows: list[Row], coefficients: CoefficientSet, show_rows: bool) -> None:
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        error = row.predicted_w(coefficients) / row.watts - 1
        groups.setdefault((row.table, row.gpu.name, row.kind), []).append(error)
        groups.setdefault((row.table, row.gpu.name, "all"), []).append(error)
        if show_rows:
            print(f"{row.gpu.name:16s} {row.name:60s} {row.watts:6.0f} W {100 * error:+6.1f} %")
    print(f"{'table':10s} {'card':16s} {'rows of':22s}    n  median |error|     bias  within 10 %")
    for (name, card, kind), errors in sorted(groups.items()):
        size = [abs(e) for e in errors]
        within = sum(e <= 0.1 for e in size) / len(size)
        print(
            f"{name:10s} {card:16s} {kind:22s} {len(size):4d} {100 * median(size):13.1f} % "
            f"{100 * mean(errors):+6.1f} % {100 * within:10.0f} %"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--golden", type=Path, help="write the rows that the fit keeps")
    parser.add_argument("--rows", action="store_true", help="print every row")
    options = parser.parse_args()
    rows = read(options.folder)
    if not rows:
        parser.error(f"{options.folder} holds none of {', '.join(READERS)}")
    if options.golden:
        text = ",\n".join(json.dumps(entry) for entry in golden(rows))
        options.golden.write_text(f'{{"rows": [\n{text}\n]}}\n')
        return
    table(rows, load_catalog().coefficients("power"), options.rows)


if __name__ == "__main__":
    main()
