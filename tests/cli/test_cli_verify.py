"""advisor verify against a live endpoint of a known law: the table, the record, and a port where nobody listens."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from advisor.cli import run

SERVER = Path(__file__).parents[1] / "verify" / "fake_server.py"
PLAN = ("--model", "8b", "--gpus", "1xH100", "--tp", "1", "--concurrency", "2", "--isl", "32", "--osl", "4")


@pytest.fixture
def address() -> Iterator[str]:
    words = [sys.executable, str(SERVER), "--ttft-s=0.02", "--tpot-s=0.005"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.terminate()
    process.wait(10)


# locust is never imported here: it patches sockets and locks of the whole process, which later imports then wait for
needs_locust = pytest.mark.skipif(find_spec("locust") is None, reason="locust is not installed (extra 'verify')")


@needs_locust
def test_predicted_stands_beside_measured_and_a_record_is_kept(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = tmp_path / "records.jsonl"
    assert run(["verify", address, *PLAN, "--record", str(records)]) == 0
    out = capsys.readouterr().out
    assert "ttft_p50_s" in out
    assert "the endpoint serves 'org/model'" in out
    kept = [json.loads(line) for line in records.read_text().splitlines()]
    assert {r["cell"] for r in kept} == {"light", "load"}
    assert kept[0]["hf_config"]["num_hidden_layers"] == 32, "a record carries its model, so that it can be fitted"


@needs_locust
def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "http://127.0.0.1:9", *PLAN]) == 2
    assert "nobody listens" in capsys.readouterr().err
