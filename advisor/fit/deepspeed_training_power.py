"""Power coefficients of DeepSpeed training from our H100 records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import nnls

from advisor.fit.deepspeed_raw import run_ids
from advisor.predict.deepspeed_step import Rates
from advisor.predict.train import step_parts
from advisor.predict.train_memory import sizes_of
from advisor.predict.train_power import time_shares
from advisor.schema import Cluster, Coefficient, Model
from advisor.schema.training import TrainJob

Raw = dict[str, Any]
NAMES = {
    "train_power_busy_frac": "of what the power limit leaves, drawn while layers run",
    "train_power_move_frac": "of what the power limit leaves, drawn while the update or a collective moves bytes",
    "train_power_wait_frac": "of what the power limit leaves, drawn while the GPU waits",
}


def training_power(
    records: Sequence[Raw],
    cluster: Cluster,
    values: Mapping[str, float],
    *,
    model_of: Callable[[Raw], Model],
    job_of: Callable[[Raw], TrainJob],
) -> dict[str, Coefficient]:
    """Return what a board draws in each kind of a step's time, as a share of what the limit leaves above idle.

    Non-negative least squares over all training records, one GPU or several, of ``drawn = sum(share of time x draw)``;
    the shares of time are the step law's. Each interval leaves one record out and adds the residuals' spread.
    values : the other training coefficients. Raises ValueError with fewer records than unknowns.
    """
    cells = [r for r in records if r["engine"] == "deepspeed-zero-train"]
    if len(cells) < len(NAMES) + 1:
        raise ValueError(f"{len(cells)} training records cannot tell {len(NAMES)} kinds of power")
    rows, drawn = [], []
    for r in cells:
        model, job = model_of(r), job_of(r)
        rows.append(time_shares(job, step_parts(model, cluster, job, sizes_of(model, job), Rates(dict(values)))))
        idle, limit = cluster.gpu.idle_power_w, r["power_limit_w_per_gpu"]
        drawn.append((r["measured"]["board_power_w"]["mean"] / r["n_gpus"] - idle) / (limit - idle))
    shares, seen = np.asarray(rows), np.asarray(drawn)
    found = nnls(shares, seen)[0]
    each = np.arange(len(seen))
    left_out = np.array([nnls(shares[each != i], seen[each != i])[0] for i in each])
    spread = 1.64 * float(np.std(shares @ found - seen))
    cited = run_ids(cells)
    made = {}
    for i, (name, meaning) in enumerate(NAMES.items()):
        value = min(1.0, float(found[i]))
        made[name] = Coefficient(
            value=value,
            low=max(0.0, min(value, float(left_out[:, i].min())) - spread),
            high=min(1.0, max(value, float(left_out[:, i].max())) + spread),
            unit="1",
            bounds=(0.0, 1.0),
            meaning=meaning,
            source=cited,
        )
    return made
