"""Recorded kernels made short: a layer's medians, what lies between two steps, and files that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from calibration.__main__ import main
from calibration.kernel_steps import condense

NAMES = ["FlashAttnFwdSm90", "FlashAttnFwdCombine", "nvjet_a", "norm", "sample", "nvjet_head"]
LAYER_US = (10.0, 2.0, 50.0, 3.0)
GAP_US = 1.0


def step(events: list[list[float]], at_us: float, n_layers: int, slower_us: float = 0.0) -> float:
    """Append the kernels of a step that begins at `at_us`; return when the next one begins."""
    for _ in range(n_layers):
        for kernel, us in enumerate(LAYER_US):
            events.append([kernel, at_us, us + (slower_us if kernel == 2 else 0.0)])
            at_us += events[-1][2] + GAP_US
    for kernel, us in ((5, 100.0), (4, 5.0), (4, 5.0), (4, 5.0), (4, 5.0)):
        events.append([kernel, at_us, us])
        at_us += us + (40.0 if kernel == 5 else GAP_US)
    return at_us


def line(n_steps: int = 4, n_layers: int = 6, **more: Any) -> dict[str, Any]:
    events: list[list[float]] = []
    at_us = 0.0
    for k in range(n_steps):
        at_us = step(events, at_us, n_layers, slower_us=50.0 if k == 0 else 0.0)
    made = {"run_id": "r", "what": "decode", "n": 8, "n_context_tokens": 160, "kernels": NAMES, "events": events}
    return made | more


def test_a_layer_is_the_median_of_those_recorded() -> None:
    found = condense(line())
    assert found is not None
    assert found["layer"] == [[NAMES[k], us] for k, us in enumerate(LAYER_US)]
    assert found["layer_us"] == sum(LAYER_US) + len(LAYER_US) * GAP_US
    assert (found["run_id"], found["what"], found["n"], found["n_context_tokens"]) == ("r", "decode", 8, 160)


def test_between_two_steps_lie_a_layer_and_what_the_step_does_besides() -> None:
    found = condense(line())
    assert found is not None
    assert [name for name, _ in found["between"]] == NAMES[:4] + ["nvjet_head"] + ["sample"] * 4
    assert found["between_us"] - found["layer_us"] == 100 + 40 + 4 * (5 + GAP_US)
    assert found["idle_us"] == 40


def test_steps_that_differ_are_told_apart_and_a_step_begun_before_is_dropped() -> None:
    noted = [[512, 1, 1], [3000, 5, 5], [1000, 2, 1], [8, 8, 0]]
    found = condense(line(what="burst", n=8, n_tokens=512, steps=noted))
    assert found is not None
    assert "layer" not in found
    assert found["n_tokens"] == 512
    assert [[s["n_tokens"], s["n_sequences"], s["n_new"]] for s in found["steps"]] == noted
    slow, *others = [s["layer"][2][1] for s in found["steps"]]
    assert slow == LAYER_US[2] + 50
    assert others == [LAYER_US[2]] * 3
    begins = [s["at_us"] for s in found["steps"]]
    assert begins == sorted(begins)
    assert begins[0] == 0.0
    late = condense(line(what="mixed", steps=noted[1:]))
    assert late is not None
    assert [s["at_us"] for s in late["steps"]] == begins[1:]
    assert condense(line(what="mixed", steps=noted[2:])) is None
    assert condense(line(what="mixed", steps=[*noted, [8, 8, 0]])) is None


def test_one_step_alone_has_nothing_between_and_a_trace_without_layers_says_nothing() -> None:
    found = condense(line(n_steps=1))
    assert found is not None
    assert "between" not in found
    assert condense(line(kernels=["gemm"] * 6)) is None
    assert condense(line(events=[])) is None


def write(path: Path, lines: list[Any]) -> str:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(text) + "\n" for text in lines)
    return str(path)


def test_the_command_writes_what_it_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "a.gz", [line(), line(events=[])]), tmp_path / "out.jsonl.gz"
    assert main(["condense-kernels", source, "--out", str(out)]) == 0
    assert "1 steps written" in capsys.readouterr().out
    with gzip.open(out, "rt") as file:
        assert [json.loads(text)["n"] for text in file] == [8]
    assert main(["condense-kernels", source, "--out", str(out)]) != 0
    assert "never overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [[{"kernels": []}], [3], [line(kernels=[])]])
def test_a_file_of_something_else_is_refused_in_one_sentence(
    tmp_path: Path, lines: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "a.gz", lines)
    assert main(["condense-kernels", source, "--out", str(tmp_path / "out.gz")]) != 0
    assert "not of recorded kernels" in capsys.readouterr().err
    (tmp_path / "plain").write_text("{}")
    assert main(["condense-kernels", str(tmp_path / "plain"), "--out", str(tmp_path / "out.gz")]) != 0
    assert "is not a file of recorded kernels" in capsys.readouterr().err
