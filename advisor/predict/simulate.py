"""Replay of a workload through the scheduler copy: percentiles, throughput, occupancy, work done."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from advisor.errors import DomainError
from advisor.predict.engine import WAITING_SCORE, Engine
from advisor.predict.engine_state import EngineLimits, Sequence_, Work
from advisor.predict.front import Front
from advisor.predict.quantile import quantile
from advisor.predict.step import TERMS, StepCost
from advisor.predict.traffic import Traffic
from advisor.schema import Slo

STATISTICS = ("mean", "p50", "p90", "p95", "p99")
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Client:
    """Delays outside the engine [s].

    submit_s, return_s : request to engine, token to client
    serial_s           : the client's work between two requests that it sends at once, and
    serial_token_s     : for each token of the second one's prompt
    wake_s             : an idle engine's, before it schedules: requests that arrive meanwhile share its first step
    front_s            : of an API server's process for a request, for each token of its prompt, and for each token sent
    intake_s           : an engine's that launches by itself for a request that arrives meanwhile: the thread that takes
                         it in holds the interpreter
    """

    submit_s: float
    return_s: float
    serial_s: float
    serial_token_s: float = 0.0
    wake_s: float = 0.0
    front_s: tuple[float, float, float] = (0.0, 0.0, 0.0)
    intake_s: float = 0.0


@dataclass(frozen=True)
class Simulation:
    """What a client would have measured, one element a request, and what the engine did in total."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats
    submitted_s: Floats
    output_tokens: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    itl_s: Floats
    itl_weights: Floats
    duration_s: float
    work: tuple[Work, ...]
    timeline: tuple[tuple[float, int, int, int], ...] = ()

    @property
    def requests_per_s(self) -> float:
        """Return completed requests over the time from first submission to last completion."""
        return len(self.ttft_s) / self.duration_s

    def since(self, start_s: float) -> Simulation:
        """Return the same replay with only the requests submitted at `start_s` or later: without the warm-up."""
        kept = self.submitted_s >= start_s
        if not kept.any():
            return self
        names = ("ttft_s", "tpot_s", "e2e_s", "submitted_s", "output_tokens", "prompt_tokens")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def latency(self, metric: Literal["ttft", "tpot", "e2e", "itl"], statistic: str) -> float:
        """Return one statistic ('mean', 'p50' ... 'p99') of a latency [s]; NaN where no request has one."""
        return self.latencies(metric, (statistic,))[0]

    def latencies(self, metric: Literal["ttft", "tpot", "e2e", "itl"], statistics: Sequence[str]) -> list[float]:
        """Return several statistics of a latency [s]: sorted once."""
        if metric == "itl":
            return weighted_statistics(self.itl_s, self.itl_weights, statistics)
        values = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}[metric]
        values = values[np.isfinite(values)]
        if not len(values):
            return [float("nan")] * len(statistics)
        ordered = np.sort(values)
        return [float(values.mean()) if s == "mean" else quantile(ordered, float(s[1:]) / 100) for s in statistics]

    def attainment(self, slo: Slo) -> NDArray[np.bool_]:
        """Return for each request whether it meets every per-request bound of `slo` (TTFT, TPOT, E2E)."""
        ok = np.ones(len(self.ttft_s), dtype=bool)
        per_request = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2e": self.e2e_s}
        for target in slo.targets:
            if target.metric in per_request:
                values = per_request[target.metric]
                ok &= ~(values > target.max_s)
        return ok

    def total(self, name: str) -> float:
        """Return a total of `Work` over all replicas."""
        return float(sum(getattr(work, name) for work in self.work))

    @property
    def total_work(self) -> Work:
        """Return the work of all replicas together."""
        total = Work()
        for work in self.work:
            total.add(work.n_steps, work.tokens, work.pairs, work.context_tokens, work.sampled, work.busy_s)
            total.add_terms(work.terms, 1.0)
            total.prefill_steps += work.prefill_steps
            total.expert_reads += work.expert_reads
            total.n_preemptions += work.n_preemptions
            total.recomputed_tokens += work.recomputed_tokens
        return total

    def term_seconds(self) -> dict[str, float]:
        """Return the GPU seconds of each term of the step law, summed over replicas and stages."""
        return {name: float(sum(work.terms[i] for work in self.work)) for i, name in enumerate(TERMS)}


def weighted_statistics(values: Floats, weights: Floats, statistics: Sequence[str]) -> list[float]:
    """Return statistics of `values` that occur `weights` times each; NaN for no values."""
    if not len(values) or weights.sum() <= 0:
        return [float("nan")] * len(statistics)
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])

    def one(statistic: str) -> float:
        if statistic == "mean":
            return float((values * weights).sum() / weights.sum())
        rank = float(statistic[1:]) / 100 * cumulative[-1]
        return float(values[order[min(int(np.searchsorted(cumulative, rank)), len(values) - 1)]])

    return [one(s) for s in statistics]


