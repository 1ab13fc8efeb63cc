"""A config.json becomes a Model: each family's silent defaults, and one sentence for anything that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog import load_catalog, model_from_config, parse_config
from advisor.errors import BadData
from advisor.predict.shapes import shapes_of
from advisor.schema import Model

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
}

COUNTED = json.loads((Path(__file__).parent / "counted_by_transformers.json").read_text())["cases"]
"""Small models of every family with the parameter count of transformers' own modules: an oracle without our code."""


def read(config: dict[str, Any]) -> Model:
    return model_from_config(config, name="m")


def test_llama_8b_has_the_published_count() -> None:
    assert shapes_of(read(LLAMA)).n_params == 8_030_261_248


@pytest.mark.parametrize("case", COUNTED, ids=[c["name"] for c in COUNTED])
def test_every_family_counts_like_transformers(case: dict[str, Any]) -> None:
    model = read(case["config"])
    shapes = shapes_of(model)
    assert shapes.n_params == case["n_params"] + case["n_buffer_params"]
    assert shapes.kv_elements_per_token_layer == case.get("kv_elements", shapes.kv_elements_per_token_layer)
    assert model.n_sliding_layers == case.get("n_sliding_layers", model.n_sliding_layers)


def test_missing_kv_heads_mean_multi_head_attention() -> None:
    assert read({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}).n_kv_heads == 32


def test_tied_embeddings_follow_the_family_then_the_file() -> None:
    assert not read(LLAMA).has_tied_embeddings
    assert read(LLAMA | {"tie_word_embeddings": True}).has_tied_embeddings
    assert read(LLAMA | {"model_type": "gemma"}).has_tied_embeddings


def test_qwen2_has_qkv_biases_but_none_on_the_output() -> None:
    model = read(LLAMA | {"model_type": "qwen2"})
    assert model.has_attention_bias
    assert not model.has_output_bias


def test_llama_attention_bias_covers_the_output() -> None:
    model = read(LLAMA | {"attention_bias": True})
    assert model.has_attention_bias
    assert model.has_output_bias


@pytest.mark.parametrize(
    ("config", "window", "n_sliding"),
    [
        ({"model_type": "mistral"}, 4096, 32),  # the class default when the key is missing
        ({"model_type": "mistral", "sliding_window": None}, 0, 0),
        ({"model_type": "gemma2"}, 4096, 16),
        ({"model_type": "gemma3_text", "sliding_window": 1024, "sliding_window_pattern": 6}, 1024, 27),
        ({"model_type": "gpt_oss", "sliding_window": 128}, 128, 16),
        ({"model_type": "qwen2", "sliding_window": 131072}, 0, 0),
        ({"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 28}, 4096, 4),
        ({"layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 128}, 128, 16),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, 8192, 24),
    ],
)
def test_sliding_layers(config: dict[str, Any], window: int, n_sliding: int) -> None:
    model = read(LLAMA | config)
    assert (model.sliding_window_tokens, model.n_sliding_layers) == (window, n_sliding)


def test_opt_positions_carry_its_offset_of_two() -> None:
    assert (
        read(LLAMA | {"model_type": "opt", "ffn_dim": 16384, "max_position_embeddings": 2048}).n_learned_positions
        == 2050
    )


def test_falcon_heads_and_norms() -> None:
    old = {
        "model_type": "falcon",
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "vocab_size": 65024,
    }
    model = read(old)
    assert (model.n_kv_heads, model.n_norms_per_layer, model.is_parallel_attention, model.d_ff) == (1, 1, True, 18176)
    new = read(
        old | {"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True}
    )
    assert (new.n_kv_heads, new.n_norms_per_layer) == (8, 2)


def test_context_follows_linear_rope_but_not_yarn() -> None:
    assert read(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}}).max_context_tokens == 262144
    assert read(LLAMA | {"rope_scaling": {"type": "yarn", "factor": 40}}).max_context_tokens == 131072


def test_mla_moe_of_deepseek() -> None:
    moe = {
        "model_type": "deepseek_v3",
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
    }
    model = read(LLAMA | moe)
    assert model.mla is not None
    assert model.moe is not None
    assert (model.mla.kv_lora_rank, model.moe.n_dense_layers, model.moe.d_ff_shared) == (512, 3, 2048)
    assert model.moe.n_router_extra_params == 256


def test_every_second_layer_sparse() -> None:
    moe = {"model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = read(LLAMA | moe | {"decoder_sparse_step": 2, "mlp_only_layers": [1]})
    assert model.moe is not None
    assert model.moe.n_dense_layers == 17


@pytest.mark.parametrize(
    ("section", "method", "bits", "group"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8, 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq", 4, 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "gptq", 8, 0),
        ({"quant_method": "mxfp4"}, "mxfp4", 4, 32),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8}}}},
            "compressed-tensors",
            8,
            0,
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "compressed-tensors", 4, 16),
    ],
)
def test_quantised_checkpoints(section: dict[str, Any], method: str, bits: int, group: int) -> None:
    quantization = read(LLAMA | {"quantization_config": section}).quantization
    assert quantization is not None
    assert (quantization.method, quantization.weight_bits, quantization.group_size) == (method, bits, group)


def test_multimodal_configs_are_read_by_their_text_part() -> None:
    parsed = parse_config({"model_type": "gemma3", "text_config": LLAMA | {"model_type": "gemma3_text"}}, name="m")
    assert parsed.model.family == "gemma3_text"
    assert "text part" in parsed.notes[0].text


