"""Errors of NVIDIA aiconfigurator and of `advisor validate` on the same measured vLLM runs; `make peers` runs it.

The peer has an environment of its own and is asked through this same file (`--answer`). Each measured cell with a
constant number of clients and fixed lengths becomes one `cli_estimate` in aggregated mode: the model from the record's
own `hf_config`, batch size = clients ("max concurrent requests" in its words), and two settings of its per-step prefill
budget: its default (the prompt length) and the engine's `max_num_batched_tokens`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

METRICS = ("ttft_s.p50", "tpot_s.p50", "requests_per_s")
SYSTEMS = {
    "h100-sxm-80gb": "h100_sxm",
    "h200-sxm-141gb": "h200_sxm",
    "a100-sxm-80gb": "a100_sxm",
    "l40s": "l40s",
    "l4": "l4",
}
GEMM = {"bf16": "bfloat16", "fp8": "fp8", "awq-int4": "int4_wo"}
KV = {"bf16": "bfloat16", "fp8": "fp8"}
SETTINGS = {"default": "aiconfigurator", "engine": "aiconfigurator with the engine's token budget"}
GROUPS = (("1 client", 1, 1), ("2-16 clients", 2, 16), ("over 16 clients", 17, 10**6))
URL = "https://github.com/ai-dynamo/aiconfigurator"
Cell = dict[str, Any]


def why_not(record: Cell) -> str | None:
    """The reason why the peer has no input for this cell, or None."""
    if record["engine"] != "vllm":
        return "not vLLM"
    if record["load"]["kind"] != "closed":
        return "arrivals at a rate: it has no arrival process"
    if record["lengths"]["kind"] != "fixed":
        return "spread lengths: it has one prompt length"
    if record["gpu"] not in SYSTEMS or record["weight_dtype"] not in GEMM or record["kv_dtype"] not in KV:
        return "GPU or number format that it has no data for"
    return None


def measured(record: Cell) -> dict[str, float]:
    found = record["measured"]
    values = {
        "ttft_s.p50": found["ttft_s"]["p50"],
        "tpot_s.p50": found.get("tpot_s", {}).get("p50"),
        "requests_per_s": found["requests_per_s"],
    }
    return {name: value for name, value in values.items() if value}


def has_experts(record: Cell) -> bool:
    return any(record["hf_config"].get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))


def answer() -> None:
    """Read records on stdin and print the peer's predictions; runs in the peer's environment."""
    import importlib.metadata
    import logging

    from aiconfigurator.cli.api import cli_estimate

    logging.disable(logging.CRITICAL)
    out: list[Cell] = []
    took_s: list[float] = []
    configs: dict[str, str] = {}
    db_versions: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for record in json.load(sys.stdin):
            if record["run_id"] not in configs:
                model = Path(folder) / str(len(configs))
                model.mkdir()
                # the formats are passed as arguments, and it refuses a config that says "awq"
                config = {key: value for key, value in record["hf_config"].items() if key != "quantization_config"}
                (model / "config.json").write_text(json.dumps(config))
                configs[record["run_id"]] = str(model)
            cell: Cell = {}
            for setting, budget in zip(SETTINGS, (None, record["max_num_batched_tokens"]), strict=True):
                # it counts batch size per pipeline stage
                clients, stages = record["load"]["concurrency"], record["pp"]
                start = perf_counter()
                try:
                    found = cli_estimate(
                        configs[record["run_id"]],
                        SYSTEMS[record["gpu"]],
                        backend_name="vllm",
                        isl=record["lengths"]["prompt_tokens"],
                        osl=record["lengths"]["output_tokens"],
                        batch_size=max(1, clients // stages),
                        ctx_tokens=budget,
                        tp_size=record["tp"],
                        pp_size=stages,
                        moe_tp_size=record["tp"] if has_experts(record) else None,
                        gemm_quant_mode=GEMM[record["weight_dtype"]],
                        kvcache_quant_mode=KV[record["kv_dtype"]],
                    )
                except Exception as error:  # whatever stops it is part of what we report
                    cell[setting] = {
                        "refused": f"{type(error).__name__}: {error}".splitlines()[0].split(" at /")[0][:120]
                    }
                    continue
                took_s.append(perf_counter() - start)
                db_versions.add(found.backend_version)
                values = (
                    found.ttft / 1e3,
                    found.tpot / 1e3,
                    float(found.raw["seq/s"]) * min(1, clients / found.raw["concurrency"]),
                )
                cell[setting] = {name: value for name, value in zip(METRICS, values, strict=True) if value > 0}
            out.append(cell)
    versions = {
        "aiconfigurator": importlib.metadata.version("aiconfigurator"),
        "vLLM data": ", ".join(sorted(db_versions)),
    }
    json.dump({"versions": versions, "cells": out, "took_s": quantile(took_s, 0.5)}, sys.stdout)


def ask_peer(python: str, records: list[Cell]) -> Cell:
    command = [python, __file__, "--answer"]
    done = subprocess.run(command, input=json.dumps(records), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the peer stopped: {done.stderr.strip().splitlines()[-1]}")
    found: Cell = json.loads(done.stdout.splitlines()[-1])
    return found


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def errors_of(predictions: list[Cell], records: list[Cell]) -> dict[str, list[float]]:
    errors: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for predicted, record in zip(predictions, records, strict=True):
        for metric, value in measured(record).items():
            if metric in predicted:
                errors[metric].append(predicted[metric] / value - 1)
    return errors


def ours(records: list[Cell]) -> tuple[list[Cell], float]:
    """What `advisor validate` predicts for the same cells, with the coefficients of data/fitted, and its time a cell.

    Every cell is replayed request by request, several times where a record asks for draws; the peer evaluates means.
    """
    from advisor.fit.validate import validate
    from advisor.schema import RunRecord

    predictions: list[Cell] = [{} for _ in records]
    asked = [RunRecord.model_validate(record) for record in records]
    start = perf_counter()
    for row in validate(asked):
        predictions[row.cell][row.metric] = row.predicted
    return predictions, (perf_counter() - start) / max(1, len(records))


def rows_of(predictors: dict[str, list[Cell]], records: list[Cell]) -> list[dict[str, Any]]:
    """The table as data: predictor, loads, and each metric's error; our left-out rows, as `advisor fit` left them."""
    rows = []
    for name, predictions in predictors.items():
        groups = [("all", list(range(len(records))))]
        for label, low, high in GROUPS:
            groups.append((label, [i for i, r in enumerate(records) if low <= r["load"]["concurrency"] <= high]))
        for label, chosen in groups:
            found = errors_of([predictions[i] for i in chosen], [records[i] for i in chosen])
            errors = {metric: summary_of(values) for metric, values in found.items() if values}
            rows.append({"predictor": name, "loads": label, "errors": errors})
    path = Path("data/fitted/accuracy.json")
    by_load = json.loads(path.read_text())["by_regime"]["load"] if path.is_file() else {}
    for label, *_ in GROUPS:
        found = {m: e for m, e in by_load.get(f"closed, {label}", {}).items() if m in METRICS}
        rows.append({"predictor": "advisor, each start left out of its fit", "loads": label, "errors": found})
    return rows


