"""The step law of one pipeline stage for an event loop: what comes again is computed once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from advisor.predict.step import StepCost

Floats = NDArray[np.float64]
BLOCK = 512
"""Token counts that are computed at once: one array operation on them costs little more than one on a number."""


class Decodes(NamedTuple):
    """Steps of the same decodes without prompts: linear in the context tokens that they read.

    full_s, context_s : GPU time at full clock without context, and of one context token [s]
    full_j, context_j : the same of energy [J]
    power_w           : what the board's limit leaves above idle [W]
    host_s            : time on the host [s]
    prepare_s         : the part of it that is over before the first kernel starts [s]
    """

    full_s: float
    context_s: float
    full_j: float
    context_j: float
    power_w: float
    host_s: float
    prepare_s: float


class _Columns:
    """What follows from one number, for `BLOCK` numbers at a time: columns for the event loop, terms for sums."""

    def __init__(self) -> None:
        self.columns: dict[int, Floats] = {}
        self.terms: dict[int, Floats] = {}

    def add(self, block: int, terms: tuple[Any, ...], others: tuple[Any, ...]) -> Floats:
        """Keep the terms of a block and return its columns, one a number: the sum of the terms, then the others."""
        rows = np.empty((1 + len(others) + len(terms), BLOCK))
        for row, value in zip(rows[1:], (*others, *terms), strict=True):
            row[:] = value  # a number or an array
        mine = self.terms[block] = rows[1 + len(others) :]
        mine.sum(axis=0, out=rows[0])
        columns = self.columns[block] = rows[: 1 + len(others)]
        return columns

    def summed(self, n: Floats, weights: Floats) -> list[float]:
        """Return each term summed over the numbers `n`, every one of them seen before, with weights."""
        blocks = np.array(sorted(self.terms))
        whole = n.astype(np.int64)
        at = np.searchsorted(blocks, whole // BLOCK) * BLOCK + whole % BLOCK
        count = np.bincount(at, weights, len(blocks) * BLOCK).reshape(len(blocks), BLOCK)
        total = sum(self.terms[block] @ count[k] for k, block in enumerate(blocks.tolist()))
        return np.asarray(total).tolist()  # type: ignore[no-any-return]


class Clock:
    """Time and power of single steps, and the GPU seconds that go into each term.

    Most of a step follows from two small integers, its tokens and its sampled sequences. `StepCost` says what follows
    from what; here it is remembered, for all replays of the stage: nothing in it depends on what an engine does.
    """

    __slots__ = (
        "_busy_factor",
        "_context_j",
        "_context_s",
        "_cost",
        "_of_sampled",
        "_of_tokens",
        "_pair_j",
        "_pair_s",
        "_prefill_s",
        "_sampled",
        "_tokens",
        "dynamic_power_w",
        "is_linear",
    )

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self._tokens, self._sampled = _Columns(), _Columns()
        self._of_tokens: dict[int, tuple[float, float, float, float]] = {}
        self._of_sampled: dict[int, tuple[float, float, float]] = {}
        self._busy_factor: float = cost.host_busy_factor
        self.dynamic_power_w: float = cost.dynamic_power_w
        # attention is linear but for windows: the law gives its own coefficients
        self.is_linear = not cost.window_frac
        self._pair_s: float = cost.attention_terms(0, 1.0, 0, 0.0)[0]
        self._prefill_s: float = cost.attention_terms(1, 0.0, 0, 0.0)[0]
        self._context_s: float = cost.attention_terms(0, 0.0, 0, 1.0)[1]
        self._pair_j: float = cost.request_j(1.0, 0.0, 0)
        self._context_j: float = cost.request_j(0.0, 1.0, 0)

    def step(
        self, n_prefill: int, n_pairs: float, n_decode: int, n_padded: int, n_context: float, n_sampled: int
    ) -> tuple[float, float, float, float]:
        """Return a step's time on the GPU at full clock [s], its power ratio, its time on the host [s], and its part
        of that which is over before the first kernel starts [s].

        Arguments as of `StepCost.terms`; `n_padded` is `n_decode` with the padding of the CUDA graph.
        """
        n = n_prefill + n_padded
        full_s, joules, pure_s, mixed_s = self._of_tokens.get(n) or self._new_tokens(n)
        if n_padded != n_decode:
            n = n_prefill + n_decode
            _, joules, pure_s, mixed_s = self._of_tokens.get(n) or self._new_tokens(n)
        sampled_s, sampled_j, prepare_s = self._of_sampled.get(n_sampled) or self._new_sampled(n_sampled)
        if self.is_linear:
            full_s += sampled_s + n_pairs * self._pair_s + n_prefill * self._prefill_s + n_context * self._context_s
        else:
            pairs_s, context_s = self._cost.attention_terms(n_prefill, n_pairs, n_padded, n_context)
            full_s += sampled_s + pairs_s + context_s
        joules += sampled_j + n_pairs * self._pair_j + n_context * self._context_j
        layers_s = pure_s
        if n_prefill:
            layers_s = mixed_s * self._busy_factor if n_decode else mixed_s
        return full_s, joules / (full_s * self.dynamic_power_w), prepare_s + layers_s, prepare_s

    def decodes(self, n_decode: int, n_padded: int, n_sampled: int) -> Decodes:
        """Return the law of steps without prompts where it is linear; arguments as of `step`."""
        full_s, _, _, _ = self._of_tokens.get(n_padded) or self._new_tokens(n_padded)
        _, joules, pure_s, _ = self._of_tokens.get(n_decode) or self._new_tokens(n_decode)
        sampled_s, sampled_j, prepare_s = self._of_sampled.get(n_sampled) or self._new_sampled(n_sampled)
        full_s, full_j = full_s + sampled_s, joules + sampled_j
        return Decodes(
            full_s,
            self._context_s,
            full_j,
            self._context_j,
            self.dynamic_power_w,
            host_s=prepare_s + pure_s,
            prepare_s=prepare_s,
        )

    def terms(
        self,
        n_prefill: Floats,
        n_pairs: Floats,
        n_padded: Floats,
        n_context: Floats,
        n_sampled: Floats,
        weights: Floats,
    ) -> list[float]:
        """Return the GPU seconds of many steps, term by term as `StepCost.terms`, each step as often as its weight.

        Arguments as of `step`, one element a step that was asked for before.
        """
        linear, experts, elementwise, all_reduce = self._tokens.summed(n_prefill + n_padded, weights)
        head, overhead, tiles_s = self._sampled.summed(n_sampled, weights)
        pairs_s, context_s = self._cost.attention_terms(n_prefill, n_pairs, n_padded, n_context)
        attention = (float(np.sum(pairs_s * weights)), float(np.sum(context_s * weights)) + tiles_s)
        return [linear, experts, head, *attention, elementwise, all_reduce, overhead]

    def expert_reads(self, n_tokens: Floats, weights: Floats) -> float:
        """Return the shares of a layer's experts that steps of so many tokens touch, summed with weights."""
        return float(self._cost.touched_frac(n_tokens) @ weights) if self._cost.n_experts else 0.0

    def _new_tokens(self, n: int) -> tuple[float, float, float, float]:
        block, at = divmod(int(n), BLOCK)
        columns = self._tokens.columns.get(block)
        if columns is None:
            cost, many = self._cost, np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=float)
            host_s = (cost.layer_launch_s(many, False), cost.layer_launch_s(many, True))
            columns = self._tokens.add(block, cost.token_terms(many), (cost.token_j(many), *host_s))
        entry: tuple[float, float, float, float] = tuple(columns[:, at].tolist())
        self._of_tokens[n] = entry
        return entry

    def _new_sampled(self, n: int) -> tuple[float, float, float]:
        block, at = divmod(int(n), BLOCK)
        columns = self._sampled.columns.get(block)
        if columns is None:
            cost, many = self._cost, np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=float)
            prepare_s = cost.host_step_s + many * cost.host_seq_s
            columns = self._sampled.add(block, cost.sampled_terms(many), (cost.request_j(0.0, 0.0, many), prepare_s))
        entry: tuple[float, float, float] = tuple(columns[:, at].tolist())
        self._of_sampled[n] = entry
        return entry


@lru_cache(maxsize=64)
def clock_of(cost: StepCost) -> Clock:
    """Return the clock of a stage, shared by its replicas and by all replays of one deployment."""
    return Clock(cost)
