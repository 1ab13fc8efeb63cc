"""Rank side of DeepSpeed-FastGen (inference v2): single steps of its ragged engine. Run by deepspeed_runner only."""

from __future__ import annotations

import time
from typing import Any

from calibration import deepspeed_rank as rank
from calibration.deepspeed_infer import record_fields, startup_fields
from calibration.deepspeed_rank import Out
from calibration.deepspeed_work import llama_dims

RESERVE_BYTES = 4_000_000_000  # left free beside the KV cache (DeepSpeed leaves 1e9)
MAX_TOKENS = 4096  # of one step; DeepSpeed's own default is 768
Fields = dict[str, Any]


class FastGen:
    """DeepSpeed's inference v2 engine with random weights made on the GPU."""

    def __init__(self, case: Fields) -> None:
        import torch
        from deepspeed.inference.v2.checkpoint.base_engine import CheckpointEngineBase
        from deepspeed.inference.v2.config_v2 import RaggedInferenceEngineConfig
        from deepspeed.inference.v2.engine_v2 import InferenceEngineV2
        from deepspeed.inference.v2.model_implementations import Llama2Policy
        from transformers import LlamaConfig

        self.max_tokens = int(case.get("max_tokens", MAX_TOKENS))
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
            "memory_config": {"mode": "reserve", "size": int(case.get("reserve_bytes", RESERVE_BYTES))},
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
            room = self.max_tokens
            now: list[tuple[int, int]] = []
            later: list[tuple[int, int]] = []
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
    engine = FastGen(case)
    rank.sync()
    startup = {
        "startup_s": time.perf_counter() - began,
        "n_kv_blocks": engine.n_blocks,
        "kv_block_tokens": engine.block_tokens,
        "kv_cache_tokens": engine.n_blocks * engine.block_tokens,
        **startup_fields(rank.memory(), time.perf_counter() - began),
    }
    made = record_fields(case, tp=case.get("tp", 1), startup=startup)
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
