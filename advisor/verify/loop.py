"""The verify loop: measure a live endpoint under the plan's workload, compare, say what is off, make a run record."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from advisor.errors import AdvisorError, DomainError
from advisor.predict.footprint import cache_tokens
from advisor.schema import (
    ClosedLoad,
    Coefficient,
    FixedLengths,
    LognormalLengths,
    Model,
    Note,
    Noun,
    Plan,
    Prediction,
    TraceLoad,
    Workload,
)
from advisor.schema.run_record import Measured, RunRecord, Sent, Startup
from advisor.verify.compare import LIGHT, LOAD, START, Row, blame, compare, has_gap
from advisor.verify.drive import Listener, drive
from advisor.verify.endpoint import Endpoint, EndpointError, failure_sentence, probe
from advisor.verify.measure import Traced, client_lag_s, flat, measured, most_common
from advisor.verify.suspects import Suspect, Vary, suspect_text, suspects

N_LIGHT_REQUESTS = 8
# The first request of a server that has just started compiles kernels and opens the connection.
N_WARM_REQUESTS = 1
# Requests of a closed load that names no count: each client sends this many, so that start and end weigh little.
ROUNDS = 8
# A client that sends later than this share of TTFT measures itself.
LAG_FRAC = 0.05
Predict = Callable[[Workload], Prediction]


class CellReport(Noun):
    """One cell: what was sent, what came back."""

    name: str
    workload: Workload
    sent: Sent
    measured: Measured
    n_failed: int = 0


class VerifyReport(Noun):
    """What the live endpoint did beside what the plan predicted."""

    endpoint: str
    model: str
    engine_version: str
    cells: tuple[CellReport, ...]
    rows: tuple[Row, ...]
    verdict: str
    suspects: tuple[Suspect, ...] = ()
    n_inside: int
    notes: tuple[Note, ...] = ()
    records: tuple[RunRecord, ...] = ()


def longest_tokens(workload: Workload) -> int:
    """Return the longest prompt plus output that the workload can draw, as far as it is bounded."""
    lengths = workload.lengths
    if isinstance(lengths, FixedLengths):
        return lengths.prompt_tokens + lengths.output_tokens
    if isinstance(lengths, LognormalLengths):
        return lengths.prompt_clip[1] + lengths.output_clip[1]
    return max(p + o for p, o in zip(lengths.prompt_tokens, lengths.output_tokens, strict=True))


def fit_lengths(workload: Workload, max_model_len: int | None) -> tuple[Workload, Note | None]:
    """Return the workload with drawn lengths clipped to what the server takes, and a note when that cuts something.

    Raises:
        DomainError: fixed or recorded lengths are longer than the server's limit.
    """
    if max_model_len is None or longest_tokens(workload) <= max_model_len:
        return workload, None
    lengths = workload.lengths
    if not isinstance(lengths, LognormalLengths):
        raise DomainError(
            f"the workload needs {longest_tokens(workload)} tokens a request, the server takes {max_model_len}; "
            "raise --max-model-len or shorten the workload"
        )
    share = lengths.prompt_tokens_mean / (lengths.prompt_tokens_mean + lengths.output_tokens_mean)
    top_prompt = max(1, min(lengths.prompt_clip[1], int(max_model_len * share)))
    top_output = max(1, min(lengths.output_clip[1], max_model_len - top_prompt))
    clipped = lengths.model_copy(
        update={
            "prompt_clip": (min(lengths.prompt_clip[0], top_prompt), top_prompt),
            "output_clip": (min(lengths.output_clip[0], top_output), top_output),
        }
    )
    text = f"lengths are clipped to {top_prompt} + {top_output} tokens, because the server takes {max_model_len}"
    return workload.model_copy(update={"lengths": clipped}), Note(level="info", text=text)


def counted(workload: Workload, n_requests: int | None = None, duration_s: float | None = None) -> Workload:
    """Return the workload with an end: so many requests, or for an open load so many seconds.

    Raises:
        DomainError: a duration for a closed loop, either for a recorded trace, or both.
    """
    load = workload.load
    if n_requests is not None and duration_s is not None:
        raise DomainError("give the number of requests or the duration, not both")
    if isinstance(load, TraceLoad):
        if n_requests is not None or duration_s is not None:
            raise DomainError("a recorded trace has its own requests: give neither their number nor a duration")
        return workload
    if isinstance(load, ClosedLoad):
        if duration_s is not None:
            raise DomainError("a closed loop ends after a number of requests, not after a duration")
        n = n_requests or load.n_requests or ROUNDS * load.concurrency
        return workload.model_copy(update={"load": load.model_copy(update={"n_requests": n})})
    if n_requests is None and duration_s is None:
        return workload
    ends = {"n_requests": n_requests, "duration_s": duration_s}
    return workload.model_copy(update={"load": type(load).model_validate(load.model_dump() | ends)})


def light(workload: Workload, n_requests: int = N_LIGHT_REQUESTS) -> Workload:
    """Return the same lengths one request at a time: no queue, no batch; the first request only warms up."""
    load = ClosedLoad(concurrency=1, n_requests=n_requests + N_WARM_REQUESTS)
    return workload.model_copy(update={"name": f"{workload.name}, one at a time", "load": load})


def sent_in(workload: Workload, requests: list[Traced]) -> Sent:
    """Return the very requests that were answered: lengths and, of an open load, arrivals.

    A prediction for them differs from what was measured by the model's error alone, not by what was drawn.
    """
    is_closed = isinstance(workload.load, ClosedLoad)
    ordered = sorted(requests, key=lambda r: r.start_s if is_closed else r.arrival_s)
    return Sent(
        prompt_tokens=tuple(max(1, r.prompt_tokens) for r in ordered),
        output_tokens=tuple(max(1, r.output_tokens) for r in ordered),
        arrival_s=None if is_closed else tuple(round(r.arrival_s - ordered[0].arrival_s, 6) for r in ordered),
    )


def run_record(
    cell: CellReport, plan: Plan, model: Model, endpoint: Endpoint, run_id: str, hf_config: dict[str, Any]
) -> RunRecord:
    """Return the run record, schema 1, of one measured cell; power is not known to an HTTP client."""
    deployment, cache = plan.deployment, endpoint.cache
    startup = None
    if cache is not None:
        paged = deployment.model_copy(update={"kv_block_tokens": cache.kv_block_tokens})
        tokens = cache_tokens(model, paged, cache.n_kv_blocks)
        startup = Startup(
            n_kv_blocks=cache.n_kv_blocks, kv_block_tokens=cache.kv_block_tokens, kv_cache_tokens=tokens
        ).model_dump(exclude_none=True)
    return RunRecord.model_validate(
        {
            "schema": 1,
            "run_id": run_id,
            "engine": "vllm" if deployment.backend == "vllm" else deployment.backend,
            "engine_version": endpoint.engine_version or deployment.engine_version,
            "gpu": deployment.gpu,
            "n_gpus": deployment.n_gpus,
            "model": model.name,
            "hf_config": hf_config,
            "tp": deployment.tp,
            "pp": deployment.pp,
            "dp": deployment.dp,
            "weight_dtype": deployment.weight_dtype,
            "kv_dtype": deployment.kv_dtype,
            "max_model_len": deployment.max_model_len,
            "max_num_batched_tokens": deployment.max_num_batched_tokens,
            "max_num_seqs": deployment.max_num_seqs,
            "gpu_memory_utilization": deployment.gpu_memory_utilization,
            "prefix_caching": deployment.prefix_caching,
            "enforce_eager": deployment.enforce_eager,
            "startup": startup,
            "load": cell.workload.load.model_dump(mode="json", exclude_none=True),
            "lengths": cell.workload.lengths.model_dump(mode="json"),
            "sent": cell.sent.model_dump(mode="json", exclude_none=True),
            "measured": cell.measured.model_dump(mode="json", exclude_none=True),
            "client": "http, locust, open-ai completions",
            "cell": cell.name,
        }
    )


def _differences(live: Endpoint, plan: Plan, model: Model) -> list[Note]:
    """Return a warning for each way in which the server is not the plan's."""
    d, texts = plan.deployment, []
    if live.model not in {model.folder, model.hf_id, model.name} - {""}:
        texts.append(f"the endpoint serves '{live.model}', the plan is for '{model.name}'")
    if live.engine_version and live.engine_version != d.engine_version:
        texts.append(f"the endpoint runs release {live.engine_version}, the plan is for {d.engine_version}")
    cache = live.cache
    if cache is not None and d.backend == "vllm":
        share = cache.gpu_memory_utilization
        if share is not None and abs(share - d.gpu_memory_utilization) > 1e-6:
            texts.append(
                f"the server's gpu_memory_utilization is {share:g}, the plan's is {d.gpu_memory_utilization:g}"
            )
        if cache.prefix_caching is not None and cache.prefix_caching != d.prefix_caching:
            texts.append(f"prefix caching is {'on' if cache.prefix_caching else 'off'} there, not as in the plan")
    return [Note(level="warning", text=text) for text in texts]


