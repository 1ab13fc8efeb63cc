"""The runners against the real engines, on the CPU, where they are installed (make test-engines' environment)."""

import dataclasses
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from calibration import vllm_probe
from calibration.jobs import Job
from calibration.vllm_runner import engine_args

pytestmark = pytest.mark.engines
ROOT = Path(__file__).resolve().parents[2]


def has(*names):
    return all(importlib.util.find_spec(n) for n in names)


@pytest.mark.skipif(not has("vllm"), reason="vllm is not installed")
class TestVllm:
    def test_arguments_are_vllms_own(self):
        from vllm.engine.arg_utils import AsyncEngineArgs

        known = {f.name for f in dataclasses.fields(AsyncEngineArgs)}
        job = Job("x", tp=2, pp=2, dp=2, quantization="fp8", kv_cache_dtype="fp8")
        assert set(engine_args(job, "/m")) <= known

    def test_the_probe_hides_nothing_of_the_worker_and_finds_its_figures(self):
        from vllm.v1.worker import gpu_worker

        added = [n for n in dir(vllm_probe.MemoryProbe) if not n.startswith("__")]
        assert added == ["calibration_launch", "calibration_memory", "calibration_spread_routing"]
        assert not [n for n in added if hasattr(gpu_worker.Worker, n)]
        text = inspect.getsource(gpu_worker)
        for name in ("non_torch_memory", "peak_activation_memory", "available_kv_cache_memory_bytes", "init_snapshot"):
            assert f"self.{name} = " in text

    def test_its_memory_report_is_read(self):
        from vllm.utils.mem_utils import MemoryProfilingResult

        gib = 2**30
        figures = {"torch_peak_increase": 2 * gib, "non_torch_increase": gib // 4, "weights_memory": 15 * gib}
        report = object.__new__(MemoryProfilingResult)
        report.__dict__.update(figures, non_kv_cache_memory=sum(figures.values()), profile_time=1.0)
        found = vllm_probe.from_log(repr(report))
        assert found == {"weights_bytes": 15 * gib, "peak_activation_bytes": 2 * gib, "non_torch_bytes": gib // 4}

    def test_the_lines_that_the_log_gives_are_still_there(self):
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.worker import gpu_worker

        runner = Path(inspect.getfile(gpu_worker)).with_name("gpu_model_runner.py").read_text()
        whole = re.sub(r'"\s*f?"', "", inspect.getsource(gpu_worker) + inspect.getsource(kv_cache_utils) + runner)
        for words in (
            "GiB for weight",
            "GiB for peak activation",
            "GiB for non-torch memory",
            "GiB for CUDAGraph memory",
        ):
            assert words in whole
        assert "GPU KV cache size: %s tokens" in whole
        assert "Available KV cache memory: %s GiB" in whole


def run_jobs(tmp_path, jobs):
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    options = {
        "jobs": tmp_path / "jobs.json",
        "out-dir": tmp_path / "out",
        "deadline-s": 900,  # seconds on an idle machine; a busy one imports torch for minutes
        "gpus": "0,1",
        "min-start-s": 5,
    }
    given = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "calibration", "run-many", *given],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not has("deepspeed", "torch", "transformers"), reason="deepspeed is not installed")
def test_deepspeed_trains_pipelines_and_infers_on_two_cpu_ranks(tmp_path):
    tiny = {"model": "llama-shape-tiny", "n_gpus": 2}
    train = {"micro_batch_size": 2, "sequence_length": 64, "n_steps": 3, "torch_adam": True}
    infer = [{"batch_size": 2, "prompt_tokens": 16, "output_tokens": 4}]
    pipe = {"micro_batch_size": 2, "sequence_length": 64, "torch_adam": True}
    zero_offload = {"offload": "parameters", "pin_memory": False}
    records = run_jobs(
        tmp_path,
        [
            tiny
            | {"run_id": "z", "kind": "deepspeed-zero-train", "cells": [train | {"zero_stage": s} for s in (2, 3)]},
            tiny
            | {"run_id": "p", "kind": "deepspeed-pipe-train", "options": pipe}
            | {"cells": [{"n_microbatches": m} for m in (1, 4)]},
            tiny | {"run_id": "i", "kind": "deepspeed-inference", "tp": 2, "cells": infer},
            tiny | {"run_id": "zi", "kind": "deepspeed-zero-inference", "options": zero_offload, "cells": infer},
        ],
    )
    by = {(r["engine"], r.get("zero_stage"), r.get("n_microbatches")): r for r in records}
    assert len(by) == 6
    for stage in (2, 3):
        r = by["deepspeed-zero-train", stage, None]
        # DeepSpeed's own count of the parameters against the sum over the shapes, by hand: see the FLOP test
        assert r["n_params"] == 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384 + 256) + 128 + 2 * 512 * 128
        assert (r["dp"], r["tokens_per_step"]) == (2, 2 * 2 * 64)
        assert r["measured"]["first_loss"] == pytest.approx(6.24, abs=0.25)  # ln(512): random weights know nothing
    few, many = (by["deepspeed-pipe-train", 1, m]["measured"] for m in (1, 4))
    assert few["bubble_frac"] > many["bubble_frac"] > 0
    assert len(many["stages"]) == 2
    # tensor parallel ranks share a batch of 2; ZeRO ranks have one each
    for engine, n_seqs in (("deepspeed-inference", 2), ("deepspeed-zero-inference", 4)):
        found = next(r for r in records if r["engine"] == engine)["measured"]
        assert found["decode_tokens_per_s"] * found["decode_step_s"] == pytest.approx(n_seqs)
