"""The exact `vllm serve` line of a deployment, for one release of vLLM, and why each option is there.

An option appears only when it differs from that release's own default for that card, or when the plan's numbers rest on
it. Sources of the defaults: EngineFacts.cite (data/engines/vllm.toml).
"""

from __future__ import annotations

import shlex
from typing import NamedTuple

from advisor.emit.names import model_argument
from advisor.errors import DomainError
from advisor.schema import Deployment, EngineFacts, Gpu, Model, Note
from advisor.schema.engine import version_key

# check_if_supports_dtype in vllm/platforms/cuda.py: bfloat16 needs compute capability 8.0.
BF16_MIN_CAPABILITY = "8.0"
_CHECKPOINT_METHODS = {
    "fp8": ("fp8", "compressed-tensors"),
    "awq-int4": ("awq", "compressed-tensors"),
    "gptq-int4": ("gptq", "compressed-tensors"),
    "mxfp4": ("mxfp4",),
    "int8": ("compressed-tensors", "bitsandbytes"),
}
_CHECKPOINT_BITS = {"fp8": 8, "awq-int4": 4, "gptq-int4": 4, "mxfp4": 4, "int8": 8}
_ON_LOAD = {"fp8": "fp8", "int8": "int8_per_channel_weight_only"}
_REQUIRED = {"fp8": "fp8", "awq-int4": "awq", "gptq-int4": "gptq", "mxfp4": "mxfp4", "int8": "compressed-tensors"}
_FORMAT_NAME = {"fp8": "FP8", "awq-int4": "AWQ", "gptq-int4": "GPTQ", "mxfp4": "MXFP4", "int8": "INT8"}


class Flag(NamedTuple):
    """One option, its value (empty for a switch) and the reason for it."""

    name: str
    value: str
    why: str


def is_stored_as(model: Model, weight_dtype: str) -> bool:
    """Return whether the checkpoint itself already holds its weights in this format."""
    if weight_dtype in ("bf16", "fp16"):
        return model.quantization is None
    stored = model.quantization
    if stored is None:
        return False
    bits = _CHECKPOINT_BITS[weight_dtype]
    return stored.method in _CHECKPOINT_METHODS[weight_dtype] and bits <= stored.weight_bits < bits + 1


def _compute_dtype(deployment: Deployment, model: Model, gpu: Gpu) -> Flag | None:
    below = (
        gpu.vendor == "nvidia"
        and gpu.compute_capability
        and version_key(gpu.compute_capability) < version_key(BF16_MIN_CAPABILITY)
    )
    if below and model.native_dtype != "fp16":
        return Flag("--dtype", "half", f"{gpu.label} has no bfloat16 (compute capability {gpu.compute_capability})")
    if deployment.weight_dtype == "fp16" and model.native_dtype != "fp16":
        return Flag("--dtype", "float16", f"the plan computes in fp16, the checkpoint is {model.native_dtype}")
    if deployment.weight_dtype == "bf16" and model.native_dtype != "bf16" and not below:
        return Flag("--dtype", "bfloat16", f"the plan computes in bf16, the checkpoint is {model.native_dtype}")
    return None


def _quantization(deployment: Deployment, model: Model, facts: EngineFacts) -> Flag | None:
    wanted = deployment.weight_dtype
    if wanted in ("bf16", "fp16") or is_stored_as(model, wanted):
        return None
    on_load = _ON_LOAD.get(wanted, "")
    if on_load in facts.quantizes_on_load and model.quantization is None:
        return Flag("--quantization", on_load, f"quantises the {model.native_dtype} checkpoint to {wanted} on load")
    # Naming the method makes an unquantised checkpoint fail at start instead of running in another precision.
    why = f"the plan needs {_FORMAT_NAME[wanted]} weights; vLLM refuses a checkpoint that has none"
    return Flag("--quantization", _REQUIRED[wanted], why)


