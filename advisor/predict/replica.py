"""From a deployment to what the simulator and the closed form need: stages, limits, client, all per replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from advisor.errors import DomainError
from advisor.laws.kv import held_blocks
from advisor.predict.engine_state import EngineLimits
from advisor.predict.footprint import Footprint, footprint
from advisor.predict.front import front_of
from advisor.predict.pace import paces
from advisor.predict.shapes import shapes_of
from advisor.predict.simulate import Client
from advisor.predict.step import StepCost, default_graph_tokens, step_cost
from advisor.predict.transfer import in_process
from advisor.schema import Deployment, EngineFacts, Gpu, Model, PrefixSharing


@dataclass(frozen=True)
class Replica:
    """One replica, ready to run."""

    stages: tuple[StepCost, ...]
    limits: EngineLimits
    client: Client
    send_s: float
    memory: Footprint


def graph_batch(n_decode: NDArray[np.int64] | int, max_num_seqs: int) -> NDArray[np.int64]:
    """Return the batch size that the CUDA graph of `n_decode` sequences was captured with (padding).

    Captured: 1, 2, 4, multiples of 8 below 256, multiples of 16 up to min(2 max_num_seqs, 512); larger runs as it is.
    Reference: vLLM 0.26.0, config/vllm.py ``_set_cudagraph_sizes``.

    >>> graph_batch(np.array([1, 3, 9, 250, 257, 600]), 512).tolist()
    [1, 4, 16, 256, 272, 600]
    """
    n = np.asarray(n_decode, dtype=np.int64)
    largest = default_graph_tokens(max_num_seqs)
    padded = np.where(n <= 2, n, np.where(n <= 4, 4, np.where(n <= 256, -(-n // 8) * 8, -(-n // 16) * 16)))
    return np.where(padded > largest, n, padded)


@lru_cache(maxsize=64)
def _graph_table(max_num_seqs: int) -> tuple[int, ...]:
    largest = default_graph_tokens(max_num_seqs)
    return tuple(int(n) for n in graph_batch(np.arange(largest + 1), max_num_seqs))


def engine_limits(
    model: Model,
    deployment: Deployment,
    n_kv_blocks: int,
    values: Mapping[str, float],
    facts: EngineFacts | None,
    prefix: PrefixSharing,
    phase: float = 0.0,
) -> EngineLimits:
    """Return the scheduler's limits of one replica; batches in flight follow the engine version.

    `phase` is where the pattern of the host's paces begins (`pace.paces`).
    """
    pp = deployment.pp
    is_moe = model.moe is not None
    if facts is not None:
        in_flight = facts.n_concurrent_batches(
            pp, is_moe, architecture=model.architecture, is_quantized=model.quantization is not None
        )
        reserves = facts.reserves_full_prompt
    else:
        in_flight = 2 if pp == 1 else (pp if is_moe else pp + 1)
        reserves = True
    speculative = deployment.speculative
    verify, per_step = 1, 1.0
    if speculative is not None:
        verify = speculative.n_draft_tokens + 1
        a = speculative.acceptance_frac
        per_step = float(verify) if a >= 1 else (1 - a**verify) / (1 - a)
    block, groups, window = deployment.kv_block_tokens, shapes_of(model).kv_groups, model.sliding_window_tokens
    shared = prefix.shared_prefix_tokens // block * block if deployment.prefix_caching else 0
    return EngineLimits(
        max_num_batched_tokens=deployment.max_num_batched_tokens,
        max_num_seqs=deployment.max_num_seqs,
        n_kv_blocks=n_kv_blocks,
        kv_block_tokens=block,
        n_in_flight=in_flight,
        pp=pp,
        blocks_on_launch=deployment.tp * pp == 1,
        reserves_full_prompt=reserves,
        graph_sizes=() if deployment.enforce_eager else _graph_table(deployment.max_num_seqs),
        tokens_per_step=per_step,
        verify_tokens=verify,
        shared_prefix_blocks=min(held_blocks(shared, block, groups, window), max(0, n_kv_blocks - 1)),
        graph_wait_frac=values["graph_wait_frac"],
        launch_paces=paces(values["slow_launch_factor"], values["slow_launch_frac"], phase),
        pace_s=values["slow_launch_s"],
        kv_groups=groups,
        window_tokens=window,
        hot_context_tokens=shared * (1.0 - values["shared_kv_frac"]),
    )


def client_of(values: Mapping[str, float], *, is_http: bool = True) -> Client:
    """Return the delays outside the engine: of a client of its API servers, or of one in the engine's process."""
    own = values if is_http else in_process(values)
    serial = (own["serial_s"], own["serial_token_s"])
    return Client(own["submit_s"], own["return_s"], *serial, own["wake_s"], front_of(own), own["intake_s"])


def replica_of(
    model: Model,
    gpu: Gpu,
    deployment: Deployment,
    values: Mapping[str, float],
    facts: EngineFacts | None = None,
    prefix: PrefixSharing | None = None,
) -> Replica:
    """Return one replica of `deployment`. Raises DomainError when it does not fit, with the reason.

    `values` are coefficient values for this GPU (see `transfer`).
    """
    memory = footprint(model, gpu, deployment, facts)
    if memory.n_kv_blocks <= 0:
        raise DomainError(f"this deployment does not fit: {memory.reason}")
    shapes = shapes_of(model)
    stages = tuple(step_cost(shapes, gpu, deployment, values, stage) for stage in range(deployment.pp))
    limits = engine_limits(model, deployment, memory.n_kv_blocks, values, facts, prefix or PrefixSharing())
    return Replica(stages, limits, client_of(values), values["send_s"] if deployment.pp > 1 else 0.0, memory)
