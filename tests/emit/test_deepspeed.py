"""DeepSpeed artefacts: shell-safe lines, scripts that parse, every configuration line explained."""

from __future__ import annotations

import ast
import json
import re
import shlex
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.emit.deepspeed import (
    command_for,
    explain_config,
    flat_keys,
    hostfile,
    inference_script,
    launcher_line,
    zero_inference_config,
)
from advisor.emit.deepspeed_training import (
    explain_training,
    training_command,
    training_config,
    training_files,
    training_script,
)
from advisor.errors import DomainError, UnknownName
from advisor.predict.deepspeed_config import check_ds_config
from advisor.schema import Deployment, Model
from advisor.schema.training import TrainJob

BACKENDS = ("deepspeed-zero-inference", "deepspeed-autotp", "deepspeed-kernel-injection", "deepspeed-fastgen")


def model(name: str = "org/model-7b") -> Model:
    return Model(
        name="m",
        hf_id=name,
        family="llama",
        n_layers=30,
        d_model=4096,
        n_heads=32,
        n_kv_heads=32,
        d_head=128,
        d_ff=11008,
        vocab_size=32000,
        max_context_tokens=4096,
    )


def deployment(backend: str, **more: Any) -> Deployment:
    return Deployment.model_validate({"backend": backend, "model": "m", "gpu": "h100-sxm-80gb"} | more)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lines_and_scripts_agree(backend: str) -> None:
    d = deployment(backend, tp=1 if "zero" in backend else 4, dp=2, static_batch=16, weight_dtype="fp16")
    words = shlex.split(command_for(d, model()))
    script = inference_script(d, model())
    ast.parse(script)
    assert "org/model-7b" in words
    assert "org/model-7b" in script
    if backend != "deepspeed-fastgen":
        assert words[:2] == ["deepspeed", "--num_gpus"]
        assert words[2] == ("2" if "zero" in backend else "4")
        assert words[words.index("--batch") + 1] == "16"
        accepted = set(re.findall(r'"(--[a-z-]+)"', script))
        assert {w for w in words[4:] if w.startswith("--")} <= accepted


@given(st.text(min_size=1, max_size=60))
def test_hostile_model_names_stay_data(name: str) -> None:
    try:
        m = model(name)
        lines = {b: command_for(deployment(b), m) for b in BACKENDS}
    except (DomainError, ValueError):
        return
    for backend, line in lines.items():
        assert name in shlex.split(line)
        tree = ast.parse(inference_script(deployment(backend), m))
        constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert name in constants


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_every_line_of_the_zero_inference_config_is_explained(offload: str) -> None:
    config = zero_inference_config(deployment("deepspeed-zero-inference", offload=offload), model())
    reasons = explain_config(config)
    assert set(reasons) == {k for k, _ in flat_keys(config)}
    assert check_ds_config(config) == []
    script = inference_script(deployment("deepspeed-zero-inference", offload=offload), model())
    for key in reasons:
        assert f"# {key} = " in script


JOBS = [
    TrainJob(model="m", zero_stage=stage, dp=8, offload_optimizer=opt, offload_param=par, has_overlap=overlap)
    for stage, opt, par, overlap in (
        (0, "none", "none", None),
        (1, "none", "none", True),
        (2, "cpu", "none", False),
        (3, "nvme", "nvme", None),
        (3, "cpu", "cpu", None),
    )
] + [
    TrainJob(model="m", zero_stage=1, pp=4, dp=2, gradient_accumulation_steps=16, is_checkpointed=True),
    TrainJob(model="m", zero_stage=3, tp=2, dp=4, lora_rank=16, lora_targets="all-linear"),
    TrainJob(model="m", zero_stage=3, dp=16, hpz_ranks=8, has_quantized_weights=True, has_quantized_gradients=True),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda j: f"z{j.zero_stage}-{j.offload_param}-pp{j.pp}-tp{j.tp}")
def test_training_files(job: TrainJob) -> None:
    config = training_config(job)
    assert check_ds_config(config, world_size=job.n_gpus, tp=job.tp * job.pp) == []
    assert set(explain_training(job)) == {k for k, _ in flat_keys(config)}
    assert json.loads(json.dumps(config)) == config
    ast.parse(training_script(job, model()))
    words = shlex.split(training_command(job, model(), gpus_per_node=8))
    assert words[0] == "deepspeed"
    assert ("--hostfile" in words) == (job.n_gpus > 8)


def test_the_pipeline_script_carries_the_split() -> None:
    job = TrainJob(model="m", zero_stage=1, pp=4, gradient_accumulation_steps=12)
    script = training_script(job, model())
    assert "Blocks a stage: 8, 8, 7, 7" in script
    assert "num_stages=4" in script
    assert "20.0%" in script  # 3 / (12 + 3)
    assert "FIRST_LAYER = [0, 9, 17, 24, 32]" in script  # embedding before the first block, head after the last
    uneven = training_script(job.model_copy(update={"stage_layers": (5, 8, 8, 9)}), model())
    assert "Blocks a stage: 5, 8, 8, 9" in uneven
    assert "FIRST_LAYER = [0, 6, 14, 22, 32]" in uneven
    with pytest.raises(DomainError, match="use stage 1"):
        training_config(job.model_copy(update={"zero_stage": 3}))


