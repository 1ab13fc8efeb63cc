"""Exact parameter counts of a decoder-only transformer, component by component."""

from __future__ import annotations


def attention_params(
    d_model: int,
    n_heads: int,
    n_kv_heads: int,
    d_head: int,
    *,
    has_qkv_bias: bool = False,
    has_output_bias: bool = False,
) -> tuple[int, int]:
    """Return (matrix, bias) parameters of one attention block with grouped queries.

    matrices: ``d_model * d_head * (n_heads + 2 n_kv_heads)`` for q, k, v and ``n_heads * d_head * d_model`` for the
    output; biases: one per output element where the architecture has them.

    Reference: Ainslie et al. 2023, arXiv:2305.13245 (grouped-query attention).

    >>> attention_params(4096, 32, 8, 128)[0]  # Llama-3.1-8B: q 16.8M + k, v 4.2M each + o 16.8M
    41943040
    """
    qkv = d_head * (n_heads + 2 * n_kv_heads)
    matrix = d_model * qkv + n_heads * d_head * d_model
    bias = (qkv if has_qkv_bias else 0) + (d_model if has_output_bias else 0)
    return matrix, bias


def mla_params(
    d_model: int,
    n_heads: int,
    *,
    q_lora_rank: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
) -> tuple[int, int]:
    """Return (matrix, norm) parameters of one multi-head latent attention block.

    Queries go through a rank ``q_lora_rank`` bottleneck (0 = full matrix), keys and values through ``kv_lora_rank``
    plus a shared rotary key of ``qk_rope_head_dim``.

    Reference: DeepSeek-V2, arXiv:2405.04434, section 2.1 and table of dimensions.

    >>> mla_params(7168, 128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
    ...            qk_rope_head_dim=64, v_head_dim=128)[0]  # DeepSeek-V3, one layer
    187105280
    """
    d_qk = qk_nope_head_dim + qk_rope_head_dim
    query = d_model * q_lora_rank + q_lora_rank * n_heads * d_qk if q_lora_rank else d_model * n_heads * d_qk
    down = d_model * (kv_lora_rank + qk_rope_head_dim)
    up = kv_lora_rank * n_heads * (qk_nope_head_dim + v_head_dim)
    output = n_heads * v_head_dim * d_model
    return query + down + up + output, q_lora_rank + kv_lora_rank


def mlp_params(d_model: int, d_ff: int, *, is_gated: bool, has_bias: bool = False) -> tuple[int, int]:
    """Return (matrix, bias) parameters of one MLP: three matrices when gated, two when not.

    Reference: Shazeer 2020, arXiv:2002.05202 (gated linear units).

    >>> mlp_params(4096, 14336, is_gated=True)[0]
    176160768
    """
    n_in = 2 if is_gated else 1
    return (n_in + 1) * d_model * d_ff, (n_in * d_ff + d_model) if has_bias else 0
