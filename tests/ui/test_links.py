"""A link may hold anything: each page shows an answer or one sentence, never a traceback, and nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from advisor.schema import Request

Open = Callable[..., AppTest]
KINDS = ("selectbox", "number_input", "button_group", "select_slider", "multiselect", "toggle", "text_area")
HOSTILE = {
    "no number": "NaN",
    "endless": "inf",
    "huge": "1e308",
    "beyond 64 bits": "9" * 40,
    "negative": "-1",
    "zero": "0",
    "nothing": "",
    "markup": "<img src=x onerror=alert(1)>",
    "markdown": "[x](http://example.com) $a$ :red[b] `c`",
    "long": "a" * 5000,
    "not ASCII": "\u202e\U0001f4a5\u0000",
    "a list": "[1, 2]",
}
FREE = {
    "model": "lists of names take typed ones",
    "gpus": "the same",
    "train_model": "the same",
    "job_model": "the same",
}
VIEWS: dict[str, dict[str, str]] = {
    "recommend": {"load": "rate"},
    "compare": {"load": "clients"},
    "explore": {"model": "8b", "gpus": "1xH100"},
    "train": {},
    "capacity": {"model": "8b", "gpus": "4xH100", "view": "Money", "offline": "both"},
    "trust": {},
    "audit": {"claims": "one figure"},
    "calibrate": {},
}


def keys_of(test: AppTest) -> list[str]:
    """Controls of a page by their keys, which are their names in the address."""
    return [w.key for kind in KINDS for w in test.get(kind) if getattr(w, "key", None)]


@pytest.fixture(scope="module")
def keys() -> dict[str, list[str]]:
    return {}


# every value on a third of the pages, every page with a third of the values: all of them take two minutes
SOME = [(name, text) for i, name in enumerate(VIEWS) for k, text in enumerate(HOSTILE) if (i + k) % 3 == 0]


@pytest.mark.parametrize(("name", "text"), SOME)
def test_a_hostile_value_everywhere_is_an_answer_or_a_sentence(
    answers: Callable[..., list[Request]], open_page: Open, keys: dict[str, list[str]], name: str, text: str
) -> None:
    value = HOSTILE[text]
    answers()
    if name not in keys:
        keys[name] = keys_of(open_page(name, **VIEWS[name]))
    wrong = {key: value for key in keys[name] if key not in FREE and key not in VIEWS[name]}
    test = open_page(name, **(VIEWS[name] | wrong))
    fine(test)


@pytest.mark.parametrize("value", [v for v in HOSTILE.values() if v not in ("-1", "0")])
@pytest.mark.parametrize(("name", "key"), [("explore", "model"), ("explore", "gpus"), ("train", "train_model")])
def test_a_hostile_name_is_a_sentence(open_page: Open, name: str, key: str, value: str) -> None:
    test = open_page(name, **(VIEWS[name] | {key: value}))
    fine(test)
    if value:
        (error,) = test.error
        assert len(error.value) < 700


@pytest.mark.parametrize(
    ("name", "key", "value", "wanted"),
    [
        ("recommend", "prompt", "inf", "prompt=inf (a whole number from 1 to 100,000,000)"),
        ("recommend", "prompt", "1.5", "a whole number"),
        ("recommend", "usd", "-1", "usd=-1 (a number from 0 to 10,000)"),
        ("recommend", "tpot_p99", "25 ms", "one of off, 10 ms"),
        ("train", "checkpointing", "perhaps", "true or false"),
        ("trust", "held_metric", "TTFT P42", "one of 6 in its list"),
        ("trust", "held_row", "<b>x</b>", "in its list"),
        ("audit", "verdicts", "<b>x</b>", "of consistent"),
        ("explore", "at_max_num_seqs", "1e3", "one of auto"),
    ],
)
def test_what_a_link_cannot_ask_for_is_said_and_the_default_stands(
    answers: Callable[..., list[Request]],
    open_page: Open,
    name: str,
    key: str,
    value: str,
    wanted: str,
) -> None:
    answers()
    test = open_page(name, **(VIEWS[name] if name == "explore" else {}), **{key: value})
    fine(test)
    first = test.warning[0].value.replace("\\", "")
    assert first.startswith("Left out of the link, the default stands instead: ")
    assert wanted in first
    assert key not in test.query_params


def test_a_good_link_is_not_remarked_on(answers: Callable[..., list[Request]], open_page: Open) -> None:
    seen = answers()
    test = open_page("recommend", prompt="900", tpot_p99="20 ms", usd="2.5", kwh="0", model="8b")
    assert not any("Left out" in w.value for w in test.warning)
    assert seen[-1].prompt_tokens == 900
    assert seen[-1].slo.targets[0].max_s == 0.02


def fine(test: AppTest) -> None:
    assert not test.exception, [e.value for e in test.exception]
    assert test.title[0].value
    assert all("Traceback" not in e.value for e in test.error)
    assert len(test.error) <= 1, [e.value for e in test.error]
    for kind in ("markdown", "caption", "error", "info", "warning"):
        for element in test.get(kind):
            assert "<img" not in str(element.value).replace("\\<", ""), element.value


def test_every_control_of_a_page_has_a_name_in_the_address(
    answers: Callable[..., list[Request]], open_page: Open
) -> None:
    answers()
    found: dict[str, Any] = {name: keys_of(open_page(name, **view)) for name, view in VIEWS.items()}
    assert {"model", "gpus", "rate", "tpot_p99", "plan"} <= set(found["recommend"])
    assert {"engine", "runs", "held_by", "held_row", "held_metric", "peer_load", "origin"} <= set(found["trust"])
    assert {"figure", "value", "claim_engine"} <= set(found["audit"])