def test_a_pipeline_of_split_layers_sets_all_three_degrees() -> None:
    # without a topology DeepSpeed takes the split GPUs for replicas and refuses train_batch_size
    job = TrainJob(model="m", zero_stage=1, pp=2, tp=2, dp=4, gradient_accumulation_steps=16)
    script = training_script(job, model())
    assert "topology=PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=4)" in script
    assert "from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology" in script
    assert "num_stages" not in script
    assert "get_slice_parallel_group" in script
    ast.parse(script)
    assert "on 2 GPUs" in training_files(job, model(), n_nodes=2, gpus_per_node=8)["EXPLAINED.md"]
    alone = training_script(job.model_copy(update={"tp": 1}), model())
    assert "opology" not in alone
    assert "num_stages=2" in alone


def test_the_files_of_a_job_on_two_nodes_explain_every_line() -> None:
    job = TrainJob(model="m", zero_stage=3, dp=16, hpz_ranks=8, has_quantized_weights=True)
    files = training_files(job, model(), n_nodes=2, gpus_per_node=8)
    assert set(files) == {"ds_config.json", "train.py", "run.sh", "EXPLAINED.md", "hostfile"}
    assert files["hostfile"] == "node1 slots=8\nnode2 slots=8\n"
    assert "--hostfile hostfile train.py" in files["run.sh"]
    for key, _ in flat_keys(json.loads(files["ds_config.json"])):
        assert f"`{key}`" in files["EXPLAINED.md"]
    pipeline = TrainJob(model="m", zero_stage=1, pp=4, gradient_accumulation_steps=8)
    files = training_files(pipeline, model(), n_nodes=1, gpus_per_node=4)
    assert set(files) == {"ds_config.json", "train_pipeline.py", "run.sh", "EXPLAINED.md"}
    assert "stage 3: 7 blocks, the head and the loss" in files["EXPLAINED.md"]
    ast.parse(files["train_pipeline.py"])


def test_interleaved_chunks_have_no_config() -> None:
    job = TrainJob(model="m", zero_stage=1, pp=4, n_chunks=2, stack="megatron")
    with pytest.raises(DomainError, match="use n_chunks 1"):
        training_config(job)


def test_offload_param_is_emitted_for_stage_3_only() -> None:
    assert "offload_param" not in training_config(JOBS[2])["zero_optimization"]
    assert training_config(JOBS[3])["zero_optimization"]["offload_param"]["device"] == "nvme"


def test_four_bit_weights_and_a_cache_on_the_host_reach_config_and_script() -> None:
    packed = deployment("deepspeed-zero-inference", weight_dtype="int4", kv_offload="cpu", offload="cpu")
    config = zero_inference_config(packed, model())
    assert config["fp16"] == {"enabled": True}
    assert set(config["weight_quantization"]["post_init_quant"]) == {"self_attn", "mlp"}
    assert check_ds_config(config) == []
    assert set(explain_config(config)) == {key for key, _ in flat_keys(config)}
    script = inference_script(packed, model())
    ast.parse(script)
    assert script.index("_init_group_wise_weight_quantization(model, config)") < script.index("deepspeed.initialize(")
    assert 'cache_implementation="offloaded"' in script
    plain = inference_script(deployment("deepspeed-zero-inference", offload="cpu"), model())
    assert "quantization" not in plain
    assert "offloaded" not in plain
    opt = model().model_copy(update={"family": "opt"})
    assert "fc" in zero_inference_config(packed, opt)["weight_quantization"]["post_init_quant"]


def test_scripts_name_what_they_need() -> None:
    zero = TrainJob(model="m", zero_stage=3, dp=8)
    assert "pip install deepspeed transformers accelerate\n" in training_script(zero, model())
    assert "accelerate" not in training_script(zero.model_copy(update={"zero_stage": 2}), model())
    assert "transformers peft\n" in training_script(TrainJob(model="m", zero_stage=2, lora_rank=8), model())
    assert "accelerate" in inference_script(deployment("deepspeed-zero-inference", offload="cpu"), model())
    assert "stage 2, 1 GPU\n" in training_script(TrainJob(model="m", zero_stage=2), model())


def test_hostfile() -> None:
    assert hostfile(["node-1", "10.0.0.2"], 8) == "node-1 slots=8\n10.0.0.2 slots=8\n"
    for bad in ("a b", "x\ny slots=99", "-x", "", "a;rm"):
        with pytest.raises(DomainError, match="host name"):
            hostfile([bad], 8)
    with pytest.raises(DomainError, match="at least one host"):
        hostfile([], 8)
    assert "--hostfile hostfile" in launcher_line("t.py", [], n_nodes=2, gpus_per_node=8)


def test_what_is_not_deepspeed_is_refused() -> None:
    with pytest.raises(UnknownName, match="deepspeed-"):
        command_for(deployment("vllm"), model())
    with pytest.raises(DomainError, match="bf16 or fp16"):
        command_for(deployment("deepspeed-autotp", weight_dtype="fp8"), model())
