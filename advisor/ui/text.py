"""Words of the pages: labels, tooltips, numbers with their units, and text made safe for Markdown."""

from __future__ import annotations

import html
import re

from advisor.schema import Interval
from advisor.units import (
    format_bytes,
    format_count,
    format_frac,
    format_j,
    format_rate,
    format_s,
    format_usd,
    format_w,
)

HELP = {
    "ttft": "Time to first token: from sending the request to its first token, queueing included.",
    "tpot": "Time per output token: (end to end - time to first token) / (output tokens - 1), of one request.",
    "itl": "Inter-token latency: the gap between two tokens as the client sees them; its tail shows stalls.",
    "e2e": "End to end: from sending the request to its last token.",
    "p99": "99 of 100 requests are at least this fast.",
    "slo": "Service-level objective: a bound on a latency that a plan must keep. Off = best effort.",
    "interval": "The range in brackets covers the measured value in 9 of 10 cases (90 % interval).",
    "throughput": "Output tokens of all requests together, per second, for the whole plan.",
    "cost": "Rent of the GPUs divided by the output tokens that they produce at this load.",
    "usd_per_h": "Rent of all GPUs of the plan for one hour, at the price shown under the inputs.",
    "step": "Time of one optimizer step.",
    "training": "Tokens of all GPUs together, a second.",
    "allocated": "What the tensors and the CUDA context take at the peak of a step; it must fit the card.",
    "memory": "What nvidia-smi shows for one GPU at the peak: with what the allocator or the engine keeps for later.",
    "duration": "Time of the whole training run on the tokens asked for.",
    "power": "Power at the boards of all GPUs of the plan, averaged over the run.",
    "energy": "Energy at the boards for one output token.",
    "saturation": "The largest request rate that the plan completes; above it the queue grows without end.",
    "goodput": "Requests per second that meet every latency target.",
    "attainment": "Share of requests that meet every latency target.",
    "kv": "KV cache: keys and values that attention keeps for each token of each running request.",
    "tp": "Tensor parallel: GPUs that share every layer.",
    "pp": "Pipeline parallel: stages of layers, one after the other.",
    "dp": "Data parallel: independent copies of the model, each with its own queue.",
    "mfu": "Model FLOP/s utilisation: useful operations over the dense peak of the GPUs.",
    "mbu": "Memory-bandwidth utilisation: bytes read over the peak bandwidth.",
    "pareto": "On the Pareto front no other plan is both cheaper and faster.",
    "zero": "ZeRO shards optimizer states (stage 1), gradients too (2), and parameters too (3) over the GPUs.",
    "zero_inference": "DeepSpeed ZeRO-Inference leaves the weights in host memory or on drives and moves each layer to"
    " the GPU when it works: large models on few GPUs, but a token takes seconds.",
    "int4": "4-bit weights: a quarter of the bytes of bf16 to keep and to move; answers can get worse. int4 is"
    " DeepSpeed's weight_quantization, for ZeRO-Inference alone; vLLM reads AWQ and GPTQ checkpoints instead.",
    "kv_offload": "KV cache in host memory: the GPU holds that of the layers at work, so that larger batches fit, and"
    " every step moves the cache over the host's bus.",
    "way": "A way of doing offline work: an engine with its own plan on a group of GPUs. In each hour a job runs in"
    " those that do the most until its deadline, starts counted.",
    "bubble": "Pipeline bubble: time in which a stage waits for another one.",
    "checkpointing": "Activation checkpointing: keep one tensor a layer, compute the rest again in the backward pass.",
    "gpus": "COUNTxGPU or NODESxCOUNTxGPU, such as 8xA100, 4xL40S or 2x8xH100; commas compare several pools.",
    "model": "A catalogue name, a hub id or a short name such as 70b, 8b, qwen3-32b, mixtral. You may type your own.",
    "preset": "Typical lengths and arrivals: chat and code follow public traces; the note under the answer says which.",
    "pue": "Power usage effectiveness: power of the whole site over power of the machines.",
    "lengths": "A token is about three quarters of an English word.",
    "price_kind": "Spot is cheap and can be taken away at any time; own: give your price below.",
    "grid": "Mean emissions of a country's electricity, life cycle, 2025; a contract or an hour can differ a lot.",
    "roofline": "No GPU computes faster than its peak, nor faster than its memory feeds it; the roof is both limits.",
    "intensity": "Operations that a step does for each byte that it moves to or from the GPU's memory.",
    "prefill": "Computing a prompt: many tokens at once, so arithmetic is the limit.",
    "decode": "Computing a token of each running request: few tokens for all the weights read, so memory is the limit.",
    "power_limit": "A board can be told to draw less (nvidia-smi -pl): its clock falls, and work that waits for memory"
    " slows little.",
    "objective": "What the best plan minimises among those that keep the latency targets.",
    "method": "Simulation: the engine's scheduler was replayed request by request. Closed form: formulas only, for"
    " plans that were not among the best; they miss bursts.",
    "targets": "Kept or missed; overload = more arrives than the plan can serve, so waiting grows without end.",
    "weights": "Number format of the model's weights.",
    "linear": "Matrix products of the layers: their time goes into reading weights (decode) or arithmetic (prefill).",
    "lm_head": "The last matrix product, from the model's width to its vocabulary.",
    "elementwise": "Norms, activations, rotations and copies between the matrix products.",
    "all_reduce": "GPUs that share a layer add up their parts over NVLink or PCIe.",
    "overhead": "Time of the host and of launches during which the GPU has nothing to do.",
    "prompts_of_others": "Decoding requests wait while the same step computes prompts of newly arrived ones.",
    "gaps": "Relative error: (predicted - measured) / measured, without sign where it says median or P90.",
}

