"""Validation on foreign records: the contract of its summary, error arithmetic, and nothing measured leaking in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.errors import DomainError
from advisor.fit.records import parse_records, read_records
from advisor.fit.validate import METRICS, Row, by_regime, summary, table, validate
from advisor.schema import RunRecord

CATALOG = load_catalog()
RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"


def some_records() -> list[RunRecord]:
    records = read_records(RUNS / "vllm-0.26.0_h100-2.jsonl")
    first = {r.run_id for r in records[:1]}
    return [r for r in records if r.run_id in first][:6] + [r for r in records if r.run_id not in first][:3]


def row(metric: str, measured: float, predicted: float, run: str = "a") -> Row:
    return Row(run, 0, metric, measured, predicted, "closed", "fixed", {"load": "closed", "gpu": "x"})


def test_summary_is_the_contract_of_the_command() -> None:
    rows = validate(some_records(), CATALOG)
    found = json.loads(json.dumps(summary(rows)))
    assert set(found) == {"schema_version", "overall", "runs"}
    assert set(found["overall"]) <= set(METRICS)
    assert {"ttft_s.p50", "tpot_s.p50", "requests_per_s", "kv_blocks"} <= set(found["overall"])
    assert len(found["runs"]) == 2
    for one in (found["overall"], *found["runs"].values()):
        for metric, values in one.items():
            assert set(values) == {"median", "p90", "bias", "n"}, metric
            assert 0 <= values["median"] <= values["p90"] * (1 + 1e-9)
            assert isinstance(values["n"], int)
            assert values["n"] >= 1
    for metric in found["overall"]:
        assert found["overall"][metric]["n"] == sum(run.get(metric, {"n": 0})["n"] for run in found["runs"].values())


def test_our_own_runs_are_predicted_within_the_published_accuracy() -> None:
    overall = table(validate(sorted(RUNS.glob("vllm-0.26.0_h100-*.jsonl")), CATALOG))
    assert overall["tpot_s.p50"]["median"] < 0.06
    assert overall["requests_per_s"]["median"] < 0.05
    assert overall["ttft_s.p50"]["median"] < 0.12
    assert overall["kv_blocks"]["p90"] < 0.01


def test_table_by_hand() -> None:
    rows = [row("tpot_s.p50", 1.0, 1.1), row("tpot_s.p50", 1.0, 0.9), row("tpot_s.p50", 2.0, 2.6)]
    found = table(rows)["tpot_s.p50"]
    assert found["median"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx(0.1)
    assert found["p90"] == pytest.approx(np.percentile([0.1, 0.1, 0.3], 90))
    assert found["n"] == 3
    assert table([]) == {}
    assert table([row("tpot_s.p50", 1.0, math.inf)]) == {}


def test_regimes_share_out_the_rows() -> None:
    rows = validate(some_records(), CATALOG)
    groups = by_regime(rows)
    assert {"load", "lengths", "parallelism", "weights", "model", "gpu"} <= set(groups)
    for name, group in groups.items():
        n = sum(values["requests_per_s"]["n"] for values in group.values() if "requests_per_s" in values)
        assert n == table(rows)["requests_per_s"]["n"], name


def test_predictions_do_not_use_the_measurements() -> None:
    """Other latencies and another cache in a closed-loop record change what is compared, not what is predicted."""
    records = [r for r in some_records() if (r.load or {}).get("kind") == "closed"][:3]
    changed = []
    for r in records:
        raw = json.loads(r.model_dump_json(by_alias=True))
        for stats in ("ttft_s", "tpot_s", "e2e_s"):
            if raw["measured"].get(stats):
                raw["measured"][stats] = {k: v * 3 for k, v in raw["measured"][stats].items() if v is not None}
        raw["startup"]["n_kv_blocks"] = 5000
        changed += parse_records(json.dumps(raw), "x")
    one = {(r.cell, r.metric): r.predicted for r in validate(records, CATALOG)}
    other = {(r.cell, r.metric): r.predicted for r in validate(changed, CATALOG)}
    assert one == other


def test_nothing_to_validate_is_said() -> None:
    with pytest.raises(DomainError, match="nothing to validate"):
        validate([r.model_copy(update={"engine": "deepspeed"}) for r in some_records()], CATALOG)
    with pytest.raises(DomainError):
        validate([], CATALOG)


def test_files_and_parsed_records_are_the_same(tmp_path: Path) -> None:
    records = some_records()[:2]
    file = tmp_path / "runs.jsonl"
    file.write_text("\n".join(r.model_dump_json(by_alias=True) for r in records), encoding="utf-8")
    calls: list[Any] = []
    one = validate([file], CATALOG, progress=lambda n, total: calls.append((n, total)))
    assert one == validate(records, CATALOG)
    assert calls == [(1, 2), (2, 2)]