def _batch_limits(deployment: Deployment, gpu: Gpu, facts: EngineFacts) -> list[Flag]:
    if deployment.max_num_seqs > deployment.max_num_batched_tokens:
        raise DomainError(
            f"max_num_seqs {deployment.max_num_seqs} exceeds max_num_batched_tokens "
            f"{deployment.max_num_batched_tokens}; vLLM needs one token of budget for each sequence"
        )
    card = (gpu.device_memory_bytes, f"{gpu.label} {gpu.name}")
    tokens = facts.max_num_batched_tokens_default(
        *card,
        compute_capability=gpu.compute_capability,
        max_num_seqs=deployment.max_num_seqs,
        max_model_len=deployment.max_model_len,
    )
    seqs = facts.max_num_seqs_default(
        *card,
        compute_capability=gpu.compute_capability,
        max_num_batched_tokens=deployment.max_num_batched_tokens,
    )
    flags = []
    if deployment.max_num_seqs != seqs:
        why = f"sequences that run together in the plan (default here {seqs})"
        flags.append(Flag("--max-num-seqs", str(deployment.max_num_seqs), why))
    if deployment.max_num_batched_tokens != tokens:
        why = f"token budget of one step in the plan (default here {tokens}); it sets how long a prefill delays decodes"
        flags.append(Flag("--max-num-batched-tokens", str(deployment.max_num_batched_tokens), why))
    return flags


def _parallel(deployment: Deployment, model: Model) -> list[Flag]:
    flags = []
    if deployment.tp > 1:
        flags.append(
            Flag("--tensor-parallel-size", str(deployment.tp), f"each layer is split over {deployment.tp} GPUs")
        )
    if deployment.pp > 1:
        why = f"the layers are split into {deployment.pp} pipeline stages"
        flags.append(Flag("--pipeline-parallel-size", str(deployment.pp), why))
    if deployment.dp > 1:
        flags.append(Flag("--data-parallel-size", str(deployment.dp), f"{deployment.dp} replicas behind one address"))
    if deployment.ep > 1:
        if model.moe is None:
            raise DomainError(f"ep {deployment.ep} needs a mixture-of-experts model; {model.name} is dense, so ep is 1")
        why = f"whole experts are spread over {deployment.ep} GPUs instead of slices of each"
        flags.append(Flag("--enable-expert-parallel", "", why))
    if deployment.n_nodes > 1:
        why = f"one replica spans {deployment.n_nodes} nodes, which Ray connects"
        flags.append(Flag("--distributed-executor-backend", "ray", why))
    return flags


def serve_flags(deployment: Deployment, model: Model, gpu: Gpu, facts: EngineFacts) -> list[Flag]:
    """Return every option of the launch line with its reason.

    Raises:
        DomainError: the deployment is not one that vLLM runs (another backend, ep on a dense model, impossible limits).
    """
    if deployment.backend != "vllm":
        raise DomainError(f"backend '{deployment.backend}' has no vllm serve line; only backend 'vllm' has one")
    flags = _parallel(deployment, model)
    chosen = [_quantization(deployment, model, facts), _compute_dtype(deployment, model, gpu)]
    flags += [flag for flag in chosen if flag is not None]
    if deployment.kv_dtype == "fp8":
        flags.append(Flag("--kv-cache-dtype", "fp8", "halves the bytes of each cached token"))
    why = f"longest prompt plus output of the plan (the model could take {model.max_context_tokens})"
    flags.append(Flag("--max-model-len", str(deployment.max_model_len), why))
    flags += _batch_limits(deployment, gpu, facts)
    if abs(deployment.gpu_memory_utilization - facts.gpu_memory_utilization) > 1e-9:
        why = f"share of the card's memory that vLLM may fill (default {facts.gpu_memory_utilization:g})"
        flags.append(Flag("--gpu-memory-utilization", f"{deployment.gpu_memory_utilization:g}", why))
    if deployment.prefix_caching != facts.prefix_caching:
        name = "--enable-prefix-caching" if deployment.prefix_caching else "--no-enable-prefix-caching"
        why = (
            "shared prompt prefixes are reused"
            if deployment.prefix_caching
            else "the plan assumes no reuse of prefixes"
        )
        flags.append(Flag(name, "", why))
    if deployment.kv_block_tokens != facts.kv_block_tokens:
        why = f"tokens of one KV block (default {facts.kv_block_tokens})"
        flags.append(Flag("--block-size", str(deployment.kv_block_tokens), why))
    if deployment.enforce_eager:
        flags.append(Flag("--enforce-eager", "", "no CUDA graphs: less memory, slower decodes"))
    return flags