TERMS = {k: k.upper() for k in ("ttft", "tpot", "e2e", "slo", "tp", "pp", "dp", "mfu", "mbu", "pue")}
TERMS |= {"zero_inference": "ZeRO-Inference", "int4": "int4", "kv_offload": "KV cache in host memory", "way": "Way"}
TERMS |= {"zero": "ZeRO", "kv": "KV cache", "pareto": "Pareto front", "interval": "90 % interval"}
TERMS |= {"method": "Simulation, closed form", "linear": "Linear", "lm_head": "LM head", "all_reduce": "All-reduce"}
TERMS |= {"elementwise": "Elementwise", "overhead": "Overhead", "prompts_of_others": "Prompts of others"}
TERMS |= {"power_limit": "Power limit", "intensity": "Operational intensity", "price_kind": "Price"}
"""How the terms of HELP are written."""

LABELS = {
    "requests_per_s": "Requests completed",
    "offered_requests_per_s": "Requests that arrive",
    "output_tokens_per_s": "Output tokens",
    "total_tokens_per_s": "Prompt and output tokens",
    "goodput_requests_per_s": "Goodput",
    "saturation_requests_per_s": "Saturation",
    "slo_attainment_frac": "Requests within all targets",
    "memory_bytes_per_gpu": "Memory per GPU",
    "kv_cache_tokens": "KV cache",
    "kv_occupancy_frac": "KV cache in use",
    "board_power_w": "Board power, all GPUs",
    "energy_j_per_output_token": "Energy per output token",
    "energy_j_per_request": "Energy per request",
    "usd_per_h": "Rent",
    "usd_per_million_output_tokens": "Cost of 1M output tokens",
    "usd_per_million_tokens": "Cost of 1M tokens",
    "mfu_frac": "MFU",
    "mbu_frac": "MBU",
    "step_s": "Step time",
    "tokens_per_s": "Training tokens",
    "tokens_per_s_per_gpu": "Training tokens per GPU",
    "flops_per_s_per_gpu": "Useful FLOP/s per GPU",
    "bubble_frac": "Pipeline bubble",
    "allocated_bytes_per_gpu": "Allocated per GPU",
    "host_memory_bytes_per_gpu": "Host memory per GPU",
    "host_bytes_per_node": "Host memory per node",
    "sent_bytes_per_gpu": "Sent per GPU and step",
    "duration_s": "Whole run",
}
BACKENDS = {
    "vllm": "vLLM",
    "deepspeed-zero-inference": "DeepSpeed ZeRO-Inference",
    "deepspeed-autotp": "DeepSpeed AutoTP",
    "deepspeed-kernel-injection": "DeepSpeed kernel injection",
    "deepspeed-fastgen": "DeepSpeed FastGen",
}
_LATENCY = re.compile(r"(ttft|tpot|itl|e2e)_(mean|p50|p90|p95|p99)_s")
PARTS = {
    "kv_cache": "KV cache",
    "context": "CUDA context",
    "lm_head": "LM head",
    "all_reduce": "all-reduce",
    "decode_step_s": "decode step",
    "forward_backward": "forward and backward",
    "live_parameters": "layers at work",
    "kv_copies": "copies of the KV cache",
}
"""Parts of breakdowns whose names do not read well, or that two engines name differently."""
SETTINGS = (
    (r"see --slo, --slo none", "set others in the side bar"),
    (r"see --rate, --concurrency", "set another load in the side bar"),
    (r"--weight-dtype \S+ widens the search", "other weight formats of the side bar widen the search"),
    (r"--weight-dtype (?=\w)", "weight format "),
    (r"--max-model-len\b", "the longest request"),
    (r"--prompt-tokens (\d+) --output-tokens (\d+)", r"a prompt of \1 and an output of \2 tokens"),
    (r"give --price or --capex-per-gpu", "give a price or your own hardware"),
    (r"give --price USD per GPU hour", "give your own price in the side bar"),
    (r"--price USD per GPU hour", "your own price in the side bar"),
    (r"give --electricity-price USD per kWh \(and --pue\)", "give the price of electricity (and the PUE)"),
    (r"--engine-version ", ""),
    (r": --restart says yours", ""),
)
"""Advice in which the command line names its flags, and what the pages say instead."""
_TERM = re.compile(r"\b(ttft|tpot|itl|e2e)_(mean|p50|p90|p95|p99)(?:_s)?\b|\b(tp|pp|dp)(?= \d)")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>#$~|:&])")


