"""The DeepSpeed runner around fake ranks, and the first raw measurements as run records."""

import fcntl
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from advisor.schema.run_record import RunRecord
from calibration import cuda_build
from calibration.deepspeed_runner import check_cells, ops_needed
from calibration.deepspeed_work import llama_dims, train_flops_per_token
from calibration.deepspeed_zero_infer import ds_config
from calibration.errors import EngineMissing, JobError
from calibration.import_raw import convert
from calibration.jobs import Job, parse_job
from calibration.models import MODELS

ROOT = Path(__file__).resolve().parents[2]
CELL = {"zero_stage": 2, "micro_batch_size": 2, "sequence_length": 64}
START = textwrap.dedent(
    """
    import sys
    from calibration import deepspeed_runner as r
    from calibration.jobs import read_jobs
    r.WORK["deepspeed-zero-train"] = ("fake_work", "work", sys.argv[3] == "each")
    r.FAILED_RANK_GRACE_S = 1.0
    sys.exit(r.run_job(read_jobs(sys.argv[1])[0], sys.argv[2]))
    """
)


@pytest.fixture
def ranks(write, tmp_path, lines):
    """Run a job whose ranks are fake; return (status, printed, records, errors)."""
    spec = importlib.util.spec_from_file_location("calibration_conftest", Path(__file__).with_name("conftest.py"))
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)

    def go(cells, each="each", **job):
        base = {"run_id": "t", "kind": "deepspeed-zero-train", "model": "llama-shape-tiny", "n_gpus": 2, "budget_s": 60}
        path = write(base | {"cells": [CELL | c for c in cells]} | job)
        done = subprocess.run(
            [sys.executable, "-c", START, path, tmp_path / "r.jsonl", each],
            env=conftest.fake_env(tmp_path),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout, lines(tmp_path / "r.jsonl"), lines(tmp_path / "r.jsonl.errors")

    return go


def test_a_case_becomes_a_record_with_the_power_of_all_its_gpus(ranks):
    status, text, records, _ = ranks([{}], options={"option": 7})
    assert status == 0, text
    (record,) = records
    RunRecord.model_validate(record)
    assert record["run_id"] == "deepspeed-0.19.8__h100-sxm-80gb__t"
    assert (record["engine"], record["n_gpus"], record["case_option"]) == ("deepspeed-zero-train", 2, 7)
    m = record["measured"]
    assert (m["step_s"], m["world"]) == (0.1, 2)
    assert m["board_power_w"]["mean"] == pytest.approx(2 * 412)
    assert m["energy_j"] == pytest.approx(2 * 412 * 0.3, rel=0.1)


def test_a_case_that_fails_costs_only_itself(ranks):
    cells = [{"do": "die"}, {"zero_stage": 1}, {"do": "oom"}, {"do": "kill"}, {"zero_stage": 3}]
    status, _, records, errors = ranks(cells)
    assert status == 0
    assert [r["measured"]["echo"] for r in records] == [1, 3]
    assert "peer went away" in errors[0]["error"]
    assert "out of memory" in errors[1]["error"]
    assert "a rank ended with [-9, -9]" in errors[2]["error"]


def test_a_hung_case_ends_at_its_guard(ranks):
    status, _, records, errors = ranks([{"do": "hang"}, {}], options={"guard_s": 1.5})
    assert status == 0
    assert len(records) == 1
    assert errors[0]["error"] == "stopped: its time is over"


def test_answers_before_a_death_are_kept_and_a_rerun_resumes(ranks):
    cells = [{"zero_stage": 1}, {"zero_stage": 2, "do": "die-after"}, {"zero_stage": 3}]
    _, _, records, errors = ranks(cells, each="together")
    assert [r["measured"]["echo"] for r in records] == [1, 2]
    assert "died after its answer" in errors[0]["error"]
    _, _, records, _ = ranks(cells, each="together")
    assert [r["measured"]["echo"] for r in records] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cells": []}, "no cells"),
        ({"cells": ["c,1,2,3"]}, "must be an object"),
        ({"cells": [{"zero_stage": 2}]}, "needs 'micro_batch_size'"),
        ({"cells": [CELL | {"zero_stage": 4}]}, "0, 1, 2 or 3"),
        (
            {"kind": "deepspeed-pipe-train", "cells": [{"n_microbatches": 4}], "options": {"zero_stage": 2}},
            "zero_stage 0 and 1 only",
        ),
    ],
)
def test_a_bad_deepspeed_job_is_refused(change, says):
    with pytest.raises(JobError, match=says):
        parse_job({"run_id": "t", "kind": "deepspeed-zero-train", "cells": [CELL]} | change)


def test_equal_cells_get_names_of_their_own():
    names = [c["cell_id"] for c in check_cells(Job("t", kind="deepspeed-zero-train", cells=[CELL, CELL, CELL]))]
    assert names == [names[0], f"{names[0]}-1", f"{names[0]}-2"]


def test_sizes_are_the_published_ones():
    # parameter counts as the model cards state them
    assert llama_dims(MODELS["llama-2-7b"])["n_params"] == 6_738_415_616
    assert llama_dims(MODELS["llama-3.1-8b"])["n_params"] == 8_030_261_248
    assert llama_dims(MODELS["llama-2-70b"])["n_params"] == 68_976_648_192
    assert llama_dims(MODELS["llama-3.2-1b"])["n_params"] == 1_235_814_400


