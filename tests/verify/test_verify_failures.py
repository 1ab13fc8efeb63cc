"""Every way in which an endpoint can fail is one sentence that says what to do."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.errors import AdvisorError, DomainError, UnknownName
from advisor.schema import ClosedLoad, FixedLengths, LognormalLengths, Workload
from advisor.verify import Endpoint, EndpointError, probe, verify
from advisor.verify.drive import drive
from advisor.verify.endpoint import base_url, failure_sentence
from advisor.verify.loop import fit_lengths, longest_tokens
from advisor.verify.measure import most_common

SMALL = Workload(lengths=FixedLengths(prompt_tokens=4, output_tokens=5), load=ClosedLoad(concurrency=1, n_requests=2))


def is_one_sentence(error: BaseException) -> bool:
    text = str(error)
    return "\n" not in text and len(text) < 300 and "Traceback" not in text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:8000",
        "ftp://x",
        "http://",
        "http://u:p@host",
        "http://h?x=1",
        "http://h:99999",
        "http://[::1",
        "a b",
    ],
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(DomainError, match="endpoint") as caught:
        base_url(text)
    assert is_one_sentence(caught.value)
    assert "u:p" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("http://h:8000", "http://h:8000"),
        ("https://h/v1/", "https://h"),
        ("http://[::1]:80/api/v1", "http://[::1]:80/api"),
    ],
)
def test_addresses_lose_their_version(text: str, base: str) -> None:
    assert base_url(text) == base


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_a_sentence(text: str) -> None:
    try:
        base = base_url(text)
    except DomainError as error:
        base = f"http://{error}"
    assert base.startswith(("http://", "https://"))
    assert base.isprintable()


def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(EndpointError, match="nobody listens"):
        probe(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("mode", "pattern"),
    [
        ("denied", "wants a valid key .HTTP 401.*OPENAI_API_KEY"),
        ("missing", "no OpenAI-compatible API"),
        ("html", "answers HTML, a web page, not JSON"),
        ("many", "serves 2 models: a, b; name one"),
    ],
)
def test_what_the_first_look_finds(serve: Callable[..., str], mode: str, pattern: str) -> None:
    with pytest.raises(AdvisorError, match=pattern) as caught:
        probe(serve(mode=mode))
    assert is_one_sentence(caught.value)
    assert "<script>" not in str(caught.value)


def test_a_model_that_is_not_served_is_named(serve: Callable[..., str]) -> None:
    with pytest.raises(UnknownName, match="serves org/model"):
        probe(serve(), wanted_model="org/mode")


def test_a_server_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(EndpointError, match="stalled"):
        probe(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)


@pytest.mark.parametrize(
    ("mode", "kind", "pattern"),
    [
        ("stall", "stall", "stalled: nothing came for 0.5 s"),
        ("json", "not_sse", "does not stream server-sent events"),
        ("cut", "connection|cut", "broke off|connection"),
        ("broken", "status", "failed itself .HTTP 500"),
    ],
)
def test_what_the_load_test_finds(serve: Callable[..., str], mode: str, kind: str, pattern: str) -> None:
    address = serve(mode=mode)
    answered, failed = drive(Endpoint(address, "org/model"), SMALL, vocab_size=1000, timeout_s=0.5)
    assert not answered
    assert 1 <= len(failed) <= 2  # on a busy machine the run can end before the second has stalled long enough
    worst = most_common(failed)
    assert worst.kind in kind.split("|")
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(failure_sentence(worst.kind, worst.text, address))


def test_verify_ends_with_the_sentence(serve: Callable[..., str], make: Any) -> None:
    with pytest.raises(EndpointError, match=r"reported an error while it generated: .*out of memory") as caught:
        verify(serve(mode="error"), make.plan(), model=make.model(), workload=SMALL, timeout_s=2)
    assert is_one_sentence(caught.value)


def test_requests_that_the_server_cannot_hold_are_refused_before_the_test(serve: Callable[..., str], make: Any) -> None:
    workload = SMALL.model_copy(update={"lengths": FixedLengths(prompt_tokens=4000, output_tokens=500)})
    with pytest.raises(DomainError, match="needs 4500 tokens a request, the server takes 4096"):
        verify(serve(), make.plan(), model=make.model(), workload=workload)


@given(st.floats(1, 5000), st.floats(1, 5000), st.integers(2, 5000), st.integers(1, 10**6), st.integers(1, 10**6))
def test_drawn_lengths_are_clipped_to_the_server(p: float, o: float, limit: int, p_clip: int, o_clip: int) -> None:
    lengths = LognormalLengths(
        prompt_tokens_mean=p, output_tokens_mean=o, sigma=1, prompt_clip=(1, p_clip), output_clip=(1, o_clip)
    )
    clipped, note = fit_lengths(SMALL.model_copy(update={"lengths": lengths}), limit)
    assert longest_tokens(clipped) <= limit
    assert (note is None) == (p_clip + o_clip <= limit)
