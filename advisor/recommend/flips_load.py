"""The rate, number of clients or prompt length at which the winner changes: proposed by the closed form, replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from advisor.errors import AdvisorError
from advisor.predict.traffic import mean_lengths
from advisor.recommend.aside import side_by_side
from advisor.recommend.ask import Pool, Question
from advisor.recommend.explain import plan_text
from advisor.recommend.forecast import forecast
from advisor.recommend.plan import Option, latency_s, option_badness, option_score
from advisor.recommend.rank import SATURATED, Floats, badness, missed, order, score, score_bin, usd_per_h, values_of
from advisor.recommend.search import Found, steady_values
from advisor.schema import ClosedLoad, Deployment, FixedLengths, Lengths, LognormalLengths, Plan, TraceLoad, Workload
from advisor.units import format_rate

SPAN = 32.0
"""Rates are searched up to this factor above and below the request's own; prompts up to `MAX_LONGER`."""
MAX_LONGER = 8.0
GRID = 12
STEPS = 3
BESIDE = (1.1, 1.3)
"""A change that the closed form sees at a factor is replayed this far beyond it: near, and once more further."""
N_RIVALS = 2
"""Plans that are replayed beside the old winner: the closed form does not tell the best two apart."""
MAX_REPLAYS = 6
"""Replays that bear out one change; the three of an answer are looked at side by side."""
Shaped = Callable[[float], Workload]


@dataclass(frozen=True)
class Change:
    """Where the winner changes: between two replayed factors, to another plan or to none that meets the targets."""

    inside: float
    outside: float
    winner: int | None
    misses: tuple[str, ...]
    rel_low: float
    rel_high: float

    @property
    def factor(self) -> float:
        """Return the middle of the two replayed factors."""
        return float(np.sqrt(self.inside * self.outside))

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 90 % interval of the factor: the bracket, widened by what is unknown of the plan's capacity."""
        low, high = sorted((self.inside, self.outside))
        return low * self.rel_low, high * self.rel_high


class Spent(Exception):
    """As many replays as flips may cost were made; what is not confirmed by then is not said."""


def _key(plan: Plan) -> tuple[object, ...]:
    d = plan.deployment
    return (d.gpu, d.backend, d.tp, d.pp, d.dp, d.ep, d.weight_dtype)


