"""The launch lines and the release facts against the real vLLM, on a machine without a GPU.

vLLM asks its platform for a device before it builds its parser; here it is told that the platform is the CPU. The
parser, the default limits, the batches in flight and the graph sizes are then vLLM's own code, asked about real cards.
"""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from advisor.emit import vllm_serve_args
from advisor.emit.names import model_argument
from advisor.schema import Deployment, EngineFacts, Gpu, Model, Moe, Source

pytestmark = pytest.mark.engines
ENGINES = Path(__file__).resolve().parents[2] / "data" / "engines" / "vllm.toml"
GIB = 2**30
CARDS = {
    "h100-sxm-80gb": ("NVIDIA H100 80GB HBM3", "9.0", 79.18 * GIB),
    "a100-sxm-80gb": ("NVIDIA A100-SXM4-80GB", "8.0", 79.14 * GIB),
    "l4": ("NVIDIA L4", "8.9", 22.0 * GIB),
    "b200": ("NVIDIA B200", "10.0", 178.4 * GIB),
    "h200": ("NVIDIA H200", "9.0", 139.7 * GIB),
}


@pytest.fixture(scope="module")
def vllm() -> Any:
    """The installed vLLM with the CPU as its platform."""
    platforms = pytest.importorskip("vllm.platforms", reason="vllm is not installed: make test-engines")
    from vllm.platforms.cpu import CpuPlatform

    platforms._current_platform = CpuPlatform()
    import vllm

    return vllm


@pytest.fixture(scope="module")
def facts(vllm: Any) -> EngineFacts:
    """What the data file says of the installed release."""
    version = importlib.metadata.version("vllm")
    return EngineFacts.from_table(tomllib.loads(ENGINES.read_text()), version)


