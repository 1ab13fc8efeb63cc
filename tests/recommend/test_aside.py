"""Replays side by side: each in a process of its own here, as only a process with one thread is copied."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from advisor.recommend import aside

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import os, threading, time
from advisor.recommend import aside
aside.os.sched_getaffinity = lambda _: {0, 1}  # two processes, however many cores this machine has
parent = os.getpid()
def left():
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0
    return 1
"""
needs_fork = pytest.mark.skipif(not aside.TASKS.exists(), reason="side by side is for Linux: no /proc here")


def run(code: str) -> str:
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HEAD + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@needs_fork
def test_each_result_stands_at_the_place_of_its_job_and_two_processes_took_part() -> None:
    code = """
def job(i):
    time.sleep(0.02)
    return i, os.getpid()
made = aside.side_by_side([lambda i=i: job(i) for i in range(12)])
assert {i: v[0] for i, v in made.items()} == {i: i for i in range(12)}
pids = {v[1] for v in made.values()}
print(len(pids), parent in pids, left())
"""
    assert run(code) == "2 True 0"


@needs_fork
def test_a_job_that_raises_is_left_to_the_caller() -> None:
    code = """
def bad():
    raise ValueError("no")
print(aside.side_by_side([bad, lambda: 1, bad, lambda: 3]), left())
"""
    assert run(code) == "{1: 1, 3: 3} 0"


@needs_fork
@pytest.mark.parametrize("last", ["os._exit(9)", "os.kill(os.getpid(), 9)", "lambda: 0"])
def test_results_of_a_child_that_dies_or_cannot_send_are_left_to_the_caller(last: str) -> None:
    code = f"""
def job(i):
    time.sleep(0.03)
    if os.getpid() != parent:
        return {last}
    return i
made = aside.side_by_side([lambda i=i: job(i) for i in range(6)])
print(made == {{i: i for i in made}}, 0 < len(made) < 6, left())
"""
    assert run(code) == "True True 0"


@needs_fork
def test_an_interrupt_leaves_no_child_behind() -> None:
    code = """
def job():
    if os.getpid() == parent:
        raise KeyboardInterrupt
    time.sleep(60)
begin = time.monotonic()
try:
    aside.side_by_side([job] * 4)
except KeyboardInterrupt:
    print("interrupted", left(), time.monotonic() - begin < 30)
"""
    assert run(code) == "interrupted 0 True"


@needs_fork
def test_a_process_with_threads_is_not_copied_and_one_job_is_no_work_to_share() -> None:
    code = """
print(aside.n_processes(5), aside.n_processes(1), aside.side_by_side([lambda: 1]))
stop = threading.Event()
threading.Thread(target=stop.wait).start()
print(aside.n_processes(5), aside.side_by_side([lambda: 1, lambda: 2]))
stop.set()
"""
    assert run(code) == "2 1 {}\n1 {}"


@needs_fork
def test_more_jobs_than_a_byte_can_number() -> None:
    code = "made = aside.side_by_side([lambda i=i: i for i in range(300)]); print(made == {i: i for i in range(256)})"
    assert run(code) == "True"


@needs_fork
def test_an_answer_is_the_same_from_one_process_and_from_two() -> None:
    code = """
import advisor
from advisor.recommend import kept
request = advisor.Request(model="8b", gpus="2xH100", rate=20.0)
made, side_by_side = [], aside.side_by_side
def noted(jobs, meanwhile):
    made.append(side_by_side(jobs, meanwhile))
    return made[-1]
from advisor.recommend import forecast
forecast.side_by_side = noted
two = advisor.recommend(request).model_dump_json()
kept.forget()
aside.MOST_PROCESSES = 1
n_two = sum(map(len, made))
one = advisor.recommend(request).model_dump_json()
print(one == two, n_two > 1, sum(map(len, made)) - n_two)
"""
    assert run(code) == "True True 0"
