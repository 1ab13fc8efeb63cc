"""Rules that judge published statements: each computes the deciding numbers from a law, or looks up a sourced fact."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from advisor.errors import BadData, DomainError, UnknownName, printable
from advisor.laws.bubble import bubble_frac
from advisor.laws.zero import zero_state
from advisor.predict.batching import serve_static
from advisor.predict.deepspeed_config import SOURCE as CONFIG_SOURCE
from advisor.predict.deepspeed_config import check_ds_config
from advisor.predict.deepspeed_paths import PATHS
from advisor.predict.deepspeed_step import kv_bytes_per_token
from advisor.predict.shapes import BYTES_PER_WEIGHT, shapes_of
from advisor.predict.splitfuse import serve_splitfuse
from advisor.predict.train_memory import phase_peaks, sizes_of
from advisor.schema import CoefficientSet, Gpu, Interval, Model, Note
from advisor.schema.claims import Setup, Verdict
from advisor.schema.training import TrainJob
from advisor.units import format_bytes, format_change, format_count

Subject = Mapping[str, str | int | float | bool]
PASS_S, TOKEN_S = 0.02, 2e-5
"""A 7B model on an A100, rounded from data/golden/deepspeed_public.json; the gain hardly depends on them."""
GAIN_SPREADS = (0.2, 0.4, 0.8)
"""Standard deviations of log output length: narrow, moderate, and about that of chat traces (Azure 2023: 0.7 to 1)."""


class Names(Protocol):
    """What a rule may ask of the catalogue."""

    def model(self, name: str) -> tuple[Model, tuple[Note, ...]]:
        """Return a model by name."""

    def gpu(self, name: str) -> Gpu:
        """Return a GPU by name."""

    def coefficients(self, name: str) -> CoefficientSet:
        """Return a fitted set by name."""

    def engine(self, name: str) -> dict[str, Any]:
        """Return the table of an engine's facts."""


class Ruling(NamedTuple):
    """The verdict of one rule with its deciding numbers."""

    verdict: Verdict
    why: str
    source: str
    ours: Interval | None = None
    quantity: str = ""


FACTS: dict[str, tuple[bool, str, str]] = {
    "vllm.tensor_parallel": (True, "vllm serve --tensor-parallel-size", "vLLM documentation, Parallelism and Scaling"),
    "vllm.pipeline_parallel": (
        True,
        "vllm serve --pipeline-parallel-size",
        "vLLM documentation, Parallelism and Scaling",
    ),
    "vllm.data_parallel": (True, "vllm serve --data-parallel-size", "vLLM documentation, Data Parallel Deployment"),
    "vllm.expert_parallel": (
        True,
        "vllm serve --enable-expert-parallel",
        "vLLM documentation, Expert Parallel Deployment",
    ),
    "vllm.ray_required_across_nodes": (
        False,
        "data parallel ranks start on each node with --headless --data-parallel-address, without Ray; until 2024 every"
        " multi-node plan needed it",
        "vLLM documentation, Data Parallel Deployment; v0.5.1, Distributed Inference and Serving",
    ),
    "vllm.awq": (True, "AWQ and GPTQ int4 checkpoints load directly", "vLLM documentation, Quantization"),
    "deepspeed.inference_pipeline": (
        False,
        "no DeepSpeed inference path (ZeRO-Inference, AutoTP, kernel injection, FastGen) has pipeline stages",
        "DeepSpeed 0.19.8, inference/config.py and inference/v2",
    ),
    "deepspeed.inference_gradient_accumulation": (
        False,
        "init_inference raises a ValidationError on gradient_accumulation_steps",
        "DeepSpeed 0.19.8, inference/config.py (run)",
    ),
}
"""What an engine can do: (whether, how, where it says so). A claim that says otherwise is wrong."""
ONCE_TRUE = frozenset({"vllm.ray_required_across_nodes"})
"""Facts that older releases had the other way round: such a claim is stale rather than wrong."""


def _text(subject: Subject, key: str) -> str:
    if key not in subject:
        raise BadData("claims file", f"the rule needs subject.{key}")
    return str(subject[key])


def _number(subject: Subject, key: str, default: float | None = None, *, low: float = 0, high: float = 1e15) -> float:
    value = subject.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadData(
            "claims file", f"subject.{key} must be a number from {low:g} to {high:g}, got '{printable(value)}'"
        )
    return float(value)


def _model(setup: Setup, names: Names, fallback: str = "llama-2-70b") -> Model:
    return names.model(setup.model or fallback)[0]


