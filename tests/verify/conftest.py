"""A live endpoint of a known law, and the plan that predicts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from advisor.schema import Deployment, Interval, Model, Plan, Prediction

SERVER = Path(__file__).with_name("fake_server.py")


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """Start a server: serve(ttft_s=0.05, mode='stall') -> its address."""
    running: list[subprocess.Popen[str]] = []

    def start(**options: Any) -> str:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        process = subprocess.Popen([sys.executable, str(SERVER), *words], stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        return f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


class Make:
    @staticmethod
    def model(**changes: Any) -> Model:
        fields: dict[str, Any] = {
            "name": "m",
            "family": "llama",
            "hf_id": "org/model",
            "n_layers": 2,
            "d_model": 64,
            "n_heads": 4,
            "n_kv_heads": 4,
            "d_head": 16,
            "d_ff": 128,
            "vocab_size": 1000,
            "max_context_tokens": 4096,
        }
        return Model.model_validate(fields | changes)

    @staticmethod
    def prediction(**values: float) -> Prediction:
        return Prediction(quantities={k: Interval(value=v, low=0.97 * v, high=1.03 * v) for k, v in values.items()})

    @classmethod
    def plan(cls, **values: float) -> Plan:
        return Plan(
            rank=1,
            backend="vllm",
            deployment=Deployment(model="m", gpu="h100-sxm-80gb"),
            prediction=cls.prediction(**values),
            meets_slo=True,
            usd_per_h=1,
            score=1,
            command="",
        )


@pytest.fixture(scope="session")
def make() -> type[Make]:
    return Make
