"""`advisor check`: a ds_config's faults, each with its fix."""

import json
from pathlib import Path

import pytest

from advisor.cli import run


def config(folder: Path, value: object) -> str:
    path = folder / "ds_config.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_faults_are_named_with_their_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "train_micro_batch_size_per_gpu": 1,
        "pipeline_parallelism": {"num_stages": 4},
        "zero_optimization": {"stage": 4},
    }
    assert run(["check", config(tmp_path, bad)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "'pipeline_parallelism' is ignored" in out
    assert "PipelineModule" in out


def test_a_good_config_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    assert run(["check", config(tmp_path, good), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["faults"] == []


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_what_is_no_config_is_one_sentence(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    assert run(["check", str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
