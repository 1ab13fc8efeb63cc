"""A small answer for the pages' tests: numbers chosen by hand, so that a test can find them on the page."""

from __future__ import annotations

import pickle
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest

from advisor.catalog import Catalog, load_catalog
from advisor.schema import (
    Breakdown,
    Deployment,
    Interval,
    Note,
    Part,
    Plan,
    Prediction,
    Recommendation,
    Rejected,
    Request,
)
from advisor.ui import later
from benchmarks.app_browser import FLAGS, WATCH, settle

HOSTILE = "<script>alert(1)</script>[x](http://example.com) $1 and $2 `a` :red[b]"


def around(value: float, share: float = 0.1) -> Interval:
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def make_plan(
    rank: int, backend: str, *, tpot_s: float, usd: float, tp: int = 4, note: str = "", gpu: str = "a100-sxm-80gb"
) -> Plan:
    gb = 1e9
    return Plan(
        rank=rank,
        backend=backend,
        deployment=Deployment.model_validate(
            {"backend": backend, "model": "llama-3.1-70b", "gpu": gpu, "tp": tp, "dp": 8 // tp}
        ),
        prediction=Prediction(
            quantities={
                "ttft_p50_s": around(0.21),
                "ttft_p99_s": around(0.95),
                "tpot_p50_s": around(tpot_s * 0.8),
                "tpot_p99_s": around(tpot_s),
                "e2e_p99_s": around(9.0),
                "requests_per_s": around(5.5, 0.0),
                "output_tokens_per_s": around(1160),
                "saturation_requests_per_s": around(14),
                "memory_bytes_per_gpu": around(71 * gb),
                "board_power_w": around(2310),
                "energy_j_per_output_token": around(1.99),
                "usd_per_million_output_tokens": around(usd),
                "usd_per_h": around(14.4, 0.0),
            },
            breakdowns=(
                Breakdown(
                    name="memory per GPU",
                    unit="bytes",
                    total=71 * gb,
                    parts=(
                        Part(name="weights", value=35 * gb, why="70.6B parameters over 4 GPUs"),
                        Part(name="kv_cache", value=30 * gb),
                        Part(name="activations", value=6 * gb),
                    ),
                ),
                Breakdown(
                    name="time per output token",
                    unit="s",
                    total=tpot_s,
                    parts=(Part(name="linear", value=tpot_s * 0.7), Part(name="overhead", value=tpot_s * 0.3)),
                ),
            ),
            notes=(Note(level="warning", text=note),) if note else (),
        ),
        meets_slo=rank == 1,
        is_pareto=rank < 3,
        usd_per_h=14.4,
        score=usd,
        command=f"vllm serve meta-llama/Llama-3.1-70B --tensor-parallel-size {tp}",
        reasons=("cheapest that keeps the targets",),
    )


@pytest.fixture
def a_plan() -> Callable[..., Plan]:
    """Makes a plan: `a_plan(rank, backend, tpot_s=, usd=)`."""
    return make_plan


def an_answer(request: Request) -> Recommendation:
    gpu = load_catalog().clusters(request.gpus).clusters[0].gpu.name
    plans = (
        make_plan(1, "vllm", tpot_s=0.031, usd=3.45, note=HOSTILE, gpu=gpu),
        make_plan(2, "vllm", tpot_s=0.024, usd=4.1, tp=8, gpu=gpu),
        make_plan(3, "deepspeed-autotp", tpot_s=0.09, usd=11.0, tp=8, gpu=gpu),
    )
    return Recommendation(
        request=request.model_dump(mode="json"),
        model=request.model,
        model_note="70b: took llama-3.1-70b",
        gpus=request.gpus,
        best=plans[0],
        best_by_backend={"vllm": plans[0], "deepspeed-autotp": plans[2]},
        plans=plans,
        rejected=(
            Rejected(
                backend="vllm",
                deployment=Deployment(model="llama-3.1-70b", gpu="a100-sxm-80gb"),
                reason="weights need 141 GB, the card has 85 GB",
                nearest="tp 2",
                count=7,
            ),
        ),
        why=("costs 16 % less than the next plan",),
        flips=("below 2 requests/s DeepSpeed AutoTP wins",),
        notes=(Note(text="prices of 2026-11"),),
    )


def no_answer(request: Request) -> Recommendation:
    full = an_answer(request)
    return full.model_copy(update={"best": None, "plans": (), "best_by_backend": {}})


_SEEN: dict[bytes, Any] = {}


def once(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, worked out once for the same arguments: AppTest forgets streamlit's caches at every run."""

    def found(*args: Any, **kwargs: Any) -> Any:
        key = pickle.dumps((call.__qualname__, [a for a in args if not isinstance(a, Catalog)], kwargs))
        if key not in _SEEN:
            _SEEN[key] = call(*args, **kwargs)
        return _SEEN[key]

    return found


@pytest.fixture(scope="session", autouse=True)
def _packages_read_once() -> Iterator[None]:
    """AppTest reads the metadata of every installed package at each run, which takes longer than most of our pages."""
    from streamlit.components.v2 import manifest_scanner

    found = manifest_scanner.scan_component_manifests()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_scanner, "scan_component_manifests", lambda: list(found))
        yield


@pytest.fixture(autouse=True)
def _worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from advisor.ui import accuracy, call

    later.forget()
    for name in ("find_plans", "find_verdicts", "find_power", "look_for", "plan_day", "plan_for", "recommend_training"):
        monkeypatch.setattr(call, name, once(getattr(call, name)))
    monkeypatch.setattr(accuracy, "validate", once(accuracy.validate))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Request]]:
    """Puts a fixed answer ("full", "none" or an exception) in the place of the search; returns the requests seen."""

    def replace(kind: str | Exception = "full") -> list[Request]:
        seen: list[Request] = []

        def find(request: Request, is_brief: bool = False) -> Recommendation:
            seen.append(request)
            if isinstance(kind, Exception):
                raise kind
            return an_answer(request) if kind == "full" else no_answer(request)

        st.cache_data.clear()
        later.forget()
        monkeypatch.setattr("advisor.ui.call.find_plans", find)
        return seen

    return replace


