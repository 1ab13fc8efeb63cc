"""Bad study files and traces: one sentence each, before anything is computed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from advisor.errors import AdvisorError, BadData
from advisor.study import read_study
from advisor.study.trace import read_trace

GOOD = 'models = ["8b"]\ngpus = ["1xL40S"]\n'
BAD = [
    ("modles = ['8b']\n" + GOOD, "unknown key 'modles'; did you mean models"),
    (GOOD + "[[workloads]]\nprompt_token = 5", "unknown key of a workload 'prompt_token'; did you mean prompt_tokens"),
    (GOOD + "mode='simulate'\n[deployment]\ntpp = 2", "unknown key of the deployment 'tpp'; did you mean tp"),
    ('gpus = ["1xL40S"]', "'models' field required"),
    ('models = []\ngpus = ["1xL40S"]', "'models' is an empty list"),
    (GOOD + "seeds = []", "'seeds' is an empty list"),
    (GOOD + "workloads = []", "'workloads' is an empty list"),
    (GOOD + "seeds = [1, 1]", "'seeds' names a value twice"),
    (GOOD + "seeds = 0", "a number of seeds must be 1 to"),
    (GOOD + "seeds = true", "seeds"),
    (GOOD + "seeds = [-1]", "greater than or equal to 0"),
    ('models = ["lama-3.1-8b"]\ngpus = ["1xL40S"]', "unknown model 'lama-3.1-8b'; did you mean llama-3.1-8b"),
    ('models = ["8b"]\ngpus = ["1xL40X"]', "unknown GPU 'l40x'; did you mean l40s"),
    (GOOD + 'workloads = ["chatt"]', "unknown workload 'chatt'; did you mean chat"),
    (GOOD + 'workloads = ["no.csv"]', "no.csv: no such file"),
    (GOOD + "workloads = [{rate = 1, concurrency = 2}]", "give rate or concurrency, not both"),
    (GOOD + 'workloads = [{trace = "a.csv", rate = 1}]', "a trace brings its own"),
    (GOOD + 'slos = ["ttft_p98=1s"]', "cannot read target 'ttft_p98=1s'"),
    (GOOD + 'objectives = ["speed"]', "'cost', 'latency'"),
    (GOOD + 'engine_version = "9.9"', "9.9"),
    (GOOD + "[deployment]\ntp = 2", "set mode = 'simulate'"),
    (GOOD + "workloads = [{rate = [1, 2, 3]}]\nseeds = 5000000", "15,000,000 cells; at most 10,000,000"),
    ("models = [", "is no TOML"),
    ("models = 3\ngpus = 4", "'models'"),
    ('models = "8b"\ngpus = ["1xL40S"]', "'models'"),
]


@pytest.mark.parametrize(("text", "says"), BAD, ids=[says[:30] for _, says in BAD])
def test_a_bad_file_is_refused_in_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    with pytest.raises(AdvisorError) as caught:
        read_study(path)
    message = str(caught.value)
    assert says.lower() in message.lower()
    assert "\n" not in message
    assert re.search(r"s\.toml|no\.csv", message), "the message names the file"


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no such file"):
        read_study(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--backend", "rays"], "unknown backend 'rays'; did you mean ray"),
        (["--shard", "4/4"], "i from 0 to n-1"),
        (["--workers", "0"], "workers must be 1 to"),
        (["--out", "/proc/none/x.jsonl"], "cannot be written"),
    ],
)
def test_bad_options_end_in_one_sentence(
    argv: list[str],
    says: str,
    study_file: Callable[..., Path],
    run_advisor: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_advisor("study", str(study_file()), *argv)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_trace_is_read_by_its_column_names(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("trace,T_S,input_tokens,output_tokens,x\na,12.5,7,8,\na,10,5,6,\nb,1,2,3,\n")
    workload = read_trace(path, "a")
    assert workload.load.arrival_s == (0.0, 2.5)  # sorted, from its own start
    assert workload.lengths.prompt_tokens == (5, 7)
    assert workload.lengths.output_tokens == (6, 8)


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("when,prompt_tokens,output_tokens\n1,2,3\n", "", "has no column for the time"),
        ("", "", "has no column"),
        ("time,prompt_tokens,output_tokens\n", "", "has no requests"),
        ("time,prompt_tokens,output_tokens\n1,2,x\n", "", "line 2 needs seconds"),
        ("time,prompt_tokens,output_tokens\n1,2\n", "", "line 2 needs seconds"),
        ("time,prompt_tokens,output_tokens\n1,2,0\n", "", "greater than 0"),
        ("time,prompt_tokens,output_tokens\nnan,2,1\n", "", "finite"),
        ("trace,time,prompt_tokens,output_tokens\na,1,2,3\nb,1,2,3\n", "", "set trace_name"),
        ("trace,time,prompt_tokens,output_tokens\nmon,1,2,3\nsun,1,2,3\n", "mno", "did you mean mon"),
    ],
)
def test_a_bad_trace_is_refused(text: str, name: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(BadData) as caught:
        read_trace(path, name)
    assert says in str(caught.value)
    assert "t.csv" in str(caught.value)


def test_a_trace_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"time,prompt_tokens,output_tokens\n1,2,\xff\xfe\n")
    with pytest.raises(BadData, match="UTF-8"):
        read_trace(path)
