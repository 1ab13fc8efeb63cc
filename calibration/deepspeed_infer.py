"""Rank side of DeepSpeed inference: init_inference, ZeRO-Inference and FastGen. Run by deepspeed_runner only."""

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
FASTGEN_RESERVE_BYTES = 4_000_000_000
FASTGEN_MAX_TOKENS = 4096
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
    return max(c["prompt_tokens"] + c["output_tokens"] for c in cells)


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

    made = _made(case, mode=mode, tp=tp, startup=_startup(weights, startup_s))
    vocab = case["hf_config"]["vocab_size"]

    def point(ids: Any, n_output: int, n_repeats: int) -> Fields:
        if by_hand:
            _release_workspace(model)
        return _prefill_then_decode(step, ids, n_output, n_repeats)

    _timed(cells, out, vocab, point, made)


def _made(case: Fields, **more: Any) -> Fields:
    dtype = case.get("weight_dtype", "bf16")
    n_params = llama_dims(case["hf_config"])["n_params"]
    return {"weight_dtype": dtype, "kv_dtype": dtype, "n_params": n_params, **more, **rank.versions()}


def _startup(mem: dict[str, int], startup_s: float) -> Fields:
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

    def point(ids: Any, n_output: int, n_repeats: int) -> Fields:
        measured = _prefill_then_decode(step, ids, n_output, n_repeats)
        streamed = llama_dims(case["hf_config"])["n_params"] * bits / 8
        return measured | {"weights_bytes_per_s": streamed / measured["decode_step_s"]}

    made = _made(case, zero_stage=3, offload=offload, weight_bits=bits, dp=world, startup=_startup(mem, startup_s))
    _timed(cells, out, case["hf_config"]["vocab_size"], point, made, world)


