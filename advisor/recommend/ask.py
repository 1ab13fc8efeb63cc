"""A request made concrete: model, pools with prices, workload that fits the context, engine facts, coefficients."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from advisor.catalog import Catalog
from advisor.errors import DomainError, UnknownName, printable
from advisor.recommend.kept import Kept, kept_for
from advisor.schema import (
    ClosedLoad,
    Cluster,
    CoefficientSet,
    EngineFacts,
    FixedLengths,
    Gpu,
    Lengths,
    LognormalLengths,
    Model,
    Note,
    PoissonLoad,
    Request,
    Slo,
    Target,
    TraceLengths,
    Workload,
)
from advisor.schema.engine import version_key
from advisor.units import format_usd

LENGTH_STEP = 1024
Z_99, Z_999 = 2.3263, 3.0902
"""Quantiles 0.99 and 0.999 of the standard normal distribution."""
USUAL_SLO = Slo(
    targets=(Target(metric="ttft", statistic="p99", max_s=2.0), Target(metric="tpot", statistic="p99", max_s=0.2))
)
"""MLPerf Inference's limits for its Llama-2-70B server scenario: 99th percentiles of 2000 ms and 200 ms
(mlcommons/inference_policies, inference_rules.adoc, 'Constraints for the Open division' table)."""
_TARGET = re.compile(r"(ttft|tpot|itl|e2e)_(mean|p50|p90|p95|p99)(?:<=|=|<)([0-9.eE+-]+)(us|ms|s|min)?")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_WATTS = re.compile(r"([0-9.eE+-]+)(w|kw|mw)?")
STALE_PRICE_DAYS = 120


@dataclass(frozen=True)
class Pool:
    """One cluster of the request and what an hour of one of its GPUs costs; None = no price is known."""

    cluster: Cluster
    usd_per_gpu_h: float | None
    price_text: str

    @property
    def name(self) -> str:
        """Return the pool as a spec, such as '2x8xh100-sxm-80gb'."""
        c = self.cluster
        return f"{f'{c.n_nodes}x' if c.n_nodes > 1 else ''}{c.gpus_per_node}x{c.gpu.name}"


@dataclass(frozen=True)
class Question:
    """Everything that the search needs; `context_fault` is set when the lengths fit no deployment."""

    request: Request
    model: Model
    model_notes: tuple[Note, ...]
    pools: tuple[Pool, ...]
    workload: Workload
    max_model_len: int
    context_fault: tuple[str, str] | None
    facts: EngineFacts
    vllm: CoefficientSet | None
    deepspeed: CoefficientSet | None
    power: CoefficientSet | None
    notes: tuple[Note, ...]
    kept: Kept = field(default_factory=Kept, compare=False)

    @property
    def slo(self) -> Slo:
        """Return the latency targets: the request's, else the usual ones where users arrive and wait.

        A closed loop starts with all its clients at once, so the first tokens of its first requests say nothing about
        service: it has no usual targets.
        """
        request = self.request
        is_online = self.is_open and request.task != "batch" and not request.is_best_effort
        return request.slo if request.slo.targets or not is_online else USUAL_SLO

    @property
    def is_open(self) -> bool:
        """Return whether the load is a rate of arrivals (else it is a number of clients)."""
        return not isinstance(self.workload.load, ClosedLoad)


def parse_slo(text: str) -> Slo:
    """Return the targets that text such as 'ttft_p99=500ms,tpot_p99=50ms' means; a number without unit is seconds.

    Raises DomainError for text that means none.

    >>> [(t.name, t.max_s) for t in parse_slo("ttft_p99=500ms, tpot_mean=0.05").targets]
    [('ttft_p99', 0.5), ('tpot_mean', 0.05)]
    """
    targets = []
    for part in filter(None, (p.strip().lower().replace(" ", "") for p in text.split(","))):
        match = _TARGET.fullmatch(part)
        seconds = _number(match[3]) * _SECONDS[match[4] or "s"] if match else math.nan
        if match is None or not 0 < seconds < math.inf:
            raise DomainError(
                f"cannot read target '{printable(part)}'; write METRIC_STATISTIC=TIME, such as ttft_p99=500ms, with"
                " metric ttft, tpot, itl or e2e, statistic mean, p50, p90, p95 or p99, and a time above 0"
            )
        targets.append(Target.model_validate({"metric": match[1], "statistic": match[2], "max_s": seconds}))
    if len({t.name for t in targets}) < len(targets):
        raise DomainError(f"a target is given twice in '{printable(text)}'; give each once")
    return Slo(targets=tuple(targets))


def parse_power_w(text: str) -> float:
    """Return a power [W] from text such as '2.4kW' or '700'; DomainError for text that means none.

    >>> parse_power_w("2.4 kW")
    2400.0
    """
    match = _WATTS.fullmatch(text.strip().lower().replace(" ", ""))
    watts = _number(match[1]) * {"w": 1.0, "kw": 1e3, "mw": 1e6}[match[2] or "w"] if match else math.nan
    if not 0 < watts < math.inf:
        raise DomainError(f"cannot read power '{printable(text)}'; write watts above 0 such as 2400W or 2.4kW")
    return watts


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def quantile_tokens(lengths: Lengths, z: float) -> tuple[int, int]:
    """Return prompt and output tokens at a quantile (z of the standard normal) of each; a trace gives its longest."""
    if isinstance(lengths, FixedLengths):
        return lengths.prompt_tokens, lengths.output_tokens
    if isinstance(lengths, LognormalLengths):
        factor = math.exp(min(-0.5 * lengths.sigma**2 + z * lengths.sigma, 50.0))
        prompt = min(math.ceil(lengths.prompt_tokens_mean * factor), lengths.prompt_clip[1])
        output = min(math.ceil(lengths.output_tokens_mean * factor), lengths.output_clip[1])
        return max(1, prompt), max(1, output)
    pairs = zip(lengths.prompt_tokens, lengths.output_tokens, strict=True)
    return max(pairs, key=lambda pair: pair[0] + pair[1])


def mean_tokens(lengths: Lengths) -> tuple[float, float]:
    """Return the mean prompt and output tokens, before clipping."""
    if isinstance(lengths, FixedLengths):
        return float(lengths.prompt_tokens), float(lengths.output_tokens)
    if isinstance(lengths, LognormalLengths):
        return lengths.prompt_tokens_mean, lengths.output_tokens_mean
    n = len(lengths.prompt_tokens)
    return sum(lengths.prompt_tokens) / n, sum(lengths.output_tokens) / n


def workload_of(request: Request, catalog: Catalog) -> Workload:
    """Return the preset with the request's own lengths and load.

    Lengths that are given are fixed unless `length_sigma` says how they spread; one length alone keeps the preset's
    mean of the other.
    """
    name = "batch" if request.task == "batch" and "workload" not in request.model_fields_set else request.workload
    preset = catalog.workload(name)
    lengths, load = preset.lengths, preset.load
    is_own = request.prompt_tokens is not None or request.output_tokens is not None
    if is_own or request.length_sigma is not None:
        prompt, output = mean_tokens(lengths)
        prompt, output = float(request.prompt_tokens or prompt), float(request.output_tokens or output)
        if request.length_sigma:
            lengths = LognormalLengths(prompt_tokens_mean=prompt, output_tokens_mean=output, sigma=request.length_sigma)
        else:
            lengths = FixedLengths(prompt_tokens=max(1, round(prompt)), output_tokens=max(1, round(output)))
    if request.rate is not None:
        load = PoissonLoad(arrivals_per_s=request.rate)
    elif request.concurrency is not None:
        load = ClosedLoad(concurrency=request.concurrency)
    prefix = request.prefix if request.prefix is not None else preset.prefix
    prompt, _ = mean_tokens(lengths)
    if prefix.shared_prefix_tokens >= prompt:
        raise DomainError(
            f"a shared prefix of {prefix.shared_prefix_tokens:,} tokens leaves nothing of a mean prompt of"
            f" {prompt:,.0f} tokens, which contains it; give fewer, or longer prompts"
        )
    return Workload(name=preset.name, lengths=lengths, load=load, prefix=prefix)


def fit_context(
    workload: Workload, model: Model, request: Request
) -> tuple[Workload, int, tuple[str, str] | None, list[Note]]:
    """Return the workload cut to the context, the context length to serve with, the fault if none fits, and notes.

    Lengths that the user gave must fit at their 99th percentile; a preset's tail is cut with a warning.
    """
    if request.max_model_len is not None and request.max_model_len > model.max_context_tokens:
        raise DomainError(
            f"max_model_len {request.max_model_len} exceeds the {model.max_context_tokens} tokens that {model.name} "
            f"was trained for; give at most {model.max_context_tokens}"
        )
    limit = request.max_model_len or model.max_context_tokens
    lengths = workload.lengths
    is_own = request.prompt_tokens is not None or request.output_tokens is not None
    needed = sum(quantile_tokens(lengths, Z_99)) if is_own or isinstance(lengths, TraceLengths) else None
    prompt_mean, output_mean = mean_tokens(lengths)
    least = needed or math.ceil(prompt_mean + output_mean)
    if least > limit:
        what = "99 % of the requests need" if is_own and not isinstance(lengths, FixedLengths) else "a request needs"
        whose = "--max-model-len" if request.max_model_len else f"the context of {model.name}"
        reason = f"{what} up to {least:,} tokens (prompt + output), {whose} is {limit:,}"
        ratio = limit / least
        output = min(max(1, int(output_mean * ratio)), limit - 1)
        nearest = f"--prompt-tokens {min(max(1, int(prompt_mean * ratio)), limit - output)} --output-tokens {output}"
        if limit < 2:
            nearest = "a context of at least 2 tokens: one of the prompt and one of the answer"
        return workload, limit, (reason, nearest), []
    prompt, output = quantile_tokens(lengths, Z_999)
    notes = []
    if prompt + output > limit:
        share = limit / (prompt + output)
        prompt, output = max(1, int(prompt * share)), max(1, int(output * share))
        if sum(quantile_tokens(lengths, Z_99)) > limit:
            text = f"the longest requests of '{workload.name}' exceed {limit:,} tokens"
            notes.append(Note(level="warning", text=f"{text}: they are cut to {prompt:,} + {output:,}"))
    served = request.max_model_len or min(limit, -(-(prompt + output) // LENGTH_STEP) * LENGTH_STEP)
    if isinstance(lengths, LognormalLengths):
        cut = {
            "prompt_clip": (min(lengths.prompt_clip[0], prompt), min(lengths.prompt_clip[1], prompt)),
            "output_clip": (min(lengths.output_clip[0], output), min(lengths.output_clip[1], output)),
        }
        workload = workload.model_copy(update={"lengths": lengths.model_copy(update=cut)})
    return workload, served, None, notes


def _day(date: str) -> str:
    """Return the date that a text begins with."""
    found = re.match(r"\d{4}(-\d{2}){0,2}", date)
    return found[0] if found else date


def _node_of(request: Request, cluster: Cluster) -> Cluster:
    """Return the cluster with what the request says of its hosts, drives and network."""
    own = {
        "host_memory_bytes_per_gpu": request.host_memory_bytes_per_gpu,
        "nvme_bytes": request.nvme_bytes,
        "nvme_bytes_per_s": request.nvme_bytes_per_s,
        "internode_bytes_per_s_per_gpu": request.network_bytes_per_s_per_gpu,
    }
    return cluster.model_copy(update={name: value for name, value in own.items() if value is not None})


def _pools(request: Request, catalog: Catalog) -> tuple[tuple[Pool, ...], list[Note]]:
    parsed = catalog.clusters(request.gpus)
    own = {p.gpu: p for p in parsed.prices}
    pools: list[Pool] = []
    notes = list(parsed.notes)
    for cluster in (_node_of(request, c) for c in parsed.clusters):
        gpu = cluster.gpu.name
        if request.price_usd_per_gpu_h is not None:
            rent, text = request.price_usd_per_gpu_h, "your price"
        elif gpu in own:
            rent, text = own[gpu].usd_per_gpu_h, f"price of the card's file, {own[gpu].date}"
        else:
            choice = catalog.price_choice(gpu, request.provider, request.price_kind)
            if choice is None:
                rent, text = None, "no price"
                whose = f" of {request.provider}" if request.provider else ""
                notes.append(
                    Note(
                        level="warning",
                        text=f"no {request.price_kind} price{whose} is known for {gpu}: cost is counted in GPU hours;"
                        " give --price USD per GPU hour",
                    )
                )
            else:
                p, others = choice.price, choice.alternatives
                rent, text = p.usd_per_gpu_h, f"{p.provider} {p.kind}, {_day(p.date)}"
                shown = ", ".join(f"{o.provider} {format_usd(o.usd_per_gpu_h)}" for o in others[:4])
                more = f" (others: {shown})" if others else ""
                notes.append(Note(text=f"price of {gpu}: {format_usd(rent)} per GPU hour, {text}{more}"))
        pools.append(Pool(cluster, rent, text))
    return tuple({p.name: p for p in pools}.values()), notes


def _coefficients(catalog: Catalog, name: str) -> CoefficientSet | None:
    try:
        return catalog.coefficients(name)
    except UnknownName:
        return None


def _facts(request: Request, pools: tuple[Pool, ...], catalog: Catalog) -> tuple[EngineFacts, list[Note]]:
    """Return the facts of the release; the default release gives way to the newest that still runs on old cards."""
    table = catalog.engine("vllm")
    facts = EngineFacts.from_table(table, request.engine_version)
    if request.engine_version != Request.model_fields["engine_version"].default:
        return facts, []
    old = [p.cluster.gpu for p in pools if p.cluster.gpu.vendor == "nvidia" and not _runs_on(facts, p.cluster.gpu)]
    known = sorted((str(r["version"]) for r in table.get("release", [])), key=version_key, reverse=True)
    for version in known if old else ():
        other = EngineFacts.from_table(table, version)
        if version_key(version) < version_key(facts.version) and all(_runs_on(other, g) for g in old):
            text = f"vLLM {facts.version} no longer runs on {old[0].name}: {version} is planned for"
            return other, [Note(level="warning", text=text)]
    return facts, []


def _runs_on(facts: EngineFacts, gpu: Gpu) -> bool:
    return version_key(gpu.compute_capability) >= version_key(facts.min_compute_capability)


def ask(request: Request, catalog: Catalog) -> Question:
    """Return the request made concrete.

    Raises UnknownName or DomainError for a model, GPU, preset, provider or engine version that means nothing.
    """
    model, model_notes = catalog.model(request.model)
    pools, notes = _pools(request, catalog)
    workload, max_model_len, fault, cut = fit_context(workload_of(request, catalog), model, request)
    facts, older = _facts(request, pools, catalog)
    vllm, deepspeed, power = (_coefficients(catalog, name) for name in ("vllm", "deepspeed", "power"))
    return Question(
        request=request,
        model=model,
        model_notes=model_notes,
        pools=pools,
        workload=workload,
        max_model_len=max_model_len,
        context_fault=fault,
        facts=facts,
        vllm=vllm,
        deepspeed=deepspeed,
        power=power,
        notes=(*notes, *cut, *older),
        kept=kept_for(model, tuple(p.cluster for p in pools), facts, vllm, deepspeed, power, request.seed),
    )
