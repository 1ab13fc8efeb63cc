"""Families with words or layers of their own: published sizes, sliding layers, and one sentence for a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog import model_from_config, parse_config
from advisor.errors import BadData
from advisor.predict.shapes import shapes_of
from advisor.schema import Model

CASES = json.loads((Path(__file__).parent / "counted_by_transformers.json").read_text())["cases"]
CONFIGS: dict[str, dict[str, Any]] = {case["name"]: case["config"] for case in CASES}

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


def read(config: dict[str, Any]) -> Model:
    return model_from_config(config, name="m")


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # billions as the model cards state them; active ones where the card gives them
        ("SmolLM3-3B", 3.08, 0),
        ("glm-4-9b-chat-hf", 9.4, 0),
        ("Seed-OSS-36B", 36, 0),
        ("EXAONE-4.0-32B", 32, 0),
        ("dots.llm1", 142, 14),
        ("Hunyuan-A13B", 80, 13),
        ("AFM-4.5B", 4.6, 0),
        ("Apertus-8B", 8, 0),
        ("Trinity-Mini", 26, 3),
        ("K-EXAONE-236B-A23B", 236, 23),
        ("dbrx-base", 132, 36),
        ("MiniMax-M2", 230, 10),
        ("GLM-4.5-Air", 106, 12),
    ],
)
def test_real_models_have_the_sizes_on_their_cards(name: str, total: float, active: float) -> None:
    shapes = shapes_of(read(CONFIGS[name]))
    assert shapes.n_params / 1e9 == pytest.approx(total, rel=0.011)
    if active:
        # cards round and differ in whether they count the embeddings
        assert shapes.n_active_params / 1e9 == pytest.approx(active, rel=0.13)


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_no_counted_family_needs_a_warning(case: dict[str, Any]) -> None:
    assert [n.text for n in parse_config(case["config"], name="m").notes if n.level == "warning"] == []


ERNIE_4_5_21B_A3B: dict[str, Any] = {
    # the sizes of baidu/ERNIE-4.5-21B-A3B-PT, which are the defaults of transformers' own class
    "model_type": "ernie4_5_moe",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "tie_word_embeddings": True,
}


def test_ernie_names_its_experts_in_its_own_words() -> None:
    model = read(ERNIE_4_5_21B_A3B)
    moe = model.moe
    assert moe is not None
    assert shapes_of(model).n_params == 21_825_437_888
    assert (moe.n_experts, moe.n_experts_per_token, moe.n_shared_experts, moe.d_ff_shared) == (64, 6, 2, 3072)
    assert (moe.n_dense_layers, model.d_head, model.n_kv_heads) == (1, 128, 4)


def test_olmoe_1b_7b_has_the_published_size() -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16}
    experts = {"num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304, "max_position_embeddings": 4096}
    model = read({"model_type": "olmoe"} | sizes | experts)
    assert model.has_qk_norm
    # arXiv:2409.02060, table 1: 6.9B in total, 1.3B active with the input embeddings
    shapes = shapes_of(model)
    assert shapes.n_params == pytest.approx(6.9e9, rel=0.01)
    assert shapes.n_active_params + shapes.embedding_params == pytest.approx(1.3e9, rel=0.02)


@pytest.mark.parametrize(
    ("config", "n_sliding"),
    [
        ({"model_type": "exaone4", "sliding_window_pattern": "LLLG"}, 6),
        ({"model_type": "exaone4", "sliding_window": None, "sliding_window_pattern": None}, 0),
        ({"model_type": "cohere2_moe", "num_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 4}, 3),
        ({"model_type": "granite_swa"}, 6),
        ({"model_type": "dots1", "max_window_layers": 8}, 0),
        ({"model_type": "smollm3", "sliding_window": 128}, 0),
        ({"model_type": "smollm3", "sliding_window": 128, "use_sliding_window": True}, 2),
    ],
)
def test_sliding_layers_without_a_list_of_them(config: dict[str, Any], n_sliding: int) -> None:
    assert read(SIZES | config).n_sliding_layers == n_sliding


def test_sizes_that_differ_by_layer_are_refused() -> None:
    config = SIZES | {"model_type": "hunyuan_v1_moe", "num_experts": 4, "moe_topk": [1, 2] * 4}
    with pytest.raises(BadData, match="'moe_topk' must be the same in all layers, got 2 different"):
        read(config)


def test_layer_types_of_the_mlp_must_name_all_layers() -> None:
    config = SIZES | {"model_type": "hy_v3", "num_experts": 4, "num_experts_per_tok": 2, "mlp_layer_types": ["dense"]}
    with pytest.raises(BadData, match="'mlp_layer_types' must name all 8 layers, got 1"):
        read(config)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gemma4_text"}, "another head size"),
        ({"model_type": "gemma3n_text"}, "reuse the keys and values"),
        ({"model_type": "mimo_v2_flash"}, "another number of heads"),
        ({"model_type": "longcat_flash"}, "two attention blocks"),
        ({"model_type": "xlm-roberta"}, "decoder-only"),
        ({"num_kv_shared_layers": 4}, "reuse the keys and values"),
        ({"use_cla": True}, "reuse the keys and values"),
        ({"block_configs": [{}]}, "layers of different sizes"),
        ({"num_attention_heads_per_layer": [4, 8] * 4}, "another number of heads"),
    ],
)
def test_layers_that_one_set_of_sizes_cannot_describe_are_refused(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadData, match=reason) as error:
        read(SIZES | {"model_type": "brandnew"} | change)
    assert "\n" not in str(error.value)


def test_olmo_says_how_many_norm_weights_are_not_there() -> None:
    # transformers 5.23.0 counts 6,888,095,744 for the 7B sizes: its norms are plain functions
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    parsed = parse_config(
        sizes | {"model_type": "olmo", "vocab_size": 50304, "max_position_embeddings": 2048}, name="m"
    )
    assert shapes_of(parsed.model).n_params - 266_240 == 6_888_095_744
    assert "266240" in parsed.notes[0].text


@pytest.mark.parametrize(
    ("rope", "context", "kind"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}}, 8192, "yarn"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 4096, ""),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 8192, "linear"),
        ({"rope_parameters": {"full_attention": {"rope_type": "llama3", "factor": 8.0}}}, 4096, "llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}, "model_type": "gemma3_text"}, 4096, "linear"),
    ],
)
def test_rotary_positions_by_old_and_new_words(rope: dict[str, Any], context: int, kind: str) -> None:
    model = read(SIZES | {"model_type": "llama"} | rope)
    assert (model.max_context_tokens, model.rope_scaling) == (context, kind)


def test_a_text_part_of_mistral_may_leave_its_sizes_out() -> None:
    small = parse_config({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}, name="m").model
    assert small.mla is not None
    # Mistral Small 4: 119B
    assert shapes_of(small).n_params == 118_972_826_624
    ministral = read({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}})
    assert shapes_of(ministral).n_params == 8_489_553_920
