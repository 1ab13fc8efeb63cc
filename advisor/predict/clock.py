"""The step law of one pipeline stage for an event loop: what comes again is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.predict.step import StepCost


class Clock:
    """Time and power of single steps, and the GPU seconds that went into each term.

    Most of a step follows from two small integers, its tokens and its sampled sequences. `StepCost` says what follows
    from what; here it is remembered, together with the number of steps that had it.
    """

    __slots__ = ("_attention_s", "_by_sampled", "_by_tokens", "_cost", "_last", "_of_tokens", "throttle_s")

    def __init__(self, cost: StepCost) -> None:
        self._cost = cost
        self.throttle_s: float = cost.throttle_s
        # each list ends with the number of steps
        self._by_tokens: dict[int, list[float]] = {}
        self._by_sampled: dict[int, list[float]] = {}
        self._of_tokens: dict[int, tuple[float, float, float]] = {}
        self._attention_s = [0.0, 0.0]
        self._last: tuple[list[float], list[float], float, float] = ([0.0], [0.0], 0.0, 0.0)

    def step(
        self, n_prefill: int, n_pairs: float, n_decode: int, n_padded: int, n_context: float, n_sampled: int
    ) -> tuple[float, float, float]:
        """Return a step's time on the GPU at full clock [s], its power ratio and its time on the host [s].

        Arguments as of `StepCost.terms`; `n_padded` is `n_decode` with the padding of the CUDA graph.
        """
        cost = self._cost
        n = n_prefill + n_padded
        tokens = self._by_tokens.get(n) or self._new_tokens(n)
        sampled = self._by_sampled.get(n_sampled) or self._new_sampled(n_sampled)
        n = n_prefill + n_decode
        joules, pure_s, mixed_s = self._of_tokens.get(n) or self._new_of_tokens(n)
        pairs_s, context_s = cost.attention_terms(n_prefill, n_pairs, n_padded, n_context)
        self._last = (tokens, sampled, pairs_s, context_s)
        linear_s, experts_s, elementwise_s, all_reduce_s, _ = tokens
        head_s, overhead_s, _ = sampled
        full_s = linear_s + experts_s + head_s + pairs_s + context_s + elementwise_s + all_reduce_s + overhead_s
        ratio = (joules + cost.request_j(n_pairs, n_context, n_sampled)) / (full_s * cost.dynamic_power_w)
        layers_s = pure_s
        if n_prefill:
            layers_s = mixed_s * cost.host_busy_factor if n_decode else mixed_s
        return full_s, ratio, cost.host_step_s + layers_s + n_sampled * cost.host_seq_s

    def prepare_s(self, n_sampled: int) -> float:
        """Return the part of a step's host time that is over before its first kernel starts [s]."""
        return float(self._cost.host_step_s + n_sampled * self._cost.host_seq_s)

    def count(self, n_steps: float) -> None:
        """Count the last step `n_steps` times; slower clocks count as more."""
        tokens, sampled, pairs_s, context_s = self._last
        tokens[-1] += n_steps
        sampled[-1] += n_steps
        self._attention_s[0] += pairs_s * n_steps
        self._attention_s[1] += context_s * n_steps

    def terms(self) -> list[float]:
        """Return the GPU seconds of the steps counted so far, term by term as `StepCost.terms`."""
        linear, experts, elementwise, all_reduce = (
            sum(entry[k] * entry[-1] for entry in self._by_tokens.values()) for k in range(4)
        )
        head, overhead = (sum(entry[k] * entry[-1] for entry in self._by_sampled.values()) for k in range(2))
        return [linear, experts, head, *self._attention_s, elementwise, all_reduce, overhead]

    def stretch(self, power_ratio: float) -> float:
        """Return by how much a power demand stretches time."""
        return float(self._cost.stretch(power_ratio))

    def _new_tokens(self, n: int) -> list[float]:
        entry = self._by_tokens[n] = [*self._cost.token_terms(n), 0.0]
        return entry

    def _new_sampled(self, n: int) -> list[float]:
        entry = self._by_sampled[n] = [*self._cost.sampled_terms(n), 0.0]
        return entry

    def _new_of_tokens(self, n: int) -> tuple[float, float, float]:
        cost = self._cost
        entry = self._of_tokens[n] = (cost.token_j(n), cost.layer_launch_s(n, False), cost.layer_launch_s(n, True))
        return entry