def plain(text: object) -> str:
    """Return text that Markdown shows as it stands: no link, image, formula, colour or HTML can come from it."""
    return _MARKDOWN.sub(r"\\\1", "".join(c if c.isprintable() or c == "\n" else "?" for c in str(text)))


def sentence(text: str) -> str:
    """Return text that starts with a capital, unless with a name, and that Markdown shows as it stands."""
    is_word = re.match(r"[a-z]+(?=[ ,:;.]|$)", text)
    return clause(text[:1].upper() + text[1:] if is_word else text)


def clause(text: str) -> str:
    """Return a part of a sentence, in which quantities and settings read as on the pages.

    'ttft_p99' becomes 'TTFT P99', and a flag of the command line what sets the same in the side bar.
    """
    for flag, words in SETTINGS:
        text = re.sub(flag, words, text)
    return plain(_TERM.sub(_spelled, text))


def _spelled(found: re.Match[str]) -> str:
    """Return a quantity or a degree inside a sentence as the pages write it: 'TTFT P99', 'TP 2'."""
    return label(f"{found[1]}_{found[2]}_s") if found[1] else found[3].upper()


def label(name: str) -> str:
    """Return the name of a quantity for people, without its unit."""
    if match := _LATENCY.fullmatch(name):
        return f"{match[1].upper()} {match[2].upper() if match[2] != 'mean' else 'mean'}"
    return LABELS.get(name, name.replace("_", " "))


def tooltip(name: str) -> str:
    """Return the explanation of a quantity, with what its interval means."""
    keys = {
        "output_tokens_per_s": "throughput",
        "usd_per_million_output_tokens": "cost",
        "usd_per_million_tokens": "cost",
        "usd_per_h": "usd_per_h",
        "board_power_w": "power",
        "energy_j_per_output_token": "energy",
        "saturation_requests_per_s": "saturation",
        "goodput_requests_per_s": "goodput",
        "slo_attainment_frac": "attainment",
        "kv_cache_tokens": "kv",
        "kv_occupancy_frac": "kv",
        "bubble_frac": "bubble",
        "mfu_frac": "mfu",
        "mbu_frac": "mbu",
        "step_s": "step",
        "tokens_per_s": "training",
        "allocated_bytes_per_gpu": "allocated",
        "memory_bytes_per_gpu": "memory",
        "duration_s": "duration",
    }
    key = name.split("_", 1)[0] if _LATENCY.fullmatch(name) else keys.get(name, "")
    tail = f" {HELP['p99']}" if "_p99_" in name else ""
    return f"{HELP[key]}{tail} {HELP['interval']}" if key else HELP["interval"]


def show(name: str, value: float) -> str:
    """Return a value as text with its unit, which the last words of the quantity's name tell."""
    if name.startswith("usd") or name.endswith("_usd"):
        per = {"usd_per_h": "/h", "usd_per_gpu_h": "/GPU/h"}.get(name, "")
        return f"{format_usd(value)}{per}"
    if "flops_per_s" in name:
        return f"{format_count(value)} FLOP/s"
    if name.endswith(("_per_s", "_per_s_per_gpu")):
        kind = "tokens" if "tokens" in name else "requests"
        return format_rate(value, kind)
    if "_bytes" in name or name == "bytes":
        return format_bytes(value)
    if name.endswith("_s") or name == "s":
        return format_s(value)
    if name.endswith("_frac"):
        return format_frac(value)
    if name.endswith(("_w", "_w_per_gpu")) or name == "W":
        return format_w(value)
    if "_j" in name or name == "J":
        return format_j(value)
    if name == "requests_in_flight":
        return f"{format_count(value)} requests"
    if "kgco2e" in name:
        return f"{format_count(value)} kg CO2e"
    return f"{format_count(value)} tokens" if name.endswith("_tokens") else format_count(value)


def show_short(name: str, value: float) -> str:
    """Return a value as text without the thing that a rate counts, for places where its label says it."""
    text = show(name, value)
    return text.replace(" tokens/", " /").replace(" requests/", " /")


def show_range(name: str, interval: Interval) -> str:
    """Return the 90 % interval as text, such as '41.0 ms to 48.2 ms'."""
    if interval.low == interval.high:
        return "exact"
    return f"{show(name, interval.low)} to {show(name, interval.high)}"


def part_name(name: str) -> str:
    """Return the name of a breakdown or of one of its parts for people."""
    if name in PARTS:
        return PARTS[name]
    return LABELS[name].lower() if name in LABELS else name.replace("_", " ")


def plain_html(text: object) -> str:
    """Return text for plotly's labels, which know a little HTML: no tag can come from it."""
    return html.escape("".join(c if c.isprintable() else "?" for c in str(text)), quote=False)
