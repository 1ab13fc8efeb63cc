"""Whatever stands on the command line, the answer is a result or one sentence: never a traceback."""

from __future__ import annotations

import contextlib
import io

from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.cli import run
from advisor.cli.commands import COMMANDS

NUMBERS = st.one_of(
    st.sampled_from(["nan", "inf", "-1", "0", "1e30", "-1e-9", "1e-300", "", "1e3", "0x10", "١", "1_000", "2.5"]),
    st.integers(-5, 10**20).map(str),
    st.floats(allow_nan=True).map(str),
)
NAMES = st.one_of(
    st.sampled_from(
        ["8b", "70b", "../../etc/passwd", "$(id)", "'; drop", "a" * 5000, "\x00", "..", "/", "-", "💥", "."]
    ),
    st.text(max_size=30),
)
GPUS = st.one_of(
    st.sampled_from(["1xH100", "0xH100", "8xA100", "-1xH100", "9999999x1xH100", "1e9xH100", "x", ",", "1x1x1xL4"]),
    st.text(max_size=20),
)
FLAGS = st.sampled_from(
    [
        "--rate",
        "--concurrency",
        "--prompt-tokens",
        "--output-tokens",
        "--length-sigma",
        "--price",
        "--budget",
        "--power-cap",
        "--slo",
        "--max-model-len",
        "--engine-version",
        "--weight-dtype",
        "--backend",
        "--provider",
        "--workload",
        "--seed",
        "--pue",
        "--nonsense",
    ]
)


def outcome(words: list[str]) -> tuple[int, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run(words)
        except SystemExit as stop:  # --help prints and exits
            code = int(stop.code or 0)
    return code, err.getvalue()


def check(words: list[str]) -> None:
    code, err = outcome(words)
    assert code in (0, 2), words
    if code == 2:
        assert err.startswith("advisor: "), words
        assert len(err.splitlines()) == 1, err
        assert len(err) < 1000


@given(model=NAMES, gpus=GPUS)
@settings(max_examples=60)
def test_any_names(model: str, gpus: str) -> None:
    check(["predict", "--model", model, "--gpus", gpus, "--closed-form"])


@given(st.lists(st.tuples(FLAGS, st.one_of(NUMBERS, NAMES)), max_size=3))
@settings(max_examples=80)
def test_any_options(options: list[tuple[str, str]]) -> None:
    words = [word for pair in options for word in pair]
    check(["recommend", "--model", "1b", "--gpus", "1xH100", "--finalists", "0", *words])


@given(st.lists(st.one_of(st.sampled_from(sorted(COMMANDS)), NAMES, FLAGS), max_size=4))
@settings(max_examples=60)
def test_any_words(words: list[str]) -> None:
    # these three would read or load for real when a path or an address happens to mean something
    if words[:1] in (["fit"], ["verify"], ["validate"]):
        words = words[1:]
    check(words)
