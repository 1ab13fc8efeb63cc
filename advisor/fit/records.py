"""Run records from JSON lines, and what the simulator needs to replay one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from advisor.catalog import Catalog, parse_config
from advisor.errors import BadData, DomainError, printable
from advisor.predict.engine_state import has_new_rows, heads_beyond
from advisor.predict.shapes import shapes_of
from advisor.predict.step import largest_graph
from advisor.predict.traffic import Traffic, draw
from advisor.schema import (
    ClosedLoad,
    Deployment,
    EngineFacts,
    FixedLengths,
    Gpu,
    Lengths,
    Load,
    Model,
    PoissonLoad,
    PrefixSharing,
    RunRecord,
    Workload,
    first_error,
)
from advisor.units import MIB

MAX_FILE_BYTES = 256 * MIB
N_DRAWS = 5
"""Draws of a random load that a prediction averages over."""
FIRST_WAKES = (0.4, 1.0, 1.8)
"""How long the engine takes to wake, over the mean, in each replay of a burst: one, two and three requests then share
its first step. In 490 bursts of 4 to 64 clients (data/runs/rows) one did in 15 %, two in 43 %, three in 19 %, four in
11 %. The others follow in groups, and whether the median is of one group or of the next hangs on the first one."""
MOST_BY_CHANCE = 256
"""Most clients of whom a group is so large a part that the median of their first tokens leaps with it."""

_LENGTHS: TypeAdapter[Lengths] = TypeAdapter(Lengths)
_LOAD: TypeAdapter[Load] = TypeAdapter(Load)


@dataclass(frozen=True)
class Cell:
    """One record with its model, GPU, deployment and traffic."""

    record: RunRecord
    model: Model
    gpu: Gpu
    deployment: Deployment
    workload: Workload
    traffics: tuple[Traffic, ...]
    host: str = ""
    cold_heads: frozenset[int] = frozenset()
    """kernels of the LM head that the engine start has not loaded before this cell (`engine_state.head_of`)"""
    cold_rows: int = 0
    """tokens of the smallest step whose matrix kernels it has not loaded yet (`engine_state.has_new_rows`), 0: none"""

    @property
    def is_drawn(self) -> bool:
        """Return whether its replays have different requests, drawn from the same distributions."""
        return self.traffics[0] is not self.traffics[-1]

    @property
    def run_id(self) -> str:
        """Return the engine start that the cell belongs to."""
        return self.record.run_id


def read_records(path: str | Path) -> list[RunRecord]:
    """Return the run records of a JSON-lines file. Raises BadData with the line and the rule that it breaks."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise BadData(printable(file), f"larger than {MAX_FILE_BYTES // MIB} MiB")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise BadData(printable(file), f"cannot be read: {reason}") from None
    records = parse_records(text, printable(file))
    if not records:
        raise BadData(printable(file), "holds no run record; expected one JSON object a line (schema 1)")
    return records


def parse_records(text: str, where: str) -> list[RunRecord]:
    """Return the run records of JSON lines; empty lines are skipped."""
    records = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError):
            raise BadData(where, f"line {number} is not one whole JSON object (truncated?)") from None
        try:
            records.append(RunRecord.model_validate(raw))
        except ValidationError as error:
            raise BadData(where, f"line {number}: {first_error(error)}") from None
    return records


def is_serving(record: RunRecord) -> bool:
    """Return whether the record is a vLLM cell that can be replayed."""
    return record.engine == "vllm" and record.load is not None and record.lengths is not None


def _command(record: RunRecord) -> Mapping[str, Any]:
    return (record.model_extra or {}).get("command") or {}


def spreads_experts(record: RunRecord) -> bool:
    """Return whether an engine ran with expert parallelism, of which there is no law here (docs/decisions.md)."""
    return bool(_command(record).get("enable_expert_parallel"))


ONE_ROUTE = frozenset({"GptOssForCausalLM", "DeepseekV2ForCausalLM"})
"""Architectures whose tokens all go to the same experts while weights are random: gpt-oss' router has a bias, larger
than what random states of norm 0.001 add to it; DeepSeek-V2's probabilities are 16-bit numbers, equal for all experts
(vLLM 0.26.0, grouped_topk_router.py takes the softmax of logits that differ by some 1e-5). Their decode steps say so:
8 sequences take hardly longer than one (runs gpt-oss-20b, deepseek-v2-lite). Trained weights spread their tokens."""

