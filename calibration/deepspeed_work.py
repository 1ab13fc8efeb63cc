"""Arithmetic that DeepSpeed records need: sizes and FLOPs of Llama-like models (standard library only)."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def llama_dims(config: Config) -> dict[str, int]:
    """Return the sizes of a Llama-like config.json, its parameters included."""
    d, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads, d_ff = int(config.get("num_key_value_heads") or heads), int(config["intermediate_size"])
    d_head, layers = int(config.get("head_dim") or d // heads), int(config["num_hidden_layers"])
    vocab, tied = int(config["vocab_size"]), bool(config.get("tie_word_embeddings"))
    attention = 2 * d * heads * d_head + 2 * d * kv_heads * d_head
    n_params = layers * (attention + 3 * d * d_ff + 2 * d) + d + vocab * d * (1 if tied else 2)
    return {
        "d_model": d,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "d_head": d_head,
        "d_ff": d_ff,
        "vocab_size": vocab,
        "n_embedding_params": vocab * d,
        "is_tied": int(tied),
        "n_params": n_params,
    }


def train_flops_per_token(config: Config, sequence_length: int) -> float:
    """Return the model FLOPs of one trained token: 6 x matrix parameters + 6 x layers x length x attention width.

    Causal attention costs 2 x length x width a token and layer forward (half of the full square), twice that
    backward. Recomputed activations do not count: they are not the model's work.
    """
    s = llama_dims(config)
    matrices = s["n_params"] - (0 if s["is_tied"] else s["n_embedding_params"])
    return 6.0 * matrices + 6.0 * s["n_layers"] * sequence_length * s["n_heads"] * s["d_head"]