def test_train_flops_by_hand():
    # tiny: 2 layers of 4 x 128 x 32 heads (2 KV): attention 2*128*128 + 2*128*64, MLP 3*128*384, norms 2*128;
    # last norm 128, LM head 512*128 (the input embedding multiplies nothing)
    matrices = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384 + 256) + 128 + 512 * 128
    assert train_flops_per_token(MODELS["llama-shape-tiny"], 64) == 6 * matrices + 6 * 2 * 64 * 128


def test_committed_records_are_the_engines_own_numbers():
    records = [json.loads(line) for line in (ROOT / "data/runs/deepspeed-0.19.8_h100.jsonl").read_text().splitlines()]
    for r in records:
        RunRecord.model_validate(r)
    train = [r for r in records if r["engine"] == "deepspeed-zero-train"]
    for r in train:
        # DeepSpeed counted the parameters itself; tokens a step over the step is the rate it printed
        assert llama_dims(r["hf_config"])["n_params"] == r["n_params"]
        assert r["tokens_per_step"] / r["measured"]["step_s"] == pytest.approx(r["measured"]["tokens_per_s"], rel=1e-4)
        flops = (
            train_flops_per_token(r["hf_config"], r["sequence_length"]) * r["measured"]["tokens_per_s"] / r["n_gpus"]
        )
        assert flops == pytest.approx(r["measured"]["model_flops_per_s_per_gpu"], rel=1e-3)
        parts = sum(r["measured"][k] for k in ("forward_s", "backward_s", "optimizer_s"))
        assert parts == pytest.approx(r["measured"]["step_s"], rel=0.1)
        # what the allocator holds between steps is at least weights, master copy and two moments on the device
        if r["offload"] == "none":
            assert r["measured"]["allocated_bytes"] >= 14 * r["n_params"]
    for r in records:
        if r["engine"] == "deepspeed-pipe-train":
            p, m = r["n_stages"], r["n_microbatches"]
            assert r["measured"]["bubble_frac"] == pytest.approx((p - 1) / (m + p - 1), abs=0.02)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is not JSON"),
        ('{"schema": 1}', "is a run record already"),
        ('{"ok": true, "script": "x.py"}', "nothing converts the output of 'x.py'"),
    ],
)
def test_a_raw_file_that_is_not_one_is_refused(line, says):
    with pytest.raises(JobError, match=says):
        convert([line])


def test_a_failed_case_is_named_and_left_out():
    records, failures = convert(['{"ok": false, "script": "ds_infer.py", "case": {"model": "7b"}, "error": "OOM"}'])
    assert records == []
    assert failures == ["line 1, ds_infer.py 7b: OOM"]


def test_an_architecture_list_is_one_that_deepspeeds_builder_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An image that sets '9.0a' made every op's build fail: invalid literal for int() with base 10: '0a'."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0f+PTX")
    assert cuda_build.build_env()["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0;10.0+PTX"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert "TORCH_CUDA_ARCH_LIST" not in cuda_build.build_env()


BATCH = {"batch_size": 1, "prompt_tokens": 16, "output_tokens": 5}


@pytest.mark.parametrize(
    ("options", "cell", "says"),
    [
        ({"weight_quantization": 3}, {}, "must be 4, 8 or 16"),
        ({"weight_bits": 4}, {}, "the option is weight_quantization"),
        ({"weight_quantization": 4, "weight_dtype": "bf16"}, {}, "packs fp16 weights only"),
        ({"kv_offload": "cpu"}, {}, "kv_offload of options must be true or false"),
        ({}, {"kv_offload": 1}, "kv_offload of a cell must be true or false"),
    ],
)
def test_a_zero_inference_job_says_what_it_packs_and_where_its_cache_is(options, cell, says):
    job = {"run_id": "t", "kind": "deepspeed-zero-inference", "options": options, "cells": [BATCH | cell]}
    with pytest.raises(JobError, match=says):
        parse_job(job)


def test_only_packed_weights_need_the_quantizer():
    job = {"run_id": "t", "kind": "deepspeed-zero-inference", "cells": [BATCH | {"kv_offload": True}]}
    assert ops_needed(parse_job(job)) == ()
    assert ops_needed(parse_job(job | {"options": {"weight_quantization": 4}})) == ("QuantizerBuilder",)


def test_packed_weights_are_configured_as_deepspeed_reads_them():
    case = {"hf_config": MODELS["llama-shape-tiny"], "weight_dtype": "fp16", "weight_quantization": 4}
    config = ds_config(case)
    assert config["fp16"] == {"enabled": True}
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    group = {"num_bits": 4, "group_size": 64, "group_dim": 1, "symmetric": False}
    assert config["weight_quantization"]["post_init_quant"] == {"self_attn": group, "mlp": group}
    plain = ds_config({"hf_config": MODELS["llama-shape-tiny"], "offload": "none"})
    assert "weight_quantization" not in plain
    assert "offload_param" not in plain["zero_optimization"]


def test_an_op_that_cannot_be_built_is_named_with_the_reason(tmp_path):
    env = {"PYTHONPATH": str(Path(__file__).with_name("fake_site")), "TORCH_EXTENSIONS_DIR": str(tmp_path / "ops")}
    with pytest.raises(EngineMissing, match=r"QuantizerBuilder cannot build its op here: .*No module named"):
        cuda_build.build_ops(("QuantizerBuilder",), env)


def test_the_lock_of_a_build_under_way_stays_and_that_of_a_killed_one_goes(tmp_path):
    lock = tmp_path / "quantizer" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with open(tmp_path / ".calibration-build", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cuda_build.drop_stale_locks(str(tmp_path))
        assert lock.exists()
    cuda_build.drop_stale_locks(str(tmp_path))
    assert not lock.exists()
