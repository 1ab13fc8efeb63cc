"""The vLLM runner, whole, against the fake engine (fake_site): its step law is known."""

import gzip
import json
import os
import signal
import time

import pytest

from advisor.schema.run_record import RunRecord
from calibration import vllm_probe
from calibration.jobs import Job, kv_dtype, parse_job, weight_dtype

JOB = {"run_id": "t", "model": "llama-3.1-8b", "cells": ["c,200,40,10,40"], "warmup": False}
SLOW = {"kind": "closed", "prompt_tokens": 64, "output_tokens": 200, "concurrency": 1, "n_requests": 2}


def test_a_record_holds_what_the_law_of_the_engine_says(run, write, lines, tmp_path):
    status, text = run("run-vllm", "--job", write(JOB), "--out", tmp_path / "r.jsonl", "--rows", tmp_path / "rows.gz")
    assert status == 0, text
    (record,) = lines(tmp_path / "r.jsonl")
    RunRecord.model_validate(record)
    assert record["run_id"] == "vllm-0.26.0__h100-sxm-80gb__t"
    assert (record["gpu"], record["n_gpus"], record["interconnect"]) == ("h100-sxm-80gb", 1, "nvlink")
    assert record["load"] == {"kind": "closed", "concurrency": 10, "n_requests": 40}
    m = record["measured"]
    # a decode step of the fake engine sleeps 2 ms + 10 x 20 us; asyncio adds its timer's grain, never takes away
    assert 0.0022 <= m["tpot_s"]["p50"] < 0.0045
    # Little's law: clients = rate x time in the system, for a loop that keeps all of them busy
    assert m["requests_per_s"] * m["e2e_s"]["mean"] == pytest.approx(10, rel=0.06)
    assert m["output_tokens_per_s"] == pytest.approx(40 * m["requests_per_s"])
    assert m["input_tokens_per_s"] == pytest.approx(200 * m["requests_per_s"])
    assert m["e2e_s"]["mean"] == pytest.approx(m["ttft_s"]["mean"] + 39 * m["tpot_s"]["mean"])
    # the fake boards draw 412 W
    assert m["board_power_w"]["mean"] == pytest.approx(412)
    assert m["energy_j"] == pytest.approx(412 * m["duration_s"], rel=0.05)
    assert record["idle_power_w"] == pytest.approx(412)
    with gzip.open(tmp_path / "rows.gz", "rt") as file:
        (rows,) = [json.loads(line) for line in file]
    assert rows["cell_id"] == record["cell_id"]
    assert len(rows["rows"]) == 40
    e2e = [dict(zip(rows["columns"], r, strict=True))["e2e_s"] for r in rows["rows"]]
    assert sum(e2e) / 40 == pytest.approx(m["e2e_s"]["mean"], abs=1e-5)


def test_start_up_figures_are_the_workers_own_and_the_logs_otherwise(run, write, lines, tmp_path):
    run("run-vllm", "--job", write(JOB), "--out", tmp_path / "exact.jsonl")
    run("run-vllm", "--job", write(JOB), "--out", tmp_path / "log.jsonl", FAKE_ENGINE="norpc")
    exact, log = (lines(tmp_path / f"{n}.jsonl")[0]["startup"] for n in ("exact", "log"))
    assert (exact["source"], log["source"]) == ("workers", "log (NotImplementedError)")
    assert exact["weights_bytes"] == 16_100_000_001
    assert log["weights_bytes"] == round(14.99 * 2**30)
    for startup in (exact, log):
        assert startup["n_kv_blocks"] * startup["kv_block_tokens"] == startup["kv_cache_tokens"] == 449_968
        assert startup["cuda_graph_bytes"] == round(0.58 * 2**30)


def test_poisson_share_of_saturation_uses_the_best_closed_rate(run, write, lines, tmp_path):
    cells = ["p,64,8,0.5,1", "c,64,8,2,20", "c,64,8,8,80", "p,64,8,0.5,1", "p,64,8,r30,1"]
    status, text = run("run-vllm", "--job", write(JOB | {"cells": cells}), "--out", tmp_path / "r.jsonl")
    assert status == 0, text
    found = lines(tmp_path / "r.jsonl")
    best = max(r["measured"]["requests_per_s"] for r in found[:2])
    assert [r["load"].get("arrivals_per_s") for r in found] == [None, None, pytest.approx(best / 2), 30]
    (error,) = lines(tmp_path / "r.jsonl.errors")
    assert "needs an earlier closed cell" in error["error"]


def test_a_cell_that_fails_or_hangs_costs_only_itself(run, write, lines, tmp_path):
    cells = ["c,64,4,2,4", "c,333,4,2,4", {**SLOW, "prompt_tokens": 444, "guard_s": 0.5}, "c,65,4,2,4"]
    job = write(JOB | {"cells": cells})
    status, text = run("run-vllm", "--job", job, "--out", tmp_path / "r.jsonl", FAKE_ENGINE="bad=333,stall=444")
    assert status == 0, text
    assert [r["cell"]["prompt_tokens"] for r in lines(tmp_path / "r.jsonl")] == [64, 65]
    errors = [e["error"] for e in lines(tmp_path / "r.jsonl.errors")]
    assert "out of memory" in errors[0]
    assert errors[1] == "exceeded 0 s"


