"""Runs of a study: the rows are the library's own answers, whoever computes them and however often a run is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import advisor
from advisor.catalog import load_catalog
from advisor.recommend.ask import ask, parse_slo
from advisor.recommend.one import deployment_of, predict_one
from advisor.schema import Request
from advisor.schema.study import Study
from advisor.study import read_study, run_study
from advisor.study.cell import Cells
from advisor.study.grid import Grid, Shard
from advisor.study.run import MAX_BATCH, Progress
from advisor.study.store import Store

Rows = list[dict[str, Any]]


def rows_of(path: Path) -> Rows:
    return sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["id"])


def test_a_simulated_cell_is_what_predict_says(small: Study, tmp_path: Path) -> None:
    own = {"deployment": {"max_num_seqs": 32}, "seeds": [5], "gpus": ["1xA100"]}
    study = Study.model_validate(small.model_dump() | own)
    run_study(study, tmp_path / "r.jsonl", n_workers=1)
    for row in rows_of(tmp_path / "r.jsonl"):
        rate = float(row["workload"].split()[-1].removesuffix("/s"))
        request = Request(
            model="llama-3.1-8b", gpus="1xA100", prompt_tokens=64, output_tokens=8, rate=rate, seed=5,
            slo=parse_slo("ttft_p99=1s"),
        )  # fmt: skip
        question = ask(request, load_catalog())
        plan = predict_one(question, deployment_of(question, {"max_num_seqs": 32}))
        assert row["plan"]["max_num_seqs"] == 32
        assert row["meets_slo"] == plan.meets_slo
        for name, interval in plan.prediction.quantities.items():
            assert row["quantities"][name] == pytest.approx([interval.value, interval.low, interval.high], rel=1e-5)


def test_a_recommended_cell_is_what_recommend_says(study_file: Callable[..., Path], tmp_path: Path) -> None:
    study = read_study(study_file(mode='"recommend"', seeds="[2]", gpus='["1xL40S"]', rate="2"))
    run_study(study, tmp_path / "r.jsonl", n_workers=1)
    (row,) = rows_of(tmp_path / "r.jsonl")
    request = Request(
        model="llama-3.1-8b", gpus="1xL40S", prompt_tokens=64, output_tokens=8, rate=2, seed=2, n_finalists=0,
        slo=parse_slo("ttft_p99=1s"),
    )  # fmt: skip
    best = advisor.recommend(request).best
    assert best is not None
    assert row["plan"]["tp"] == best.deployment.tp
    assert row["plan"]["max_num_seqs"] == best.deployment.max_num_seqs
    assert row["score"] == pytest.approx(best.score, rel=1e-5)
    assert row["usd_per_h"] == pytest.approx(best.usd_per_h, rel=1e-5)


def test_seeds_replay_one_deployment(small: Study, tmp_path: Path) -> None:
    run_study(small, tmp_path / "r.jsonl", n_workers=1)
    rows = rows_of(tmp_path / "r.jsonl")
    plans: dict[tuple[str, str], set[str]] = {}
    results: dict[tuple[str, str], set[float]] = {}
    for row in rows:
        key = row["gpus"], row["workload"]
        plans.setdefault(key, set()).add(json.dumps(row["plan"]))
        results.setdefault(key, set()).add(row["quantities"]["ttft_p99_s"][0])
    assert {len(v) for v in plans.values()} == {1}
    assert {len(v) for v in results.values()} == {3}, "a seed draws its own traffic"


def test_parallel_shards_and_serial_give_the_same_rows(small: Study, tmp_path: Path) -> None:
    pytest.importorskip("joblib", reason="joblib not installed: pip install 'advisor[study]'")
    serial = run_study(small, tmp_path / "serial.jsonl", n_workers=1)
    parallel = run_study(small, tmp_path / "parallel.jsonl", n_workers=2)
    parts = [run_study(small, tmp_path / f"{i}.jsonl", n_workers=1, shard=Shard(i, 3)) for i in range(3)]
    assert serial.n_done == parallel.n_done == sum(p.n_done for p in parts) == 12
    merged = "".join((tmp_path / f"{i}.jsonl").read_text() for i in range(3))
    (tmp_path / "merged.jsonl").write_text(merged)
    expected = rows_of(tmp_path / "serial.jsonl")
    assert rows_of(tmp_path / "parallel.jsonl") == expected
    assert rows_of(tmp_path / "merged.jsonl") == expected
    again = run_study(small, tmp_path / "merged.jsonl", n_workers=1)
    assert (again.n_skipped, again.n_done) == (12, 0)


def test_cells_do_not_depend_on_their_neighbours(small: Study) -> None:
    cells = list(Grid(small))
    forward = Cells(small)
    rows = {c.id: forward.row(c) for c in cells}
    backward = Cells(small)
    assert all(backward.row(c) == rows[c.id] for c in reversed(cells[::2]))


def test_a_cell_that_cannot_be_is_a_row_with_its_reason(study_file: Callable[..., Path], tmp_path: Path) -> None:
    text = study_file(models='["llama-3.1-8b", "70b"]', seeds="1", gpus='["1xL40S"]').read_text()
    # DeepSpeed could stream the weights of the large model from the host
    path = study_file('\nbackends = ["vllm"]' + text)
    summary = run_study(read_study(path), tmp_path / "best.jsonl", n_workers=1)
    assert summary.n_by_status == {"ok": 2, "infeasible": 2}
    reasons = {row["reason"] for row in rows_of(tmp_path / "best.jsonl") if row["status"] == "infeasible"}
    assert len(reasons) == 1
    assert "nearest that fits" in reasons.pop()
    path.write_text(text + "\n[deployment]\ntp = 64\n")
    summary = run_study(read_study(path), tmp_path / "given.jsonl", n_workers=1)
    assert summary.n_by_status == {"error": 4}
    reasons = {row["reason"] for row in rows_of(tmp_path / "given.jsonl")}
    assert all("DomainError: tp 64 is not legal" in reason for reason in reasons)
    assert sum(n for _, n in summary.reasons) == 4


def test_lengths_beyond_the_context_are_a_reason(study_file: Callable[..., Path], tmp_path: Path) -> None:
    study = read_study(study_file(prompt_tokens="2000000", seeds="1", rate="1", gpus='["1xL40S"]'))
    run_study(study, tmp_path / "r.jsonl", n_workers=1)
    (row,) = rows_of(tmp_path / "r.jsonl")
    assert row["status"] == "infeasible"
    assert "2,000,008 tokens" in row["reason"]


def test_a_defect_is_a_row_too(small: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no luck")

    monkeypatch.setattr("advisor.study.cell.predict_one", broken)
    row = Cells(small).row(next(iter(Grid(small))))
    assert row["status"] == "error"
    assert "ZeroDivisionError: no luck" in row["reason"]


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    lines = [f"{i * 0.25},{40 + i % 7},{4 + i % 3}" for i in range(240)]
    (tmp_path / "day.csv").write_text("time,prompt_tokens,output_tokens\n" + "\n".join(lines))
    path = tmp_path / "s.toml"
    path.write_text('mode = "simulate"\nmodels = ["8b"]\ngpus = ["1xL40S"]\nworkloads = ["day.csv"]\n')
    study = read_study(path)
    run_study(study, tmp_path / "r.jsonl", n_workers=1)
    (row,) = rows_of(tmp_path / "r.jsonl")
    assert row["workload"] == "day.csv"
    assert row["status"] == "ok", row["reason"]
    assert row["quantities"]["requests_per_s"][0] == pytest.approx(4.0, rel=0.01)  # one each 0.25 s
    (tmp_path / "day.csv").write_text("time,prompt_tokens,output_tokens\n0,1,1\n")
    stale = replace(next(iter(Grid(study))), seed=1)
    from advisor.study import cell, trace

    trace.digest.cache_clear()
    cell._asked.cache_clear()
    assert "has changed since" in Cells(study).row(stale)["reason"]


LONG = {"seeds": "400", "rate": "[1, 2, 3, 4]"}


def start(path: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "advisor", "study", str(path), "--out", str(out), *more]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_rows(process: subprocess.Popen[str], out: Path, n: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if out.exists() and out.read_bytes().count(b"\n") >= n:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    pytest.fail(f"no {n} rows in a minute")


def test_a_killed_run_goes_on_where_it_was(study_file: Callable[..., Path], tmp_path: Path) -> None:
    path, out = study_file(**LONG), tmp_path / "r.jsonl"
    process = start(path, out, "--workers", "2")
    try:
        wait_for_rows(process, out, 20)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    kept = out.read_bytes().count(b"\n")
    before = rows_of(out) if out.read_bytes().endswith(b"\n") else []
    # the same cells again, but few: seeds that the killed run has and has not reached
    study = read_study(study_file(**LONG | {"seeds": "3"}))
    summary = run_study(study, out, n_workers=1)
    assert kept >= 20
    assert summary.n_cells == 24
    assert summary.n_skipped >= 1, "the first cells were computed before the kill"
    assert summary.n_done == 24 - summary.n_skipped
    rows = rows_of(out)
    assert len({row["id"] for row in rows}) == len(rows) == kept + summary.n_done, "no cell twice"
    assert all(row in rows for row in before)
    fresh = run_study(study, tmp_path / "fresh.jsonl", n_workers=1)
    assert fresh.n_done == 24
    by_id = {row["id"]: row for row in rows}
    assert all(by_id[row["id"]] == row for row in rows_of(tmp_path / "fresh.jsonl"))


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_says_how_to_go_on(
    workers: str, number: signal.Signals, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    path, out = study_file(**LONG), tmp_path / "r.jsonl"
    process = start(path, out, "--workers", workers)
    wait_for_rows(process, out, 2)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    text, errors = process.communicate(timeout=60)
    n = out.read_bytes().count(b"\n")
    assert process.returncode == 130, errors
    assert f"stopped with {n:,} of 3,200 cells kept; to go on: advisor study {path} --out {out}" in errors
    assert "Traceback" not in errors
    assert str(out) in text
    assert all(json.loads(line)["status"] == "ok" for line in out.read_text().splitlines())


def test_a_stop_in_the_middle_of_a_write_counts_what_is_written(
    small: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = Store.append

    def append_and_stop(store: Store, rows: Rows) -> None:
        append(store, rows)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Store, "append", append_and_stop)
    handler = signal.getsignal(signal.SIGINT)
    summary = run_study(small, tmp_path / "r.jsonl", n_workers=1)
    assert summary.n_done == len(rows_of(tmp_path / "r.jsonl")) == 1
    assert not summary.is_complete
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_dead_worker_is_one_sentence(study_file: Callable[..., Path], tmp_path: Path) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc to find the worker")
    path, out = study_file(**LONG), tmp_path / "r.jsonl"
    process = start(path, out, "--workers", "2")
    wait_for_rows(process, out, 2)
    workers = [
        int(p.name)
        for p in Path("/proc").iterdir()
        if p.name.isdigit()
        and (p / "stat").read_text().rsplit(")", 1)[1].split()[1] == str(process.pid)
        and b"popen_loky" in (p / "cmdline").read_bytes()
    ]
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker died" in errors
    assert "Traceback" not in errors


def test_the_summary_is_one_object(
    study_file: Callable[..., Path], tmp_path: Path, run_advisor: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path, out = study_file(seeds="1"), tmp_path / "r.jsonl"
    done = run_advisor("study", str(path), "--out", str(out), "--workers", "1", "--json")
    summary = json.loads(done.stdout)
    assert (summary["schema_version"], summary["n_cells"], summary["n_done"]) == ("1", 4, 4)
    assert summary["is_complete"] is True
    again = run_advisor("study", str(path), "--out", str(out), "--workers", "1")
    assert "4 were there already" in again.stdout
    refused = run_advisor("study", str(path), "--out", str(out), "--no-resume")
    assert refused.returncode == 2
    assert "holds 4 results" in refused.stderr


def test_parquet_holds_every_value(small: Study, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow not installed")
    out = tmp_path / "r.parquet"
    run_study(small, out, n_workers=1, shard=Shard(0, 2))
    table = pq.read_table(out).to_pylist()
    rows = rows_of(out.with_suffix(".jsonl"))
    assert len(rows) == len(table) > 0
    for row, record in zip(rows, sorted(table, key=lambda r: r["id"]), strict=True):
        assert record["plan.tp"] == row["plan"]["tp"]
        assert record["plan.kv_dtype"] == row["plan"]["kv_dtype"]
        for name, values in row["quantities"].items():
            assert [record[name + bound] for bound in ("", ".low", ".high")] == values
    run_study(small, out, n_workers=1)
    assert pq.read_table(out).num_rows == 12, "the rest of the grid is added"


def test_batches_follow_the_time_of_a_cell() -> None:
    progress = Progress(n_cells=10**6, n_skipped=0)
    assert progress.batch_cells(2) == 1, "nothing is known yet"
    progress.n_done, progress.busy_s = 10, 1.0
    assert progress.batch_cells(2) == 20, "two seconds of work"
    progress.busy_s = 1e-6
    assert progress.batch_cells(2) == MAX_BATCH
    progress.n_done = 10**6 - 16
    assert progress.batch_cells(2) == 2, "the rest is shared out"
    progress.n_done = 10**6 - 1
    assert progress.batch_cells(2) == 1
