"""Rank side of DeepSpeed inference: init_inference and ZeRO-Inference. Run by deepspeed_runner only."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from typing import Any

from calibration import deepspeed_rank as rank
from calibration.deepspeed_rank import Mark, Out
from calibration.deepspeed_work import llama_dims

MODES = ("eager", "autotp", "kernel-injection", "kernel-injection-plain")
MAX_POSITIONS = 8192
TRACE_PASSES = 2
"""Passes before ZeRO-3's trace is complete: one without, one that records (partitioned_param_coordinator.py)."""
Fields = dict[str, Any]


def _dtype(case: Fields) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[case.get("weight_dtype", "bf16")]


def _tidy() -> None:
    import torch

    gc.collect()
    if rank.use_cuda():
        torch.cuda.empty_cache()


def _built(case: Fields, longest: int) -> Any:
    more = {"max_position_embeddings": max(MAX_POSITIONS, longest)}
    fields = {k: v for k, v in case["hf_config"].items() if k not in more}
    return rank.hf_model(fields, _dtype(case), **more).eval()


def _longest(cells: list[Fields]) -> int:
    return max(int(c["prompt_tokens"]) + int(c["output_tokens"]) for c in cells)


def _timed(
    cells: list[Fields], out: Out, vocab: int, point: Callable[..., Fields], made: Fields, world: int = 1
) -> None:
    """Run every (batch, prompt) cell; one that runs out of memory costs only itself when there is one rank."""
    import torch

    for i, cell in enumerate(cells):
        batch, prompt = cell["batch_size"], cell["prompt_tokens"]
        try:
            ids = torch.randint(0, vocab, (batch, prompt), device=rank.device())
            measured = point(ids, cell["output_tokens"], cell.get("n_repeats", 2))
            window = measured.pop("window")
            measured["decode_tokens_per_s"] = batch * world / measured["decode_step_s"]
            measured["prefill_tokens_per_s"] = batch * world * prompt / measured["prefill_s"]
            measured |= rank.peak_fields()
        except Exception as err:
            # ranks that go on without the others would wait in the next collective for ever; and where the first
            # cell fails for another reason than memory, so will the rest
            if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                raise
            if "out of memory" not in str(err).lower() and i == 0:
                raise
            out.failed(cell["index"], err)
            _tidy()
            continue
        lengths = {"kind": "fixed", "prompt_tokens": prompt, "output_tokens": cell["output_tokens"]}
        load = {"kind": "batch", "batch_size": batch}
        out.cell(cell["index"], window, made | {"load": load, "lengths": lengths}, measured)
        _tidy()


def _prefill_then_decode(step: Callable[..., Any], ids: Any, n_output: int, n_repeats: int) -> Fields:
    """Time prefills, then the decode steps that follow the last one; `step(ids, past)` returns logits and cache."""
    import torch

    prefills: list[float] = []
    with torch.inference_mode():
        for repeat in range(n_repeats + 1):  # the first one warms up
            rank.sync()
            a = Mark()
            logits, past = step(ids, None)
            token = logits[:, -1, :].argmax(-1, keepdim=True)
            b = Mark()
            rank.sync()
            if repeat:
                prefills.append(a.seconds_to(b))
            if repeat < n_repeats:
                past = None
        rank.reset_peak()
        begin, marks = time.perf_counter(), [Mark()]
        for _ in range(n_output):
            logits, past = step(token, past)
            token = logits[:, -1, :].argmax(-1, keepdim=True)
            marks.append(Mark())
        rank.sync()
        end = time.perf_counter()
    decodes = [a.seconds_to(b) for a, b in itertools.pairwise(marks)]
    steady = decodes[min(3, n_output - 1) :]
    return {
        "prefill_s": rank.median(prefills),
        "prefill_min_s": min(prefills),
        "decode_step_s": rank.median(steady),
        "decode_p90_s": rank.p90(steady),
        "decode_max_s": max(decodes),
        "decode_wall_s": (end - begin) / n_output,
        "is_finite": bool(torch.isfinite(logits.float()).all()),
        "window": (begin, end),
    }


