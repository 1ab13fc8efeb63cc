"""Runs the requests of a cell against anything that streams tokens, and sums them up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from calibration.cells import Ask, Cell, Prompts
from calibration.gpus import PowerMeter
from calibration.records import spread

# send(request id, prompt ids, tokens wanted) -> (new tokens, prompt tokens found in the cache or None), in turn
Send = Callable[[str, list[int], int], AsyncIterator[tuple[int, int | None]]]
ROW_COLUMNS = [
    "submit_s",
    "ttft_s",
    "e2e_s",
    "itl_max_s",
    "prompt_tokens",
    "asked_tokens",
    "output_tokens",
    "cached_tokens",
]


@dataclass
class Answer:
    """One request as the client saw it; times from its own submission."""

    submit_s: float
    ttft_s: float
    e2e_s: float
    n_prompt: int
    n_asked: int
    n_output: int
    gaps_s: list[float] = field(default_factory=list)
    n_cached: int | None = None

    def row(self) -> list[Any]:
        """The request as a row under `ROW_COLUMNS`."""
        times = [round(x, 6) for x in (self.submit_s, self.ttft_s, self.e2e_s, max(self.gaps_s, default=0.0))]
        return [*times, self.n_prompt, self.n_asked, self.n_output, self.n_cached]


@dataclass
class Outcome:
    """What a cell gave: the record's `measured`, and a row a request."""

    measured: dict[str, Any]
    rows: list[list[Any]]


async def _one(send: Send, request_id: str, ask: Ask, start: float, answers: list[Answer]) -> None:
    submit = time.perf_counter()
    first = last = None
    n, cached = 0, None
    gaps: list[float] = []
    async for n_new, n_cached in send(request_id, ask.prompt, ask.n_output):
        now = time.perf_counter()
        cached = n_cached if n_cached is not None else cached
        if not n_new:
            continue
        if last is None:
            first = now
        else:
            gaps.append(now - last)
        last, n = now, n + n_new
    if first is None or last is None:
        raise RuntimeError(f"request {request_id} ended without a token")
    size = len(ask.prompt)
    answers.append(Answer(submit - start, first - submit, last - submit, size, ask.n_output, n, gaps, cached))


async def _closed(send: Send, tag: str, asks: list[Ask], concurrency: int, start: float) -> list[Answer]:
    answers: list[Answer] = []
    queue = iter(enumerate(asks))

    async def client() -> None:
        for i, ask in queue:
            await _one(send, f"{tag}-{i}", ask, start, answers)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(asks))):
            group.create_task(client())
    return answers


async def _open(send: Send, tag: str, asks: list[Ask], start: float) -> list[Answer]:
    answers: list[Answer] = []
    async with asyncio.TaskGroup() as group:
        for i, ask in enumerate(asks):
            wait = start + ask.at_s - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            group.create_task(_one(send, f"{tag}-{i}", ask, start, answers))
    return answers


async def warm_prefixes(send: Send, tag: str, cell: Cell, seed: int, vocab_size: int) -> None:
    """Send each shared prefix once, so that the cell starts with a cache that holds it."""
    prompts = Prompts(vocab_size, seed)
    for group in range(cell.n_prefixes):
        async for _ in send(f"{tag}-warm{group}", prompts.prefix(group, cell.shared_prefix_tokens), 1):
            pass


async def answers_of(send: Send, tag: str, cell: Cell, asks: list[Ask], start: float) -> list[Answer]:
    """Send the requests of a cell that begins at `start` (`time.perf_counter`) and return what came back."""
    if cell.kind == "closed":
        return await _closed(send, tag, asks, cell.concurrency, start)
    return await _open(send, tag, asks, start)


async def run_cell(send: Send, tag: str, cell: Cell, asks: list[Ask], meter: PowerMeter | None) -> Outcome:
    """Send the requests of a cell and return what was measured, from the first submission to the last token."""
    before = meter.energy_j() if meter else None
    start = time.perf_counter()
    answers = await answers_of(send, tag, cell, asks, start)
    return outcome_of(answers, start, time.perf_counter(), before, meter)


def outcome_of(
    answers: list[Answer], start: float, end: float, before: float | None, meter: PowerMeter | None
) -> Outcome:
    """Return what was measured between two times (`time.perf_counter`); `before` is the energy counter at the first."""
    after = meter.energy_j() if meter else None
    measured = summarise(answers, end - start)
    if meter and (power := meter.window(start, end)):
        measured["board_power_w"] = power
        meter.forget(end)
    if before is not None and after is not None:
        measured["energy_j"] = after - before
    return Outcome(measured, [a.row() for a in answers])


def summarise(answers: list[Answer], duration_s: float) -> dict[str, Any]:
    """Return the record's `measured` without power."""
    out: dict[str, Any] = {
        "n_requests": len(answers),
        "duration_s": duration_s,
        "requests_per_s": len(answers) / duration_s,
        "output_tokens_per_s": sum(a.n_output for a in answers) / duration_s,
        "input_tokens_per_s": sum(a.n_prompt for a in answers) / duration_s,
    }
    many = [a for a in answers if a.n_output > 1]
    series = {
        "ttft_s": [a.ttft_s for a in answers],
        "e2e_s": [a.e2e_s for a in answers],
        "tpot_s": [(a.e2e_s - a.ttft_s) / (a.n_output - 1) for a in many],
        "itl_max_s": [max(a.gaps_s, default=0.0) for a in many],
        "itl_s": [g for a in many for g in a.gaps_s],
    }
    out |= {name: stats for name, values in series.items() if (stats := spread(values))}
    cached = [(a.n_cached, a.n_prompt) for a in answers if a.n_cached is not None]
    if cached:
        out["cached_prompt_frac"] = sum(c for c, _ in cached) / sum(p for _, p in cached)
    short = sum(a.n_output != a.n_asked for a in answers)
    if short:
        out["n_short_answers"] = short
    return out
