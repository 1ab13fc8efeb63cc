"""Any Hugging Face config.json of a decoder-only transformer as a `Model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from advisor.catalog.hf_defaults import with_defaults
from advisor.catalog.hf_families import ALIASES, FAMILIES, UNKNOWN, Family
from advisor.catalog.hf_fields import Fields
from advisor.catalog.hf_layers import moe_of, sliding_of
from advisor.catalog.hf_nested import with_flat_sizes
from advisor.catalog.hf_quant import quantization_of
from advisor.catalog.hf_unsupported import refuse_unsupported
from advisor.errors import BadData, printable
from advisor.schema import Mla, Model, Note, first_error
from advisor.schema.model import MAX_DIM

_TEXT_SECTIONS = ("text_config", "llm_config", "language_config")
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
_DEFAULT_CONTEXT_TOKENS = 2048
"""What vLLM assumes when no field names the context length (0.26.0, config/model.py)."""
_FIXED_CONTEXT_ROPE = frozenset({"", "default", "llama3", "yarn", "su", "longrope", "mrope", "deepseek_yarn"})
"""Rope types whose max_position_embeddings already is the extended context; others multiply it by their factor."""


@dataclass(frozen=True)
class ParsedModel:
    """A model and what had to be assumed to read it."""

    model: Model
    notes: tuple[Note, ...] = ()


def model_from_config(config: Mapping[str, Any], *, name: str, hf_id: str = "") -> Model:
    """Return the `Model` that a config.json describes; BadData names the first field that cannot be used."""
    return parse_config(config, name=name, hf_id=hf_id).model


def parse_config(config: Mapping[str, Any], *, name: str, hf_id: str = "", where: str = "config.json") -> ParsedModel:
    """Return the `Model` that a config.json describes, with a note for each assumption.

    `where` names the document in errors. Multimodal configs are read by their text part.
    Errors: BadData when a size is missing, has the wrong type or is out of bounds, or the architecture is one that
    this package has no laws for (encoders, state-space and linear-attention layers, attention that differs by layer).
    """
    if not isinstance(config, Mapping):
        raise BadData(where, "a config.json must hold one JSON object")
    notes: list[Note] = []
    outer = Fields(config, where)
    fields, family_name = _text_part(outer, notes)
    family = _family(family_name, fields, notes)
    try:
        model = _build(fields, outer, family_name, family, notes, name=name, hf_id=hf_id)
    except ValidationError as error:
        raise BadData(where, first_error(error)) from None
    return ParsedModel(model, tuple(notes))


def _text_part(outer: Fields, notes: list[Note]) -> tuple[Fields, str]:
    fields = outer
    family = outer.text("model_type")
    for key in _TEXT_SECTIONS:
        if outer.section(key) is not None:
            values, filled = with_defaults(outer.raw(key))
            fields = Fields(values, outer.where)
            family = fields.text("model_type") or family
            notes.append(Note(text=f"Read the text part ('{key}'); the other modalities' weights are not counted."))
            if filled:
                text = f"'{key}' leaves out {', '.join(filled)}: taken from the defaults of transformers' {family}."
                notes.append(Note(text=text))
            break
    if family in ("deepseek_v32", "glm_moe_dsa"):
        notes.append(Note(level="warning", text="The sparse-attention indexer is not modelled: read like DeepSeek-V3."))
    name = ALIASES.get(family, family)
    return with_flat_sizes(name, fields), name


def _family(name: str, fields: Fields, notes: list[Note]) -> Family:
    refuse_unsupported(name, fields)
    if name in FAMILIES:
        return FAMILIES[name]
    shown = f"model_type '{printable(name)}' is unknown" if name else "model_type is missing"
    text = f"{shown}: read like Llama by the common field names; check the parameter count."
    notes.append(Note(level="warning", text=text))
    return UNKNOWN


def _build(
    fields: Fields, outer: Fields, family_name: str, family: Family, notes: list[Note], *, name: str, hf_id: str
) -> Model:
    d_model = fields.integer("hidden_size", "n_embd", "n_embed", "d_model", low=1, high=MAX_DIM)
    n_layers = fields.integer("num_hidden_layers", "n_layer", "n_layers", "num_layers", low=1, high=2000)
    n_heads = fields.integer("num_attention_heads", "n_head", "n_heads", low=1, high=65536)
    vocab_size = fields.integer("vocab_size", "padded_vocab_size", low=1, high=10**8)
    if fields.integer("word_embed_proj_dim", low=1, high=MAX_DIM, default=d_model) != d_model:
        raise BadData(fields.where, f"'word_embed_proj_dim' must equal 'hidden_size' ({d_model})")
    family = _with_layout(family_name, family, fields)
    n_kv_heads = _n_kv_heads(fields, family_name, family, n_heads)
    mla = _mla(fields)
    d_head = _d_head(fields, family, d_model, n_heads, mla)
    moe = moe_of(fields, family_name, family, n_layers)
    window, n_sliding = sliding_of(fields, family_name, family, n_layers)
    context = _context_tokens(fields, family_name, notes)
    has_qk_norm = family.has_qk_norm
    if family.qk_norm_field:
        has_qk_norm = fields.boolean(family.qk_norm_field, has_qk_norm)
    has_head_bias = fields.boolean(family.head_bias_field, False) if family.head_bias_field else family.has_head_bias
    qkv_bias, output_bias = _attention_biases(fields, family)
    extra = (vocab_size if has_head_bias else 0) + family.n_activation_params * n_layers
    if has_qk_norm and family.is_qk_norm_over_all_heads:
        # `has_qk_norm` stands for one vector of d_head for q and one for k
        extra += (n_heads + n_kv_heads - 2) * d_head * n_layers
    if mla is not None and qkv_bias:
        # one bias after each compression and one after the output; the decompressing matrices have none
        extra += (mla.q_lora_rank + mla.kv_lora_rank + mla.qk_rope_head_dim + d_model) * n_layers
    if family.has_attention_gate:
        extra += d_model * n_heads * d_head * n_layers
        notes.append(Note(text="The gate of the attention's output is counted, but neither sharded nor quantised."))
    if family_name == "olmo":
        n_weights = d_model * (2 * n_layers + 1)
        notes.append(Note(text=f"OLMo's norms hold no weights: the {n_weights} counted for them are not there."))
    architectures = fields.texts("architectures") or outer.texts("architectures")
    return Model(
        name=name,
        family=family_name or "unknown",
        architecture=architectures[0] if architectures else "",
        hf_id=hf_id,
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_heads if mla else n_kv_heads,
        d_head=d_head,
        d_ff=_d_ff(fields, family_name, family, d_model),
        vocab_size=vocab_size,
        max_context_tokens=context,
        rope_scaling=_rope_scaling(fields),
        is_gated_mlp=family.is_gated_mlp,
        has_tied_embeddings=fields.boolean(
            "tie_word_embeddings", outer.boolean("tie_word_embeddings", family.has_tied_embeddings)
        ),
        has_attention_bias=qkv_bias,
        has_output_bias=output_bias,
        has_mlp_bias=fields.boolean(family.mlp_bias_field, family.has_mlp_bias)
        if family.mlp_bias_field
        else family.has_mlp_bias,
        has_qk_norm=has_qk_norm,
        has_norm_bias=family.has_norm_bias,
        n_norms_per_layer=family.n_norms_per_layer,
        has_embedding_norm=family.has_embedding_norm,
        n_learned_positions=context + family.position_offset if family.position_offset >= 0 else 0,
        is_parallel_attention=family.is_parallel,
        sliding_window_tokens=window,
        n_sliding_layers=n_sliding,
        has_attention_sinks=family.has_attention_sinks,
        mla=mla,
        moe=moe,
        quantization=quantization_of(outer if outer.has("quantization_config") else fields),
        native_dtype=_dtype(fields, outer, notes),
        n_extra_params=extra,
    )


def _with_layout(name: str, family: Family, fields: Fields) -> Family:
    """Return the family with the residual layout that its flags choose: one norm feeds both branches, or two."""
    if name == "falcon":
        is_new = _is_new_falcon(fields)
        is_parallel = is_new or fields.boolean("parallel_attn", True)
        n_norms = fields.integer("num_ln_in_parallel_attn", low=1, high=2, default=2 if is_new else 1)
        return replace(family, is_parallel=is_parallel, n_norms_per_layer=n_norms if is_parallel else 2)
    if name == "stablelm" and fields.boolean("use_parallel_residual", False):
        return replace(family, is_parallel=True, n_norms_per_layer=1)
    if name == "hyperclovax" and not fields.boolean("use_post_norm", True):
        return replace(family, n_norms_per_layer=2)
    if name == "gpt_neox":
        return replace(family, is_parallel=fields.boolean("use_parallel_residual", True))
    return family


def _is_new_falcon(fields: Fields) -> bool:
    # the first Falcon-40B files have no switch, but name their KV heads
    return fields.boolean("new_decoder_architecture", fields.has("n_head_kv"))


def _n_kv_heads(fields: Fields, name: str, family: Family, n_heads: int) -> int:
    if name in ("falcon", "gpt_bigcode"):
        if name == "falcon" and _is_new_falcon(fields):
            return fields.integer("num_kv_heads", "n_head_kv", low=1, high=65536, default=n_heads)
        return 1 if fields.boolean("multi_query", True) else n_heads
    names = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads", "multi_query_group_num")
    return fields.integer(*names, low=1, high=65536, default=family.n_kv_heads or n_heads)


def _mla(fields: Fields) -> Mla | None:
    if not fields.has("kv_lora_rank"):
        return None
    return Mla(
        q_lora_rank=fields.integer("q_lora_rank", low=0, high=MAX_DIM, default=0),
        kv_lora_rank=fields.integer("kv_lora_rank", low=1, high=MAX_DIM),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", low=1, high=65536),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim", low=1, high=65536),
        v_head_dim=fields.integer("v_head_dim", low=1, high=65536),
    )


def _d_head(fields: Fields, family: Family, d_model: int, n_heads: int, mla: Mla | None) -> int:
    if mla is not None:
        return mla.qk_nope_head_dim + mla.qk_rope_head_dim
    names = ("head_dim", "attention_head_dim", "kv_channels")
    if fields.has(*names):
        return fields.integer(*names, low=1, high=65536)
    if family.d_head and fields.is_absent("head_dim"):
        return family.d_head
    if d_model % n_heads:
        raise BadData(
            fields.where, f"'head_dim' is missing and 'hidden_size' {d_model} is no multiple of the {n_heads} heads"
        )
    return d_model // n_heads


def _d_ff(fields: Fields, name: str, family: Family, d_model: int) -> int:
    names: tuple[str, ...] = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
    if name == "llama4_text":
        # its dense layers have a size of their own; `intermediate_size` is one expert's
        names = ("intermediate_size_mlp", *names)
    elif name == "cohere2_moe":
        names = ("prefix_dense_intermediate_size", *names)
    elif name == "solar_open":
        # no layer is dense, and its files may leave the size out
        names = (*names, "moe_intermediate_size")
    default = d_model * family.d_ff_per_d_model or None
    return fields.integer(*names, low=1, high=MAX_DIM, default=default)


def _attention_biases(fields: Fields, family: Family) -> tuple[bool, bool]:
    if not family.qkv_bias_field:
        return family.has_qkv_bias, family.has_output_bias
    switch = fields.boolean(family.qkv_bias_field, family.has_qkv_bias)
    if family.output_bias_field:
        return switch, fields.boolean(family.output_bias_field, family.has_output_bias)
    return switch, switch if family.bias_field_covers_output else family.has_output_bias


def _rope(fields: Fields) -> Fields | None:
    """Return the description of the rotary positions, of the full layers where sliding ones have their own."""
    rope = fields.section("rope_scaling") or fields.section("rope_parameters")
    if rope is not None and isinstance(rope.raw("full_attention"), Mapping):
        rope = rope.section("full_attention")
    return rope


def _rope_scaling(fields: Fields) -> str:
    """Return the kind of RoPE scaling, empty where positions are used as they are."""
    rope = _rope(fields)
    kind = "" if rope is None else rope.text("rope_type", "type")
    return "" if kind == "default" else kind[:40]


def _context_tokens(fields: Fields, name: str, notes: list[Note]) -> int:
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
    if not fields.has(*names):
        notes.append(Note(text=f"No field names the context length: {_DEFAULT_CONTEXT_TOKENS} tokens assumed."))
        return _DEFAULT_CONTEXT_TOKENS
    context = fields.integer(*names, low=1, high=10**9)
    rope = _rope(fields)
    if rope is None:
        return context
    kind = rope.text("rope_type", "type")
    if kind == "yarn" and rope.has("original_max_position_embeddings"):
        # as vLLM 0.26.0 does: Qwen's files state what it was before
        context = rope.integer("original_max_position_embeddings", low=1, high=10**9)
    elif kind in _FIXED_CONTEXT_ROPE or name.startswith("gemma3"):
        # Gemma 3 states the extended context, whatever its rope type
        return context
    return min(int(context * rope.number("factor", low=1, high=1e6, default=1)), 10**9)


def _dtype(fields: Fields, outer: Fields, notes: list[Note]) -> str:
    text = fields.text("torch_dtype", "dtype") or outer.text("torch_dtype", "dtype", default="bfloat16")
    dtype = _DTYPES.get(text.removeprefix("torch."))
    if dtype is None:
        notes.append(Note(level="warning", text=f"dtype '{printable(text)}' is unknown: bfloat16 assumed."))
        return "bf16"
    return dtype