def verify(
    endpoint: str,
    plan: Plan,
    *,
    model: Model,
    workload: Workload,
    hf_config: dict[str, Any] | None = None,
    served_model: str = "",
    key: str = "",
    predict: Predict | None = None,
    vary: Vary | None = None,
    coefficients: Mapping[str, Coefficient] | None = None,
    n_requests: int | None = None,
    duration_s: float | None = None,
    n_light: int = N_LIGHT_REQUESTS,
    timeout_s: float = 120,
    seed: int = 0,
    listen: Listener | None = None,
) -> VerifyReport:
    """Return how a live endpoint behaves beside the plan's prediction.

    Two cells run: requests one at a time, where nothing queues, and the plan's workload. `predict` gives the prediction
    of the same plan for the requests that a cell really sent; without it the plan's own stands beside the second cell.
    With `vary` and `coefficients` gaps are traced to the coefficient that would explain them.

    Raises:
        EndpointError: the endpoint does not answer as an OpenAI-compatible streaming server, or fails every request.
        DomainError, UnknownName: the address, the served model or the lengths do not fit.
    """
    asked = counted(workload, n_requests, duration_s)
    live = probe(endpoint, wanted_model=served_model, key=key, timeout_s=min(timeout_s, 20))
    asked, clipped = fit_lengths(asked, live.max_model_len)
    notes = [*([clipped] if clipped else []), *_differences(live, plan, model)]
    cells: list[CellReport] = []
    rows: list[Row] = []
    sent_by: dict[str, Workload] = {}
    if live.cache is not None:
        paged = plan.deployment.model_copy(update={"kv_block_tokens": live.cache.kv_block_tokens})
        tokens = float(cache_tokens(model, paged, live.cache.n_kv_blocks))
        rows += compare(START, plan.prediction, {"kv_cache_tokens": tokens})
    for name, traffic in ((LIGHT, light(asked, n_light)), (LOAD, asked)):
        if name == LIGHT and not n_light:
            continue
        answered, failed = drive(
            live,
            traffic,
            vocab_size=model.vocab_size,
            cell=name,
            key=key,
            timeout_s=timeout_s,
            seed=seed,
            listen=listen,
        )
        if name == LIGHT:
            answered = sorted(answered, key=lambda r: r.start_s)[N_WARM_REQUESTS:]
        if not answered and failed:
            worst = most_common(failed)
            raise EndpointError(failure_sentence(worst.kind, worst.text, live.base_url))
        if failed:
            worst = most_common(failed)
            text = f"{len(failed)} of {len(failed) + len(answered)} requests of the {name} cell failed: "
            notes.append(Note(level="warning", text=text + failure_sentence(worst.kind, worst.text, live.base_url)))
        requests = sent_in(traffic, answered)
        sent = sent_by[name] = requests.within(traffic)
        if name == LIGHT:
            traffic = traffic.model_copy(update={"load": sent.load})
        cell = CellReport(name=name, workload=traffic, sent=requests, measured=measured(answered), n_failed=len(failed))
        cells.append(cell)
        lag_s, ttft = client_lag_s(answered), cell.measured.ttft_s
        if ttft is not None and lag_s > LAG_FRAC * ttft.p50:
            text = f"the client was up to {1e3 * lag_s:.0f} ms late in the {name} cell: use a faster client machine"
            notes.append(Note(level="warning", text=text))
        promised = plan.prediction if name == LOAD else None
        expected = predict(sent) if predict is not None and len(answered) > 1 else promised
        if expected is not None:
            rows += compare(name, expected, flat(cell.measured), promised)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    wanted = plan.deployment.engine_version
    run_id = f"verify-{plan.deployment.backend}-{wanted}__{plan.deployment.gpu}__{model.name}-{stamp}"
    verdict = blame(tuple(rows))
    found: tuple[Suspect, ...] = ()
    if predict is not None and vary is not None and coefficients and has_gap(tuple(rows)):
        found = suspects(rows, sent_by, coefficients, vary, predict)
        verdict = "; ".join(filter(None, (verdict, suspect_text(found))))
    records = tuple(run_record(cell, plan, model, live, run_id, hf_config or {}) for cell in cells)
    return VerifyReport(
        endpoint=live.base_url,
        model=live.model,
        engine_version=live.engine_version,
        cells=tuple(cells),
        rows=tuple(rows),
        verdict=verdict,
        suspects=found,
        n_inside=sum(row.is_inside for row in rows),
        notes=tuple(notes),
        records=records,
    )


def write_records(report: VerifyReport, path: Path) -> None:
    """Append the report's run records to a JSON-lines file, the form that `advisor fit` reads.

    Raises:
        AdvisorError: the file cannot be written.
    """
    lines = [json.dumps(r.model_dump(mode="json", by_alias=True, exclude_none=True)) + "\n" for r in report.records]
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
    except OSError as error:
        raise AdvisorError(f"cannot write {path}: {error.strerror}") from None
