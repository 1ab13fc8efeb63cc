"""Recorded kernels: asked for by a job, taken from a trace, one line a step, and no failure ends the run."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibration import kernel_probe
from calibration.errors import JobError
from calibration.jobs import parse_job
from calibration.vllm_runner import engine_args

JOB = {"run_id": "x", "model": "llama-3.1-8b", "cells": ["c,300,1,1,2"]}
TRACE = {
    "traceEvents": [
        {"cat": "kernel", "name": "gemm", "ts": 1010.0, "dur": 5.5},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 990.0, "dur": 50.0},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 1000.0, "dur": 1.25},
        {"cat": "kernel", "name": "gemm", "ts": 1020.0, "dur": 5.0},
        {"ph": "M", "name": "process_name"},
    ]
}


class Engine:
    """Answers the two calls; `n_sent` requests decode until they are cancelled."""

    def __init__(self, fails_at: int = 0) -> None:
        self.calls: list[str] = []
        self.fails_at, self.n_running = fails_at, 0

    async def collective_rpc(self, method: str) -> list[dict[str, Any]]:
        self.calls.append(method)
        if len(self.calls) == self.fails_at:
            raise RuntimeError("CUPTI is taken")
        return [kernel_probe.events_of(TRACE)] if method == "calibration_kernels" else [{}]

    async def send(self, request_id: str, prompt: list[int], n_tokens: int) -> AsyncIterator[tuple[int, int | None]]:
        self.n_running += 1
        try:
            for _ in range(n_tokens):
                await asyncio.sleep(0.001)
                yield 1, None
        finally:
            self.n_running -= 1


def test_a_job_asks_for_kernels() -> None:
    job = parse_job(JOB | {"options": {"kernels": {"decode": [1, 64], "prompt": [2048]}}})
    assert job.kernels == {"decode": [1, 64], "prompt": [2048]}
    assert engine_args(job, "m")["worker_extension_cls"] == kernel_probe.EXTENSION
    module, _, name = kernel_probe.EXTENSION.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name) is kernel_probe.KernelProbe
    assert not parse_job(JOB).kernels


@pytest.mark.parametrize(
    "options",
    [
        {"kernels": [1, 2]},
        {"kernels": {"decodes": [1]}},
        {"kernels": {"decode": [0]}},
        {"kernels": {"decode": [True]}},
        {"kernels": {"decode": 3}},
        {"kernels": {"decode": [[2, 512]]}},
        {"kernels": {"burst": [8]}},
        {"kernels": {"burst": [[8]]}},
        {"kernels": {"mixed": [[8, 0]]}},
        {"kernels": {"decode": [1]}, "time_launches": True},
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="kernels"):
        parse_job(JOB | {"options": options})


@pytest.mark.parametrize("count", [0, -1, "2", 1.5, True, None])
def test_a_number_of_servers_that_cannot_be_is_refused(count: Any) -> None:
    with pytest.raises(JobError, match="api_server_count must be a positive whole number"):
        parse_job(JOB | {"options": {"api_server_count": count}})


def test_a_request_that_fails_says_why_at_once(tmp_path: Path) -> None:
    class Failing(Engine):
        async def send(self, request_id: str, prompt: list[int], n_tokens: int) -> AsyncIterator[tuple[int, None]]:
            await asyncio.sleep(0.001)
            raise ValueError("too long for this model")
            yield 1, None

    path = tmp_path / "k.jsonl.gz"
    with gzip.open(path, "wt"):
        pass
    said, lines = recorded(Failing(), path, {"decode": [2]})
    assert "ValueError too long for this model" in said[0]
    assert lines == []


def test_a_trace_becomes_names_and_times_from_its_first_event() -> None:
    found = kernel_probe.events_of(TRACE)
    assert found["kernels"] == ["Memcpy HtoD", "gemm"]
    assert found["events"] == [[0, 0.0, 1.25], [1, 10.0, 5.5], [1, 20.0, 5.0]]
    assert kernel_probe.events_of({"traceEvents": []}) == {"kernels": [], "events": []}


def recorded(engine: Engine, path: Path, wanted: dict[str, list[Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    work = kernel_probe.record_kernels(engine, engine.send, wanted, 32_000, path, "run")
    with ThreadPoolExecutor(1) as pool:  # the browser of other tests may have a loop in this thread
        said = pool.submit(asyncio.run, work).result()
    with gzip.open(path, "rt") as file:
        return said, [json.loads(line) for line in file]


def test_each_step_has_a_line_and_no_request_is_left_running(tmp_path: Path) -> None:
    engine = Engine()
    said, lines = recorded(engine, tmp_path / "k.jsonl.gz", {"decode": [1, 3], "prompt": [512]})
    assert [(line["what"], line["n"]) for line in lines] == [("decode", 1), ("decode", 3), ("prompt", 512)]
    assert all(line["run_id"] == "run" and len(line["events"]) == 3 for line in lines)
    assert all(line["n_context_tokens"] > kernel_probe.PROMPT_TOKENS for line in lines[:2])
    assert engine.n_running == 0
    assert len(said) == 3
    assert engine.calls == ["calibration_record_kernels", "calibration_kernels"] * 3


def test_bursts_and_prompts_among_decodes_say_both_numbers(tmp_path: Path) -> None:
    engine = Engine()
    said, lines = recorded(engine, tmp_path / "k.jsonl.gz", {"burst": [[4, 32]], "mixed": [[2, 64]]})
    assert [(line["what"], line["n"], line["n_tokens"]) for line in lines] == [("burst", 4, 32), ("mixed", 2, 64)]
    assert said[0].startswith("kernels of 4 prompts of 32 tokens at once: 3 of 2 kinds")
    assert said[1].startswith("kernels of 2 sequences and a prompt of 64 tokens")
    assert engine.n_running == 0


def test_the_worker_notes_what_each_step_holds_while_it_records() -> None:
    class Runner:
        def execute_model(self, scheduled: Any) -> int:
            return scheduled.total_num_scheduled_tokens

    worker = kernel_probe.KernelProbe()
    worker.model_runner = Runner()  # type: ignore[attr-defined]
    worker.calibration_steps = []
    worker._calibration_note_steps()
    worker._calibration_note_steps()  # a second recording wraps nothing again
    step = SimpleNamespace(
        total_num_scheduled_tokens=520, num_scheduled_tokens={"a": 512, "b": 8}, scheduled_new_reqs=["a"]
    )
    assert worker.model_runner.execute_model(step) == 520  # type: ignore[attr-defined]
    worker.model_runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=0))  # type: ignore[attr-defined]
    assert worker.calibration_steps == [[520, 2, 1]]


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    engine = Engine(fails_at=1)
    said, lines = recorded(engine, tmp_path / "k.jsonl.gz", {"decode": [2], "prompt": [64]})
    assert "RuntimeError CUPTI is taken" in said[0]
    assert [line["what"] for line in lines] == ["prompt"]
    assert engine.n_running == 0
