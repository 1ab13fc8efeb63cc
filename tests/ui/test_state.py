"""Every widget explains itself, an example sets the side bar, and long work stays out of the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from advisor.errors import DomainError, UnknownName
from advisor.schema import Request
from advisor.ui import jobs, pool
from advisor.ui.navigation import PAGES

Open = Callable[..., AppTest]
Answers = Callable[..., list[Request]]


def test_an_example_sets_the_side_bar(answers: Answers, open_page: Open) -> None:
    seen = answers()
    test = open_page("recommend")
    test.button_group(key="example").set_value("RAG, 32B on 4 H100").run()
    assert not test.exception
    assert (seen[-1].model, seen[-1].gpus, seen[-1].workload, seen[-1].rate) == ("qwen3-32b", "4xH100", "rag", 2.0)


@pytest.mark.parametrize("name", [title.lower() for title in PAGES])
def test_every_widget_of_every_page_explains_itself(answers: Answers, open_page: Open, name: str) -> None:
    answers()
    test = open_page(name)
    assert not test.exception
    kinds = ("selectbox", "number_input", "select_slider", "multiselect", "button_group", "toggle", "file_uploader")
    silent = [w.label for kind in kinds for w in test.get(kind) if not w.proto.help]
    assert silent == []


@pytest.mark.parametrize("name", [title.lower() for title in PAGES])
def test_every_big_number_of_every_page_explains_itself(answers: Answers, open_page: Open, name: str) -> None:
    answers()
    test = open_page(name)
    assert not test.exception
    assert [m.label for m in test.metric if not m.proto.help] == []
    assert test.metric or name in ("audit", "calibrate")


def test_a_call_without_workers_runs_here() -> None:
    assert pool.run(sum, [1, 2]) == 3
    assert pool.run_all(divmod, [(7, 2), (9, 4)]) == [(3, 1), (2, 1)]
    with pytest.raises(UnknownName):
        pool.run(refuse)


def refuse(*_: object) -> None:
    raise UnknownName("model", "lama", ["llama"])


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(pool.WORKERS, "1")
    pool.start()
    pool.wait()
    yield
    (worker,) = pool._workers
    worker.shutdown()
    pool._workers.clear()
    pool._busy.clear()
    pool._warm.clear()


@pytest.mark.usefixtures("workers")
def test_a_worker_gives_the_same_answer_and_the_same_sentence() -> None:
    from advisor.recommend.look import plan_for

    request = Request(model="8b", gpus="1xH100", rate=2.0)
    assert pool.run(plan_for, request, {"tp": 1}) == plan_for(request, {"tp": 1})
    with pytest.raises(DomainError, match="unknown model 'lama-8b'; did you mean"):
        pool.run(plan_for, Request(model="lama-8b", gpus="1xH100"), {})


@pytest.mark.usefixtures("workers")
def test_a_worker_that_is_killed_is_replaced() -> None:
    import os
    import signal

    os.kill(next(iter(pool._workers[0]._processes)), signal.SIGKILL)
    assert pool.run(sum, [1, 2]) == 3
    pool.wait()
    assert pool.run(sum, [3, 4]) == 7


def test_workers_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pool.WORKERS, "0")
    pool.start()
    assert not pool._workers
    assert not pool.is_running()


def test_long_work_tells_its_progress_and_is_found_again(root: Path) -> None:
    from advisor.fit.adapt import refit_shipped
    from advisor.fit.records import read_records

    records = read_records(root / "data" / "runs" / "vllm-0.26.0_h100-2.jsonl")[:3]
    job = jobs.start("a", refit_shipped, records, "host")
    assert jobs.start("a", refit_shipped, records, "host") is job
    assert jobs.find("a") is job
    shares = []
    for _ in range(600):
        shares.append(job.progress()[0])
        if job.is_done:
            break
        time.sleep(0.1)
    assert job.result().n_cells == 3
    assert shares == sorted(shares)
    assert job.progress()[0] == 1.0
    bad = jobs.start("b", refit_shipped, [], "host")
    with pytest.raises(DomainError, match="none of the records"):
        bad.result()
    assert jobs.find("c") is None


def test_too_many_jobs_are_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        is_done = False

    full: Any = {str(i): Never() for i in range(jobs.MAX_WAITING)}
    monkeypatch.setattr(jobs, "_jobs", full)
    with pytest.raises(DomainError, match="8 refits wait already"):
        jobs.start("more", refuse)