@pytest.fixture(scope="module")
def parse(vllm: Any) -> Any:
    """Parse a launch line as `vllm serve` does."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="command"))
    return lambda args: parser.parse_args(args[1:])


def card(name: str) -> Gpu:
    label, capability, memory_bytes = CARDS[name]
    return Gpu(
        name=name,
        label=label,
        vendor="nvidia",
        family="any",
        compute_capability=capability,
        memory_bytes=memory_bytes,
        device_memory_bytes=memory_bytes,
        memory_bandwidth_bytes_per_s=1e12,
        peak_flops_per_s={"bf16": 1e14},
        board_power_w=400,
        idle_power_w=40,
        link="nvlink",
        link_bytes_per_s=1e11,
        host_link_bytes_per_s=1e10,
        sources=(Source(field="*", title="test"),),
    )


def model(is_moe: bool) -> Model:
    moe = Moe(n_experts=8, n_experts_per_token=2, d_ff_expert=14336) if is_moe else None
    return Model(
        name="m",
        family="llama",
        hf_id="org/model it's; $(x)",
        n_layers=32,
        d_model=4096,
        n_heads=32,
        n_kv_heads=8,
        d_head=128,
        d_ff=14336,
        vocab_size=128256,
        max_context_tokens=131072,
        moe=moe,
    )


PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tensor parallel": {"tp": 8, "max_num_seqs": 32, "max_num_batched_tokens": 2048, "max_model_len": 100_000},
    "replicas": {"tp": 2, "dp": 4, "gpu_memory_utilization": 0.85, "prefix_caching": True},
    "fp8": {"weight_dtype": "fp8", "kv_dtype": "fp8"},
    "awq": {"weight_dtype": "awq-int4"},
    "gptq": {"weight_dtype": "gptq-int4"},
    "mxfp4": {"weight_dtype": "mxfp4"},
    "int8": {"weight_dtype": "int8"},
    "half": {"weight_dtype": "fp16"},
    "nodes": {"tp": 8, "pp": 2, "n_nodes": 2},
    "experts": {"tp": 2, "dp": 4, "ep": 8},
    "eager": {"enforce_eager": True, "kv_block_tokens": 32},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("gpu", CARDS)
def test_the_real_parser_reads_back_the_plan(parse: Any, facts: EngineFacts, plan: str, gpu: str) -> None:
    fields = {"model": "m", "gpu": gpu} | PLANS[plan]
    deployment = Deployment.model_validate(fields)
    subject = model(is_moe=deployment.ep > 1)
    parsed = parse(vllm_serve_args(deployment, subject, card(gpu), facts))
    assert parsed.model_tag == model_argument(subject)
    assert parsed.tensor_parallel_size == deployment.tp
    assert parsed.pipeline_parallel_size == deployment.pp
    assert parsed.data_parallel_size == deployment.dp
    assert parsed.max_model_len == deployment.max_model_len
    assert parsed.enforce_eager == deployment.enforce_eager
    assert parsed.enable_expert_parallel == (deployment.ep > 1)
    assert parsed.gpu_memory_utilization == pytest.approx(deployment.gpu_memory_utilization)
    assert (parsed.kv_cache_dtype == "fp8") == (deployment.kv_dtype == "fp8")
    assert (parsed.distributed_executor_backend == "ray") == (deployment.n_nodes > 1)
    caches = facts.prefix_caching if parsed.enable_prefix_caching is None else parsed.enable_prefix_caching
    assert caches == deployment.prefix_caching


def test_the_real_parser_refuses_what_does_not_exist(parse: Any) -> None:
    with pytest.raises(SystemExit):
        parse(["vllm", "serve", "x", "--no-such-option", "1"])


def test_options_that_the_facts_list_exist(parse: Any, facts: EngineFacts) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    known = {option for action in parser._actions for option in action.option_strings}
    assert set(facts.flags) <= known
    assert known.isdisjoint(facts.removed_flags)


def test_names_that_the_facts_list_exist(vllm: Any, facts: EngineFacts) -> None:
    from typing import get_args

    from vllm.config.cache import CacheDType
    from vllm.model_executor.layers.quantization import QuantizationMethods

    assert set(facts.kv_dtypes) == set(get_args(CacheDType))
    assert set(facts.quantizations) == set(get_args(QuantizationMethods))


@pytest.mark.parametrize("gpu", CARDS)
def test_default_limits_are_the_engine_s_own(
    vllm: Any, facts: EngineFacts, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine import arg_utils
    from vllm.usage.usage_lib import UsageContext

    name, capability, memory_bytes = CARDS[gpu]
    major, minor = map(int, capability.split("."))
    platform = SimpleNamespace(
        get_device_total_memory=lambda: memory_bytes,
        get_device_name=lambda: name,
        is_tpu=lambda: False,
        is_cpu=lambda: False,
        is_device_capability=lambda wanted: tuple(wanted) == (major, minor),
    )
    monkeypatch.setattr(arg_utils, "current_platform", platform)
    tokens, seqs = arg_utils.EngineArgs.get_batch_defaults(1)
    for entry, context in (("api_server", UsageContext.OPENAI_API_SERVER), ("llm_class", UsageContext.LLM_CLASS)):
        ours: Any = entry
        theirs = (tokens[context], seqs[context])
        about = (memory_bytes, name, ours)
        assert (
            facts.max_num_batched_tokens_default(memory_bytes, name, ours, compute_capability=capability) == theirs[0]
        )
        assert facts.max_num_seqs_default(*about, compute_capability=capability) == theirs[1]


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("is_moe", [False, True])
def test_batches_in_flight_are_the_engine_s_own(vllm: Any, facts: EngineFacts, pp: int, is_moe: bool) -> None:
    from vllm.config import VllmConfig

    if not hasattr(VllmConfig, "max_concurrent_batches"):
        pytest.skip(f"vllm {facts.version} keeps this number in its executors")
    architecture = "MixtralForCausalLM" if is_moe else "LlamaForCausalLM"
    stand_in = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=pp),
        scheduler_config=SimpleNamespace(async_scheduling=facts.schedules_async(pp)),
        use_v2_model_runner=facts.uses_v2_runner(architecture=architecture, is_moe=is_moe),
    )
    theirs = VllmConfig.max_concurrent_batches.fget(stand_in)
    assert facts.n_concurrent_batches(pp, is_moe, architecture=architecture) == theirs


@pytest.mark.parametrize("is_moe", [False, True])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"])
def test_the_model_runner_is_the_engine_s_own_choice(
    vllm: Any, facts: EngineFacts, architecture: str, is_moe: bool
) -> None:
    from vllm.config import VllmConfig

    if not hasattr(VllmConfig, "_is_default_v2_model_runner_model"):
        pytest.skip(f"vllm {facts.version} has no such choice")
    described = SimpleNamespace(
        runner_type="generate", is_hybrid=False, is_attention_free=False, architectures=[architecture], is_moe=is_moe
    )
    theirs = VllmConfig._is_default_v2_model_runner_model(SimpleNamespace(model_config=described))
    assert facts.uses_v2_runner(architecture=architecture, is_moe=is_moe) == theirs


@pytest.mark.parametrize("seqs", [1, 3, 10, 64, 128, 256, 300, 1024])
@pytest.mark.parametrize("tokens", [8, 100, 250, 300, 2048, 8192])
def test_graph_sizes_are_the_engine_s_own(vllm: Any, facts: EngineFacts, seqs: int, tokens: int) -> None:
    from vllm.config import CUDAGraphMode, VllmConfig

    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        max_cudagraph_capture_size=None,
        cudagraph_capture_sizes=None,
        pass_config=SimpleNamespace(enable_sp=False),
        post_init_cudagraph_sizes=lambda: None,
        compile_sizes=[],
    )
    stand_in = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=False),
        compilation_config=compilation,
        scheduler_config=SimpleNamespace(max_num_seqs=seqs, max_num_batched_tokens=tokens),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        num_speculative_tokens=0,
        uniform_decode_query_len=1,
        performance_mode="balanced",
        speculative_config=None,
    )
    VllmConfig._set_cudagraph_sizes(stand_in)
    assert facts.graph_capture_sizes(seqs, tokens) == tuple(compilation.cudagraph_capture_sizes)
