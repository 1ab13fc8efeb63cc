"""The command line that is equal to a page's request."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from advisor.recommend.day import Day, Offline
from advisor.recommend.power import Terms
from advisor.schema import Request, Slo
from advisor.schema.training import TrainJob
from advisor.units import MS

KW = 1e3
"""Watts of the unit that --rack-kw takes."""

FLAGS = {
    "task": "--task",
    "prompt_tokens": "--prompt-tokens",
    "output_tokens": "--output-tokens",
    "length_sigma": "--length-sigma",
    "rate": "--rate",
    "concurrency": "--concurrency",
    "objective": "--objective",
    "max_model_len": "--max-model-len",
    "engine_version": "--engine-version",
    "price_usd_per_gpu_h": "--price",
    "provider": "--provider",
    "price_kind": "--price-kind",
    "power_cap_w": "--power-cap",
    "budget_usd_per_h": "--budget",
    "electricity_usd_per_kwh": "--electricity-price",
    "pue": "--pue",
    "grid_kgco2e_per_kwh": "--grid-carbon",
    "max_plans": "--plans",
    "n_finalists": "--finalists",
    "seed": "--seed",
}
SEARCH = ("task", "max_plans", "n_finalists")
"""Fields that only `advisor recommend` takes."""
MONEY = (
    *("price_usd_per_gpu_h", "provider", "price_kind", "power_cap_w", "budget_usd_per_h"),
    *("electricity_usd_per_kwh", "pue", "grid_kgco2e_per_kwh"),
)
"""Fields that a replay of traffic does not ask for."""


def slo_text(slo: Slo) -> str:
    """Return targets as the command line reads them: 'ttft_p99=500ms,tpot_p99=50ms'."""
    return ",".join(f"{t.name}={t.max_s / MS:g}ms" for t in slo.targets)


def shell(words: Iterable[str]) -> str:
    """Return words as one line that a POSIX shell reads back as these words."""
    return shlex.join(words)


def recommend_words(request: Request) -> list[str]:
    """Return the words of `advisor recommend` for a request; what is the default is left out."""
    words = _common("recommend", request, FLAGS)
    for field, flag in (("backends", "--backend"), ("weight_dtypes", "--weight-dtype"), ("kv_dtypes", "--kv-dtype")):
        if values := getattr(request, field):
            words += [flag, ",".join(values)]
    return words


def compare_words(request: Request) -> list[str]:
    """Return the words of `advisor compare` for a request."""
    return _common("compare", request, {k: v for k, v in FLAGS.items() if k not in SEARCH})


def predict_words(request: Request, chosen: Mapping[str, Any]) -> list[str]:
    """Return the words of `advisor predict` for a request and the settings of one deployment."""
    return _deployed("predict", request, chosen, (*SEARCH, "objective"))


def simulate_words(request: Request, chosen: Mapping[str, Any]) -> list[str]:
    """Return the words of `advisor simulate` for a request and the settings of one deployment: no money in it."""
    return _deployed("simulate", request, chosen, (*SEARCH, "objective", *MONEY))


def _deployed(command: str, request: Request, chosen: Mapping[str, Any], left_out: tuple[str, ...]) -> list[str]:
    words = _common(command, request, {k: v for k, v in FLAGS.items() if k not in left_out})
    for field, value in chosen.items():
        words += [f"--{field.replace('_', '-')}", str(value)]
    return words


def power_words(request: Request, chosen: Mapping[str, Any], terms: Terms) -> list[str]:
    """Return the words of `advisor power` for a request, the settings of one deployment and the terms of the bill."""
    words = ["advisor", "power", *predict_words(request, chosen)[2:]]
    if terms.capex_usd_per_gpu is not None:
        words += ["--capex-per-gpu", f"{terms.capex_usd_per_gpu:g}", "--years", f"{terms.years:g}"]
    if terms.utilization_frac != 1.0:
        words += ["--utilisation", f"{terms.utilization_frac:g}"]
    if terms.hosted is not None:
        words += ["--hosted-in", f"{terms.hosted.usd_per_million_in:g}"]
        words += ["--hosted-out", f"{terms.hosted.usd_per_million_out:g}"]
    return words + (["--rack-kw", f"{terms.rack_w / KW:g}"] if terms.rack_w is not None else [])


def mixed_words(request: Request, day: Day, wanted: Offline) -> list[str]:
    """Return the words of `advisor mixed` for a day; the request's rate is its peak."""
    words = _common("mixed", request, {k: v for k, v in FLAGS.items() if k not in (*SEARCH, "objective")})
    words += ["--night-frac", f"{day.night_frac:g}", "--peak-hour", f"{day.peak_hour:g}"]
    words += ["--headroom", f"{day.headroom_frac:g}"]
    if wanted.batch_tokens:
        words += ["--batch-tokens", str(wanted.batch_tokens), "--batch-deadline", str(wanted.batch_deadline)]
    if wanted.train_tokens:
        words += ["--train-tokens", str(wanted.train_tokens), "--train-deadline", str(wanted.train_deadline)]
        words += ["--train-model", wanted.train_model, "--train-gpus", str(wanted.train_gpus)]
    return words


def train_words(job: TrainJob, gpus: str) -> list[str]:
    """Return the words of `advisor train` for jobs of the same model, batch and length."""
    words = ["advisor", "train", "--model", job.model, "--gpus", gpus]
    words += ["--global-batch", str(job.train_batch_size), "--sequence-length", str(job.sequence_length)]
    if job.lora_rank:
        words += ["--lora-rank", str(job.lora_rank)]
    for field in ("stack", "dtype"):
        if (value := getattr(job, field)) != TrainJob.model_fields[field].default:
            words += [f"--{field}", value]
    return words + (["--tokens", str(job.total_tokens)] if job.total_tokens else [])


def train_job_words(job: TrainJob, gpus: str) -> list[str]:
    """Return the words of `advisor train` that fix every part of a job, so that it is the one that is predicted."""
    words = [*train_words(job, gpus), "--zero-stage", str(job.zero_stage), "--micro-batch", str(job.micro_batch_size)]
    words += ["--tp", str(job.tp), "--pp", str(job.pp)]
    words += ["--offload-optimizer", job.offload_optimizer, "--offload-param", job.offload_param]
    words.append("--checkpointing" if job.is_checkpointed else "--no-checkpointing")
    return words if job.has_overlap is None else [*words, "--overlap" if job.has_overlap else "--no-overlap"]


def _common(command: str, request: Request, flags: Mapping[str, str]) -> list[str]:
    words = ["advisor", command, "--model", request.model, "--gpus", request.gpus]
    if request.workload != Request.model_fields["workload"].default:
        words += ["--workload", request.workload]
    for field, flag in flags.items():
        value = getattr(request, field)
        if value is not None and value != Request.model_fields[field].default:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    if request.slo.targets:
        words += ["--slo", slo_text(request.slo)]
    return words
