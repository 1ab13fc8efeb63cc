"""Work, activations and traffic of one training step of a decoder-only transformer."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

HALF_BYTES = 2.0


def layer_activation_bytes(
    n_tokens: float, d_model: int, d_query: int, d_kv: int, d_ff: int, *, is_gated: bool = True, tp: int = 1
) -> float:
    """Return the bytes that one layer keeps for its backward pass, eager transformers code in 16 bits.

    ``tokens * (16 d + (4 q + 4 kv + 8 f) / tp)``: two RMSNorms with an fp32 copy (8 d each), the rotated query and the
    attention output (4 q), key and value (4 kv), gate, up, their activation and product (8 f; 6 f without a gate).

    d_model d, d_query = heads * head size q, d_kv = KV heads * head size kv, d_ff f [elements]; tp splits the inside.

    Notes: flash or memory-efficient attention (no score matrix), no dropout. Fused layers keep less: about
    ``34 d tokens`` for GPT (Korthikanti et al. 2022, arXiv:2205.05198, equation 2), which has f = 4 d.

    >>> d, f = 2048, 5504
    >>> round(layer_activation_bytes(8192, d, d, d, f) * 24 / 2**30, 2)  # measured 17.08 GiB on a 1.3B Llama shape
    17.06
    """
    mlp = (8.0 if is_gated else 6.0) * d_ff
    return n_tokens * (16.0 * d_model + (4.0 * d_query + 4.0 * d_kv + mlp) / tp)


def checkpoint_bytes(n_tokens: float, d_model: int) -> float:
    """Return what full activation checkpointing keeps of one layer: its 16-bit input, ``2 tokens d``.

    Reference: Chen et al. 2016, arXiv:1604.06174; Korthikanti et al. 2022, arXiv:2205.05198, section 5.

    >>> checkpoint_bytes(8192, 2048) * 24 / 2**30
    0.75
    """
    return HALF_BYTES * n_tokens * d_model


def loss_bytes(n_tokens: float, vocab_size: int, d_model: int) -> tuple[float, float]:
    """Return (kept after forward, peak at the start of backward) of the language-model head and its loss.

    Kept ``tokens (4 V + 8 d)``: fp32 logits and the final norm; peak ``tokens (12 V + 8 d)``: the 16-bit logits'
    gradient chain in fp32 beside them. V = vocabulary.

    Notes: a loss that casts all logits to fp32 (transformers); a fused or tiled loss avoids most of it.
    Measured on an H100 (1.3B shape, 8192 tokens, V = 32000): 1.10 and 3.06 GiB.

    >>> [round(b / 2**30, 2) for b in loss_bytes(8192, 32000, 2048)]
    [1.1, 3.05]
    """
    rest = 8.0 * n_tokens * d_model
    return 4.0 * n_tokens * vocab_size + rest, 12.0 * n_tokens * vocab_size + rest


def forward_flops(
    n_tokens: ArrayLike, n_matrix_params: float, n_pairs: ArrayLike, d_query: int, n_layers: float
) -> NDArray[np.float64]:
    """Return the operations of a forward pass: ``2 T N + 4 pairs q L``, all layers and the LM head in N.

    n_tokens T; n_matrix_params N that each token uses (embedding look-up left out); n_pairs (query, key) pairs of one
    layer, ``T s / 2`` when causal; d_query q = heads * head size.

    Reference: Narayanan et al. 2021, arXiv:2104.04473, section 3.4 (they count full attention, twice the causal pairs).

    >>> t, s = 8192, 2048
    >>> round(float(forward_flops(t, 1.2799e9, t * s / 2, 2048, 24)) / 1e12, 1)
    22.6
    """
    tokens = np.asarray(n_tokens, dtype=float)
    return np.asarray(2 * tokens * n_matrix_params + 4 * np.asarray(n_pairs, dtype=float) * d_query * n_layers)


def step_flops(forward: ArrayLike, *, is_checkpointed: bool = False, frozen_frac: float = 0.0) -> NDArray[np.float64]:
    """Return the operations of a step from those of its forward pass: 3 times, 4 times with full checkpointing.

    Backward is twice the forward pass: gradients of the activations and of the weights; frozen weights (LoRA) need no
    weight gradient, so ``frozen_frac`` of the parameters saves that share of one forward.

    Reference: Narayanan et al. 2021, arXiv:2104.04473, section 3.4 (factor 4 with recomputation).

    >>> float(step_flops(1.0, is_checkpointed=True))
    4.0
    """
    return np.asarray(np.asarray(forward, dtype=float) * (3.0 + (1.0 if is_checkpointed else 0.0) - frozen_frac))


def mfu_frac(
    model_flops: ArrayLike, step_s: ArrayLike, peak_flops_per_s: float, n_gpus: ArrayLike = 1
) -> NDArray[np.float64]:
    """Return model FLOPs utilisation: useful operations (no recomputation) over what the GPUs could do in that time.

    Reference: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.

    >>> round(float(mfu_frac(3 * 22.6e12, 0.2709, 989.4e12)), 3)  # 1.3B on one H100: 0.253 in our records
    0.253
    """
    work = np.asarray(model_flops, dtype=float)
    return np.asarray(work / (np.asarray(step_s, dtype=float) * peak_flops_per_s * np.asarray(n_gpus, dtype=float)))


def tensor_parallel_bytes(
    n_tokens: float, d_model: int, n_layers: float, tp: int, *, is_checkpointed: bool = False
) -> float:
    """Return what one GPU sends for tensor parallelism in a microbatch: all-reduces of the activations.

    ``2 (t - 1) / t * 2 T d`` bytes each; two a layer forward, two backward, two more when the forward is recomputed.

    Reference: Shoeybi et al. 2019, arXiv:1909.08053, section 3; Narayanan et al. 2021, arXiv:2104.04473, section 3.2.

    >>> round(tensor_parallel_bytes(2048, 12288, 96, 8) / 1e9, 1)
    33.8
    """
    times = 6.0 if is_checkpointed else 4.0
    return times * n_layers * 2.0 * (tp - 1) / tp * HALF_BYTES * n_tokens * d_model


def stage_send_bytes(n_tokens: float, d_model: int, tp: int = 1) -> float:
    """Return what one pipeline stage sends to the next for a microbatch: its 16-bit output, ``2 T d / t``.

    Backward sends as much again the other way. Notes: with tensor parallelism t, each rank sends its share.
    Reference: Narayanan et al. 2021, arXiv:2104.04473, section 4.1 (there b s h elements a microbatch).

    >>> stage_send_bytes(2048, 12288) / 2**20
    48.0
    """
    return HALF_BYTES * n_tokens * d_model / tp


def lora_params(n_layers: int, shapes: list[tuple[int, int]], rank: int) -> int:
    """Return the trainable parameters of LoRA: ``rank * (inputs + outputs)`` for each adapted matrix of each layer.

    Reference: Hu et al. 2021, arXiv:2106.09685, section 4.1.

    >>> lora_params(96, [(12288, 12288), (12288, 12288)], 4)  # GPT-3 175B, W_q and W_v: the paper says 18M, 35 MB
    18874368
    """
    return n_layers * sum(rank * (a + b) for a, b in shapes)