def test_an_unknown_family_is_read_with_a_warning() -> None:
    parsed = parse_config(LLAMA | {"model_type": "brandnew"}, name="m")
    assert parsed.model.n_layers == 32
    assert parsed.notes[0].level == "warning"
    assert "brandnew" in parsed.notes[0].text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 1e30}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": float("nan")}, "vocab_size"),
        ({"intermediate_size": [1, 2]}, "intermediate_size"),
        ({"num_key_value_heads": 5}, "n_kv_heads"),
        ({"num_attention_heads": 33, "num_key_value_heads": 33}, "head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": 7}, "model_type"),
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "mamba"}, "mamba"),
        ({"layer_types": ["linear_attention"] * 32}, "linear-attention"),
        ({"layer_types": ["sliding_attention"], "sliding_window": 8}, "layer_types"),
        ({"is_encoder_decoder": True}, "decoder-only"),
        ({"text_config": 3}, "text_config"),
        ({"quantization_config": {"quant_method": "magic"}}, "quant_method"),
        ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor"),
        ({"num_experts": 4, "num_experts_per_tok": 8}, "n_experts_per_token"),
        ({"kv_lora_rank": 512}, "qk_nope_head_dim"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_sentence(change: dict[str, Any], named: str) -> None:
    with pytest.raises(BadData) as error:
        read(LLAMA | change)
    text = str(error.value)
    assert named in text
    assert "\n" not in text
    assert len(text) < 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
known_keys = st.sampled_from(
    [
        *LLAMA,
        *("text_config", "quantization_config", "rope_scaling", "layer_types", "sliding_window", "num_experts"),
        *("num_experts_per_tok", "moe_layer_freq", "mlp_only_layers", "kv_lora_rank", "head_dim", "torch_dtype"),
        *("tie_word_embeddings", "attention_bias", "first_k_dense_replace", "n_routed_experts", "decoder_sparse_step"),
        *("mlp_layer_types", "sliding_window_pattern", "rope_parameters", "num_kv_shared_layers", "n_shared_experts"),
        *("attn_config", "ffn_config", "moe_topk", "no_rope_layers", "num_attention_heads_per_layer"),
    ]
)


families = st.sampled_from(["llama", "dbrx", "hunyuan_v1_moe", "smollm3", "cohere2_moe", "exaone_moe", "mistral4"])


@given(st.dictionaries(known_keys | st.text(max_size=12), json_values, max_size=8), st.booleans(), families)
@settings(max_examples=300, deadline=None)
def test_fuzzed_configs_give_a_model_or_one_sentence(
    change: dict[str, Any], on_top_of_llama: bool, family: str
) -> None:
    config = (LLAMA | {"model_type": family} if on_top_of_llama else {}) | change
    message, model = "", None
    try:
        model = read(config)
    except BadData as error:
        message = str(error)
    assert "\n" not in message
    if model is not None:
        assert shapes_of(model).n_params > 0
        json.loads(model.model_dump_json())


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.integers(1, 512), st.integers(1, 5000))
@settings(max_examples=100, deadline=None)
def test_parameters_grow_with_layers(layers: int, kv: int, group: int, d_ff: int, vocab: int) -> None:
    heads = kv * group
    base = SMALL | {"model_type": "llama", "hidden_size": 16 * heads, "num_attention_heads": heads}
    config = base | {"num_key_value_heads": kv, "intermediate_size": d_ff, "vocab_size": vocab}
    small = shapes_of(read(config | {"num_hidden_layers": layers})).n_params
    large = shapes_of(read(config | {"num_hidden_layers": layers + 1})).n_params
    d_model = 16 * heads
    per_layer = 2 * d_model * d_model + 2 * d_model * 16 * kv + 3 * d_model * d_ff + 2 * d_model
    assert large - small == per_layer


GEMMA_3_4B_IT = {
    # as published: sizes that equal transformers' defaults are not written into a nested config
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27},
    "torch_dtype": "bfloat16",
}


def test_a_text_part_without_its_defaults_is_read_like_the_catalogue_s_own_copy() -> None:
    parsed = parse_config(GEMMA_3_4B_IT, name="x")
    own = load_catalog().model("gemma-3-4b")[0]
    same = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_head", "d_ff", "vocab_size", "sliding_window_tokens")
    for field in same:
        assert getattr(parsed.model, field) == getattr(own, field), field
    assert any("leaves out vocab_size, num_attention_heads" in note.text for note in parsed.notes)


def test_llava_names_no_size_at_all() -> None:
    text = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064, "torch_dtype": "float16"}
    parsed = parse_config({"model_type": "llava", "text_config": text}, name="llava-1.5-7b")
    assert (parsed.model.n_layers, parsed.model.d_model, parsed.model.n_kv_heads) == (32, 4096, 32)


@pytest.mark.parametrize(
    "extra", [{"full_attention_interval": 4}, {"mamba_d_state": 16}, {"model_type": "qwen3_next"}, {"conv_L_cache": 3}]
)
def test_hybrid_models_are_refused_under_any_name(extra: dict[str, Any]) -> None:
    config = {
        "model_type": "something_new",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "intermediate_size": 5120,
        "vocab_size": 151936,
    }
    parse_config(config, name="x")
    with pytest.raises(BadData, match="linear-attention"):
        parse_config(config | extra, name="x")


def test_a_rule_over_two_fields_is_one_plain_sentence() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 5,
        "intermediate_size": 100,
        "vocab_size": 1000,
    }
    with pytest.raises(BadData) as caught:
        parse_config(config, name="x")
    assert str(caught.value) == "config.json: n_heads 32 must be a multiple of n_kv_heads 5"
