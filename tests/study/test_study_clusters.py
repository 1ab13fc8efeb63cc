"""The same rows from a Ray and a Dask cluster on this machine; skipped where the packages are absent."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from advisor.errors import DomainError
from advisor.study import read_study, run_study
from advisor.study.backends import NEEDS, check_backend

CLUSTERS = [
    pytest.param(
        backend,
        marks=pytest.mark.skipif(
            any(importlib.util.find_spec(name) is None for name in NEEDS[backend]),
            reason=f"{' and '.join(NEEDS[backend])} not installed",
        ),
    )
    for backend in ("ray", "dask")
]


@pytest.mark.parametrize("backend", CLUSTERS)
def test_a_cluster_gives_the_rows_of_a_serial_run(
    backend: str, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = study_file()
    run_study(read_study(path), tmp_path / "serial.jsonl", n_workers=1)
    command = [sys.executable, "-m", "advisor", "study", str(path), "--out", str(tmp_path / "c.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--backend", backend, "--workers", "2"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found, expected = (
        sorted((json.loads(line) for line in (tmp_path / name).read_text().splitlines()), key=lambda r: r["id"])
        for name in ("c.jsonl", "serial.jsonl")
    )
    assert found == expected


@pytest.mark.parametrize("backend", ["ray", "dask"])
def test_an_absent_package_is_one_sentence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DomainError, match=rf"backend {backend} needs .*: pip install"):
        check_backend(backend, 2)
    check_backend("processes", 1)
    with pytest.raises(DomainError, match="--workers 1"):
        check_backend("processes", 2)


@pytest.mark.parametrize("backend", CLUSTERS)
def test_a_cluster_that_is_not_there_is_one_sentence(
    backend: str, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "advisor", "study", str(study_file()), "--out", str(tmp_path / "c.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--backend", backend, "--address", "127.0.0.1:9"],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cluster at 127.0.0.1:9" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
