"""A predicted deployment as a plan: price, score, targets, command and remarks."""

from __future__ import annotations

from dataclasses import dataclass

from advisor.emit.deepspeed import command_for
from advisor.emit.vllm import launch_notes, vllm_command
from advisor.predict.bill import Tariff, energy, money
from advisor.predict.capacity import MAX_LOAD_FRAC
from advisor.predict.traffic import mean_lengths
from advisor.recommend.ask import Pool, Question
from advisor.recommend.rank import (
    NO_LATENCY,
    badness,
    missed,
    score,
    target_value,
    usd_per_h,
    values_of,
)
from advisor.schema import ClosedLoad, Deployment, Interval, Note, Plan, Prediction, TraceLoad
from advisor.units import format_s

CARBON = ("kgco2e_per_h", "kgco2e_per_million_output_tokens")


@dataclass(frozen=True)
class Option:
    """A deployment of one pool with its prediction: what a plan is made from."""

    pool: Pool
    deployment: Deployment
    prediction: Prediction
    badness_factor: float = 1.0
    """how much worse simulated neighbours were than the closed form that this prediction is"""

    @property
    def key(self) -> tuple[object, ...]:
        """Return what makes two options the same plan but for engine settings."""
        d = self.deployment
        return (self.pool.name, d.backend, d.tp, d.pp, d.dp, d.ep, d.weight_dtype, d.kv_dtype, d.offload)


def latency_s(prediction: Prediction) -> float:
    """Return the median end-to-end time of a prediction, a huge number for a saturated one that has none."""
    found = prediction.quantities.get("e2e_p50_s")
    return found.value if found is not None else NO_LATENCY


def offered_per_s(question: Question) -> float | None:
    """Return the arrivals per second of an open load, None for a closed one."""
    load = question.workload.load
    return None if isinstance(load, ClosedLoad) else load.arrivals_per_s


def with_offered_rates(question: Question, prediction: Prediction) -> Prediction:
    """Return a prediction with the rates of the long run of an open load: what arrives, or what saturates it.

    The simulation sends some hundred requests and its duration ends with the last answer.
    """
    load = question.workload.load
    if isinstance(load, ClosedLoad | TraceLoad) or load.n_requests is not None or load.duration_s is not None:
        return prediction
    rate = Interval(value=load.arrivals_per_s, low=load.arrivals_per_s, high=load.arrivals_per_s)
    if prediction.is_saturated:
        rate = prediction.quantities.get("saturation_requests_per_s", prediction.quantities["requests_per_s"])
    prompt, output = mean_lengths(question.workload.lengths)
    scales = {"requests_per_s": 1.0, "output_tokens_per_s": output, "total_tokens_per_s": prompt + output}
    rates = {
        name: Interval(value=rate.value * by, low=rate.low * by, high=rate.high * by)
        for name, by in scales.items()
        if name in prediction.quantities
    }
    met = prediction.quantities.get("slo_attainment_frac")
    if met is not None:
        goodput = (rate.value * met.value, rate.low * met.low, rate.high * met.high)
        rates["goodput_requests_per_s"] = Interval(value=goodput[0], low=goodput[1], high=goodput[2])
    return prediction.model_copy(update={"quantities": prediction.quantities | rates})


def priced_values(question: Question, option: Option, *, has_prices: bool) -> tuple[dict[str, float], float]:
    """Return the central values, with costs, and USD an hour (GPUs, where no price is known)."""
    values = values_of(option.prediction)
    rent = option.pool.usd_per_gpu_h if has_prices and option.pool.usd_per_gpu_h is not None else 1.0
    hourly = float(usd_per_h(option.deployment.n_gpus, values.get("board_power_w", 0.0), rent, question.request))
    return values, hourly


def option_badness(question: Question, option: Option) -> float:
    """Return by which factor an option misses its worst target (at most 1: it meets all)."""
    values = values_of(option.prediction)
    found = badness(values, question.slo, option.prediction.is_saturated, offered_per_s(question))
    return float(found) * option.badness_factor


def option_score(question: Question, option: Option, *, has_prices: bool) -> float:
    """Return the objective's value; a plan without a power model scores last for energy."""
    values, hourly = priced_values(question, option, has_prices=has_prices)
    if question.request.objective == "energy" and "board_power_w" not in values:
        return NO_LATENCY
    return float(score(question.request.objective, values, hourly, is_open=question.is_open))