class _Rivals:
    """The shown vLLM plans: as rows of the closed form, corrected as in the search, and replayed where it matters."""

    def __init__(self, question: Question, plans: Sequence[Plan], found: Found) -> None:
        self.question = question
        self.found = found
        table = found.table
        shown = {_key(p): p for p in plans if p.backend == "vllm"}
        self.plans: list[Plan] = []
        self.rows: list[int] = []
        for i, d in enumerate(table.deployments):
            plan = shown.get((d.gpu, d.backend, d.tp, d.pp, d.dp, d.ep, d.weight_dtype))
            if plan is not None and plan.deployment == d:
                self.plans.append(plan)
                self.rows.append(i)
        self.pools = [table.pools[i] for i in self.rows]
        self.factors = table.factors[:, self.rows] if table.factors.shape[1] else np.ones((3, len(self.rows)))
        self.mine = next((k for k, p in enumerate(self.plans) if p is plans[0]), -1)
        self.n_replays = 0
        self.replayed: dict[tuple[int, Workload], Option | None] = {}

    def ranked(self, factors: Floats, workload: Workload) -> Iterator[tuple[int, ...]]:
        """Yield the plans that meet the targets at each factor on the load of `workload`, best first.

        A load f times as high on n replicas is the same load on n/f replicas, so all factors are one call of the sweep;
        rates and power of the rows are scaled back.
        """
        request, n_factors, n_rows = self.question.request, len(factors), len(self.rows)
        columns: dict[str, Floats] = {}
        hourly = np.zeros((n_rows, n_factors))
        n_gpus = np.array([self.found.table.deployments[i].n_gpus for i in self.rows], dtype=float)
        for pool in {p.name: p for p in self.pools}.values():
            mine = [k for k, p in enumerate(self.pools) if p.name == pool.name]
            deployments = [self.found.table.deployments[self.rows[k]] for k in mine]
            values = self.question.kept.get(
                ("spread", pool.name, tuple(deployments), factors.tobytes(), workload),
                partial(self._spread, pool, deployments, factors, workload),
            )
            for name, array in values.items():
                column = np.asarray(array, dtype=float).reshape(len(mine), n_factors)
                if name.endswith("_per_s") or name == "board_power_w":
                    column = column * factors
                columns.setdefault(name, np.zeros((n_rows, n_factors)))[mine] = column
            rent = pool.usd_per_gpu_h if self.found.has_prices and pool.usd_per_gpu_h is not None else 1.0
            hourly[mine] = usd_per_h(n_gpus[mine][:, None], columns["board_power_w"][mine], rent, request)
        load = workload.load
        for k, factor in enumerate(factors.tolist()):
            at = {name: column[:, k] for name, column in columns.items()}
            offered = None if isinstance(load, ClosedLoad) else load.arrivals_per_s * factor
            scores = np.asarray(score(request.objective, at, hourly[:, k], is_open=offered is not None))
            bad = np.asarray(badness(at, self.question.slo, at["is_saturated"].astype(bool), offered))
            by = self.factors
            bad = np.where(bad >= SATURATED, bad, bad * by[1])
            rows = order(scores * by[0], bad, at["e2e_p50_s"] * by[2], n_gpus).tolist()
            yield tuple(row for row in rows if bad[row] <= 1)

    def _spread(
        self, pool: Pool, deployments: Sequence[Deployment], factors: Floats, workload: Workload
    ) -> dict[str, Floats]:
        spread = [d.model_copy(update={"dp": d.dp / f}) for d in deployments for f in factors.tolist()]
        return steady_values(self.question, pool, spread, workload)

    def is_mine(self, ranked: tuple[int, ...]) -> bool:
        """Return whether the winner of the answer leads a ranking."""
        return ranked[:1] == (self.mine,)

    def load_crossing(self, *, up: bool) -> tuple[float, tuple[int, ...]] | None:
        """Return the factor on the load nearest to 1 at which the winner changes, and the ranking there, if any."""
        sign = 1.0 if up else -1.0
        steps = np.exp(sign * np.linspace(0.0, np.log(SPAN), 2 * GRID + 1)[1:])
        workload = self.question.workload
        for refine in (False, True):
            rankings = enumerate(self.ranked(steps, workload))
            at, ranking = next(((k, r) for k, r in rankings if not self.is_mine(r)), (None, ()))
            if at is None:
                return None
            if refine:
                return float(steps[at]), ranking
            before = steps[at - 1] if at else 1.0
            steps = np.exp(np.linspace(np.log(before), np.log(steps[at]), GRID + 1)[1:])
        return None

    def prompt_crossing(self, with_prompt: Shaped, most: float) -> tuple[float, tuple[int, ...]] | None:
        """Return the smallest factor on the prompt length, up to `most`, at which the winner changes, likewise."""
        one = np.ones(1)

        def ranking(factor: float) -> tuple[int, ...]:
            return next(self.ranked(one, with_prompt(factor)))

        good, bad, others = 1.0, 0.0, ranking(1.0)
        while bad < most and self.is_mine(others):
            bad = min(most, 2.0 * good)
            others = ranking(bad)
            good = bad if self.is_mine(others) else good
        if self.is_mine(others):
            return None
        for _ in range(STEPS):
            middle = float(np.sqrt(good * bad))
            now = ranking(middle)
            good, bad, others = (middle, bad, others) if self.is_mine(now) else (good, middle, now)
        return bad, others

    def start_anew(self) -> None:
        """Allow the full number of replays again: each axis has its own, whichever process looks at it."""
        self.n_replays = 0
        self.replayed.clear()

    def replay(self, row: int, workload: Workload) -> Option | None:
        """Return a plan replayed under another workload, None when it does not run; raises Spent after too many."""
        key = (row, workload)
        if key not in self.replayed:
            if self.n_replays >= MAX_REPLAYS:
                raise Spent
            self.n_replays += 1
            self.replayed[key] = self._predict(row, workload)
        return self.replayed[key]

    def _predict(self, row: int, workload: Workload) -> Option | None:
        try:
            return forecast(self.question, self.pools[row], self.plans[row].deployment, workload)
        except AdvisorError:
            return None

    def first(self, rows: Sequence[int], workload: Workload) -> int | None:
        """Return which of some plans wins, replayed; None when none meets the targets with headroom.

        Where the price alone decides and is known beforehand, the cheapest are replayed first, and dearer ones only
        when none of those meets the targets.
        """
        asked, has_prices = replace(self.question, workload=workload), self.found.has_prices
        for alike in self._by_price(rows, workload):
            able = [(row, option) for row in alike if (option := self.replay(row, workload)) is not None]
            bad = np.array([option_badness(asked, o) for _, o in able])
            if not len(bad) or bad.min() > 1:
                continue
            scores = np.array([option_score(asked, o, has_prices=has_prices) for _, o in able])
            latency = np.array([latency_s(o.prediction) for _, o in able])
            n_gpus = np.array([float(o.deployment.n_gpus) for _, o in able])
            return able[int(order(scores, bad, latency, n_gpus)[0])][0]
        return None

    def first_of_all(self, rows: Sequence[int], workload: Workload) -> int | None:
        """Return the winner as `first` does; that none meets the targets only after all that met them were replayed."""
        winner = self.first(rows, workload)
        if winner is not None:
            return winner
        others = [row for row, plan in enumerate(self.plans) if plan.meets_slo and row not in rows]
        return self.first(others, workload) if others else None

    def _by_price(self, rows: Sequence[int], workload: Workload) -> list[list[int]]:
        """Return rows in groups of equal score, the best first; one group where only a replay tells the score.

        A plan that serves an open load delivers what arrives, so that rent decides its cost; power is the replay's.
        """
        request, load = self.question.request, workload.load
        is_known = request.objective == "cost" and not request.electricity_usd_per_kwh
        if not is_known or isinstance(load, ClosedLoad | TraceLoad) or load.n_requests or load.duration_s:
            return [[*rows]]
        _, output = mean_lengths(workload.lengths)
        groups: dict[float, list[int]] = {}
        for row in rows:
            rent = self.pools[row].usd_per_gpu_h if self.found.has_prices else None
            hourly = usd_per_h(self.plans[row].deployment.n_gpus, 0.0, 1.0 if rent is None else rent, request)
            delivered = {"output_tokens_per_s": load.arrivals_per_s * output}
            groups.setdefault(score_bin(score("cost", delivered, hourly, is_open=True)), []).append(row)
        return [groups[key] for key in sorted(groups)]

    def confirm(self, shaped: Shaped, factor: float, ranking: tuple[int, ...], most: float) -> Change | None:
        """Return the change that the closed form sees at a factor as replays bear it out; None when they do not.

        Beyond the factor one of the closed form's best must win (or none meet the targets), before it the old one.
        """
        is_up = factor > 1
        rows = (self.mine, *[row for row in ranking if row != self.mine][:N_RIVALS])
        inside, winner, outside = 1.0, None, 1.0
        for beside in BESIDE:
            outside = min(factor * beside, most) if is_up else factor / beside
            winner = self.first_of_all(rows, shaped(outside))
            if winner != self.mine:
                break
            inside = outside
        else:
            return None
        near = factor / BESIDE[0] if is_up else factor * BESIDE[0]
        if inside == 1.0 and (near > 1) == is_up:
            deciding = (self.mine,) if is_up or winner is None else (self.mine, winner)
            before = self.first(deciding, shaped(near))
            if before == self.mine:
                inside = near
            elif is_up and winner is not None:
                winner = self.first((self.mine, winner), shaped(near))
                outside = near
            else:
                winner = self.first_of_all((self.mine,), shaped(near)) if is_up else winner
                outside = near
        return self._change(shaped(outside), inside, outside, winner)

    def _change(self, at: Workload, inside: float, outside: float, winner: int | None) -> Change:
        names: tuple[str, ...] = ()
        mine = self.replayed.get((self.mine, at))
        if mine is not None:
            names = tuple(t.name for t in missed(values_of(mine.prediction), self.question.slo))
        # going down, it is the other plan's capacity that decides
        deciding = self.mine if outside > 1 or winner is None else winner
        capacity = self.plans[deciding].prediction.quantities.get("saturation_requests_per_s")
        low, high = (capacity.low / capacity.value, capacity.high / capacity.value) if capacity else (1.0, 1.0)
        return Change(inside, outside, winner, names, low, high)


