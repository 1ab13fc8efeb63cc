"""The bundle's own code runs on a host that has nothing but Python and the engine."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from calibration import bundle
from calibration.errors import CalibrationError, JobError

FAKE_SITE = Path(__file__).with_name("fake_site")


def test_the_packed_code_runs_without_our_dependencies(tmp_path):
    print(bundle.build(str(tmp_path / "b"), []))
    host = tmp_path / "host"
    with tarfile.open(tmp_path / "b" / "calibration.tar") as tar:
        tar.extractall(host, filter="data")
    assert {"calibration", "unpack.sh", "env.sh"} <= set(os.listdir(host))
    job = {"run_id": "t", "model": "llama-3.1-8b", "cells": ["c,64,4,2,4"], "warmup": False}
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        # -S: no site-packages, so no numpy, pydantic, ...
        [
            sys.executable,
            "-S",
            "-m",
            "calibration",
            "run-vllm",
            "--job",
            tmp_path / "job.json",
            "--out",
            tmp_path / "r.jsonl",
        ],
        cwd=host,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(FAKE_SITE), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("command", ["--help", "plan --help", "check --help", "bundle --help"])
def test_help_needs_no_engine(command):
    args = [sys.executable, "-c", _BLOCKED, *command.split()]
    done = subprocess.run(args, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


_BLOCKED = """
import sys
for name in ("torch", "vllm", "deepspeed", "pynvml"):
    sys.modules[name] = None
from calibration.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_scripts_are_sound_and_a_bad_part_is_refused(tmp_path, monkeypatch):
    for script in bundle.SCRIPTS.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)
    with pytest.raises(JobError, match="there is no part 'tensorrt'; parts: vllm, deepspeed, fastgen"):
        bundle.build(str(tmp_path), ["tensorrt"])
    monkeypatch.setattr("shutil.which", lambda tool: None)
    with pytest.raises(CalibrationError, match="needs bash, uv, xz on the PATH"):
        bundle.build(str(tmp_path), ["vllm"])