def summary_of(errors: list[float]) -> dict[str, float]:
    sizes = [abs(e) for e in errors]
    found = {"median": quantile(sizes, 0.5), "p90": quantile(sizes, 0.9), "bias": sum(errors) / len(errors)}
    return {key: round(value, 4) for key, value in found.items()} | {"n": len(errors)}


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| predictor | " + " | ".join(METRICS) + " |")
    print("|---" * (len(METRICS) + 1) + "|")
    for row in rows:
        cells = [
            f"{e['median']:.1%} / {e['p90']:.1%} / {e['bias']:+.1%} ({e['n']})" if e else "no answer"
            for e in map(row["errors"].get, METRICS)
        ]
        print(f"| {row['predictor']}, {row['loads']} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer-python", default=".venv-peers/bin/python")
    parser.add_argument(
        "--out", type=Path, help="also write the table here, for the app: data/peers/aiconfigurator.json"
    )
    parser.add_argument("records", nargs="*", type=Path)
    options = parser.parse_args()
    if options.answer:
        answer()
        return
    everything = [json.loads(line) for path in options.records for line in path.read_text().splitlines()]
    reasons = Counter(filter(None, map(why_not, everything)))
    records = [record for record in everything if why_not(record) is None]
    theirs = ask_peer(options.peer_python, records)
    for name, version in theirs["versions"].items():
        print(f"{name} {version}")
    print(f"{len(records)} of {len(everything)} cells can be put to it.")
    for reason, n in reasons.items():
        print(f"  {n} cannot: {reason}")
    predictors = {label: [cell[setting] for cell in theirs["cells"]] for setting, label in SETTINGS.items()}
    for label, predictions in predictors.items():
        for reason, n in Counter(p["refused"] for p in predictions if "refused" in p).items():
            print(f"  {n} refused by {label}: {reason}")
    answered = predictors[SETTINGS["default"]]
    found, took_s = ours(records)
    predictors["advisor, fitted on these runs"] = [
        {metric: value for metric, value in mine.items() if metric in peer}
        for mine, peer in zip(found, answered, strict=True)
    ]
    print(
        f"\ntime of a prediction on this machine: aiconfigurator {theirs['took_s'] * 1e3:.1f} ms (median), "
        f"advisor, every request replayed, {took_s * 1e3:.1f} ms (mean): 1/{theirs['took_s'] / took_s:.0f}"
    )
    print("\nrelative error: median and P90 of its size / mean with sign (cells)\n")
    rows = rows_of(predictors, records)
    print_table(rows)
    if options.out is not None:
        peer = f"aiconfigurator {theirs['versions']['aiconfigurator']}"
        data = f"its newest data of H100 and H200 SXM, vLLM {theirs['versions']['vLLM data']}"
        form = {"date": date.today().isoformat(), "peer": peer, "data": data, "url": URL}
        form |= {"method": "docs/peers.md", "rows": rows}
        options.out.write_text(json.dumps(form, indent=1) + "\n")


if __name__ == "__main__":
    main()
