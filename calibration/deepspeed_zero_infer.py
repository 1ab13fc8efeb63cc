"""Rank side of ZeRO-Inference: weights on the GPU or in host memory, packed or not, the cache on either side.

Run by deepspeed_runner only.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from calibration import deepspeed_rank as rank
from calibration.deepspeed_infer import (
    Fields,
    built,
    longest_sequence,
    prefill_then_decode,
    record_fields,
    startup_fields,
    tidy,
    timed,
)
from calibration.deepspeed_rank import Out
from calibration.deepspeed_work import llama_dims

TRACE_PASSES = 2
"""Passes before ZeRO-3's trace is complete: one without, one that records (partitioned_param_coordinator.py)."""
GROUP = {"group_size": 64, "group_dim": 1, "symmetric": False}
"""Groups of weight_quantization as in DeepSpeed's own examples: 64 weights, a 16-bit scale and minimum each."""
PACKED_MODULES = ("self_attn", "mlp")
KV_OFFLOAD = "transformers.DynamicCache(offloading=True)"
"""What `generate(cache_implementation="offloaded")` makes (transformers 5.17, cache_utils.py): in every pass a layer's
keys and values are copied whole from pinned host memory on a stream of their own while the layer before works, and
copied back whole on the compute stream once the new token's are appended."""


def ds_config(case: Fields) -> Fields:
    """Return the DeepSpeed configuration of a case. Raises ValueError for packed weights in another type than fp16."""
    dtype, width = case.get("weight_dtype", "bf16"), llama_dims(case["hf_config"])["d_model"]
    zero: Fields = {
        "stage": 3,
        "stage3_prefetch_bucket_size": int(case.get("stage3_prefetch_bucket_size", 2 * width * width)),
        "stage3_param_persistence_threshold": int(case.get("stage3_param_persistence_threshold", width)),
        "stage3_max_live_parameters": int(case.get("stage3_max_live_parameters", 1e9)),
    }
    if case.get("offload", "parameters") != "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": bool(case.get("pin_memory", True))}
    config: Fields = {
        "zero_optimization": zero,
        dtype: {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
    }
    bits = weight_bits(case)
    if bits < 16:
        if dtype != "fp16":  # quantization.py asserts it
            raise ValueError("weight_quantization packs fp16 weights only")
        group = {"num_bits": bits} | GROUP
        config["weight_quantization"] = {"post_init_quant": {k: dict(group) for k in PACKED_MODULES}}
    return config


def weight_bits(case: Fields) -> int:
    """Return the bits of a weight of the linear layers."""
    return int(case.get("weight_quantization", 16))


def stored_bytes(model: Any) -> int:
    """Return the bytes of all parameters as ZeRO-3 holds them over all ranks, packed ones with scales and minima."""
    return sum(int(p.ds_numel) * p.element_size() for p in model.parameters())


def packed_model(model: Any, config: Fields) -> Any:
    """Return the model with its linear layers packed, as `weight_quantization` does after initialisation.

    DeepSpeed collects garbage once a layer; with the objects of transformers and torch alive that takes longer than
    all packing, so they are set aside meanwhile.
    """
    from deepspeed.inference.quantization.quantization import _init_group_wise_weight_quantization

    gc.collect()
    gc.freeze()
    try:
        return _init_group_wise_weight_quantization(model, config)
    finally:
        gc.unfreeze()


def cache_for(model: Any, is_on_host: bool) -> Any:
    """Return what a prompt pass gets as its cache: None, or an empty one that lives in host memory."""
    if not is_on_host:
        return None
    from transformers import DynamicCache

    return DynamicCache(config=model.config, offloading=True)


def pinned_fields() -> Fields:
    """Return the pinned host memory that torch holds [bytes], where it counts it."""
    import torch

    if not rank.use_cuda() or not hasattr(torch.cuda, "host_memory_stats"):
        return {}
    stats = torch.cuda.host_memory_stats()
    return {"host_pinned_bytes": int(stats["allocated_bytes.current"])} if "allocated_bytes.current" in stats else {}


def zero_inference(case: Fields, cells: list[Fields], out: Out) -> None:
    """Time ZeRO-3 forwards: one engine, many (batch, prompt) cells; `kv_offload` holds for the case or for a cell."""
    import deepspeed
    import torch

    deepspeed.init_distributed(verbose=False)
    world = torch.distributed.get_world_size()
    bits = weight_bits(case)
    case = case | {"weight_dtype": case.get("weight_dtype", "bf16" if bits == 16 else "fp16")}
    config = ds_config(case)
    vocab = case["hf_config"]["vocab_size"]
    began = time.perf_counter()
    rank.load_hf(case["hf_config"])
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = built(case, longest_sequence(cells))
    build_s = time.perf_counter() - began
    if bits < 16:
        model = packed_model(model, config)
    pack_s = time.perf_counter() - began - build_s
    engine = deepspeed.initialize(model=model, config=config)[0]
    engine.module.eval()
    rank.sync()
    startup_s = time.perf_counter() - began
    tidy()
    rank.reset_peak()
    mem = rank.memory()
    streamed = stored_bytes(engine.module)

    def step_on(is_on_host: bool) -> Any:
        def step(ids: Any, past: Any) -> tuple[Any, Any]:
            past = cache_for(engine.module, is_on_host) if past is None else past
            found = engine.module(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            return found.logits, found.past_key_values

        return step

    # ZeRO-3 prefetches only once it has recorded a whole pass: its first two passes are slower than all others
    with torch.inference_mode():
        for _ in range(TRACE_PASSES):
            step_on(False)(torch.randint(0, vocab, (1, 16), device=rank.device()), None)

    def point(ids: Any, cell: Fields) -> Fields:
        is_on_host = bool(cell.get("kv_offload", case.get("kv_offload", False)))
        measured = prefill_then_decode(step_on(is_on_host), ids, cell)
        place: Fields = {"kv_offload": "cpu", "kv_cache": KV_OFFLOAD} if is_on_host else {"kv_offload": "none"}
        measured |= {"weights_bytes_per_s": streamed / measured["decode_step_s"]} | pinned_fields()
        return measured | {"fields": place}

    made = record_fields(
        case,
        zero_stage=3,
        offload=case.get("offload", "parameters"),
        weight_bits=bits,
        stored_weights_bytes=streamed,
        dp=world,
        n_warm_passes=TRACE_PASSES,
        startup=startup_fields(mem, startup_s) | {"build_s": build_s, "pack_s": pack_s},
    )
    if bits < 16:
        made |= {"weight_dtype": f"int{bits}", "compute_dtype": case["weight_dtype"], "weight_group": GROUP}
    timed(cells, out, vocab, point, made, world)
