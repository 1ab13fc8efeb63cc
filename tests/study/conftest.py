"""A small study whose cells take some tens of milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from advisor.schema.study import Study
from advisor.study import read_study

SMALL = """
mode = "simulate"
models = ["llama-3.1-8b"]
gpus = ["1xL40S", "1xA100"]
slos = ["ttft_p99=1s"]
seeds = 3
n_finalists = 0

[[workloads]]
prompt_tokens = 64
output_tokens = 8
rate = [1, 2]
"""


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a study file: SMALL with some texts replaced."""

    def write(text: str = SMALL, **replaced: str) -> Path:
        for old, new in replaced.items():
            assert f"\n{old} = " in text
            text = "\n".join(f"{old} = {new}" if line.startswith(f"{old} = ") else line for line in text.split("\n"))
        path = tmp_path / "small.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def small(study_file: Callable[..., Path]) -> Study:
    """12 cells: 2 GPUs x 2 rates x 3 seeds."""
    return read_study(study_file())