def simulate(
    stages: list[StepCost],
    limits: EngineLimits,
    traffic: Traffic,
    client: Client,
    *,
    dp: int = 1,
    send_s: float = 0.0,
    n_samples: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Simulation:
    """Return what clients of `dp` replicas measure when `traffic` is sent; deterministic.

    stages, limits, send_s : one replica (see `Engine`)
    client                 : delays outside the engine
    n_samples              : samples of running, waiting and occupied blocks over time, 0 = none
    progress               : called now and then with the finished share

    Raises DomainError when a request can never fit in the KV cache.
    """
    longest = int((traffic.prompt_tokens + traffic.output_tokens).max())
    if limits.blocks_held(longest) > limits.n_kv_blocks:
        raise DomainError(
            f"a request of {longest} tokens needs more KV cache than the engine has ({limits.cache_tokens} tokens)"
        )
    engines = [Engine(stages, limits, send_s) for _ in range(dp)]
    run = _Run(engines, traffic, client, limits.kv_block_tokens, progress)
    if n_samples:
        for engine in engines:
            engine.sample_every(run.expected_span_s() / n_samples)
    if traffic.arrival_s is None:
        run.closed()
    else:
        run.open(traffic.arrival_s)
    return run.result()


class Door:
    """One replica as its clients meet it: its API server if it has one, requests on their way, the engine."""

    def __init__(self, engine: Engine, client: Client) -> None:
        self.engine, self.client = engine, client
        if any(client.front_s):
            engine.front = Front(*client.front_s)
        self._reading: dict[int, Sequence_] = {}
        self._coming: list[tuple[float, int, Sequence_]] = []

    @property
    def load_score(self) -> int:
        """Return the balancing score of the engine, with those that are on their way to it."""
        return self.engine.load_score + WAITING_SCORE * (len(self._reading) + len(self._coming))

    def send(self, at_s: float, sequence: Sequence_) -> None:
        """Send a request."""
        if self.engine.front:
            self._reading[sequence.index] = sequence
            self.engine.front.send(at_s, sequence.index, sequence.prompt_tokens)
        else:
            heapq.heappush(self._coming, (at_s + self.client.submit_s, sequence.index, sequence))

    def advance(self, until_s: float) -> list[tuple[Sequence_, float]]:
        """Let time pass; return those who are done and when their last tokens are sent, as soon as any are.

        An empty list: nothing more happens before `until_s` without a further request.
        """
        engine, front, coming = self.engine, self.engine.front, self._coming
        while True:
            reach_s = coming[0][0] if coming else math.inf
            read_s = front.next_s() if front else math.inf
            at_s = min(reach_s, read_s, until_s)
            if engine.now_s < at_s:
                if finished := engine.advance(at_s):
                    return finished
                if front and front.next_s() > read_s:
                    continue  # tokens that have come up since go first
            if at_s >= until_s:
                return []
            if front and read_s <= reach_s:
                if (number := front.take()) is not None:
                    heapq.heappush(coming, (front.free_s + self.client.submit_s, number, self._reading.pop(number)))
            else:
                _, _, sequence = heapq.heappop(coming)
                if engine.is_idle:
                    engine.idle_until(reach_s + self.client.wake_s)
                elif reach_s < engine.launch_free_s and engine.limits.blocks_on_launch:
                    engine.launch_free_s += self.client.intake_s
                    engine.idle_until(engine.launch_free_s)
                engine.enqueue(sequence)


class _Run:
    """One replay: keeps who was submitted when, and collects completions."""

    def __init__(
        self,
        engines: list[Engine],
        traffic: Traffic,
        client: Client,
        block_tokens: int,
        progress: Callable[[float], None] | None,
    ) -> None:
        self.engines = engines
        self.replicas = [Door(engine, client) for engine in engines]
        self.traffic = traffic
        self.client = client
        self.shared_blocks = traffic.shared_prefix_tokens // block_tokens
        self.progress = progress
        n = len(traffic.prompt_tokens)
        self.n = n
        self.submitted = [0.0] * n
        self.first = [math.nan] * n
        self.end = [math.nan] * n
        self.n_done = 0
        self.prompt = traffic.prompt_tokens.tolist()
        self.output = traffic.output_tokens.tolist()
        self.cached = traffic.cached_tokens.tolist()

    def expected_span_s(self) -> float:
        """Return a rough duration, only to space the samples of the timeline."""
        if self.traffic.arrival_s is not None and len(self.traffic.arrival_s) > 1:
            return float(self.traffic.arrival_s[-1]) + 1e-9
        gpu_s, _, host_s, _ = self.engines[0].parts[0].clock.step(0, 0.0, 1, 1, 1.0, 1)
        step = max(gpu_s, host_s) * 2
        return step * float(np.mean(self.traffic.output_tokens)) * self.n / max(1, self.traffic.concurrency) + 1e-9

    def sequence(self, index: int, submitted_s: float) -> Sequence_:
        self.submitted[index] = submitted_s
        prompt = self.prompt[index]
        sequence = Sequence_(index, prompt, self.output[index], self.cached[index])
        if self.shared_blocks:
            # the first request computes the shared prompt, but into the blocks that all then share
            block_tokens = self.engines[0].limits.kv_block_tokens
            shared = min(self.shared_blocks, (prompt - 1) // block_tokens)
            sequence.shared_blocks = self.engines[0].limits.blocks_held(shared * block_tokens)
        return sequence

    def done(self, finished: list[tuple[Sequence_, float]]) -> None:
        for sequence, end_s in finished:
            self.first[sequence.index] = sequence.first_token_s
            self.end[sequence.index] = end_s
        before = self.n_done
        self.n_done += len(finished)
        if self.progress and before * 50 // self.n != self.n_done * 50 // self.n:
            self.progress(self.n_done / self.n)

    def closed(self) -> None:
        """Run clients that each send their next request when the last one ends, spread evenly over the replicas."""
        dp = len(self.replicas)
        shares = [self.traffic.concurrency // dp + (r < self.traffic.concurrency % dp) for r in range(dp)]
        counts = [self.n * share // max(1, self.traffic.concurrency) for share in shares]
        counts[0] += self.n - sum(counts)
        begin = 0
        for replica, share, count in zip(self.replicas, shares, counts, strict=True):
            self._closed_one(replica, share, range(begin, begin + count))
            begin += count

    def _closed_one(self, replica: Door, concurrency: int, indices: range) -> None:
        todo = iter(indices)
        at = 0.0
        for i, index in zip(range(concurrency), todo, strict=False):
            at += self.apart_s(index) if i else 0.0
            replica.send(at, self.sequence(index, 0.0))
        while finished := replica.advance(math.inf):
            self.done(finished)
            late_s = 0.0
            for k, (_, end_s) in enumerate(finished):
                index = next(todo, -1)
                if index >= 0:
                    late_s += self.apart_s(index) if k else 0.0
                    at = end_s + self.client.return_s + late_s
                    replica.send(at, self.sequence(index, at))

    def apart_s(self, index: int) -> float:
        """Return how long the client works on a request that it sends right after another [s]."""
        return self.client.serial_s + self.client.serial_token_s * int(self.traffic.prompt_tokens[index])

    def open(self, arrival_s: Floats) -> None:
        """Send requests at their times, each to the replica with the smallest load score."""
        for index, at in enumerate(arrival_s.tolist()):
            self.advance(at)
            replica = self.replicas[0]
            if len(self.replicas) > 1:
                replica = min(self.replicas, key=lambda r: r.load_score)
            replica.send(at, self.sequence(index, at))
        self.advance(math.inf)

    def advance(self, until_s: float) -> None:
        """Let time pass, and note who is done."""
        for replica in self.replicas:
            while finished := replica.advance(until_s):
                self.done(finished)

    def result(self) -> Simulation:
        if self.n_done != self.n:
            raise DomainError(f"the simulated engine stalled after {self.n_done} of {self.n} requests")
        back = self.client.return_s
        submitted, first, end = np.array(self.submitted), np.array(self.first), np.array(self.end)
        output = self.traffic.output_tokens
        decode = np.where(output > 1, output - 1, 1)
        itl_s, itl_weights = np.concatenate([engine.ledger.gaps() for engine in self.engines], axis=1)
        if any(self.client.front_s) and (made_s := float(itl_s @ itl_weights)) > 0:
            # what an API server sends later than the engine makes it comes at gaps that add up to the same
            itl_s = itl_s * max(1.0, float((end - first)[output > 1].sum()) / made_s)
        return Simulation(
            ttft_s=first + back - submitted,
            tpot_s=np.where(output > 1, (end - first) / decode, np.nan),
            e2e_s=end + back - submitted,
            submitted_s=submitted,
            output_tokens=output,
            prompt_tokens=self.traffic.prompt_tokens,
            itl_s=itl_s,
            itl_weights=itl_weights,
            duration_s=float(end.max() + back - submitted.min()),
            work=tuple(engine.work for engine in self.engines),
            timeline=tuple(sorted(sample for engine in self.engines for sample in engine.timeline)),
        )
