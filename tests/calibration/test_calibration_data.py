"""The committed measurements agree with themselves: rows with records, seeds with what was sent."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from advisor.schema.run_record import RunRecord
from calibration.cells import arrivals, parse_cell
from calibration.check import check_all, check_startup, read

RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"
FILES = sorted(RUNS.glob("*.jsonl"))
WITH_ROWS = sorted((RUNS / "rows").glob("*.jsonl.gz"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_record_is_one_and_no_start_contradicts_itself(path):
    records, wrong = read(str(path))
    assert wrong == []
    for record in records:
        RunRecord.model_validate(record)
        assert check_startup(record) == []
    # throttling is a fact of the host and stays in the data; anything else that is bad does not
    assert [str(f) for f in check_all(records) if f.severity == "bad" and "throttled" not in f.what] == []


@pytest.mark.parametrize("path", WITH_ROWS, ids=lambda p: p.name)
def test_rows_give_the_records_and_the_seed_gives_the_rows(path):
    records = {(r["run_id"], r["cell_id"]): r for r in read(str(RUNS / path.name.removesuffix(".gz")))[0]}
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert {(r["run_id"], r["cell_id"]) for r in rows} == set(records)
    for entry in rows:
        record = records[entry["run_id"], entry["cell_id"]]
        named = (dict(zip(entry["columns"], row, strict=True)) for row in entry["rows"])
        sent = sorted(named, key=lambda s: s["submit_s"])
        assert len(sent) == record["measured"]["n_requests"]
        ttft = [s["ttft_s"] for s in sent]
        assert np.percentile(ttft, 99) == pytest.approx(record["measured"]["ttft_s"]["p99"], abs=2e-6)
        assert np.mean([s["e2e_s"] for s in sent]) == pytest.approx(record["measured"]["e2e_s"]["mean"], abs=2e-6)
        if record["load"]["kind"] == "poisson":
            cell = parse_cell(record["cell"])
            planned = list(arrivals(cell, record["load"]["arrivals_per_s"], record["seed"]))
            asked = [(s["prompt_tokens"], s["asked_tokens"]) for s in sent]
            if record.get("client_processes", 1) == 1:
                assert [(p, o) for _, p, o in planned] == asked
            else:  # two processes may send what is due within a millisecond in either order
                assert sorted((p, o) for _, p, o in planned) == sorted(asked)
            late = [s["submit_s"] - at for (at, _, _), s in zip(planned, sent, strict=True)]
            assert 0 <= np.median(late) < 0.002
