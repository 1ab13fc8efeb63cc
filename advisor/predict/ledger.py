"""What the steps of one engine add up to: work, GPU seconds by term, gaps between tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from advisor.predict.clock import Clock
from advisor.predict.engine_state import EngineLimits, Work

Floats = NDArray[np.float64]
N_COLUMNS = 8
MAX_NUMBERS = 200_000
"""Numbers in rows before an engine has them added up: the memory of a long replay is that of its requests."""
NO_GAP = -1.0


class Ledger:
    """Steps of one engine as rows of numbers; sums are taken over many rows at once.

    A row: equal steps, prompt tokens, (query, key) pairs, decodes, context tokens, sampled sequences (each of one
    step), gap since the decodes' last token [s] or `NO_GAP`, time on the GPUs [s], and for each clock the number of
    steps that it ran, slower ones counted as more.
    """

    def __init__(self, clocks: Sequence[Clock], limits: EngineLimits) -> None:
        self.clocks = clocks
        self.limits = limits
        self.rows: list[float] = []
        self.ramps: list[float] = []
        """evenly growing gaps: first, last [s], tokens"""
        self.n_preemptions = 0
        self.recomputed_tokens = 0.0
        self._n_columns = N_COLUMNS + len(clocks)
        self._work = Work()
        self._gaps: list[Floats] = []

    def settle(self) -> None:
        """Add up the rows and forget them."""
        if not self.rows:
            return
        columns = np.array(self.rows).reshape(-1, self._n_columns).T
        self.rows.clear()
        n_steps, n_prefill, pairs, n_decode, context, n_sampled, gap_s, busy_s = columns[:N_COLUMNS]
        work, tokens = self._work, n_decode * self.limits.verify_tokens
        work.add(
            float(n_steps.sum()),
            float(n_steps @ (tokens + n_prefill)),
            float(pairs.sum()),
            float(n_steps @ context),
            float(n_steps @ n_sampled),
            float(busy_s.sum()),
        )
        work.prefill_steps += float((n_prefill > 0).sum())
        work.expert_reads += self.clocks[0].expert_reads(tokens + n_prefill, n_steps)
        sizes = np.array(self.limits.graph_sizes, dtype=float)
        is_graph = (n_prefill == 0) & (tokens < len(sizes))
        padded = tokens.copy()
        padded[is_graph] = sizes[tokens[is_graph].astype(np.int64)]
        for clock, weights in zip(self.clocks, columns[N_COLUMNS:], strict=True):
            work.add_terms(clock.terms(n_prefill, pairs, padded, context, n_sampled, weights), 1.0)
        is_gap = gap_s >= 0
        self._gaps.append(np.stack([gap_s[is_gap], n_decode[is_gap]]))

    def work(self) -> Work:
        """Return the totals of all steps so far."""
        self.settle()
        return replace(
            self._work,
            n_preemptions=self.n_preemptions,
            recomputed_tokens=self.recomputed_tokens,
            terms=[*self._work.terms],
        )

    def gaps(self) -> Floats:
        """Return the gaps between tokens so far [s] and how often each occurs, shape (2, n); a ramp is four gaps."""
        self.settle()
        ramps = np.array(self.ramps, dtype=float).reshape(-1, 3)
        values = ramps[:, :1] + (ramps[:, 1:2] - ramps[:, :1]) * np.array([0.125, 0.375, 0.625, 0.875])
        return np.concatenate([*self._gaps, np.stack([values.ravel(), np.repeat(ramps[:, 2] / 4, 4)])], axis=1)