def _loaded(workload: Workload, factor: float) -> Workload:
    load = workload.load
    if isinstance(load, ClosedLoad):
        changed = load.model_copy(update={"concurrency": max(1, round(load.concurrency * factor))})
        return workload.model_copy(update={"load": changed})
    faster = {"arrivals_per_s": load.arrivals_per_s * factor}
    return workload.model_copy(update={"load": load.model_copy(update=faster)})


def _longer(workload: Workload, factor: float) -> Workload:
    lengths = workload.lengths
    changed: Lengths = lengths
    if isinstance(lengths, FixedLengths):
        changed = lengths.model_copy(update={"prompt_tokens": max(1, round(lengths.prompt_tokens * factor))})
    elif isinstance(lengths, LognormalLengths):
        changed = lengths.model_copy(update={"prompt_tokens_mean": lengths.prompt_tokens_mean * factor})
    return workload.model_copy(update={"lengths": changed})


@dataclass(frozen=True)
class _Axis:
    """What is changed: words for it, the workload at a factor, the largest factor, a factor as text."""

    where: str
    shaped: Shaped
    most: float
    say: Callable[[float], str]


def _axes(question: Question) -> dict[str, _Axis]:
    """Return the load upwards and downwards, and the prompt length where a longer one still fits the context."""
    workload, load, lengths = question.workload, question.workload.load, question.workload.lengths
    base = float(load.concurrency if isinstance(load, ClosedLoad) else load.arrivals_per_s)

    def say_load(factor: float) -> str:
        if isinstance(load, ClosedLoad):
            return f"{max(1, round(base * factor)):,} clients"
        return format_rate(base * factor, "requests")

    axes = {"up": _Axis("above", lambda f: _loaded(workload, f), SPAN, say_load)}
    if isinstance(lengths, FixedLengths | LognormalLengths):
        mean = lengths.prompt_tokens if isinstance(lengths, FixedLengths) else lengths.prompt_tokens_mean
        most = min(MAX_LONGER, question.max_model_len / mean)
        if most > 1:
            say = lambda f: f"{mean * f:,.0f} tokens"  # noqa: E731
            axes["prompt"] = _Axis("prompts above", lambda f: _longer(workload, f), most, say)
    axes["down"] = _Axis("below", lambda f: _loaded(workload, f), SPAN, say_load)
    return axes


