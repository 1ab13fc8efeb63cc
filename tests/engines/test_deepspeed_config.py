"""DeepSpeed's own parser against what we emit and what we say about bad configurations."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
from typing import Any
from unittest import mock

import pytest

from advisor.emit.deepspeed import inference_script, zero_inference_config
from advisor.emit.deepspeed_training import training_config, training_script
from advisor.predict.deepspeed_config import BATCH_KEYS, check_ds_config
from advisor.schema import Deployment, Model
from advisor.schema.training import TrainJob

pytestmark = pytest.mark.engines

MODEL = Model(
    name="tiny", family="llama", n_layers=4, d_model=64, n_heads=4, n_kv_heads=4, d_head=16, d_ff=128, vocab_size=100,
    max_context_tokens=128,
)  # fmt: skip


class Ranks:
    """What DeepSpeed asks a model-parallel unit for."""

    def __init__(self, dp: int) -> None:
        self.dp = dp

    def get_data_parallel_world_size(self) -> int:
        return self.dp


def parsed(config: dict[str, Any], dp: int = 1) -> Any:
    pytest.importorskip("deepspeed", reason="deepspeed not installed")
    from deepspeed.runtime.config import DeepSpeedConfig

    # without a process group DeepSpeed takes one rank and never asks the model-parallel unit
    with mock.patch("deepspeed.runtime.config.dist.get_rank", return_value=0):
        return DeepSpeedConfig(config, mpu=Ranks(dp))


JOBS = [
    TrainJob(model="tiny", zero_stage=0, dp=4),
    TrainJob(model="tiny", zero_stage=1, dp=4, pp=4, gradient_accumulation_steps=8, is_checkpointed=True),
    TrainJob(model="tiny", zero_stage=2, dp=8, gradient_accumulation_steps=4, has_overlap=True),
    TrainJob(model="tiny", zero_stage=2, dp=2, offload_optimizer="cpu", dtype="fp16"),
    TrainJob(model="tiny", zero_stage=3, dp=2, tp=2),
    TrainJob(model="tiny", zero_stage=3, dp=4, offload_optimizer="nvme", offload_param="nvme"),
    TrainJob(model="tiny", zero_stage=3, dp=16, hpz_ranks=8, has_quantized_weights=True, has_quantized_gradients=True),
]


@pytest.mark.parametrize("job", JOBS, ids=lambda j: f"z{j.zero_stage}-tp{j.tp}-pp{j.pp}-{j.offload_optimizer}")
def test_the_parser_takes_our_training_config_as_we_mean_it(job: TrainJob) -> None:
    config = training_config(job)
    assert check_ds_config(config) == []
    seen = parsed(config, job.dp)
    assert seen.zero_config.stage == job.zero_stage
    assert seen.train_batch_size == job.train_batch_size
    offload = seen.zero_config.offload_optimizer
    assert (offload.device if offload else "none") == job.offload_optimizer
    ast.parse(training_script(job, MODEL))


@pytest.mark.parametrize("weight_dtype", ["bf16", "int4"])
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_the_parser_takes_our_zero_inference_config(offload: Any, weight_dtype: Any) -> None:
    deployment = Deployment(
        backend="deepspeed-zero-inference",
        model="tiny",
        gpu="h100-sxm-80gb",
        dp=2,
        offload=offload,
        static_batch=4,
        weight_dtype=weight_dtype,
    )
    seen = parsed(zero_inference_config(deployment, MODEL), 2)
    assert seen.zero_config.stage == 3
    assert seen.bfloat16_config.enabled == (weight_dtype == "bf16")
    assert seen.float16_config.enabled == (weight_dtype == "int4")
    ast.parse(inference_script(deployment, MODEL))


BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1}
REFUSED: list[dict[str, Any]] = [
    {"amp": {"enabled": True}},
    {"elasticity": {"enabled": False}},
    {"zero_optimization": {"stage": 4}},
    {"zero_optimization": {"stage": 2, "reduce_buckets": 5}},
    {"zero_optimization": {"stage": 3, "mics_shard_size": 4}},
    {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin": True}}},
    {"tensor_parallel": {"tp_size": 4}},
    {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
]
IGNORED: list[dict[str, Any]] = [
    {"pipeline_parallelism": {"enabled": True, "num_stages": 4}},
    {"zero_optimisation": {"stage": 3}},
    {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
]


@pytest.mark.parametrize("extra", REFUSED, ids=str)
def test_the_parser_refuses_what_we_call_refused(extra: dict[str, Any]) -> None:
    assert [f for f in check_ds_config(BASE | extra) if f.effect == "raises"]
    with pytest.raises(Exception):  # noqa: B017  DeepSpeed raises ValueError, AssertionError and its own, by key
        parsed(BASE | extra)


@pytest.mark.parametrize("extra", IGNORED, ids=str)
def test_the_parser_takes_without_a_word_what_we_call_ignored(extra: dict[str, Any]) -> None:
    faults = check_ds_config(BASE | extra)
    assert [f.effect for f in faults] == ["ignored"]
    parsed(BASE | extra)


def test_batch_sizes_are_refused_exactly_where_the_parser_refuses_them() -> None:
    for train, micro, steps, ranks in itertools.product(
        (None, 0, 1, 6, 7, 16), (None, 0, 1, 2, 3), (None, 1, 2), (1, 2, 4)
    ):
        values = dict(zip(BATCH_KEYS, (train, micro, steps), strict=True))
        config = {key: value for key, value in values.items() if value is not None}
        faults = check_ds_config(config, world_size=ranks)
        if not faults:
            assert parsed(config, ranks).train_batch_size
            continue
        with pytest.raises((AssertionError, ZeroDivisionError)):
            parsed(config, ranks)
        if train and micro != 0:
            better = re.search(r"use (\d+)", faults[0].fix)
            assert better is not None
            assert check_ds_config(config | {"train_batch_size": int(better[1])}, world_size=ranks) == []


def test_our_list_of_zero_keys_is_the_parser_s() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed not installed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from advisor.predict.deepspeed_config import ZERO

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert names - {"cpu_offload_param", "cpu_offload_use_pin_memory", "cpu_offload"} <= ZERO
    assert names >= ZERO


def test_the_estimators_are_the_ones_that_our_law_repeats() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed not installed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    from advisor.laws.zero import estimator_bytes

    _, two = estimate_zero2_model_states_mem_needs(7e9, num_gpus_per_node=4, cpu_offload=False)
    assert two == pytest.approx(estimator_bytes(7e9, 4, 2), rel=1e-9)
    _, three, _ = estimate_zero3_model_states_mem_needs(
        7e9, 131e6, num_gpus_per_node=4, cpu_offload=False, cpu_offload_params=False
    )
    assert three == pytest.approx(estimator_bytes(7e9, 4, 3, largest_layer_params=131e6), rel=1e-9)


def test_our_list_of_top_level_keys_holds_every_key_that_the_parser_reads() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed not installed")
    from deepspeed.runtime import config as module
    from deepspeed.runtime import constants

    from advisor.predict.deepspeed_config import REMOVED, TOP_LEVEL

    source = inspect.getsource(module)
    names = set(re.findall(r"(?:get_scalar_param\(|get_dict_param\(|get_list_param\()param_dict, ([A-Z_]+)", source))
    names |= set(re.findall(r"if ([A-Z_]+) in param_dict", source))
    keys = {getattr(module, n, getattr(constants, n, None)) for n in names}
    assert len(keys) > 15
    inner = {"dtype", "log_level", "lower_precision_safe_modules"}  # read from sub-blocks with the same helper
    assert {k for k in keys if isinstance(k, str)} - inner <= TOP_LEVEL | set(REMOVED)


def test_the_topology_of_our_split_pipelines_has_the_degrees_that_we_mean() -> None:
    pytest.importorskip("deepspeed", reason="deepspeed not installed")
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology  # noqa: F401  what the script imports

    job = TrainJob(model="m", zero_stage=1, pp=2, tp=2, dp=4, gradient_accumulation_steps=16)
    script = training_script(job, MODEL)
    call = script.split("topology=")[1].split(",  #")[0]
    topology = eval(call)  # our own text, in the scope of the import that it names
    assert topology.world_size() == job.n_gpus
    assert [topology.get_dim(axis) for axis in ("pipe", "model", "data")] == [job.pp, job.tp, job.dp]
    # the batch that the pipeline engine asserts: micro x accumulation x data-parallel ranks
    assert training_config(job)["train_batch_size"] == 1 * 16 * topology.get_dim("data")
