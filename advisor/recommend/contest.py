"""The finalists: which rows of the closed form are simulated, and what that says of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from numpy.typing import NDArray

from advisor.errors import AdvisorError
from advisor.predict.serving import Forecast
from advisor.recommend.ask import Pool, Question
from advisor.recommend.forecast import forecast, replays
from advisor.recommend.plan import Option, latency_s, option_badness, option_score
from advisor.recommend.rank import SATURATED, Floats, first_of_each, order
from advisor.schema import Deployment

Meanwhile = Callable[[], object]

CLOSED_ERROR = 1.05
"""How much worse, in the closed form, another setting of the leader may be to be simulated: what is common to both
cancels, so that this is less than the closed form's error."""
NEAR_MISS = 1.6
"""A cheaper plan that misses its targets by up to this factor in the closed form is simulated before it is dropped."""


@dataclass
class Table:
    """All vLLM deployments that run, with their closed-form values as arrays."""

    deployments: list[Deployment] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    values: dict[str, Floats] = field(default_factory=dict)
    badness: Floats = field(default_factory=lambda: np.zeros(0))
    score: Floats = field(default_factory=lambda: np.zeros(0))
    factors: Floats = field(default_factory=lambda: np.ones((3, 0)))
    """what the simulation of finalists said about the closed form: factors on score, badness and median latency"""

    def row(self, i: int) -> dict[str, float]:
        """Return the closed-form values of one row."""
        return {name: float(column[i]) for name, column in self.values.items()}

    def keys(self) -> list[object]:
        """Return for each row what makes it the same plan but for engine settings."""
        return [
            (p.name, d.tp, d.pp, d.dp, d.ep, d.weight_dtype, d.kv_dtype)
            for p, d in zip(self.pools, self.deployments, strict=True)
        ]


def _first(rows: Sequence[int], by: Floats, where: NDArray[np.bool_] | None = None) -> list[int]:
    able = [i for i in rows if where is None or where[i]]
    return [min(able, key=lambda i: float(by[i]))] if able else []


def choose_finalists(question: Question, table: Table, ranked: Sequence[int], n: int) -> list[int]:
    """Return up to `n` different rows worth a simulation: the best of each pool and kind, then in rank order."""
    v = table.values
    meets = table.badness <= 1
    tokens = np.maximum(v["output_tokens_per_s"], 1e-12)
    wanted = list(ranked[:2])
    near = [i for i in ranked if 1 < table.badness[i] <= NEAR_MISS]
    if ranked and meets[ranked[0]]:
        wanted += _first([i for i in near if table.score[i] < table.score[ranked[0]]], table.score)
    wanted += _first(ranked, v["e2e_p50_s"], meets)
    wanted += _first(ranked, v["board_power_w"] / tokens, meets)
    wanted += _first(ranked, -tokens, meets)
    names = [table.pools[i].name for i in ranked]
    wanted += [ranked[names.index(name)] for name in dict.fromkeys(names)]
    return list(dict.fromkeys([*wanted, *ranked[: 2 * n]]))[:n]