class _FastGen:
    """DeepSpeed's inference v2 engine with random weights made on the GPU."""

    def __init__(self, case: Fields) -> None:
        import torch
        from deepspeed.inference.v2.checkpoint.base_engine import CheckpointEngineBase
        from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig
        from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
        from deepspeed.inference.v2.model_implementations import Llama2Policy
        from transformers import LlamaConfig

        self.max_tokens = int(case.get("max_tokens", FASTGEN_MAX_TOKENS))
        context = int(case.get("max_context", 4096))
        skip = ("architectures", "model_type", "torch_dtype", "max_position_embeddings")
        hf = LlamaConfig(
            **{k: v for k, v in case["hf_config"].items() if k not in skip},
            max_position_embeddings=context,
            dtype="bfloat16",
        )
        dev = rank.device()
        generator = torch.Generator(device=dev).manual_seed(0)

        class RandomCheckpoint(CheckpointEngineBase):  # type: ignore[misc]
            def __init__(self) -> None:
                self.model_config = hf
                hf.max_seq_length = context

            def parameters(self) -> Any:
                s = llama_dims(case["hf_config"])
                h, hd, ff = s["d_model"], s["d_head"], s["d_ff"]

                def random(*shape: int) -> Any:
                    made = torch.empty(*shape, device=dev, dtype=torch.bfloat16)
                    return made.normal_(0, 0.02, generator=generator)

                ones = torch.ones(h, device=dev, dtype=torch.bfloat16)
                yield "model.embed_tokens.weight", random(s["vocab_size"], h)
                for i in range(s["n_layers"]):
                    at = f"model.layers.{i}."
                    yield f"{at}self_attn.q_proj.weight", random(s["n_heads"] * hd, h)
                    yield f"{at}self_attn.k_proj.weight", random(s["n_kv_heads"] * hd, h)
                    yield f"{at}self_attn.v_proj.weight", random(s["n_kv_heads"] * hd, h)
                    yield f"{at}self_attn.o_proj.weight", random(h, s["n_heads"] * hd)
                    yield f"{at}mlp.gate_proj.weight", random(ff, h)
                    yield f"{at}mlp.up_proj.weight", random(ff, h)
                    yield f"{at}mlp.down_proj.weight", random(h, ff)
                    yield f"{at}input_layernorm.weight", ones.clone()
                    yield f"{at}post_attention_layernorm.weight", ones.clone()
                yield "model.norm.weight", ones.clone()
                yield "lm_head.weight", random(s["vocab_size"], h)

        manager = {
            "max_tracked_sequences": 2048,
            "max_ragged_batch_size": self.max_tokens,
            "max_ragged_sequence_count": min(512, self.max_tokens),
            "max_context": context,
            "memory_config": {"mode": "reserve", "size": int(case.get("reserve_bytes", FASTGEN_RESERVE_BYTES))},
        }
        config = RaggedInferenceEngineConfig(tensor_parallel={"tp_size": case.get("tp", 1)}, state_manager=manager)
        self.engine = InferenceEngineV2(Llama2Policy(hf, checkpoint_engine=RandomCheckpoint()), config)
        self.block_tokens = int(self.engine._model.kv_cache_config()[0].block_size)
        self.n_blocks = self.free_blocks()
        self.vocab, self.last_uid = case["hf_config"]["vocab_size"], 10**6

    def free_blocks(self) -> int:
        """Free KV blocks (the engine keeps a list, one entry a cache group)."""
        return min(int(b) for b in self.engine.free_blocks)

    def tokens(self, n: int) -> Any:
        """Return `n` random token ids on the host."""
        import torch

        return torch.randint(3, self.vocab - 1, (n,), dtype=torch.int64)

    def new(self, n: int) -> list[int]:
        """Return `n` fresh sequence ids."""
        self.last_uid += n
        return list(range(self.last_uid - n, self.last_uid))

    def put(self, uids: list[int], tokens: list[Any]) -> None:
        """Run one ragged forward and bring the next tokens to the host.

        Without the engine's own checks, as DeepSpeed-MII calls it: `can_schedule` of 0.19.8 compares a number of
        blocks with the list of all groups' free blocks and raises TypeError for every batch.
        """
        if sum(len(t) for t in tokens) > self.max_tokens:
            raise ValueError(f"a step of {sum(len(t) for t in tokens)} tokens exceeds {self.max_tokens}")
        self.engine.put(uids, tokens, do_checks=False).argmax(-1).cpu()

    def fill(self, n_seqs: int, context: int) -> list[int]:
        """Return sequences with `context` tokens each, put in steps within the token budget."""
        blocks = n_seqs * -(-(context + 64) // self.block_tokens)
        if blocks > self.free_blocks():
            raise MemoryError(f"{blocks} KV blocks are needed, {self.free_blocks()} are free")
        uids = self.new(n_seqs)
        todo = [(u, context) for u in uids]
        while todo:
            room, now, later = self.max_tokens, [], []
            for uid, left in todo:
                part = min(left, room) if len(now) < 512 else 0
                room -= part
                if part:
                    now.append((uid, part))
                if left > part:
                    later.append((uid, left - part))
            self.put([u for u, _ in now], [self.tokens(n) for _, n in now])
            todo = later
        return uids

    def drop(self, uids: list[int]) -> None:
        """Forget sequences."""
        for uid in uids:
            self.engine.flush(uid)


def fastgen(case: Fields, cells: list[Fields], out: Out) -> None:
    """Time single FastGen steps: `n_prompt_tokens` of new prompts beside `n_seqs` decodes over `context_tokens`."""
    began = time.perf_counter()
    engine = _FastGen(case)
    rank.sync()
    startup = {
        "startup_s": time.perf_counter() - began,
        "n_kv_blocks": engine.n_blocks,
        "kv_block_tokens": engine.block_tokens,
        "kv_cache_tokens": engine.n_blocks * engine.block_tokens,
        **_startup(rank.memory(), time.perf_counter() - began),
    }
    made = _made(case, tp=case.get("tp", 1), startup=startup)
    for cell in cells:
        uids: list[int] = []
        try:
            n_seqs, prompt = cell.get("n_seqs", 0), cell.get("n_prompt_tokens", 0)
            uids = engine.fill(n_seqs, cell.get("context_tokens", 512)) if n_seqs else []
            times: list[float] = []
            begin = time.perf_counter()
            for _ in range(cell.get("n_repeats", 8) + 2):
                fresh = engine.new(-(-prompt // 2048))
                sizes = [min(2048, prompt - 2048 * i) for i in range(len(fresh))]
                tokens = [engine.tokens(1) for _ in uids] + [engine.tokens(n) for n in sizes]
                rank.sync()
                start = time.perf_counter()
                engine.put(uids + fresh, tokens)
                times.append(time.perf_counter() - start)
                engine.drop(fresh)
            window = (begin, time.perf_counter())
        except Exception as err:
            if case.get("tp", 1) > 1:
                raise
            out.failed(cell["index"], err)
            continue
        finally:
            engine.drop(uids)
        steady = times[2:]
        measured = {"step_s": rank.median(steady), "step_p90_s": rank.p90(steady), "n_steps": len(steady)}
        measured["tokens_per_s"] = (n_seqs + prompt) / measured["step_s"]
        load = {"kind": "step", "n_seqs": n_seqs, "context_tokens": cell.get("context_tokens", 512) if n_seqs else 0}
        out.cell(
            cell["index"], window, made | {"load": load | {"n_prompt_tokens": prompt}}, measured | rank.peak_fields()
        )