def load_changes(
    question: Question, plans: Sequence[Plan], found: Found, meanwhile: Callable[[], object] | None = None
) -> list[tuple[_Axis, Change, Plan | None]]:
    """Return where load or prompt length change the winner, each borne out by replays, with the plan that then wins.

    `meanwhile` is what this process does first where others work beside it (`side_by_side`).
    Where the simulation, not the closed form, decided who wins now, the closed form has nothing to propose: none.
    """
    rivals = _Rivals(question, plans, found)
    is_replayed = question.request.n_finalists > 0 and plans[0].prediction.method == "simulated"
    if rivals.mine < 0 or question.workload.load.kind == "trace" or not plans[0].meets_slo or not is_replayed:
        return []
    if not rivals.is_mine(next(rivals.ranked(np.ones(1), question.workload))):
        return []
    axes = _axes(question)
    # downwards two plans are replayed at each load, else mostly one: the longest begins first
    jobs = [partial(_along, rivals, name, axes[name]) for name in reversed(axes)]
    made = side_by_side(jobs, meanwhile)
    found_on = [made[k] if k in made else job() for k, job in enumerate(jobs)]
    changes = []
    for axis, change in zip(axes.values(), reversed(found_on), strict=True):
        if change is not None:
            changes.append((axis, change, None if change.winner is None else rivals.plans[change.winner]))
    return changes


def _along(rivals: _Rivals, name: str, axis: _Axis) -> Change | None:
    """Return the change of one axis, None where there is none or `MAX_REPLAYS` do not bear it out."""
    rivals.start_anew()
    crossing = (
        rivals.prompt_crossing(axis.shaped, axis.most) if name == "prompt" else rivals.load_crossing(up=name == "up")
    )
    if crossing is None or (name == "down" and not crossing[1]):
        return None
    try:
        return rivals.confirm(axis.shaped, *crossing, most=axis.most)
    except Spent:
        return None


def load_flips(
    question: Question, plans: Sequence[Plan], found: Found, meanwhile: Callable[[], object] | None = None
) -> list[str]:
    """Return the rate (or clients) and prompt length at which the winner changes, as sentences."""
    sentences = []
    for axis, change, winner in load_changes(question, plans, found, meanwhile):
        low, high = (axis.say(at) for at in change.interval)
        text = f"{axis.where} about {axis.say(change.factor)} (90 %: {low.split()[0]} to {high})"
        if winner is not None:
            text += f": then {plan_text(winner, with_gpu=len(question.pools) > 1)} does better (both replayed)"
        else:
            why = f"misses {' and '.join(change.misses)}" if change.misses else "has no tenth of its capacity left"
            text += f": this plan {why} (replayed), and no other one shown meets the targets (closed form)"
        sentences.append(text)
    return sentences
