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
def test_a_plan_file_says_it_all(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["predict", *PLAN, "--max-num-seqs", "77", "--json"]) == 0
    plan, report, records = (tmp_path / name for name in ("plan.json", "report.json", "records.jsonl"))
    plan.write_text(capsys.readouterr().out)
    words = ["verify", "--endpoint", address, "--plan", str(plan), "--requests", "6", "--light", "2"]
    assert run([*words, "--report", str(report), "--record", str(records)]) == 0
    shown = capsys.readouterr()
    assert "load cell: 6 requests" in shown.out
    assert "load tpot_p50_s" in shown.out, "the chart names its rows"
    assert "of about 6 requests" in shown.err, "progress"
    kept = json.loads(records.read_text().splitlines()[-1])
    assert (kept["max_num_seqs"], kept["load"]["concurrency"], kept["measured"]["n_requests"]) == (77, 2, 6)
    form = json.loads(report.read_text())
    assert {row["cell"] for row in form["rows"]} == {"light", "load"}
    # the record is one that the fit takes
    assert run(["validate", str(records)]) == 0
    assert "ttft_s.p50" in capsys.readouterr().out


def test_the_best_and_a_ranked_plan_of_an_answer_are_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["recommend", "--model", "8b", "--gpus", "2xH100", "--rate", "2", "--json"]) == 0
    path = tmp_path / "answer.json"
    path.write_text(capsys.readouterr().out)
    plans = json.loads(path.read_text())["plans"]
    for extra, wanted in (([], plans[0]), (["--rank", str(plans[1]["rank"])], plans[1])):
        assert run(["emit", "vllm", "--plan", str(path), *extra]) == 0
        script = capsys.readouterr().out
        assert f"--tensor-parallel-size {wanted['deployment']['tp']}" in script or wanted["deployment"]["tp"] == 1


@pytest.mark.parametrize(
    ("text", "extra", "says"),
    [
        ("{}", [], "is no plan; write one with"),
        ("[1]", [], "must hold one JSON object"),
        ("{", [], "is no JSON"),
        ('{"request": {"model": "8b", "gpus": "1xH100"}, "plans": []}', [], "holds no plan"),
        (
            '{"request": {"model": "8b", "gpus": "1xH100"}, "plans": [{"rank": 1}]}',
            ["--rank", "4"],
            "plan of rank 4",
        ),
        ('{"request": {"model": "8b", "gpus": "1xH100"}, "plans": [{"rank": 1}]}', [], "'backend' field required"),
        ('{"request": {"model": "8b", "gpus": "1xH100", "rate": -1}, "deployment": {}}', [], "'rate' must be"),
        ("{}", ["--tp", "2"], "leave out tp"),
        ("{}", ["--model", "8b"], "leave out model"),
    ],
)
def test_what_is_no_plan_is_said(
    text: str, extra: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    for words in (["verify", "http://127.0.0.1:9"], ["emit", "vllm"]):
        assert run([*words, "--plan", str(path), *extra]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1


def test_an_endpoint_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["http://a", "--endpoint", "http://b"]):
        assert run(["verify", *words, *PLAN]) == 2
        assert "give the endpoint once" in capsys.readouterr().err


@needs_locust
def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "http://127.0.0.1:9", *PLAN]) == 2
    assert "nobody listens" in capsys.readouterr().err
