"""Timed launches and what a record says of its host's CPU."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibration import cpu, launch_probe
from calibration.jobs import parse_job
from calibration.vllm_runner import engine_args

JOB = {"run_id": "x", "model": "llama-3.1-8b", "cells": ["c,300,1,1,2"]}


class Runner:
    """A model runner whose launches take a millisecond each."""

    def execute_model(self, scheduled: Any, intermediate: Any = None) -> str:
        time.sleep(1e-3)
        return f"{scheduled.total_num_scheduled_tokens} {intermediate}"

    def sample_tokens(self, grammar: Any) -> str:
        return f"sampled {grammar}"


class Worker(launch_probe.LaunchProbe):
    def __init__(self) -> None:
        self.model_runner = Runner()


def scheduled(n_tokens: int, n_new: int) -> SimpleNamespace:
    return SimpleNamespace(
        total_num_scheduled_tokens=n_tokens, num_scheduled_tokens={"a": n_tokens}, scheduled_new_reqs=[None] * n_new
    )


def test_a_line_a_launch_and_the_engine_sees_no_difference(tmp_path: Path) -> None:
    worker = Worker()
    path = tmp_path / "launches.jsonl"
    worker.calibration_time_launches(str(path))
    before = time.time()
    for k in range(launch_probe.EVERY):
        assert worker.model_runner.execute_model(scheduled(k, k % 2), "more") == f"{k} more"
        assert worker.model_runner.sample_tokens(None) == "sampled None"
    rows = [dict(zip(launch_probe.COLUMNS, json.loads(line), strict=True)) for line in path.read_text().splitlines()]
    assert [row["n_tokens"] for row in rows] == list(range(launch_probe.EVERY))
    assert {row["n_new"] for row in rows} == {0, 1}
    assert all(row["launch_s"] >= 1e-3 and row["launch_cpu_s"] <= row["launch_s"] for row in rows)
    assert all(0 < row["loop_s"] < 0.1 and before <= row["at_s"] <= time.time() for row in rows)


def test_a_job_asks_for_timed_launches() -> None:
    plain, timed = parse_job(JOB), parse_job(JOB | {"options": {"time_launches": True}})
    assert not plain.times_launches
    assert timed.times_launches
    assert engine_args(timed, "m")["worker_extension_cls"] == launch_probe.EXTENSION
    assert engine_args(plain, "m")["worker_extension_cls"] != launch_probe.EXTENSION
    module, _, name = launch_probe.EXTENSION.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name) is launch_probe.LaunchProbe


def test_the_host_is_described_by_its_cpu(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nsiblings\t: 32\ncpu cores\t: 16\n")
    found = cpu.describe(info)
    assert found["cpu"] == "Some CPU @ 2 GHz"
    assert found["cpu_threads_per_core"] == 2
    for name in ("cpu_loop_us", "cpu_echo_us"):
        low, middle, high = found[name]
        assert 0 < low <= middle <= high


def test_a_host_that_starts_no_further_process_says_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.sys, "executable", "/nothing/python")
    found = cpu.describe()
    assert "cpu_loop_us" in found
    assert "cpu_echo_us" not in found


@pytest.mark.parametrize("text", ["", "model name without a colon", "siblings : many\ncpu cores : 0"])
def test_an_odd_cpuinfo_leaves_out_what_it_does_not_say(tmp_path: Path, text: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert not {"cpu", "cpu_threads_per_core"} & set(cpu.describe(tmp_path / "cpuinfo"))
    assert "cpu_loop_us" in cpu.describe(tmp_path / "nothing")