class Contest:
    """Rows of the table that are simulated, one after the other, until the leader is a simulated one.

    What the simulation finds corrects the closed form of the rows that are not simulated: by the ratio of the two on
    the same layout where there is one, else by the median ratio of its kind (card, weights, pipeline or none).
    """

    def __init__(self, question: Question, table: Table, *, has_prices: bool) -> None:
        self.question = question
        self.table = table
        self.has_prices = has_prices
        n = len(table.deployments)
        latency = table.values["e2e_p50_s"] if n else np.zeros(0)
        self.closed = np.stack([table.score, table.badness, latency]) if n else np.zeros((3, 0))
        self.known = self.closed.copy()
        self.n_gpus = np.array([d.n_gpus for d in table.deployments], dtype=float)
        self.simulated: dict[int, Option] = {}
        self.ahead: dict[int, Forecast | None] = {}
        self.failed: set[int] = set()
        self.over_cap: list[Option] = []
        self.keys = table.keys()

    def factors(self) -> Floats:
        """Return by what score, badness and latency of each row are multiplied: simulated over closed form."""
        factors = np.ones_like(self.closed)
        rows = [i for i in self.simulated if self.closed[1, i] < SATURATED]
        kinds = [
            (p.name, d.weight_dtype, d.pp > 1) for p, d in zip(self.table.pools, self.table.deployments, strict=True)
        ]
        for k in range(3) if rows else ():
            by_kind: dict[object, list[float]] = {}
            by_key: dict[object, list[float]] = {}
            for i in rows:
                if self.closed[k, i] * self.known[k, i] > 0:
                    ratio = float(np.log(self.known[k, i] / self.closed[k, i]))
                    by_kind.setdefault(kinds[i], []).append(ratio)
                    by_key.setdefault(self.keys[i], []).append(ratio)
            alike = {kind: median(found) for kind, found in by_kind.items()}
            layouts = {key: median(found) for key, found in by_key.items()}
            factors[k] = np.exp(
                [layouts.get(key, alike.get(kind, 0.0)) for key, kind in zip(self.keys, kinds, strict=True)]
            )
        # how overloaded a plan is does not depend on the latencies
        factors[1] = np.where(self.closed[1] >= SATURATED, 1.0, factors[1])
        return factors

    def order(self) -> list[int]:
        """Return all rows, best first, on what is known now."""
        now = self.closed * self.factors()
        for i in self.simulated:
            now[:, i] = self.known[:, i]
        return [i for i in order(now[0], now[1], now[2], self.n_gpus).tolist() if i not in self.failed]

    def ranked(self) -> list[int]:
        """Return the best row of each plan, best first."""
        return first_of_each(self.keys, self.order())

    def predict(self, row: int, method: str, made: Forecast | None = None) -> Option | None:
        """Return a row with its prediction; None when it turns out not to run."""
        q, pool, d = self.question, self.table.pools[row], self.table.deployments[row]
        try:
            return forecast(q, pool, d, q.workload, method=method, steady=self.table.row(row), made=made)
        except AdvisorError:
            self.failed.add(row)
            return None

    def simulate(self, rows: Iterable[int], ahead: Iterable[int] = (), meanwhile: Meanwhile | None = None) -> None:
        """Simulate rows and put what comes out in place of the closed form.

        Where there is room beside them, `ahead` is replayed as well, for whoever asks for it later; `meanwhile` is what
        this process does before it joins in.
        """
        table = self.table
        todo = [row for row in dict.fromkeys(rows) if row not in self.simulated and row not in self.failed]
        missing = [row for row in dict.fromkeys((*todo, *ahead)) if row not in self.ahead]
        wanted = [(table.pools[row], table.deployments[row], table.row(row)) for row in missing]
        self.ahead |= zip(missing, replays(self.question, wanted, meanwhile), strict=True)
        for row in todo:
            replayed = self.ahead.pop(row)
            option = self.predict(row, "simulated", replayed)
            if option is None:
                continue
            cap, power = self.question.request.power_cap_w, option.prediction.quantities.get("board_power_w")
            if cap is not None and power is not None and power.value > cap:
                self.failed.add(row)
                self.over_cap.append(option)
                continue
            self.simulated[row] = option
            self.known[0, row] = option_score(self.question, option, has_prices=self.has_prices)
            self.known[1, row] = option_badness(self.question, option)
            self.known[2, row] = latency_s(option.prediction)


def other_settings(contest: Contest, n: int) -> list[int]:
    """Return rows with the leader's layout and other engine settings, the most promising first.

    A setting that the closed form finds to change nothing (more sequences than ever run) is none, and one that it finds
    worse than the leader by more than `CLOSED_ERROR` is not promising.
    """
    leader = next(iter(contest.ranked()), None)
    if leader is None:
        return []
    values, closed = np.stack([*contest.table.values.values()]), contest.closed
    alike = [i for i in contest.order() if contest.keys[i] == contest.keys[leader] and i not in contest.simulated]
    is_other = np.any(values != values[:, [leader]], axis=0)
    is_near = np.all(closed <= closed[:, [leader]] * CLOSED_ERROR, axis=0)
    promising: list[bool] = (is_other & is_near).tolist()
    return [i for i in alike if promising[i]][:n]
