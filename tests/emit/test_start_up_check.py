"""No plan that is written down exceeds the engine's own start-up check, on every engine start that was recorded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog import load_catalog
from advisor.fit.records import cell_of, is_serving, read_records, spreads_experts
from advisor.predict.footprint import footprint
from advisor.predict.shapes import shapes_of
from advisor.schema import EngineFacts, RunRecord

ROOT = Path(__file__).resolve().parents[2]
CATALOG = load_catalog()
# Our bytes of one start are within this share of the device's: the boundary may lie that far off. Quantising on load
# leaves up to a gigabyte in the allocator, which the engine counts as weights.
MARGIN, ON_LOAD_BYTES = 0.004, 1.0e9


def starts() -> dict[str, RunRecord]:
    found: dict[str, RunRecord] = {}
    for file in sorted((ROOT / "data" / "runs").glob("vllm-*.jsonl")):
        for record in read_records(file):
            if (
                is_serving(record)
                and not spreads_experts(record)
                and record.startup
                and record.startup.kv_cache_tokens
                and record.startup.weights_bytes
            ):
                found.setdefault(record.run_id, record)
    return found


STARTS = starts()


@pytest.mark.parametrize("run", sorted(STARTS))
def test_what_we_accept_the_engine_accepts(run: str) -> None:
    """vLLM starts when what its share of memory leaves holds one request of max_model_len (kv_cache_utils.py).

    Its own figures of the start say what is left at any share; contexts and shares are varied around the boundary.
    """
    record = STARTS[run]
    startup: Any = record.startup
    cell = cell_of(record, CATALOG, n_draws=1)
    facts = EngineFacts.from_table(CATALOG.engine("vllm"), record.engine_version)
    is_moe = cell.model.moe is not None
    counted = startup.cuda_graph_bytes or 0.0
    subtracts = facts.subtracts_graph_memory(architecture=cell.model.architecture, is_moe=is_moe)
    used = startup.weights_bytes + startup.peak_activation_bytes + startup.non_torch_bytes + counted * subtracts
    shapes, budget = shapes_of(cell.model), cell.deployment.max_num_batched_tokens
    groups, block_bytes = shapes.kv_groups, startup.kv_cache_bytes / startup.n_kv_blocks

    def longest_bytes(length: int) -> float:
        """A block table of layers that see a window holds it and what two steps have in flight, and one block more."""
        held = min(shapes.sliding_window_tokens - 1 + 2 * budget, length)
        sliding = groups.n_sliding * (-(-held // 16) + 1)
        return block_bytes * (groups.n_full * -(-length // 16) + sliding)

    n_accepted = n_refused = 0
    lengths = [2**k for k in range(10, 18) if 2**k <= cell.model.max_context_tokens]
    least = used / startup.device_memory_bytes
    margin = MARGIN * startup.device_memory_bytes + ON_LOAD_BYTES * (record.weight_dtype == "fp8")
    for share, length in itertools.product([least + d for d in (-0.02, -0.005, 0.005, 0.02, 0.1)], lengths):
        if not 0 < share <= 0.98:
            continue
        plan = cell.deployment.model_copy(update={"gpu_memory_utilization": share, "max_model_len": length})
        room = share * startup.device_memory_bytes - used - longest_bytes(length)
        if footprint(cell.model, cell.gpu, plan, facts).is_ok:
            n_accepted += 1
            assert room > -margin, f"{length} tokens at a share of {share:.3f}"
        else:
            n_refused += 1
            assert room < margin, f"{length} tokens at a share of {share:.3f}"
    assert n_accepted
    assert n_refused, "the boundary was crossed"


def test_the_records_hold_what_the_check_needs() -> None:
    assert len(STARTS) >= 15
