"""The Ray artefacts against Ray's own command line, where Ray is installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from typing import Any

import pytest

from advisor.emit.ray import emit_kuberay, emit_ray

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def start() -> Any:
    """The `ray start` command."""
    pytest.importorskip("ray", reason="ray is not installed: pip install ray")
    return importlib.import_module("ray.scripts.scripts").start


@pytest.fixture(scope="module")
def launch() -> Any:
    """A plan on two nodes, built by the builders of the artefact tests."""
    from pathlib import Path

    path = Path(__file__).resolve().parents[1] / "emit" / "conftest.py"
    spec = importlib.util.spec_from_file_location("artefact_plans", path)
    assert spec is not None
    assert spec.loader is not None
    plans = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plans)
    return plans.launch(tp=8, pp=2)


def test_ray_start_reads_both_lines(start: Any, launch: Any) -> None:
    lines = re.findall(r"ray start (.*)$", emit_ray(launch).split("set -euo")[1], re.MULTILINE)
    assert len(lines) == 2
    head, worker = (
        start.make_context("start", shlex.split(re.sub(r"\$\{2:[^}]*\}", "10.0.0.1", line))) for line in lines
    )
    assert head.params["head"]
    assert not worker.params["head"]
    assert worker.params["address"] == f"10.0.0.1:{head.params['port']}"
    assert head.params["num_gpus"] == worker.params["num_gpus"] == 8


def test_kuberay_s_start_parameters_exist(start: Any, launch: Any) -> None:
    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    used = re.findall(r"^\s+(dashboard-host|num-gpus): ", emit_kuberay(launch), re.MULTILINE)
    assert set(used) == {"dashboard-host", "num-gpus"} <= known
