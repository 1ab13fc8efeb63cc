"""What the engine releases do, against tables made by hand from their source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog.hf_layers import EXPERT_COUNTS
from advisor.errors import BadData, UnknownName
from advisor.schema import EngineFacts
from advisor.schema.engine import version_key

RELEASES = ["0.9.2", "0.11.2", "0.14.1", "0.18.1", "0.20.2", "0.22.1", "0.24.0", "0.26.0", "0.29.0", "0.33.0"]


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_that_was_read_is_exact_and_cited(make: Any, version: str) -> None:
    facts = make.facts(version)
    assert facts.is_exact
    for field in ("batch_defaults", "gpu_memory_utilization", "has_async_scheduling", "n_concurrent_batches"):
        assert "vllm/" in facts.cite[field] or "no such option" in facts.cite[field]
    assert set(facts.flags).isdisjoint({"--nonsense"})
    assert set(facts.quantizes_on_load) <= set(facts.quantizations)


def test_a_release_between_two_takes_the_earlier_one(make: Any) -> None:
    assert make.facts("0.27.1").read_version == "0.26.0"
    assert not make.facts("0.27.1").is_exact
    assert make.facts("v0.26.0").version == "0.26.0"


@pytest.mark.parametrize("version", ["0.8.5", "0.34.0", "1.0", "latest", "", "0.26.0; rm", "9" * 50])
def test_other_versions_name_the_known_ones(make: Any, version: str) -> None:
    with pytest.raises(UnknownName, match=r"Releases known: 0\.9\.2"):
        make.facts(version)


def test_a_broken_table_is_bad_data() -> None:
    with pytest.raises(BadData, match="main_cuda"):
        EngineFacts.from_table({"name": "vllm", "release": [{"version": "1.0"}]}, "1.0")


# By hand from get_batch_defaults; tests/engines asks the installed vLLM's own function the same question.
@pytest.mark.parametrize(
    ("version", "name", "capability", "gib", "entry", "tokens", "seqs"),
    [
        ("0.26.0", "NVIDIA H100 80GB HBM3", "9.0", 79.18, "llm_class", 16384, 1024),
        ("0.26.0", "NVIDIA H100 80GB HBM3", "9.0", 79.18, "api_server", 8192, 1024),
        ("0.26.0", "NVIDIA A100-SXM4-80GB", "8.0", 79.14, "api_server", 2048, 256),
        ("0.26.0", "NVIDIA A100-SXM4-80GB", "8.0", 79.14, "llm_class", 8192, 256),
        ("0.26.0", "NVIDIA L40S", "8.9", 44.4, "api_server", 2048, 256),
        ("0.26.0", "NVIDIA B200", "10.0", 178.4, "api_server", 8192, 1024),
        ("0.33.0", "NVIDIA B200", "10.0", 178.4, "api_server", 16384, 1024),
        ("0.33.0", "NVIDIA H200", "9.0", 139.7, "api_server", 8192, 1024),
        ("0.33.0", "NVIDIA GB10", "12.1", 119.7, "api_server", 2048, 256),
        ("0.26.0", "NVIDIA GB10", "12.1", 119.7, "api_server", 8192, 1024),
    ],
)
def test_default_limits(
    make: Any, version: str, name: str, capability: str, gib: float, entry: Any, tokens: int, seqs: int
) -> None:
    facts, memory_bytes = make.facts(version), gib * 2**30
    assert facts.max_num_batched_tokens_default(memory_bytes, name, entry, compute_capability=capability) == tokens
    assert facts.max_num_seqs_default(memory_bytes, name, entry, compute_capability=capability) == seqs


def test_short_contexts_cap_the_token_budget(make: Any) -> None:
    facts = make.facts()
    assert facts.max_num_batched_tokens_default(85e9, "h100", max_num_seqs=4, max_model_len=512) == 2048
    assert facts.max_num_seqs_default(85e9, "h100", max_num_batched_tokens=64) == 64


@pytest.mark.parametrize(
    ("version", "pp", "architecture", "is_moe", "executor", "n"),
    [
        ("0.9.2", 1, "LlamaForCausalLM", False, "mp", 1),
        ("0.11.2", 4, "LlamaForCausalLM", False, "mp", 4),
        ("0.14.1", 1, "LlamaForCausalLM", False, "mp", 2),
        ("0.14.1", 2, "LlamaForCausalLM", False, "mp", 2),
        ("0.22.1", 1, "Qwen3ForCausalLM", False, "mp", 2),
        ("0.22.1", 2, "Qwen3ForCausalLM", False, "mp", 2),
        ("0.24.0", 2, "LlamaForCausalLM", False, "mp", 3),
        ("0.24.0", 2, "GemmaForCausalLM", False, "mp", 2),
        ("0.26.0", 2, "GemmaForCausalLM", False, "mp", 3),
        ("0.26.0", 2, "MixtralForCausalLM", True, "mp", 2),
        ("0.26.0", 2, "Qwen2MoeForCausalLM", True, "mp", 3),
        ("0.26.0", 1, "MixtralForCausalLM", True, "mp", 2),
        ("0.26.0", 1, "LlamaForCausalLM", False, "ray", 1),
        ("0.33.0", 2, "MixtralForCausalLM", True, "ray", 3),
    ],
)
def test_batches_in_flight(
    make: Any, version: str, pp: int, architecture: str, is_moe: bool, executor: str, n: int
) -> None:
    facts = make.facts(version)
    assert facts.n_concurrent_batches(pp, is_moe, architecture=architecture, executor=executor) == n


def test_graph_sizes(make: Any) -> None:
    facts = make.facts("0.26.0")
    assert facts.graph_capture_sizes(4, 8192) == (1, 2, 4, 8)
    assert facts.graph_capture_sizes(256, 8192)[-2:] == (496, 512)
    assert facts.graph_capture_sizes(256, 100)[-2:] == (96, 100)
    assert make.facts("0.11.2").graph_capture_sizes(256, 100)[-1] == 96
    assert make.facts("0.9.2").graph_capture_sizes(4, 8192)[-1] == 512
    assert make.facts("0.33.0").graph_capture_sizes(1024, 16384, "10.0")[-1] == 1024
    assert 10 in make.facts("0.33.0").graph_capture_sizes(10, 8192)


@given(version=st.sampled_from(RELEASES), seqs=st.integers(1, 2000), tokens=st.integers(1, 20000))
def test_graph_sizes_ascend_within_the_limits(make: Any, version: str, seqs: int, tokens: int) -> None:
    sizes = make.facts(version).graph_capture_sizes(seqs, tokens)
    assert list(sizes) == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] <= min(tokens, 1024)


def test_all_reduce_limits(make: Any) -> None:
    mib = 2**20
    facts = make.facts("0.26.0")
    assert facts.custom_all_reduce_max_bytes("9.0", 8) == mib // 4
    assert facts.custom_all_reduce_max_bytes("9.0", 8, has_multicast=False) == 8 * mib
    assert facts.custom_all_reduce_max_bytes("9.0", 4) == 8 * mib
    assert facts.custom_all_reduce_max_bytes("8.0", 8) == 8 * mib
    assert facts.custom_all_reduce_max_bytes("8.9", 4, has_nvlink=False) == 0
    assert facts.custom_all_reduce_max_bytes("8.9", 2, has_nvlink=False) == 8 * mib
    assert facts.custom_all_reduce_max_bytes("9.0", 3) == 0
    assert facts.symm_mem_max_bytes("9.0", 8) == 64 * mib
    assert make.facts("0.9.2").custom_all_reduce_max_bytes("9.0", 8) == 8 * mib
    assert facts.flashinfer_all_reduce_max_bytes("9.0", 2) == 0
    assert make.facts("0.33.0").flashinfer_all_reduce_max_bytes("9.0", 8) == mib // 2


def test_the_start_up_records_tell_whether_graphs_are_subtracted(make: Any, root: Path) -> None:
    """The engine's own figures: the KV cache is what the memory share leaves, with or without the graphs (0.5-1 GB)."""
    starts: dict[str, dict[str, Any]] = {}
    for path in sorted((root / "data" / "runs").glob("vllm-*.jsonl")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            if (record.get("startup") or {}).get("cuda_graph_bytes"):
                starts.setdefault(record["run_id"], record)
    assert len(starts) >= 3
    for record in starts.values():
        startup, config = record["startup"], record["hf_config"]
        facts = make.facts(record["engine_version"])
        is_moe = any(config.get(key) for key in EXPERT_COUNTS)
        subtracts = facts.subtracts_graph_memory(architecture=config["architectures"][0], is_moe=is_moe)
        left = record["gpu_memory_utilization"] * startup["device_memory_bytes"]
        left -= startup["weights_bytes"] + startup["peak_activation_bytes"] + startup["non_torch_bytes"]
        graphs = startup["cuda_graph_bytes"]
        # What is reserved is an estimate made before the capture, so the nearer of the two is looked for.
        gap_with, gap_without = abs(left - graphs - startup["kv_cache_bytes"]), abs(left - startup["kv_cache_bytes"])
        assert (gap_with < gap_without) == subtracts, record["run_id"]


@pytest.mark.parametrize(
    ("version", "architecture", "is_moe", "subtracts"),
    [
        ("0.18.1", "LlamaForCausalLM", False, False),
        ("0.20.2", "LlamaForCausalLM", False, True),
        ("0.26.0", "LlamaForCausalLM", False, False),
        ("0.26.0", "MixtralForCausalLM", True, True),
        ("0.33.0", "LlamaForCausalLM", False, True),
    ],
)
def test_graph_memory(make: Any, version: str, architecture: str, is_moe: bool, subtracts: bool) -> None:
    assert make.facts(version).subtracts_graph_memory(architecture=architecture, is_moe=is_moe) == subtracts


@given(st.lists(st.integers(0, 99), min_size=2, max_size=4))
def test_versions_order_like_their_numbers(numbers: list[int]) -> None:
    assert version_key(".".join(map(str, numbers)))[: len(numbers)] == tuple(numbers)
