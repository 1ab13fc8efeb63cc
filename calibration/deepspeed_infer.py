"""Rank side of DeepSpeed inference: cells as all paths time them, and init_inference. Run by deepspeed_runner only."""

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
Fields = dict[str, Any]


def torch_dtype(case: Fields) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}[case.get("weight_dtype", "bf16")]


def tidy() -> None:
    import torch

    gc.collect()
    if rank.use_cuda():
        torch.cuda.empty_cache()


def built(case: Fields, longest: int) -> Any:
    more = {"max_position_embeddings": max(MAX_POSITIONS, longest)}
    fields = {k: v for k, v in case["hf_config"].items() if k not in more}
    return rank.hf_model(fields, torch_dtype(case), **more).eval()


def longest_sequence(cells: list[Fields]) -> int:
    return max(int(c["prompt_tokens"]) + int(c["output_tokens"]) for c in cells)


def timed(
    cells: list[Fields], out: Out, vocab: int, point: Callable[..., Fields], made: Fields, world: int = 1
) -> None:
    """Run every (batch, prompt) cell; one that runs out of memory costs only itself when there is one rank."""
    import torch

    for i, cell in enumerate(cells):
        batch, prompt = cell["batch_size"], cell["prompt_tokens"]
        try:
            ids = torch.randint(0, vocab, (batch, prompt), device=rank.device())
            measured = point(ids, cell)
            window, more = measured.pop("window"), measured.pop("fields", {})
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
            tidy()
            continue
        lengths = {"kind": "fixed", "prompt_tokens": prompt, "output_tokens": cell["output_tokens"]}
        load = {"kind": "batch", "batch_size": batch}
        out.cell(cell["index"], window, made | more | {"load": load, "lengths": lengths}, measured)
        tidy()


def prefill_then_decode(step: Callable[..., Any], ids: Any, cell: Fields) -> Fields:
    """Time prefills, then the decode steps that follow the last one; `step(ids, past)` returns logits and cache."""
    import torch

    n_output, n_repeats = cell["output_tokens"], cell.get("n_repeats", 2)
    prefills: list[float] = []
    rank.reset_peak()
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
        prefill_peak = rank.memory().get("peak_allocated_bytes")
        rank.reset_peak()
        begin, marks = time.perf_counter(), [Mark()]
        for _ in range(n_output):
            logits, past = step(token, past)
            token = logits[:, -1, :].argmax(-1, keepdim=True)
            marks.append(Mark())
        rank.sync()
        end = time.perf_counter()
    peak = {} if prefill_peak is None else {"prefill_peak_allocated_bytes": prefill_peak}
    decodes = [a.seconds_to(b) for a, b in itertools.pairwise(marks)]
    steady = decodes[min(3, n_output - 1) :]
    return peak | {
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
    began, longest = time.perf_counter(), longest_sequence(cells)
    with torch.device(rank.device()):
        model = built(case, longest)
    is_injected = mode.startswith("kernel-injection")
    by_hand = mode == "kernel-injection"
    if mode != "eager":
        options: Fields = {
            "dtype": torch_dtype(case),
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
    tidy()
    rank.reset_peak()
    weights = rank.memory()

    def step(ids: Any, past: Any) -> tuple[Any, Any]:
        if by_hand:
            return model(input_ids=ids, use_cache=False).logits, None
        found = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        return found.logits, found.past_key_values

    made = record_fields(case, mode=mode, tp=tp, startup=startup_fields(weights, startup_s))
    vocab = case["hf_config"]["vocab_size"]

    def point(ids: Any, cell: Fields) -> Fields:
        if by_hand:
            _release_workspace(model)
        return prefill_then_decode(step, ids, cell)

    timed(cells, out, vocab, point, made)


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
