"""Device memory of a serving engine besides weights and cache."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Real = TypeVar("Real", float, NDArray[np.float64])

FF_BYTES = 6.0
"""Bytes a token and feed-forward column alive at the peak of a layer: gate and up in 16 bit (4), their product (2)."""

PLAIN_FF_BYTES = 2.0
"""The same without a gate: the one product, changed in place (runs opt-6.7b and falcon-7b, whose peak is the LM head's:
with two copies alive OPT's would be 0.77 GB, where 0.57 was seen)."""

MODEL_BYTES = 7.0
"""Bytes a token and model column alive then: hidden state, residual, normed copy, projection output (16 bit each, one
of them half the time); from the start-up figures of vllm-0.26.0 70b-tp4 and 70b-tp2."""

HEAD_STATE_BYTES = 4.0
"""Bytes a token and model column alive beside the LM head's buffer: hidden state and residual in 16 bit."""


def forward_peak_bytes(n_tokens: Real, d_model: float, d_ff_rank: float, *, is_gated: bool = True) -> Real:
    """Return the activation peak of one layer in a batch of `n_tokens`: ``T (6 d_ff / tp + 7 d)`` [bytes].

    d_ff_rank : feed-forward columns on one rank, all experts of a token together
    is_gated  : whether the MLP has a gate; without one 2 bytes a column stand for the 6

    Valid for MLPs in 16 bit with fused kernels and no stored activations (inference); not for training.
    Reference: tensor shapes of vLLM 0.26.0's Llama layer; start-up figures of run vllm-0.26.0 70b-tp4 (0.795 GB).

    >>> round(forward_peak_bytes(8192.0, 8192, 7168) / 1e9, 2)
    0.82
    """
    return n_tokens * ((FF_BYTES if is_gated else PLAIN_FF_BYTES) * d_ff_rank + MODEL_BYTES * d_model)


def head_peak_bytes(n_tokens: Real, d_model: float, head_bytes_rank: float) -> Real:
    """Return the other peak of a start-up: a buffer of the LM head's size and the batch's states [bytes].

    ``head / tp + 4 T d``. Seen within 1 % on every compiled start of our runs whose vocabulary is large, with random
    weights and with weights loaded from disk (8b-http); starts in eager mode do not have it.

    Reference: start-up figures of runs vllm-0.26.0 1b, 8b, 14b, 32b (0.594, 1.185, 1.726, 1.724 GB).

    >>> round(head_peak_bytes(8192.0, 4096, 2 * 128256 * 4096) / 1e9, 3)
    1.185
    """
    return head_bytes_rank + HEAD_STATE_BYTES * n_tokens * d_model


def expert_peak_bytes(n_tokens: Real, d_model: float, d_expert_rank: float, n_per_token: int) -> Real:
    """Return the activation peak of a layer of experts: ``T (2 k (max(2 f, d) + max(f, d) + 2 d) + 7 d)`` [bytes].

    d_expert_rank : feed-forward columns f of one expert on one rank
    n_per_token   : experts k that a token goes through

    The fused kernels keep, a token and expert, gate and up beside their product (or the output, where that is wider),
    and the outputs before they are summed, twice. It hardly falls with tensor parallelism once f is below d.
    Reference: workspaces of vLLM 0.26.0's TritonExperts; start-up figures of runs mixtral-bf16, mixtral-tp2,
    30b-a3b-bf16 and 30b-a3b-tp2 (1.908, 1.160, 1.231, 1.231 GB), within 5 %.

    >>> round(expert_peak_bytes(8192.0, 4096, 14336, 2) / 1e9, 2)
    1.91
    >>> round(expert_peak_bytes(8192.0, 2048, 384, 8) / 1e9, 2)
    1.19
    """
    widths = max(2.0 * d_expert_rank, d_model) + max(d_expert_rank, d_model) + 2.0 * d_model
    return n_tokens * (2.0 * n_per_token * widths + MODEL_BYTES * d_model)


def graph_bytes(n_layers: Real, n_graphs: float, bytes_per_layer_graph: float) -> Real:
    """Return the memory of CUDA graphs: each captured size of each layer costs about the same [bytes].

    Reference: run vllm-0.26.0 8b-bf16 (0.62 GB for 32 layers and 51 sizes).

    >>> round(graph_bytes(32.0, 51, 0.4e6) / 1e9, 2)
    0.65
    """
    return n_layers * n_graphs * bytes_per_layer_graph