def supports(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'engine E has (or lacks) feature F' by the table of facts."""
    key = f"{_text(subject, 'engine')}.{_text(subject, 'feature')}"
    if key not in FACTS:
        raise UnknownName("fact", key, FACTS)
    truth, how, source = FACTS[key]
    claimed = bool(subject.get("claimed", True))
    if claimed == truth:
        return Ruling("consistent", how, source)
    return Ruling("stale" if key in ONCE_TRUE else "wrong", how, source)


def only_parallelism(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'engine E supports only this kind of parallelism': wrong as soon as another kind exists."""
    engine, only = _text(subject, "engine"), _text(subject, "feature")
    others = [
        k for k, (truth, _, _) in FACTS.items() if truth and k.startswith(f"{engine}.") and k.endswith("_parallel")
    ]
    others = [k for k in others if k != f"{engine}.{only}"]
    if not others:
        return Ruling("consistent", f"no other parallelism of {engine} is known", "table of facts")
    how = ", ".join(FACTS[k][1].removeprefix("vllm serve ") for k in others)
    return Ruling("wrong", f"{engine} also has {len(others)} other kinds: {how}", FACTS[others[0]][2])


def kv_growth(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'cache memory grows linearly / quadratically / exponentially with length' by the cache law."""
    model = _model(setup, names)
    token = kv_bytes_per_token(shapes_of(model), 1)
    start = _number(subject, "from_tokens", 4096, low=1)
    sizes = [token * start * k for k in (1, 2, 4)]
    claimed = _text(subject, "growth")
    growth = {"linear": 4.0, "quadratic": 16.0, "exponential": 2.0 ** min(3 * start / 1024, 1000)}
    if claimed not in growth:
        raise UnknownName("growth", claimed, growth)
    found = sizes[2] / sizes[0]
    is_same = abs(found / growth[claimed] - 1) < 0.05
    why = (
        f"{model.name} keeps {format_bytes(token)} a token: {', '.join(format_bytes(s) for s in sizes)} at"
        f" {start:.0f}, {2 * start:.0f} and {4 * start:.0f} tokens, so four times the length takes {found:.1f} times"
        " the memory: linear"
    )
    return Ruling(
        "consistent" if is_same else "wrong",
        why,
        "cache law: 2 x layers x KV heads x head size x bytes a token (arXiv:2309.06180, section 3)",
    )


def zero_shards(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'ZeRO stage S shards W first' by what shrinks when ranks are added."""
    stage, what = int(_number(subject, "stage")), _text(subject, "what")
    one, eight = zero_state(7e9, 1, stage), zero_state(7e9, 8, stage)
    before = zero_state(7e9, 8, stage - 1) if stage > 0 else one

    def gradients(state: object) -> float:
        return float(state.gradient_bytes + max(0.0, state.kept_bucket_bytes - 1e9))  # type: ignore[attr-defined]

    shrinks = {
        "parameters": eight.weights_bytes < 0.5 * one.weights_bytes,
        "gradients": gradients(eight) < 0.5 * gradients(one),
        "optimizer states": eight.optimizer_bytes < 0.5 * one.optimizer_bytes,
    }
    new = {
        "parameters": eight.weights_bytes < 0.5 * before.weights_bytes,
        "gradients": gradients(eight) < 0.5 * gradients(before),
        "optimizer states": eight.optimizer_bytes < 0.5 * before.optimizer_bytes,
    }
    if what not in shrinks:
        raise UnknownName("sharded thing", what, shrinks)
    sharded = [k for k, yes in shrinks.items() if yes] or ["nothing"]
    added = [k for k, yes in new.items() if yes] or ["nothing"]
    is_right = new[what]
    why = f"stage {stage} shards {' and '.join(sharded)}; what it adds to stage {stage - 1} is {' and '.join(added)}"
    return Ruling("consistent" if is_right else "wrong", why, "arXiv:1910.02054, section 5; DeepSpeed zero/config.py")


def one_over_n(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'memory per GPU falls to 1/N' for a ZeRO stage: model states and a training step's peak."""
    n = int(_number(subject, "n_gpus", 8, low=1, high=1e6))
    model = _model(setup, names)
    length = int(_number(subject, "sequence_length", 2048, low=1, high=1e8))
    parts, worst = [], 0.0
    stages = [int(_number(subject, "stage"))] if "stage" in subject else [1, 2, 3]
    for stage in stages:
        peaks = []
        for ranks in (1, n):
            job = TrainJob(model=model.name, zero_stage=stage, dp=ranks, sequence_length=length, is_checkpointed=True)
            peaks.append(max(phase_peaks(job, sizes_of(model, job)).values()))
        ratio = peaks[1] / peaks[0]
        worst = max(worst, ratio)
        parts.append(f"stage {stage}: {format_bytes(peaks[0])} to {format_bytes(peaks[1])} = 1/{1 / ratio:.1f}")
    verdict: Verdict = "consistent" if worst < 1.1 / n else "wrong"
    why = f"{model.name} training on {n} GPUs, peak a GPU: {'; '.join(parts)}; activations and buffers are not sharded"
    return Ruling(verdict, why, "law of ZeRO memory (laws/zero.py), checked on our records within 1 %")


def ds_config(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'this ds_config does what it says' by DeepSpeed's own rules."""
    text = _text(subject, "config")
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadData("claims file", f"subject.config is not JSON: {error.msg} at line {error.lineno}") from None
    except RecursionError:
        raise BadData("claims file", "subject.config is nested too deeply") from None
    if not isinstance(config, dict):
        raise BadData("claims file", "subject.config must be a JSON object")
    faults = check_ds_config(config)
    if not faults:
        return Ruling("consistent", "every key is known and takes effect", CONFIG_SOURCE)
    return Ruling("wrong", ". ".join(str(f) for f in faults), CONFIG_SOURCE)


def pipeline_latency(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'pipeline bubbles decide DeepSpeed's latency': does any inference path have a pipeline, how large is it?"""
    stages = int(_number(subject, "stages", 4, low=1))
    shares = [float(bubble_frac(stages, m)) for m in (1, 4, 16)]
    truth, how, source = FACTS["deepspeed.inference_pipeline"]
    launch = names.coefficients("deepspeed").coefficients["eager_decode_launch_s_per_layer"]
    model = _model(setup, names)
    slow = launch.value * model.n_layers
    why = (
        f"{how}, so there is no bubble; in training {stages} stages idle {shares[0]:.0%}, {shares[1]:.0%} and"
        f" {shares[2]:.0%} at 1, 4 and 16 microbatches. Its decode is slow because the host launches every layer:"
        f" about {slow * 1e3:.0f} ms a token for {model.name}"
    )
    interval = Interval(value=slow, low=launch.low * model.n_layers, high=launch.high * model.n_layers)
    return Ruling(
        "consistent" if truth else "wrong", why, f"{source}; {launch.source.split(';')[0]}", interval, "tpot_p50_s"
    )


def fits_one_node(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'engine E serves up to (or from) S parameters in one node' by weight bytes against the node's memory."""
    claimed = _number(subject, "n_params", low=1)
    direction = _text(subject, "direction")
    gpu = names.gpu(setup.gpu or "a100-sxm-80gb")
    room = 0.9 * gpu.device_memory_bytes * max(setup.n_gpus, 1)
    largest = {d: 0.95 * room / BYTES_PER_WEIGHT[d] for d in ("bf16", "fp8", "awq-int4")}
    sizes = ", ".join(f"{format_count(n)} in {d}" for d, n in largest.items())
    memory = f"{setup.n_gpus} x {gpu.label} hold {format_bytes(room)} of weights and cache"
    if direction == "up_to":
        holds = claimed <= largest["bf16"]
        tight = claimed > 0.8 * largest["bf16"]
        verdict: Verdict = "consistent" if holds and tight else "stale" if holds else "impossible"
        return Ruling(
            verdict, f"{memory}: about {sizes}; {format_count(claimed)} is no limit", "weight bytes, 5 % for cache"
        )
    if direction == "from":
        why = f"{memory}: about {sizes}; no engine has a smallest size, what does not fit is split or offloaded"
        return Ruling("wrong", why, "weight bytes, 5 % for cache")
    raise UnknownName("direction", direction, ("up_to", "from"))


def quantized_memory(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'format F lowers memory' by bytes of weights."""
    model = _model(setup, names)
    dtype = _text(subject, "weight_dtype")
    if dtype not in BYTES_PER_WEIGHT:
        raise UnknownName("weight format", dtype, BYTES_PER_WEIGHT)
    s = shapes_of(model)
    kept = 2.0 * (s.embedding_params + s.head_params)
    small = (s.n_params - s.embedding_params - s.head_params) * BYTES_PER_WEIGHT[dtype] + kept
    whole = s.n_params * 2.0
    why = f"{model.name}: {format_bytes(whole)} in 16 bits, {format_bytes(small)} in {dtype}; the cache stays as it is"
    return Ruling("consistent" if small < whole else "wrong", why, "parameter count x bytes of the format")


def gradient_accumulation(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'gradient_accumulation_steps trades memory for time' in training, or in inference where it does nothing."""
    context = _text(subject, "context")
    if context == "inference":
        truth, how, source = FACTS["deepspeed.inference_gradient_accumulation"]
        return Ruling("consistent" if truth else "wrong", f"{how}: it only divides a training batch", source)
    if context != "training":
        raise UnknownName("context", context, ("inference", "training"))
    model = _model(setup, names)
    peaks = []
    for micro, steps in ((8, 1), (1, 8)):
        job = TrainJob(model=model.name, zero_stage=3, dp=8, micro_batch_size=micro, gradient_accumulation_steps=steps)
        peaks.append(max(phase_peaks(job, sizes_of(model, job)).values()))
    one, eight = (format_bytes(p) for p in peaks)
    why = f"{model.name}, the same batch: {one} a GPU in one micro-step, {eight} in eight"
    return Ruling("consistent" if peaks[1] < peaks[0] else "wrong", why, "laws/zero.py and laws/training.py")


def batching_gain(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'dynamic batching raises throughput by A to B' by replaying both schedulers on the same kernels.

    The gain is what a static batch loses by waiting for its longest answer: it depends on the spread of lengths.
    """
    low, high = _number(subject, "low_frac"), _number(subject, "high_frac")
    batch = int(_number(subject, "batch", 32, low=1, high=1024))
    gains = []
    for spread in GAIN_SPREADS:
        rng = np.random.default_rng(0)
        outputs = np.maximum(rng.lognormal(np.log(128) - spread**2 / 2, spread, 20 * batch), 1).astype(np.int64)
        prompts = np.full(len(outputs), 128)

        def step(prefill: float, decodes: float, context: float) -> float:
            return PASS_S + TOKEN_S * (prefill + decodes)

        rolling = serve_splitfuse(
            prompts,
            outputs,
            arrivals=None,
            clients=batch,
            budget_tokens=2048,
            max_seqs=batch,
            kv_tokens=1e9,
            step_s=step,
        )
        fixed = serve_static(
            prompts,
            outputs,
            arrivals=None,
            clients=batch,
            batch=batch,
            prefill_s=lambda n, p: step(n * p, 0, 0),
            decode_s=lambda n, c: step(0, n, c),
        )
        gains.append(fixed.duration_s / rolling.duration_s - 1)
    ours = Interval(value=gains[1], low=gains[0], high=gains[-1])
    verdict: Verdict = "consistent" if any(low <= g <= high for g in gains[1:]) else "implausible"
    spreads = ", ".join(f"{format_change(g)} at spread {s}" for g, s in zip(gains, GAIN_SPREADS, strict=True))
    why = f"both schedulers replayed at batch {batch}: {spreads} (standard deviation of log output length)"
    if verdict == "implausible" and high < gains[1]:
        why += "; the claim is too low for ordinary lengths, it holds where all answers are about equally long"
    source = "replay of static and continuous batching (predict/batching.py)"
    return Ruling(verdict, why, source, ours, "throughput_gain_frac")


def maintained(subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Judge 'this DeepSpeed path is a current product' by the table of paths."""
    backend = _text(subject, "backend")
    found = [path for name, path in PATHS.items() if name == backend]
    if not found:
        raise UnknownName("DeepSpeed backend", backend, PATHS)
    why = found[0].notes[0].text
    return Ruling("consistent" if found[0].is_maintained else "stale", why, "DeepSpeed 0.19.8, DeepSpeed-MII 0.3.3")


RULES: dict[str, Callable[[Subject, Setup, Names], Ruling]] = {
    "supports": supports,
    "only_parallelism": only_parallelism,
    "kv_growth": kv_growth,
    "zero_shards": zero_shards,
    "one_over_n": one_over_n,
    "ds_config": ds_config,
    "pipeline_latency": pipeline_latency,
    "fits_one_node": fits_one_node,
    "quantized_memory": quantized_memory,
    "gradient_accumulation": gradient_accumulation,
    "batching_gain": batching_gain,
    "maintained": maintained,
}


def judge_statement(rule: str, subject: Subject, setup: Setup, names: Names) -> Ruling:
    """Return the ruling of a named rule; raises UnknownName for a rule that does not exist."""
    if rule not in RULES:
        raise UnknownName("rule", rule, RULES, f"Known: {', '.join(RULES)}")
    try:
        return RULES[rule](subject, setup, names)
    except DomainError as error:
        return Ruling("impossible", str(error), "the law's own domain")