def inference(case: Fields, cells: list[Fields], out: Out) -> None:
    """Time transformers eager, AutoTP or kernel injection: one engine, many (batch, prompt) cells."""
    import deepspeed
    import torch

    mode, tp = case.get("mode", "autotp"), case.get("tp", 1)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if tp > 1:
        deepspeed.init_distributed(verbose=False)
    began, longest = time.perf_counter(), _longest(cells)
    with torch.device(rank.device()):
        model = _built(case, longest)
    is_injected = mode.startswith("kernel-injection")
    by_hand = mode == "kernel-injection"
    if mode != "eager":
        options: Fields = {
            "dtype": _dtype(case),
            "tensor_parallel": {"tp_size": tp},
            "replace_with_kernel_inject": is_injected,
            "max_out_tokens": longest,
        }
        # transformers 5 takes a layer's return value for the hidden state, the injected layer returns a tuple:
        # without the tuple and without transformers' cache the kernels run on their own workspace
        if by_hand:
            options["return_tuple"] = False
        model = deepspeed.init_inference(model, config=options)
    rank.sync()
    startup_s = time.perf_counter() - began
    _tidy()
    rank.reset_peak()
    weights = rank.memory()

    def step(ids: Any, past: Any) -> tuple[Any, Any]:
        if by_hand:
            return model(input_ids=ids, use_cache=False).logits, None
        found = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return found.logits, found.past_key_values

    made = record_fields(case, mode=mode, tp=tp, startup=startup_fields(weights, startup_s))
    vocab = case["hf_config"]["vocab_size"]

    def point(ids: Any, n_output: int, n_repeats: int) -> Fields:
        if by_hand:
            _release_workspace(model)
        return _prefill_then_decode(step, ids, n_output, n_repeats)

    _timed(cells, out, vocab, point, made)


def record_fields(case: Fields, **more: Any) -> Fields:
    """Return what all records of an inference case share."""
    dtype = case.get("weight_dtype", "bf16")
    n_params = llama_dims(case["hf_config"])["n_params"]
    return {"weight_dtype": dtype, "kv_dtype": dtype, "n_params": n_params, **more, **rank.versions()}


def startup_fields(mem: dict[str, int], startup_s: float) -> Fields:
    """Return the record's `startup`."""
    found: Fields = {"startup_s": startup_s}
    if "allocated_bytes" in mem:
        found |= {"weights_bytes": mem["allocated_bytes"], "device_memory_bytes": mem["device_memory_bytes"]}
    return found


def _release_workspace(engine: Any) -> None:
    """Give back the injected kernels' KV workspace: it is made once, for the first batch's size."""
    for module in engine.module.modules():
        if hasattr(module, "_should_allocate_workspace"):
            module._should_allocate_workspace = True
            module.layer_past = None
    from deepspeed.model_implementations.transformers.ds_transformer import DeepSpeedTransformerInference

    workspace = DeepSpeedTransformerInference.workspace
    if workspace is not None and workspace.is_allocated():
        workspace.release_workspace()


def zero_inference(case: Fields, cells: list[Fields], out: Out) -> None:
    """Time ZeRO-3 forwards with parameters on the GPUs or in host memory: one engine, many (batch, prompt) cells."""
    import deepspeed
    import torch

    deepspeed.init_distributed(verbose=False)
    world = torch.distributed.get_world_size()
    offload, dtype = case.get("offload", "parameters"), case.get("weight_dtype", "bf16")
    width = llama_dims(case["hf_config"])["d_model"]
    zero: Fields = {
        "stage": 3,
        "stage3_prefetch_bucket_size": int(case.get("stage3_prefetch_bucket_size", 2 * width * width)),
        "stage3_param_persistence_threshold": int(case.get("stage3_param_persistence_threshold", width)),
        "stage3_max_live_parameters": int(case.get("stage3_max_live_parameters", 1e9)),
    }
    if offload != "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": bool(case.get("pin_memory", True))}
    config: Fields = {
        "zero_optimization": zero,
        dtype: {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
    }
    bits = int(case.get("weight_bits", 16))
    if bits < 16:
        group = {"num_bits": bits, "group_size": 64, "group_dim": 1, "symmetric": False}
        config["weight_quantization"] = {"post_init_quant": {k: dict(group) for k in ("self_attn", "mlp")}}
    began = time.perf_counter()
    rank.load_hf(case["hf_config"])
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = _built(case, _longest(cells))
    if bits < 16:
        from deepspeed.inference.quantization.quantization import _init_group_wise_weight_quantization

        model = _init_group_wise_weight_quantization(model, config)
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.module.eval()
    rank.sync()
    startup_s = time.perf_counter() - began
    _tidy()
    rank.reset_peak()
    mem = rank.memory()

    def step(ids: Any, past: Any) -> tuple[Any, Any]:
        found = engine.module(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return found.logits, found.past_key_values

    # ZeRO-3 prefetches only once it has recorded a whole pass: its first two passes are slower than all others
    with torch.inference_mode():
        for _ in range(TRACE_PASSES):
            step(torch.randint(0, case["hf_config"]["vocab_size"], (1, 16), device=rank.device()), None)

    def point(ids: Any, n_output: int, n_repeats: int) -> Fields:
        measured = _prefill_then_decode(step, ids, n_output, n_repeats)
        streamed = llama_dims(case["hf_config"])["n_params"] * bits / 8
        return measured | {"weights_bytes_per_s": streamed / measured["decode_step_s"]}

    made = record_fields(
        case,
        zero_stage=3,
        offload=offload,
        weight_bits=bits,
        dp=world,
        n_warm_passes=TRACE_PASSES,
        startup=startup_fields(mem, startup_s),
    )
    _timed(cells, out, case["hf_config"]["vocab_size"], point, made, world)
