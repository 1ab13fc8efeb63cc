"""The cells of one engine start or one server, in order, each a run record as soon as it ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from calibration.cells import Ask, Cell, Prompts, requests
from calibration.errors import EngineDied, JobError, first_error
from calibration.gpus import PowerMeter
from calibration.jobs import Job
from calibration.load import ROW_COLUMNS, Outcome, Send, run_cell, warm_prefixes
from calibration.output import Output
from calibration.records import cells_done, matches, read_lines
from calibration.vllm_probe import last_error

Measure = Callable[[Send, str, Cell, list[Ask], PowerMeter | None], Coroutine[Any, Any, Outcome]]
"""Sends the requests of a cell (sender, tag, cell, requests, power meter) and returns what was measured."""

WARMUP = Cell(kind="closed", prompt_tokens=256, output_tokens=16, concurrency=8, n_requests=16, guard_s=180)
START_MARGIN_S = 2.0

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""As in advisor.catalog.hf_layers, which a GPU host does not have; a test holds the two together."""
EXPERT_BATCHES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
"""Batches for which vLLM's tables of expert kernels have settings of their own: each compiles at its first use, in 1 to
2 s that would fall into a cell (runs mixtral-tp2, 30b-a3b-tp2). A batch that is no multiple of 16 compiles again."""


def n_experts_of(hf_config: dict[str, Any]) -> int:
    """Return the number of routed experts of a layer, 0 for a dense model."""
    return next((int(hf_config[key]) for key in EXPERT_COUNTS if hf_config.get(key)), 0)


def warmups(hf_config: dict[str, Any], max_model_len: int) -> list[Cell]:
    """Return what an engine does before its first cell: a small burst, and for experts one prompt a batch size."""
    size = min(WARMUP.prompt_tokens, max_model_len - WARMUP.output_tokens)
    cells = [replace(WARMUP, prompt_tokens=size)]
    if n_experts_of(hf_config):
        sizes = sorted({n for batch in EXPERT_BATCHES for n in (batch, batch + 1)})
        one = replace(WARMUP, output_tokens=1, concurrency=1, n_requests=1)
        cells += [replace(one, prompt_tokens=n) for n in sizes if n < max_model_len]
    return cells


RUNNING = (192, 160, 128, 120, 112, 104, 96, 88, 80, 72, 64, 56, 48, 40, 32, 24, 16, 8)
"""Batches one of which meets each kernel of the LM head that a start-up leaves to be loaded, up to 192 sequences. The
first step that needs one waits until the GPU is idle, and hands out the tokens of the step before that late."""
HEADS = "lm head kernels"
RAMP_STEPS = 24


def head_asks(vocab_size: int, max_model_len: int, seed: int = 998) -> list[Ask]:
    """Return requests, sent at once, of which so many run as `RUNNING` says, each number for two steps."""
    prompts = Prompts(vocab_size, seed)
    last = RAMP_STEPS + 2 * len(RUNNING)
    size = max(1, min(16, max_model_len - last))
    ends = [RAMP_STEPS + 2 * sum(n > rank for n in RUNNING) for rank in range(RUNNING[0])]
    return [Ask(0.0, prompts.draw(size), min(end, max_model_len - size)) for end in ends]