SPREAD = "n_tensors_changed_to_spread_routing"
"""Field of a record's command: routers and biases that the run changed so that tokens go to different experts. None
were found among fp8 weights, and the experts of 16 tokens took as long as those of one (qwen3-30b-a3b-fp8)."""


def has_one_route(record: RunRecord, model: Model) -> bool:
    """Return whether the engine's random weights sent all tokens to the same experts."""
    n_changed = _command(record).get(SPREAD)
    if isinstance(n_changed, int):
        return n_changed == 0
    return bool(record.random_weights) and model.architecture in ONE_ROUTE


SPELLINGS = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "awq": "awq-int4",
    "awq_marlin": "awq-int4",
    "gptq": "gptq-int4",
    "gptq_marlin": "gptq-int4",
    "w4a16": "gptq-int4",
    "w8a8": "fp8",
    "compressed-tensors-fp8": "fp8",
}
"""What engines and their flags call a format, and what this project does."""


def format_name(name: str) -> str:
    """Return a format's name in this project's spelling; an unknown one stays as it is and is refused later."""
    lowered = name.lower()
    if lowered.startswith("fp8"):
        return "fp8"
    return SPELLINGS.get(lowered, lowered)


def deployment_of(record: RunRecord, gpu: Gpu, facts: EngineFacts | None) -> Deployment:
    """Return the deployment that a record ran; engine defaults where the record names none."""
    memory = gpu.device_memory_bytes
    tokens = record.max_num_batched_tokens or (
        facts.max_num_batched_tokens_default(memory, gpu.name) if facts is not None else 8192
    )
    seqs = record.max_num_seqs or (facts.max_num_seqs_default(memory, gpu.name) if facts is not None else 256)
    return Deployment.model_validate(
        {
            "backend": "vllm",
            "engine_version": record.engine_version,
            "model": record.model,
            "gpu": gpu.name,
            "tp": record.tp,
            "pp": record.pp,
            "dp": record.dp,
            "weight_dtype": format_name(record.weight_dtype),
            "kv_dtype": "bf16" if record.kv_dtype == "auto" else format_name(record.kv_dtype),
            "max_model_len": record.max_model_len or 4096,
            "max_num_batched_tokens": tokens,
            "max_num_seqs": seqs,
            "gpu_memory_utilization": record.gpu_memory_utilization or 0.9,
            "prefix_caching": record.prefix_caching,
            "enforce_eager": record.enforce_eager,
        }
    )


def cell_of(record: RunRecord, catalog: Catalog, host: str = "", n_draws: int = N_DRAWS) -> Cell:
    """Return what replays a record. Raises BadData when its model, GPU or load cannot be understood.

    What a random load really sent is the client's draw, not the engine's answer: the very requests are replayed where
    the record keeps them, else their number and mean lengths are taken from it.
    """
    where = f"record of {printable(record.run_id)}"
    gpu = catalog.gpu(record.gpu)
    limit = record.power_limit_w_per_gpu
    if limit and limit > gpu.idle_power_w:
        gpu = gpu.model_copy(update={"board_power_w": limit})
    if record.interconnect == "pcie" and gpu.link != "pcie":
        gpu = gpu.model_copy(update={"link": "pcie", "link_bytes_per_s": gpu.host_link_bytes_per_s})
    model = parse_config(record.hf_config, name=record.model, where=where).model
    facts = EngineFacts.from_table(catalog.engine("vllm"), record.engine_version)
    try:
        deployment = deployment_of(record, gpu, facts)
        load = _LOAD.validate_python(record.load)
        lengths = _LENGTHS.validate_python(record.lengths)
    except ValidationError as error:
        raise BadData(where, first_error(error)) from None
    extra = record.model_extra or {}
    said = extra.get("cell")
    cell = said if isinstance(said, dict) else {}
    shared = int(cell.get("shared_prefix_tokens") or 0)
    prefix = PrefixSharing(shared_prefix_tokens=shared, is_warm=bool(shared and cell.get("prefix_warm")))
    n = record.measured.n_requests
    if isinstance(load, PoissonLoad) and load.n_requests is None and n:
        load = load.model_copy(update={"n_requests": n})
    workload = Workload(lengths=lengths, load=load, prefix=prefix)
    drawn = partial(draw, prefix_caching=deployment.prefix_caching, block_tokens=deployment.kv_block_tokens)
    if record.sent is not None:
        try:
            sent = record.sent.within(workload)
        except DomainError as error:
            raise BadData(where, str(error)) from None
        return Cell(record, model, gpu, deployment, workload, (drawn(sent, 0),), host)
    if isinstance(load, ClosedLoad) and isinstance(lengths, FixedLengths):
        by_chance = 2 <= load.concurrency <= MOST_BY_CHANCE and not is_http(record)
        draws = [drawn(workload, 0)] * (len(FIRST_WAKES) if by_chance else 1)
    else:
        draws = [drawn(workload, seed) for seed in range(n_draws)]
    return Cell(record, model, gpu, deployment, workload, tuple(_as_drawn(t, record) for t in draws), host)