def _spend(question: Question, option: Option) -> dict[str, Interval]:
    """Return cost and carbon quantities of a plan where price and power are known."""
    request, pool, q = question.request, option.pool, option.prediction.quantities
    requests, n = q["requests_per_s"], option.deployment.n_gpus
    power = q.get("board_power_w")
    found: dict[str, Interval] = {}
    if requests.value <= 0 or q["output_tokens_per_s"].value <= 0:
        return found
    electricity = None
    if power is not None and question.power is not None:
        used = energy(
            power,
            n_gpus=n,
            requests_per_s=requests.value,
            output_tokens_per_s=q["output_tokens_per_s"].value,
            coefficients=question.power,
            tariff=Tariff(request.electricity_usd_per_kwh, request.grid_kgco2e_per_kwh, request.pue),
        )
        electricity = used["electricity_usd_per_h"]
        # the rates of the long run, not those of the requests that were replayed, as for the costs
        names = ("energy_j_per_output_token", "energy_j_per_request", *CARBON)
        found |= {name: used[name] for name in names if name in used}
    if pool.usd_per_gpu_h is not None:
        prompt, _ = mean_lengths(question.workload.lengths)
        bill = money(
            q,
            n * pool.usd_per_gpu_h,
            input_tokens_per_s=requests.value * prompt,
            prefill_frac=0.0,  # the whole bill on output tokens: what plans are compared by
            electricity=electricity,
        )
        found |= {name: bill[name] for name in ("usd_per_h", "usd_per_million_output_tokens")}
    return found


def load_share(question: Question, prediction: Prediction) -> float:
    """Return an open load over what the plan can serve, 0 for a closed loop."""
    offered = offered_per_s(question)
    capacity = prediction.quantities.get("saturation_requests_per_s")
    return offered / capacity.value if offered is not None and capacity is not None and capacity.value else 0.0


def _risks(question: Question, option: Option) -> list[Note]:
    notes = []
    targets = () if option.prediction.is_saturated else question.slo.targets
    for target in targets:
        interval = option.prediction.quantities.get(f"{target.metric}_{target.statistic}_s")
        if interval is not None and interval.value <= target.max_s < interval.high:
            text = (
                f"{target.name}: met at {format_s(interval.value)}, but the 90 % interval reaches"
                f" {format_s(interval.high)} against {format_s(target.max_s)}"
            )
            notes.append(Note(level="warning", text=text))
    share = load_share(question, option.prediction)
    if share > MAX_LOAD_FRAC and not option.prediction.is_saturated:
        text = f"the load is {share:.0%} of what it can serve: no headroom, a burst makes the queue grow"
        notes.append(Note(level="warning", text=text))
    if option.prediction.is_saturated and option.deployment.backend != "vllm":
        shown = option.prediction["requests_per_s"]
        text = f"saturated: it serves at most {shown:.3g} requests/s, so queue and latency grow without end"
        notes.append(Note(level="warning", text=text))
    return notes


def command_of(question: Question, option: Option) -> str:
    """Return the shell line that starts the plan (of a DeepSpeed path: one replica)."""
    d, gpu = option.deployment, option.pool.cluster.gpu
    if d.backend == "vllm":
        return vllm_command(d, question.model, gpu, question.facts)
    return command_for(d, question.model)


def make_plan(question: Question, option: Option, *, rank: int, has_prices: bool, is_pareto: bool) -> Plan:
    """Return an option as a plan."""
    d, prediction = option.deployment, option.prediction
    # ranked in GPU hours where one pool of several has no price; what this plan costs is its own pool's
    values, hourly = priced_values(question, option, has_prices=True)
    misses = missed(values, question.slo)
    reasons = []
    for target in question.slo.targets:
        value = values.get(f"{target.metric}_{target.statistic}_s")
        if value is not None:
            verb = "misses" if target in misses else "meets"
            grows = prediction.is_saturated and target.metric != "tpot"
            shown = "no bound in an overload" if grows else format_s(value)
            reasons.append(f"{verb} {target.name}: {shown} against {format_s(target.max_s)}")
    notes = [*_risks(question, option)]
    ratios = [float(target_value(values, t)) / t.max_s for t in question.slo.targets]
    is_doubtful = not misses and max(ratios, default=0.0) * option.badness_factor > 1
    if is_doubtful:
        text = f"simulated plans were {option.badness_factor:.2g} times worse than this closed form: counted as a miss"
        notes.append(Note(level="warning", text=text))
    if d.dp > 1 and d.n_gpus > option.pool.cluster.gpus_per_node:
        text = "the line starts all replicas on one node; over several, start one engine a replica behind a balancer"
        notes.append(Note(text=f"{text}: advisor emit kubernetes writes that"))
    if d.backend == "vllm":
        notes += launch_notes(d, question.model, option.pool.cluster.gpu, question.facts)
    priced = prediction.model_copy(update={"quantities": prediction.quantities | _spend(question, option)})
    return Plan(
        rank=rank,
        backend=d.backend,
        deployment=d,
        prediction=priced,
        meets_slo=not misses and not is_doubtful and not prediction.is_saturated,
        is_pareto=is_pareto,
        usd_per_h=hourly if option.pool.usd_per_gpu_h is not None else 0.0,
        score=option_score(question, option, has_prices=has_prices),
        command=command_of(question, option),
        reasons=tuple(reasons),
        notes=tuple(notes),
    )
