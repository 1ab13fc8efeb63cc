"""A cell's requests from several processes, so that one client's Python is not what is measured.

All of them are on one machine and read one clock (`time.perf_counter` is the machine's monotonic clock on Linux).
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from calibration.cells import Ask, Cell
from calibration.errors import first_error
from calibration.gpus import PowerMeter
from calibration.load import Answer, Outcome, Send, answers_of, outcome_of

BEGIN_S = 0.05
"""From the last process being ready until all begin."""


def shares(cell: Cell, asks: list[Ask], n_processes: int) -> list[tuple[Cell, list[Ask]]]:
    """Return each process's cell, with its clients, and its requests. Nobody gets none.

    Clients are dealt out in turn, and the requests to the clients.

    >>> cell = Cell(kind="closed", prompt_tokens=8, output_tokens=1, concurrency=3, n_requests=7)
    >>> [(c.concurrency, len(a)) for c, a in shares(cell, [Ask(0.0, [1], 1)] * 7, 2)]
    [(2, 5), (1, 2)]
    """
    n_clients = min(len(asks), cell.concurrency if cell.kind == "closed" else len(asks))
    n = max(1, min(n_processes, n_clients))
    parts: list[list[Ask]] = [[] for _ in range(n)]
    for i, ask in enumerate(asks):
        parts[i % n_clients % n].append(ask)
    return [(replace(cell, concurrency=len(range(k, n_clients, n))), part) for k, part in enumerate(parts)]


def _client(pipe: Any, send_of: Callable[[], Send], tag: str, cell: Cell, asks: list[Ask]) -> None:
    try:
        send = send_of()
        pipe.send(None)
        start = pipe.recv()
        time.sleep(max(0.0, start - time.perf_counter()))
        pipe.send(asyncio.run(answers_of(send, tag, cell, asks, start)))
    except Exception as err:
        pipe.send(first_error(err))


async def _received(pipe: Any) -> Any:
    """Return what a process sends, without holding the event loop up; it may have died."""
    while not pipe.poll():
        await asyncio.sleep(0.01)
    try:
        found = pipe.recv()
    except EOFError:
        raise RuntimeError("a client process died") from None
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


async def run_cell_apart(
    send_of: Callable[[], Send], tag: str, cell: Cell, asks: list[Ask], n_processes: int, meter: PowerMeter | None
) -> Outcome:
    """Send the requests of a cell from so many processes; `send_of` makes each its sender (it must be picklable).

    Raises RuntimeError with the first error of a process; the others are then stopped.
    """
    context = multiprocessing.get_context("spawn")
    parts = shares(cell, asks, n_processes)
    pipes, processes = [], []
    try:
        for k, (mine, its_asks) in enumerate(parts):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_client, args=(theirs, send_of, f"{tag}-{k}", mine, its_asks), daemon=True)
            process.start()
            theirs.close()
            pipes.append(pipe)
            processes.append(process)
        for pipe in pipes:
            await _received(pipe)
        before = meter.energy_j() if meter else None
        start = time.perf_counter() + BEGIN_S
        for pipe in pipes:
            pipe.send(start)
        answers: list[Answer] = []
        for pipe in pipes:
            answers += await _received(pipe)
        answers.sort(key=lambda answer: answer.submit_s)
        end = start + max(answer.submit_s + answer.e2e_s for answer in answers)
        return outcome_of(answers, start, end, before, meter)
    finally:
        for process in processes:
            process.kill()
            process.join()
