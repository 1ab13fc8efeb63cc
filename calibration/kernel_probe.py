"""Where a step's time goes on the GPU, kernel by kernel: what no client can see."""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from calibration.cells import Prompts
from calibration.load import Send
from calibration.vllm_probe import MemoryProbe, held

EXTENSION = "calibration.kernel_probe.KernelProbe"
PROMPT_TOKENS = 128
READY_TOKENS = 6
"""Tokens that each request has before the recording begins: all are decoding by then."""
MAX_OUTPUT_TOKENS = 600
WINDOW_S = 0.1
LIMIT_S = 40.0
MAX_EVENTS = 16_000
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


class KernelProbe(MemoryProbe):
    """Worker extension that also records which kernels ran, when and for how long (torch's profiler, CUPTI)."""

    def calibration_record_kernels(self) -> dict[str, Any]:
        """Begin to record; a recording that is still open is dropped."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        self.calibration_steps: list[list[int]] = []
        self._calibration_note_steps()
        self.calibration_recording: Any = profile(activities=[ProfilerActivity.CUDA])
        self.calibration_recording.start()
        torch.cuda.synchronize()
        return {}

    def _calibration_note_steps(self) -> None:
        """Have the model runner note what each step holds from now on: tokens, sequences, of these new ones."""
        if getattr(self, "calibration_notes", False):
            return
        self.calibration_notes = True
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        execute = runner.execute_model

        def noted(scheduled: Any, *args: Any, **more: Any) -> Any:
            step = held(scheduled)
            if step[0]:
                self.calibration_steps.append(step)
            return execute(scheduled, *args, **more)

        runner.execute_model = noted

    def calibration_kernels(self) -> dict[str, Any]:
        """End the recording and return its `kernels` (names), `events` (place of the name, start, length; us), `steps`.

        `steps` : tokens, sequences and new sequences of each step that was launched meanwhile, in order
        """
        import torch

        torch.cuda.synchronize()
        recording, self.calibration_recording = self.calibration_recording, None
        recording.stop()
        with tempfile.TemporaryDirectory(prefix="calibration-trace-") as folder:
            path = Path(folder, "trace.json")
            recording.export_chrome_trace(str(path))
            return {**events_of(json.loads(path.read_text(encoding="utf-8"))), "steps": list(self.calibration_steps)}


def events_of(trace: dict[str, Any]) -> dict[str, Any]:
    """Return what ran on the GPU in a trace (Chrome's format), in order, times from the first one's start."""
    found = sorted((e["ts"], e["dur"], e["name"]) for e in trace["traceEvents"] if e.get("cat") in ON_GPU)
    names: dict[str, int] = {}
    events = [
        [names.setdefault(name[:160], len(names)), round(ts - found[0][0], 3), round(dur, 3)]
        for ts, dur, name in found[:MAX_EVENTS]
    ]
    return {"kernels": list(names), "events": events}


async def _decode(send: Send, name: str, prompt: list[int], seen: list[int], place: int) -> None:
    async for n_new, _ in send(name, prompt, MAX_OUTPUT_TOKENS):
        seen[place] += n_new


@asynccontextmanager
async def _decoding(send: Send, name: str, n_rows: int, prompts: Prompts) -> AsyncIterator[list[int]]:
    """Keep so many sequences decoding; gives the tokens that each has had, from `READY_TOKENS` on."""
    seen = [0] * n_rows
    tasks = [
        asyncio.create_task(_decode(send, f"kernels-{name}-{k}", prompts.draw(PROMPT_TOKENS), seen, k))
        for k in range(n_rows)
    ]
    try:
        while min(seen) < READY_TOKENS:
            await asyncio.sleep(0.005)
            for task in tasks:
                if task.done():
                    task.result()  # its error, at once
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first_tokens(send: Send, name: str, n: int, n_tokens: int, prompts: Prompts) -> None:
    """Send n prompts at once and wait for the first token of each."""

    async def one(k: int) -> None:
        async for _ in send(f"kernels-{name}-{k}", prompt[k], 1):
            pass

    prompt = [prompts.draw(n_tokens) for _ in range(n)]
    await asyncio.gather(*(one(k) for k in range(n)))


async def _recorded(engine: Any, work: Callable[[], Awaitable[None]]) -> dict[str, Any]:
    await engine.collective_rpc("calibration_record_kernels")
    await work()
    answers = await engine.collective_rpc("calibration_kernels")
    return dict(answers[0])


async def _decodes(engine: Any, send: Send, n_rows: int, _: int, prompts: Prompts) -> dict[str, Any]:
    async with _decoding(send, f"d{n_rows}", n_rows, prompts) as seen:
        found = await _recorded(engine, partial(asyncio.sleep, WINDOW_S))
        return {"n_context_tokens": PROMPT_TOKENS + min(seen), **found}


async def _prompt(engine: Any, send: Send, n_tokens: int, _: int, prompts: Prompts) -> dict[str, Any]:
    return await _burst(engine, send, 1, n_tokens, prompts)


async def _burst(engine: Any, send: Send, n: int, n_tokens: int, prompts: Prompts) -> dict[str, Any]:
    return await _recorded(engine, partial(_first_tokens, send, f"b{n}x{n_tokens}", n, n_tokens, prompts))


async def _mixed(engine: Any, send: Send, n_rows: int, n_tokens: int, prompts: Prompts) -> dict[str, Any]:
    async with _decoding(send, f"m{n_rows}x{n_tokens}", n_rows, prompts) as seen:
        found = await _recorded(engine, partial(_first_tokens, send, f"m{n_rows}x{n_tokens}-p", 1, n_tokens, prompts))
        return {"n_context_tokens": PROMPT_TOKENS + min(seen), **found}


class Kind(NamedTuple):
    """A kind of steps that can be recorded: how, whether sizes are pairs of numbers, and what is said of one."""

    record: Callable[[Any, Send, int, int, Prompts], Awaitable[dict[str, Any]]]
    is_pair: bool
    words: str


KINDS = {
    "decode": Kind(_decodes, False, "{} sequences"),
    "prompt": Kind(_prompt, False, "a prompt of {} tokens"),
    "burst": Kind(_burst, True, "{} prompts of {} tokens at once"),
    "mixed": Kind(_mixed, True, "{} sequences and a prompt of {} tokens"),
}


def is_wanted(raw: Any) -> bool:
    """Return whether an option names steps whose kernels can be recorded."""

    def is_size(size: Any, is_pair: bool) -> bool:
        numbers = size if is_pair and isinstance(size, list) and len(size) == 2 else [size]
        return len(numbers) == 1 + is_pair and all(type(n) is int and n > 0 for n in numbers)

    return isinstance(raw, dict) and all(
        name in KINDS and isinstance(sizes, list) and all(is_size(size, KINDS[name].is_pair) for size in sizes)
        for name, sizes in raw.items()
    )


async def record_kernels(
    engine: Any, send: Send, wanted: Mapping[str, Sequence[Any]], vocab_size: int, path: Path, run_id: str
) -> list[str]:
    """Record the kernels of some steps of an idle engine; return a line of what was found for each.

    wanted : "decode" (sequences that decode, each number for `WINDOW_S`), "prompt" (tokens of one prompt), "burst"
    ([prompts, tokens of each], all sent at once) and "mixed" ([sequences that decode, tokens of a prompt that comes])

    Lines go to `path` (gzipped JSON lines): run_id, what, n (sequences, tokens or prompts), n_tokens of a prompt for
    pairs, kernels, events and steps of the first worker, for decodes also n_context_tokens of a sequence, about. What
    fails is said in its line, and the rest goes on.
    """
    said = []
    for what, size in ((what, size) for what, sizes in wanted.items() for size in sizes):
        kind = KINDS[what]
        n, n_tokens = size if kind.is_pair else (size, 0)
        label = f"kernels of {kind.words.format(n, n_tokens)}"
        try:
            work = kind.record(engine, send, n, n_tokens, Prompts(vocab_size, 7000 + n + n_tokens))
            found = await asyncio.wait_for(work, LIMIT_S)
        except (TimeoutError, Exception) as err:
            said.append(f"{label}: {type(err).__name__} {str(err)[:120]}")
            continue
        shape = {"n": n, "n_tokens": n_tokens} if kind.is_pair else {"n": n}
        with gzip.open(path, "at", encoding="utf-8") as file:
            file.write(json.dumps({"run_id": run_id, "what": what, **shape, **found}) + "\n")
        said.append(f"{label}: {len(found['events'])} of {len(found['kernels'])} kinds")
    return said