@pytest.fixture
def open_page(root: Path) -> Callable[..., AppTest]:
    """Runs one page without a browser: `open_page("recommend", model="8b")`."""

    def run(name: str, **query: str) -> AppTest:
        code = f"from advisor.ui.call import page\nfrom advisor.ui.pages import {name}\npage({name}.render)()"
        test = AppTest.from_string(code, default_timeout=60)
        for key, value in query.items():
            test.query_params[key] = value
        return test.run()

    return run


@pytest.fixture
def words() -> Callable[[AppTest], str]:
    """Reads all text of a page that Markdown renders."""
    kinds = ("title", "subheader", "markdown", "caption")
    return lambda test: "\n".join(str(e.value) for kind in kinds for e in test.get(kind))


@pytest.fixture
def metrics() -> Callable[[AppTest], dict[str, str]]:
    """Reads the big numbers of a page, by label."""
    return lambda test: {m.label: m.value for m in test.metric}


@pytest.fixture
def codes() -> Callable[[AppTest], list[str]]:
    """Reads the blocks of code of a page, from top to bottom."""
    return lambda test: [c.value for c in test.code]


@pytest.fixture(scope="session")
def address(root: Path) -> Iterator[str]:
    """The app, served by streamlit on a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.address", "127.0.0.1"]
    command += ["--server.port", str(port), "--server.fileWatcherType", "none"]
    server = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"{url}/_stcore/health", timeout=1):
                    break
            except OSError:
                assert server.poll() is None, "streamlit ended at once"
                time.sleep(0.25)
        else:
            pytest.fail("streamlit did not answer within 30 s")
        yield url
    finally:
        server.terminate()
        server.wait(timeout=10)


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # one process for all pages of a visitor: what it has compiled for one page it need not compile for the next
        opened = play.chromium.launch(executable_path=chromium, headless=True, args=[*FLAGS, "--process-per-site"])
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def known(browser: Any, address: str) -> Iterator[Any]:
    """What a browser keeps for somebody who has been here before: the app's scripts, and nothing that he has chosen."""
    context = browser.new_context()
    context.add_init_script("localStorage.clear(); sessionStorage.clear()")
    context.new_page().goto(f"{address}/_stcore/health")  # stays open, and with it the process and what it compiled
    yield context
    context.close()


@pytest.fixture
def visit(browser: Any, known: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens a page of the app; at the end of the test nothing may have failed in the console or left the machine.

    `visit("/trust", is_first=True)` is the visit of a browser that has to load everything.
    """
    pages, faults = [], []

    def go(path: str = "/", *, width: int = 1280, scheme: str = "light", is_first: bool = False) -> Any:
        page = (browser.new_context() if is_first else known).new_page()
        pages.append((page, is_first))
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.add_init_script(WATCH)
        # opened below its root, streamlit's client looks for its server there first and logs the miss
        probe = re.compile(r"/\w+/_stcore/(health|host-config)")

        def said(message: Any) -> None:
            if message.type == "error" and not probe.search(message.location.get("url", "")):
                faults.append(message.text)

        page.on("console", said)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else faults.append(r.url))
        page.goto(address + path)
        settle(page)
        return page

    yield go
    for page, is_first in pages:
        (page.context if is_first else page).close()
    assert faults == []
