"""Communication coefficients of training from our records on several GPUs, beside the same jobs on one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from advisor.fit.deepspeed_raw import run_ids
from advisor.laws.zero import sent_bytes
from advisor.schema import Coefficient

Raw = dict[str, Any]
H100_LINK_BYTES_PER_S = 450e9
LARGE_MESSAGE_BYTES = 60_000_000
"""From here on an all-reduce of our micro-runs is bound by the link, not by its launch."""
SAME = ("model", "zero_stage", "micro_batch_size", "sequence_length", "activation_checkpointing", "offload")


def reduction_shares(cells: Sequence[Raw]) -> list[float]:
    """Return the share of the link that each gradient reduction of several ranks reached.

    Stages 0 to 2 without overlap reduce on the compute stream, so that their backward pass is longer than on one GPU by
    exactly the reduction.
    """
    found = []
    for r in cells:
        if r["dp"] == 1 or r["zero_stage"] == 3 or r.get("cell", {}).get("overlap_comm"):
            continue
        alone = [a for a in cells if a["n_gpus"] == 1 and all(a[k] == r[k] for k in SAME)]
        passes = [a["measured"]["backward_s"] / a["gradient_accumulation_steps"] for a in alone]
        longer = r["measured"]["backward_s"] - r["gradient_accumulation_steps"] * min(passes, default=float("inf"))
        if longer > 0:
            sent = sent_bytes(r["n_params"], r["dp"], r["zero_stage"], n_accumulation=r["gradient_accumulation_steps"])
            found.append(sent.reduced_bytes / longer / H100_LINK_BYTES_PER_S)
    return found


def rank_coefficients(records: Sequence[Raw]) -> dict[str, Coefficient]:
    """Return the share of the link in training collectives and what NCCL takes of the memory.

    Measured on two GPUs: training records against the same job on one, and all-reduces of large messages alone. Raises
    ValueError without a training record of several ranks.
    """
    cells = [r for r in records if r["engine"] == "deepspeed-zero-train"]
    several = [r for r in cells if r["n_gpus"] > 1]
    alone = [r for r in records if r["engine"] == "micro" and r.get("cell", {}).get("what") == "all_reduce"]
    large = [r for r in alone if r["cell"]["n_bytes"] >= LARGE_MESSAGE_BYTES]
    shares = sorted(reduction_shares(cells) + [r["measured"]["bus_bytes_per_s"] / H100_LINK_BYTES_PER_S for r in large])
    if not several or not shares:
        raise ValueError("no training record of several ranks: communication cannot be estimated")
    one = [r["measured"]["device_used_bytes"] - r["measured"]["reserved_bytes"] for r in cells if r["n_gpus"] == 1]
    more = [r["measured"]["device_used_bytes"] - r["measured"]["reserved_bytes"] for r in several]
    nccl = sum(more) / len(more) - sum(one) / len(one)
    cited = run_ids((*several, *large))
    return {
        "train_link_eff": Coefficient(
            value=float(np.median(shares)),
            low=min(shares) * 0.9,
            high=min(1.0, max(shares) * 1.1),
            unit="1",
            bounds=(0.05, 1.0),
            meaning="share of the GPU link in training collectives",
            source=cited,
        ),
        "train_nccl_bytes": Coefficient(
            value=nccl,
            low=nccl * 0.5,
            high=nccl * 2.0,
            unit="s bytes",
            bounds=(0.0, 8e9),
            meaning="memory of NCCL's buffers with several ranks, beside the context",
            source=run_ids(several),
        ),
    }
