"""Where a decode step's time goes on the GPU, kernel by kernel: what no client can see."""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibration.cells import Prompts
from calibration.load import Send
from calibration.vllm_probe import MemoryProbe

EXTENSION = "calibration.kernel_probe.KernelProbe"
PROMPT_TOKENS = 128
READY_TOKENS = 6
"""Tokens that each request has before the recording begins: all are decoding by then."""
MAX_OUTPUT_TOKENS = 600
WINDOW_S = 0.1
LIMIT_S = 40.0
MAX_EVENTS = 6_000
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


class KernelProbe(MemoryProbe):
    """Worker extension that also records which kernels ran, when and for how long (torch's profiler, CUPTI)."""

    def calibration_record_kernels(self) -> dict[str, Any]:
        """Begin to record; a recording that is still open is dropped."""
        import torch
        from torch.profiler import ProfilerActivity, profile

        self.calibration_recording: Any = profile(activities=[ProfilerActivity.CUDA])
        self.calibration_recording.start()
        torch.cuda.synchronize()
        return {}

    def calibration_kernels(self) -> dict[str, Any]:
        """End the recording and return its `kernels` (names) and `events` (place of the name, start, length; us)."""
        import torch

        torch.cuda.synchronize()
        recording, self.calibration_recording = self.calibration_recording, None
        recording.stop()
        with tempfile.TemporaryDirectory(prefix="calibration-trace-") as folder:
            path = Path(folder, "trace.json")
            recording.export_chrome_trace(str(path))
            return events_of(json.loads(path.read_text(encoding="utf-8")))


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


async def _decodes(engine: Any, send: Send, n_rows: int, prompts: Prompts) -> dict[str, Any]:
    seen = [0] * n_rows
    tasks = [
        asyncio.create_task(_decode(send, f"kernels-d{n_rows}-{k}", prompts.draw(PROMPT_TOKENS), seen, k))
        for k in range(n_rows)
    ]
    try:
        while min(seen) < READY_TOKENS:
            await asyncio.sleep(0.005)
            for task in tasks:
                if task.done():
                    task.result()  # its error, at once
        await engine.collective_rpc("calibration_record_kernels")
        await asyncio.sleep(WINDOW_S)
        answers = await engine.collective_rpc("calibration_kernels")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {"n_context_tokens": PROMPT_TOKENS + min(seen), **answers[0]}


async def _prompt(engine: Any, send: Send, n_tokens: int, prompts: Prompts) -> dict[str, Any]:
    await engine.collective_rpc("calibration_record_kernels")
    async for _ in send(f"kernels-p{n_tokens}", prompts.draw(n_tokens), 1):
        pass
    answers = await engine.collective_rpc("calibration_kernels")
    return dict(answers[0])


async def record_kernels(
    engine: Any, send: Send, wanted: Mapping[str, Sequence[int]], vocab_size: int, path: Path, run_id: str
) -> list[str]:
    """Record the kernels of some steps of an idle engine; return a line of what was found for each.

    wanted : "decode" (sequences that decode, each number for `WINDOW_S`) and "prompt" (tokens of one prompt)

    Lines go to `path` (gzipped JSON lines): run_id, what, n (sequences or tokens), kernels, events of the first worker,
    for decodes also n_context_tokens of a sequence, about. What fails is said in its line, and the rest goes on.
    """
    said = []
    for what, n in ((what, n) for what, sizes in wanted.items() for n in sizes):
        record = _decodes if what == "decode" else _prompt
        label = f"kernels of {n} {'sequences' if what == 'decode' else 'prompt tokens'}"
        try:
            found = await asyncio.wait_for(record(engine, send, n, Prompts(vocab_size, 7000 + n)), LIMIT_S)
        except (TimeoutError, Exception) as err:
            said.append(f"{label}: {type(err).__name__} {str(err)[:120]}")
            continue
        with gzip.open(path, "at", encoding="utf-8") as file:
            file.write(json.dumps({"run_id": run_id, "what": what, "n": n, **found}) + "\n")
        said.append(f"{label}: {len(found['events'])} of {len(found['kernels'])} kinds")
    return said
