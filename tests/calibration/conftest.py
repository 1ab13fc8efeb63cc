"""Runs `python -m calibration` against the fake engine in fake_site."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE_SITE = Path(__file__).with_name("fake_site")


def fake_env(tmp, **more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FAKE_", "CUDA_VISIBLE"))}
    env |= {"PYTHONPATH": f"{FAKE_SITE}{os.pathsep}{ROOT}", "TMPDIR": str(tmp), "CALIBRATION_IDLE_S": "0.1"}
    return env | more


@pytest.fixture
def command(tmp_path):
    """Start `python -m calibration ARGS` and return the process."""
    started = []

    def start(*args, **env):
        process = subprocess.Popen(
            [sys.executable, "-m", "calibration", *map(str, args)],
            env=fake_env(tmp_path, **env),
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def run(command):
    """Run `python -m calibration ARGS` to its end and return (status, what it printed)."""

    def go(*args, **env):
        process = command(*args, **env)
        text, _ = process.communicate(timeout=40)
        return process.returncode, text

    return go


@pytest.fixture
def write(tmp_path):
    """Write JSON to a file and return its path."""

    def put(value, name="job.json"):
        path = tmp_path / name
        path.write_text(json.dumps(value))
        return path

    return put


@pytest.fixture
def lines():
    """Read a file of JSON lines; none when there is no file."""

    def read(path):
        return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []

    return read
