"""Random routers: biases go, routers' weights grow, weights from disk and dense models stay as they are."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from calibration import models
from calibration.jobs import parse_job
from calibration.session import EXPERT_COUNTS, n_experts_of
from calibration.vllm_probe import MemoryProbe
from calibration.vllm_runner import spread_routing

JOB = {"run_id": "x", "model": "qwen3-30b-a3b", "cells": ["c,300,1,1,2"]}


class Tensor:
    def __init__(self, *shape: int, is_float: bool = True) -> None:
        self.shape, self.ndim, self.factor, self.is_float = shape, len(shape), 1.0, is_float

    def zero_(self) -> None:
        self.factor = 0.0

    def mul_(self, factor: float) -> None:
        self.factor *= factor

    def is_floating_point(self) -> bool:
        return self.is_float


def test_a_worker_changes_routers_and_biases_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(no_grad=nullcontext))
    tensors = {
        "layers.0.mlp.router.weight": Tensor(32, 2880),
        "layers.0.mlp.router.bias": Tensor(32),
        "layers.0.mlp.gate.e_score_correction_bias": Tensor(32),
        "layers.0.mlp.experts.w13_weight": Tensor(32, 5760, 1440, is_float=False),
        "layers.0.mlp.gate_quantised.weight": Tensor(32, 1440, is_float=False),
        "layers.0.self_attn.qkv_proj.weight": Tensor(5120, 2880),
        "layers.0.input_layernorm.weight": Tensor(2880),
    }
    worker = type("Worker", (MemoryProbe,), {"get_model": lambda _: SimpleNamespace(named_parameters=tensors.items)})()
    assert worker.calibration_spread_routing(32) == 3
    assert {n: t.factor for n, t in tensors.items() if t.factor != 1} == {
        "layers.0.mlp.router.weight": 1000.0,
        "layers.0.mlp.router.bias": 0.0,
        "layers.0.mlp.gate.e_score_correction_bias": 0.0,
    }


class Engine:
    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, []

    async def collective_rpc(self, method: str, args: tuple[int, ...]) -> list[int]:
        self.asked.append((method, args))
        if isinstance(self.answer, Exception):
            raise self.answer
        return [self.answer]


def spread(engine: Engine, config: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    job = parse_job(JOB | changes)
    asked = spread_routing(engine, job, config or models.resolve(job.model)[1])
    with ThreadPoolExecutor(1) as pool:  # other tests leave an event loop running in theirs
        return pool.submit(asyncio.run, asked).result()


def test_a_record_says_how_many_tensors_were_changed() -> None:
    engine = Engine(48)
    assert spread(engine) == {"n_tensors_changed_to_spread_routing": 48}
    assert engine.asked == [("calibration_spread_routing", (128,))]


def test_dense_models_weights_from_disk_and_workers_without_a_probe_are_left_alone() -> None:
    engine = Engine(48)
    assert spread(engine, models.MODELS["llama-3.1-8b"]) == {}
    assert spread(engine, load_format="auto") == {}
    assert spread(engine, worker_probe=False) == {}
    assert engine.asked == []


def test_a_worker_that_cannot_does_not_end_the_run() -> None:
    found = spread(Engine(AttributeError("no such method")))
    assert found == {"n_tensors_changed_to_spread_routing": "none: AttributeError: no such method"}


def test_experts_are_counted_under_each_familys_name() -> None:
    for key in EXPERT_COUNTS:
        assert n_experts_of({key: 64}) == 64
    assert n_experts_of({"num_experts": None, "num_local_experts": 0}) == 0