def _as_drawn(traffic: Traffic, record: RunRecord) -> Traffic:
    """Scale drawn lengths to the means that the record's client drew."""
    measured = record.measured
    if record.lengths is None or record.lengths.get("kind") == "fixed" or not measured.requests_per_s:
        return traffic
    prompt, output = traffic.prompt_tokens, traffic.output_tokens
    if measured.input_tokens_per_s:
        share = measured.input_tokens_per_s / measured.requests_per_s / float(prompt.mean())
        prompt = (prompt * share).round().astype(prompt.dtype).clip(1)
    if measured.output_tokens_per_s:
        share = measured.output_tokens_per_s / measured.requests_per_s / float(output.mean())
        output = (output * share).round().astype(output.dtype).clip(1)
    return replace(traffic, prompt_tokens=prompt, output_tokens=output)


def cells_of(records: Sequence[RunRecord], catalog: Catalog, host: str = "", n_draws: int = N_DRAWS) -> list[Cell]:
    """Return the replayable cells of some records; DeepSpeed and micro records are left to their own fits."""
    most: dict[str, int] = {}
    warm: set[str] = set()
    cells = []
    for record in filter(is_serving, records):
        cell = cell_of(record, catalog, host, n_draws)
        before = most.get(record.run_id, 0)
        if is_from_start(record):
            if not warm_up(record):
                cell = replace(cell, cold_heads=heads_beyond(before))
            # fp8 and 4-bit kernels are vLLM's own, loaded as a whole
            rows = largest_graph(cell.deployment, shapes_of(cell.model)) + 1
            if record.run_id not in warm and cell.deployment.weight_dtype == "bf16":
                cell = replace(cell, cold_rows=rows)
            if loads_rows(cell, rows):
                warm.add(record.run_id)
        cells.append(cell)
        most[record.run_id] = max(before, most_running(cell))
    return cells


def is_http(record: RunRecord) -> bool:
    """Return whether a record was measured through an HTTP server; the others were by a client in its process."""
    return str((record.model_extra or {}).get("client", "")).startswith("http")


def is_from_start(record: RunRecord) -> bool:
    """Return whether a record, and those before it of its run, are all that its engine did since it started, but for
    a warm-up of single tokens (`warm_up`)."""
    return record.startup is not None and record.startup.startup_s is not None


def warm_up(record: RunRecord) -> str:
    """Return what the engine did before its first cell, empty for nothing: requests of few tokens in all batch sizes
    load the kernels of the LM head."""
    return str((record.model_extra or {}).get("warm_up") or "")


def most_running(cell: Cell) -> int:
    """Return how many sequences a cell has run at once: its clients, or by Little's law with a half for the crowds."""
    load, found = cell.workload.load, cell.record.measured
    if isinstance(load, ClosedLoad):
        return min(load.concurrency, load.n_requests or load.concurrency)
    e2e_s = found.e2e_s.mean if found.e2e_s is not None else 0.0
    return int(CROWD * e2e_s * (found.requests_per_s or 0.0))


def loads_rows(cell: Cell, cold_rows: int) -> bool:
    """Return whether a cell has steps that need kernels of odd numbers of rows: whatever several clients send adds up
    to such numbers, of a single client's requests each prompt is a step of its own."""
    load = cell.workload.load
    longest = max(int(traffic.prompt_tokens.max()) for traffic in cell.traffics)
    if isinstance(load, ClosedLoad) and load.concurrency == 1:
        return has_new_rows(longest, cold_rows)
    return longest * max(2, most_running(cell)) >= cold_rows


CROWD = 1.5
"""How many times the mean number of running requests a random load reaches."""