@pytest.mark.parametrize(
    ("env", "status", "says"),
    [
        (
            {"FAKE_ENGINE": "oom"},
            4,
            "did not start: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00",
        ),
        ({"FAKE_ENGINE": "die=6"}, 3, "died in cell 1: RuntimeError: NCCL error"),
        ({"FAKE_VLLM": "missing"}, 5, "vLLM cannot be imported here"),
        ({"FAKE_GPUS": "none"}, 5, "no NVIDIA driver answers here"),
        ({"FAKE_GPUS": "0"}, 5, "needs 1 GPU(s), 0 are visible"),
        ({"CUDA_VISIBLE_DEVICES": "7"}, 5, "GPU 7 is not there"),
    ],
)
def test_a_start_that_cannot_be_used_is_one_line_and_a_status(run, write, lines, tmp_path, env, status, says):
    got, text = run("run-vllm", "--job", write(JOB), "--out", tmp_path / "r.jsonl", **env)
    assert got == status
    assert says in text
    assert "Traceback" not in text
    assert lines(tmp_path / "r.jsonl") == []
    assert says in lines(tmp_path / "r.jsonl.errors")[-1]["error"]


def test_kill_9_loses_one_cell_and_the_next_run_goes_on(command, run, write, lines, tmp_path):
    job = write(JOB | {"cells": ["c,64,4,2,4", SLOW, "c,65,4,2,4"]})
    out = tmp_path / "r.jsonl"
    first = command("run-vllm", "--job", job, "--out", out)
    for _ in range(200):
        if lines(out):
            break
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert len(lines(out)) == 1
    with out.open("a") as file:
        file.write('{"schema": 1, "torn')
    status, text = run("run-vllm", "--job", job, "--out", out)
    assert status == 0
    assert [r["cell"]["prompt_tokens"] for r in lines(out)] == [64, 64, 65]
    status, text = run("run-vllm", "--job", job, "--out", out, FAKE_VLLM="missing")
    assert status == 0
    assert "all 3 cells are already in" in text
    assert len(lines(out)) == 3


def test_two_runs_on_one_file(command, run, write, lines, tmp_path):
    out = tmp_path / "r.jsonl"
    first = command("run-vllm", "--job", write(JOB | {"cells": [SLOW]}), "--out", out)
    for _ in range(100):
        if out.exists():
            break
        time.sleep(0.02)
    status, text = run("run-vllm", "--job", write(JOB, "b.json"), "--out", out)
    assert status == 6
    assert "another run is writing" in text
    first.communicate(timeout=20)
    assert len(lines(out)) == 1


def test_budget_skips_what_does_not_fit(run, write, lines, tmp_path):
    cells = [
        "c,64,4,2,4",
        {"kind": "poisson", "prompt_tokens": 64, "output_tokens": 4, "rate_frac": 0.5, "duration_s": 60},
    ]
    job = write(JOB | {"cells": cells, "budget_s": 20})
    status, _text = run("run-vllm", "--job", job, "--out", tmp_path / "r.jsonl")
    assert status == 0
    assert len(lines(tmp_path / "r.jsonl")) == 1
    assert lines(tmp_path / "r.jsonl.errors")[0]["kind"] == "skipped"


def test_figures_in_a_real_log_of_four_workers():
    log = (
        "(Worker_TP0 pid=1) INFO [gpu_model_runner.py:5348] Model loading took 32.12 GiB memory and 3.1 seconds\n"
        "(Worker_TP0 pid=1) DEBUG Memory profiling takes 4.50 seconds. Total non KV cache memory: 33.00GiB; torch peak "
        "memory increase: 0.74GiB; non-torch forward increase memory: 0.06GiB; weights memory: 32.12GiB.\n"
        "(EngineCore pid=9) INFO [kv_cache_utils.py:2177] GPU KV cache size: 502,464 tokens\n"
        "(Worker_TP0 pid=1) INFO Graph capturing finished in 11 secs, took 0.96 GiB\n"
    )
    found = vllm_probe.from_log(log)
    assert found["kv_cache_tokens"] == 502_464
    gib = {k: round(v / 2**30, 2) for k, v in found.items() if k.endswith("_bytes")}
    assert gib == {
        "weights_bytes": 32.12,
        "peak_activation_bytes": 0.74,
        "non_torch_bytes": 0.06,
        "cuda_graph_bytes": 0.96,
    }


def test_the_tightest_rank_sets_the_pool():
    ranks = [
        {"rank": 0, "kv_cache_bytes": 50, "weights_bytes": 9},
        {"rank": 1, "kv_cache_bytes": 40, "weights_bytes": 19},
    ]
    found = vllm_probe.from_workers(ranks)
    assert (found["kv_cache_bytes"], found["weights_bytes"], found["ranks"]) == (40, 19, ranks)
    assert vllm_probe.from_workers(None) == {}


def test_dtypes_are_named_as_the_record_names_them():
    assert weight_dtype(Job("a"), {}) == "bf16"
    assert weight_dtype(Job("a", quantization="fp8"), {}) == "fp8"
    assert weight_dtype(Job("a"), {"quantization_config": {"quant_method": "awq", "bits": 4}}) == "awq-int4"
    assert kv_dtype(Job("a", kv_cache_dtype="fp8_e4m3")) == "fp8"
    assert kv_dtype(Job("a", dtype="float16")) == "fp16"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"run_id": "../x"}, "run_id of letters"),
        ({"model": "llama-3.1-8c"}, "did you mean llama-3.1-8b"),
        ({"tp": 0}, "tp must be a positive"),
        ({"cells": []}, "no cells"),
        ({"gpus": 2}, "no field 'gpus'"),
        ({"kind": "sglang"}, "kind must be one of"),
    ],
)
def test_a_bad_job_is_refused_with_its_rule(change, says):
    with pytest.raises(Exception, match=says):
        parse_job(JOB | change)
