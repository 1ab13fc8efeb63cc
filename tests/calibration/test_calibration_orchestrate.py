"""Many engine starts side by side, against the fake engine."""

import gzip
import json
import os
import signal
import time
from pathlib import Path

import pytest

CELLS = ["c,64,8,2,8", "p,64,8,0.5,0.5"]
SLOW = {"kind": "closed", "prompt_tokens": 64, "output_tokens": 2000, "concurrency": 1, "n_requests": 2}


def job(name, **more):
    return {"run_id": name, "cells": CELLS, "warmup": False} | more


def gone(pid, within_s=20.0):
    end = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def sleepers():
    """Process ids of the fake engine's children."""
    found = set()
    for p in Path("/proc").iterdir():
        if p.name.isdigit():
            try:
                if (p / "cmdline").read_bytes() == b"sleep\0600\0":
                    found.add(int(p.name))
            except OSError:
                continue
    return found


def test_jobs_share_the_gpus_and_the_files(run, write, lines, tmp_path):
    jobs = [job("a"), job("b", tp=2), job("c", tp=2, pp=2), job("d", tp=8), job("e", model="qwen3-30b-a3b")]
    out = tmp_path / "out"
    status, text = run("run-many", "--jobs", write(jobs), "--out-dir", out, "--deadline-s", 60, "--min-start-s", 1)
    assert status == 1  # d never fits
    assert "d: needs 8 GPUs, this host has 4" in text
    assert "4 of 5 jobs ended well" in text
    found = lines(out / "records.jsonl")
    assert sorted(r["run_id"].rsplit("__")[-1] for r in found) == ["a", "a", "b", "b", "c", "c", "e", "e"]
    assert {r["run_id"].rsplit("__")[-1]: r["n_gpus"] for r in found} == {"a": 1, "b": 2, "c": 4, "e": 1}
    assert len(list(out.iterdir())) <= 8
    with gzip.open(out / "rows.jsonl.gz", "rt") as file:
        assert sum(1 for _ in file) == 8
    assert "===== c =====" in (out / "logs.txt").read_text()
    # again: nothing is left to run, nothing is written twice
    run("run-many", "--jobs", write(jobs), "--out-dir", out, "--deadline-s", 60, "--min-start-s", 1, FAKE_ENGINE="oom")
    assert lines(out / "records.jsonl") == found


def test_one_bad_start_leaves_the_others_alone(run, write, lines, tmp_path):
    jobs = [job("a", env={"FAKE_ENGINE": "oom"}), job("b", env={"FAKE_ENGINE": "die=4"}), job("c")]
    out = tmp_path / "out"
    status, text = run("run-many", "--jobs", write(jobs), "--out-dir", out, "--deadline-s", 40, "--min-start-s", 1)
    assert status == 1
    assert "a: failed with status 4" in text
    assert "b: failed with status 3" in text
    assert "c: ended" in text
    assert len(lines(out / "records.jsonl")) == 2
    assert {e["kind"] for e in lines(out / "errors.jsonl")} >= {"EngineStartFailed", "EngineDied"}


@pytest.mark.parametrize("own_session", [1, 2])
def test_a_hung_engine_is_killed_with_its_children_at_its_limit(run, write, lines, tmp_path, own_session):
    before = sleepers()
    jobs = [job("a", limit_s=1, env={"FAKE_ENGINE": f"hang,child={own_session}"}), job("b")]
    out = tmp_path / "out"
    args = ("run-many", "--jobs", write(jobs), "--out-dir", out, "--gpus", "0", "--deadline-s", 40, "--min-start-s", 1)
    status, text = run(*args)
    assert status == 1
    assert "a: its time limit is over" in text
    assert "b: ended" in text
    assert len(lines(out / "records.jsonl")) == 2
    assert all(gone(pid) for pid in sleepers() - before)