class Run:
    """The cells of one engine start, in order, within the time that there is."""

    def __init__(self, job: Job, output: Output, known: list[str], deadline: float | None) -> None:
        self.job, self.output, self.deadline = job, output, deadline
        self.known = [str(output.records.path), *known]
        self.cells = job.parsed_cells()
        self.done = cells_done(self.known, job.run_id)
        self.peak: dict[tuple[int, int], float] = {}
        for path in self.known:
            for record in read_lines(path):
                if matches(record, job.run_id):
                    self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        lengths, load = record.get("lengths") or {}, record.get("load") or {}
        if load.get("kind") == "closed" and "cell" in record:
            key = record["cell"]["prompt_tokens"], record["cell"]["output_tokens"]
            rate = float((record.get("measured") or {}).get("requests_per_s") or 0)
            if lengths.get("kind") == "fixed" or key not in self.peak:
                self.peak[key] = max(self.peak.get(key, 0.0), rate)

    @property
    def left(self) -> list[tuple[int, Cell]]:
        """The cells that no file holds yet, with their places."""
        return [(i, c) for i, c in enumerate(self.cells) if c.cell_id() not in self.done]

    def rate_per_s(self, cell: Cell) -> float:
        """Return the arrival rate of a cell: its own, or a share of the best closed rate at the same lengths."""
        if cell.kind == "closed" or cell.arrivals_per_s:
            return cell.arrivals_per_s
        best = self.peak.get((cell.prompt_tokens, cell.output_tokens))
        if not best:
            raise JobError("rate_frac needs an earlier closed cell with the same prompt_tokens and output_tokens")
        return cell.rate_frac * best

    def seconds_left(self, budget_end: float) -> float:
        """Seconds until the budget or the deadline ends, whichever is first."""
        ends = [budget_end] if self.deadline is None else [budget_end, self.deadline]
        return min(ends) - time.time()

    async def run(
        self,
        send: Send,
        engine: Any,
        common: dict[str, Any],
        vocab: int,
        meter: PowerMeter | None,
        measure: Measure = run_cell,
    ) -> None:
        """Run every cell that is left; an error in one is written down and the rest goes on."""
        say, run_id = self.output.say, common["run_id"]
        budget_end = time.time() + self.job.budget_s
        if self.job.warmup:
            for number, cell in enumerate(warmups(common.get("hf_config") or {}, self.job.max_model_len)):
                asks = requests(cell, 0, 999 + number, vocab)
                await asyncio.wait_for(run_cell(send, f"warmup{number}", cell, asks, None), cell.guard_s)
            asks = head_asks(vocab, self.job.max_model_len)
            burst = replace(WARMUP, concurrency=len(asks), n_requests=len(asks))
            await asyncio.wait_for(run_cell(send, "heads", burst, asks, None), burst.guard_s)
            common["warm_up"] = HEADS
        for place, cell in self.left:
            where = f"{run_id} {place + 1}/{len(self.cells)} {cell.label}"
            left_s = self.seconds_left(budget_end)
            if left_s < max(START_MARGIN_S, cell.expected_s, cell.duration_s):
                self.output.error(run_id, f"skipped: {left_s:.0f} s left", cell=asdict(cell), kind="skipped")
                say(f"{where}: skipped, {max(left_s, 0):.0f} s left")
                continue
            guard_s = min(cell.guard_s, left_s)
            try:
                rate = self.rate_per_s(cell)
                seed = self.job.seed * 1000 + place + 1
                asks = requests(cell, rate, seed, vocab, self.job.max_model_len)
                started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
                if cell.shared_prefix_tokens and cell.prefix_warm:
                    await asyncio.wait_for(warm_prefixes(send, f"w{place}", cell, seed, vocab), guard_s)
                outcome = await asyncio.wait_for(measure(send, f"r{place}", cell, asks, meter), guard_s)
            except (TimeoutError, Exception) as err:
                text = f"exceeded {guard_s:.0f} s" if isinstance(err, TimeoutError) else first_error(err)
                self.output.error(run_id, text, cell=asdict(cell), kind="error")
                say(f"{where}: {text[:200]}")
                if getattr(engine, "errored", False):
                    why = last_error(self.output.log_text())
                    raise EngineDied(f"the engine of {run_id} died in cell {place + 1}: {why or text}") from None
                await asyncio.sleep(1.0)  # cancelled requests must leave the engine before the next cell
                continue
            record = (
                common | self._cell_fields(cell, rate, seed, len(asks), started_at) | {"measured": outcome.measured}
            )
            self.output.record(record, ROW_COLUMNS, outcome.rows)
            self._remember(record)
            say(f"{where}: {summary(outcome.measured)}")

    def _cell_fields(self, cell: Cell, rate: float, seed: int, n: int, started_at: str) -> dict[str, Any]:
        if cell.kind == "closed":
            load: dict[str, Any] = {"kind": "closed", "concurrency": cell.concurrency, "n_requests": n}
        else:
            load = {"kind": "poisson", "arrivals_per_s": rate, "duration_s": cell.duration_s}
        spec = {k: v for k, v in asdict(cell).items() if k not in ("guard_s", "expected_s")}
        return {
            "load": load,
            "lengths": cell.lengths,
            "cell_id": cell.cell_id(),
            "cell": spec,
            "seed": seed,
            "started_at": started_at,
        }


def summary(m: dict[str, Any]) -> str:
    tpot = f", TPOT p50 {1e3 * m['tpot_s']['p50']:.2f} ms" if "tpot_s" in m else ""
    power = f", {m['board_power_w']['mean']:.0f} W" if "board_power_w" in m else ""
    hits = f", {m['cached_prompt_frac']:.0%} cached" if m.get("cached_prompt_frac") else ""
    return (
        f"{m['n_requests']} requests in {m['duration_s']:.1f} s, {m['requests_per_s']:.2f}/s, "
        f"{m['output_tokens_per_s']:.0f} tok/s, "
        f"TTFT p50 {1e3 * m['ttft_s']['p50']:.0f} p99 {1e3 * m['ttft_s']['p99']:.0f} ms"
        f"{tpot}{power}{hits}"
    )
