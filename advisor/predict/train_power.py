"""Board power of a training step: what its parts keep the GPU busy with, and what it draws meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

from advisor.predict.deepspeed_step import Rates
from advisor.schema import Gpu
from advisor.schema.training import TrainJob


def time_shares(job: TrainJob, step: Mapping[str, float]) -> tuple[float, float, float]:
    """Return the shares of a step with layers at work, with bytes on the move, and waiting; they sum to 1.

    step : seconds by part, as `step_parts` returns them. Forward and backward passes are layers at work; the update on
    the GPU and exposed collectives move bytes; all else (hooks, host, drives, the pipeline's bubble) is waiting.
    """
    total = sum(step.values())
    moving = step["communication"] + (step["optimizer"] if job.offload_optimizer == "none" else 0.0)
    layers = min(1.0, step["forward_backward"] / total)
    moving = min(1.0 - layers, moving / total)
    return layers, moving, 1.0 - layers - moving


def board_power_w(gpu: Gpu, job: TrainJob, step: Mapping[str, float], rates: Rates) -> float:
    """Return mean board power of all GPUs of a job [W]: each kind of time draws its share of what the limit leaves.

    Notes: on our H100 the layers alone ran at the power limit (the driver reported it in every sample), so a lower
    limit would lengthen the step, which is not modelled here.
    """
    layers, moving, waiting = time_shares(job, step)
    share = layers * rates["train_power_busy_frac"] + moving * rates["train_power_move_frac"]
    share += waiting * rates["train_power_wait_frac"]
    return job.n_gpus * (gpu.idle_power_w + min(1.0, share) * (gpu.board_power_w - gpu.idle_power_w))