def test_the_deadline_stops_everything_with_the_records_in_place(run, write, lines, tmp_path):
    jobs = [job("a", cells=["c,64,8,2,8", SLOW]), job("late")]
    out = tmp_path / "out"
    began = time.monotonic()
    args = ("run-many", "--jobs", write(jobs), "--out-dir", out, "--gpus", "0", "--deadline-s", 16, "--min-start-s", 3)
    status, text = run(*args)
    assert time.monotonic() - began < 18
    assert status == 1
    assert "late: not started" in text
    assert len(lines(out / "records.jsonl")) == 1
    assert any("exceeded" in e["error"] for e in lines(out / "errors.jsonl"))


def test_kill_9_of_the_orchestrator_ends_its_engines_and_a_rerun_resumes(command, run, write, lines, tmp_path):
    jobs = write([job("a", cells=["c,64,8,2,8", {**SLOW, "output_tokens": 300}, "c,65,8,2,8"])])
    out = tmp_path / "out"
    args = ("run-many", "--jobs", jobs, "--out-dir", out, "--deadline-s", 60, "--min-start-s", 1)
    first = command(*args)
    for _ in range(200):
        if lines(out / "records.jsonl"):
            break
        time.sleep(0.05)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert children
    assert all(gone(pid) for pid in children)
    assert len(lines(out / "records.jsonl")) == 1
    status, text = run(*args)
    assert status == 0, text
    assert [r["cell"]["prompt_tokens"] for r in lines(out / "records.jsonl")] == [64, 64, 65]


def test_two_at_once_on_one_folder(command, run, write, tmp_path):
    out = tmp_path / "out"
    args = ("run-many", "--out-dir", out, "--deadline-s", 60, "--min-start-s", 1, "--jobs")
    first = command(*args, write([job("a", cells=[SLOW])]))
    while not (out / "progress.txt").exists():
        time.sleep(0.05)
    status, text = run(*args, write([job("b")], "b.json"))
    assert status == 6
    assert "another run is writing" in text
    first.send_signal(signal.SIGTERM)
    text, _ = first.communicate(timeout=20)
    assert "stopped by a signal" in text


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        ("[", 2, "is not JSON"),
        ("[]", 2, "holds no jobs"),
        (json.dumps([job("a"), job("a")]), 2, "two jobs have the run_id 'a'"),
        (json.dumps([3]), 2, "a job must be a JSON object"),
    ],
)
def test_a_bad_jobs_file_is_one_line(run, tmp_path, content, status, says):
    path = tmp_path / "jobs.json"
    path.write_text(content)
    got, text = run("run-many", "--jobs", path, "--out-dir", tmp_path / "out")
    assert got == status
    assert says in text
    assert "Traceback" not in text


def test_no_gpu_is_one_line(run, write, tmp_path):
    status, text = run("run-many", "--jobs", write([job("a")]), "--out-dir", tmp_path / "o", FAKE_GPUS="none")
    assert status == 5
    assert text.startswith("error: no NVIDIA driver answers here")


def test_a_job_keeps_to_its_hardware_threads(run, write, lines, tmp_path):
    one = min(os.sched_getaffinity(0))
    jobs = [job("kept", cpus=[one]), job("free"), job("far", cpus=[9999])]
    out = tmp_path / "out"
    status, text = run("run-many", "--jobs", write(jobs), "--out-dir", out, "--deadline-s", 60, "--min-start-s", 1)
    assert status == 1
    assert "far: hardware thread 9999 is not there, or not ours" in text
    allowed = {r["run_id"].rsplit("__")[-1]: r["host"].get("cpus_allowed") for r in lines(out / "records.jsonl")}
    all_of_it = len(os.sched_getaffinity(0)) == os.cpu_count()
    assert allowed["kept"] == (None if os.cpu_count() == 1 else [one])
    assert (allowed["free"] is None) == all_of_it
    status, text = run("run-many", "--jobs", write([job("bad", cpus=["two"])]), "--out-dir", out)
    assert (status, "cpus must be a list of hardware threads" in text) == (2, True)
