"""What a pass of ZeRO-Inference takes, from our records: host, link, and how much of the shorter of the two shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from advisor.fit.deepspeed_raw import Raw, coefficient, run_ids
from advisor.laws.offload import partly_hidden_s, weight_stream_s
from advisor.predict.deepspeed_step import kv_bytes_per_token
from advisor.predict.shapes import shapes_of
from advisor.schema import Coefficient, Gpu, Model

Floats = NDArray[np.float64]
ModelOf = Callable[[Raw], Model]
LEAST_WIDTH = 0.1
"""Half-width of an interval at least; our cells are medians of three passes on one host."""


def _wide(value: float, low: float, high: float) -> tuple[float, float, float]:
    return value, min(low, value * (1 - LEAST_WIDTH)), max(high, value * (1 + LEAST_WIDTH))


def moved_bytes(record: Raw, model_of: ModelOf) -> float:
    """Return the bytes that a decode pass of one rank takes over the host link: weights, and a cache that waits there.

    The cache comes whole in each pass, with the prompt and half of the answer in it.
    """
    lengths = record["lengths"]
    cached = record["load"]["batch_size"] * (lengths["prompt_tokens"] + lengths["output_tokens"] / 2)
    cache = kv_bytes_per_token(shapes_of(model_of(record)), 1) * cached if record["kv_offload"] == "cpu" else 0.0
    return (record["stored_weights_bytes"] if record["offload"] != "none" else 0.0) + cache


def _host_of(total_s: float, stream_s: float, serial_frac: float) -> float:
    """Return the host time with which a pass of that stream takes `total_s`."""
    if total_s >= stream_s * (1 + serial_frac):
        return total_s - serial_frac * stream_s
    return (total_s - stream_s) / serial_frac


def zero_pass_coefficients(
    records: Sequence[Raw], model_of: ModelOf, gpu: Gpu, gather_eff: float
) -> dict[str, Coefficient]:
    """Return the coefficients of a pass, from records whose passes had their trace before they were timed.

    gather_eff : share of the GPU link in the all-gathers of several ranks

    The host's end of a pass is what a decode pass takes longer than a prompt pass of one sequence, which ends with its
    last kernel. Weights and cache on the GPU leave the hooks alone; passes that move bytes then give the link's rate
    and the share of the shorter of hooks and link that shows. Raises ValueError where no such record is there.
    """
    cells = [r for r in records if r["engine"] == "deepspeed-zero-inference"]
    warm = [r for r in cells if r.get("n_warm_passes")]
    alone = [r for r in warm if r["dp"] == 1]
    resident = [r for r in cells if r["dp"] == 1 and not r.get("n_warm_passes") and r["offload"] == "none"]
    if not alone:
        raise ValueError("no ZeRO-Inference record with its trace complete: its passes cannot be estimated")

    def layers(record: Raw) -> int:
        return shapes_of(model_of(record)).n_layers

    single = [r for r in alone if r["load"]["batch_size"] == 1]
    ends = [r["measured"]["decode_step_s"] - r["measured"]["prefill_s"] for r in single]
    end = float(np.median(ends))
    still = [r for r in alone if r["offload"] == "none" and r["kv_offload"] == "none"]
    hooks = [(r["measured"]["decode_step_s"] - end) / layers(r) for r in still]
    busy = [(r["measured"]["decode_step_s"] - end) / layers(r) for r in resident]
    hook = float(np.median(hooks))
    moving = [r for r in alone if moved_bytes(r, model_of)]
    host = np.array([end + hook * layers(r) for r in moving])
    moved = np.array([moved_bytes(r, model_of) for r in moving])
    seen = np.log([r["measured"]["decode_step_s"] for r in moving])

    def residuals(x: Floats) -> Floats:
        return np.asarray(np.log(partly_hidden_s(host, moved / (x[0] * gpu.host_link_bytes_per_s), x[1])) - seen)

    fit = least_squares(residuals, [0.8, 0.6], bounds=([0.1, 0.0], [1.0, 1.0]))
    share, serial = (float(v) for v in fit.x)
    variance = float(np.sum(fit.fun**2)) / max(1, len(moving) - 2)
    half = 1.7 * np.sqrt(np.diag(np.linalg.inv(fit.jac.T @ fit.jac)) * variance)
    found = {
        "zero_pass_s": coefficient(
            _wide(end, min(ends), max(ends)),
            "s",
            (0.0, 0.5),
            "host time at the end of a pass, before the next can start",
            run_ids(single),
        ),
        "zero_hook_s_per_layer": coefficient(
            _wide(hook, min(hooks), max(hooks + busy)),
            "s",
            (1e-4, 5e-2),
            "host time of ZeRO-3's hooks in one layer; the high end is a host that others used too",
            run_ids([*still, *resident]),
        ),
        "zero_stream_eff": coefficient(
            _wide(share, share - half[0], min(1.0, share + half[0])),
            "1",
            (0.05, 1.0),
            "share of the host link at which weights and an offloaded cache come (H100 host)",
            run_ids(moving),
        ),
        "zero_serial_frac": coefficient(
            _wide(serial, max(0.0, serial - half[1]), min(1.0, serial + half[1])),
            "s share",
            (0.0, 1.0),
            "share of the shorter of hooks and link that does not hide behind the longer",
            run_ids(moving),
        ),
    }
    several = [r for r in warm if r["dp"] > 1]
    launches = []
    for r in several:
        rates = (share * gpu.host_link_bytes_per_s, gather_eff * gpu.link_bytes_per_s)
        stream = float(weight_stream_s(moved_bytes(r, model_of), r["dp"], *rates))
        whole = _host_of(r["measured"]["decode_step_s"], stream, serial)
        launches.append(max(0.0, (whole - end) / layers(r) - hook))
    if launches:
        found["zero_gather_s_per_layer"] = coefficient(
            _wide(float(np.median(launches)), 0.5 * min(launches), 1.5 * max(launches)),
            "s",
            (0.0, 5e-2),
            "host time of a layer's all-gathers, where several ranks share the weights",
            run_ids(several),
        )
    return found