def vllm_serve_args(deployment: Deployment, model: Model, gpu: Gpu, facts: EngineFacts) -> list[str]:
    """Return the launch line as an argument list: ['vllm', 'serve', model, option, value, ...]."""
    args = ["vllm", "serve", model_argument(model)]
    for flag in serve_flags(deployment, model, gpu, facts):
        args += [flag.name, flag.value] if flag.value else [flag.name]
    return args


def vllm_command(deployment: Deployment, model: Model, gpu: Gpu, facts: EngineFacts) -> str:
    """Return the launch line as one line that a POSIX shell runs as it is."""
    return shlex.join(vllm_serve_args(deployment, model, gpu, facts))


def explain_flags(deployment: Deployment, model: Model, gpu: Gpu, facts: EngineFacts) -> list[tuple[str, str]]:
    """Return (option as written, reason) for each option of the launch line."""
    return [
        (shlex.join([flag.name, flag.value] if flag.value else [flag.name]), flag.why)
        for flag in serve_flags(deployment, model, gpu, facts)
    ]


def launch_notes(deployment: Deployment, model: Model, gpu: Gpu, facts: EngineFacts) -> tuple[Note, ...]:
    """Return what a person must know before running the line: checkpoint, card, release, licence."""
    notes: list[tuple[str, str]] = []
    wanted = deployment.weight_dtype
    flag = _quantization(deployment, model, facts)
    if flag is not None and flag.value not in facts.quantizes_on_load:
        stored = model.quantization.method if model.quantization else model.native_dtype
        text = f"{model.name} is stored as {stored}: put the id of its {_FORMAT_NAME[wanted]} checkpoint in its place."
        notes.append(("warning", text))
    if flag is not None and flag.value not in facts.quantizations:
        notes.append(("error", f"vLLM {facts.version} has no quantisation method '{flag.value}'."))
    if wanted in ("bf16", "fp16") and model.quantization is not None:
        text = f"{model.name} is stored as {model.quantization.method}: for {wanted} give an unquantised checkpoint."
        notes.append(("error", text))
    if gpu.vendor == "nvidia" and gpu.compute_capability:
        capability = version_key(gpu.compute_capability)
        if capability < version_key(facts.min_compute_capability):
            text = (
                f"vLLM {facts.version} is built for CUDA {facts.main_cuda}, which starts at compute capability "
                f"{facts.min_compute_capability}; {gpu.label} has {gpu.compute_capability}: use a release for CUDA 12."
            )
            notes.append(("error", text))
        elif capability < version_key(BF16_MIN_CAPABILITY):
            text = f"{gpu.label} has no FlashAttention in vLLM {facts.version}; it runs slower backends, less tested."
            notes.append(("warning", text))
        least = facts.quantization_min_capability.get(flag.value if flag else "")
        if least and capability < version_key(least):
            text = f"{wanted} weights need compute capability {least}; {gpu.label} has {gpu.compute_capability}."
            notes.append(("error", text))
    elif gpu.vendor != "nvidia":
        notes.append(("warning", f"{gpu.label} needs the build of vLLM for its vendor, not the package index's wheel."))
    if deployment.kv_dtype == "fp8" and "fp8" not in facts.kv_dtypes:
        notes.append(("error", f"vLLM {facts.version} has no fp8 KV cache."))
    if deployment.speculative is not None:
        notes.append(("warning", "The plan assumes a draft model: add --speculative-config with yours."))
    if deployment.n_nodes > 1 and facts.has_async_scheduling and not facts.schedules_async(executor="ray"):
        text = (
            f"With Ray, vLLM {facts.version} schedules each step after the one before; its own launcher overlaps them."
        )
        notes.append(("info", text))
    if model.folder:
        text = f"The line names a folder of this machine, {model.folder}: weights and tokeniser must lie there too."
        notes.append(("info", text))
    elif not model.hf_id:
        notes.append(("warning", f"{model.name} has no hub id: put the path of its checkpoint in its place."))
    if model.is_gated:
        notes.append(("info", f"{model.hf_id or model.name} is gated: accept its licence and set HF_TOKEN."))
    if not facts.is_exact:
        text = f"vLLM {facts.version} was not read; its defaults are taken from {facts.read_version}."
        notes.append(("info", text))
    return tuple(Note.model_validate({"level": level, "text": text}) for level, text in notes)
