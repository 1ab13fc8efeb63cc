"""The fake engine. FAKE_ENGINE holds its faults: oom, hang, die=N (requests), bad=N (prompt length), stall=N."""

import asyncio
import importlib
import json
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

STEP_S, SEQ_S, PREFILL_S = 0.002, 0.00002, 0.000002  # a step, a decoding sequence, a prefill token

LOG = """INFO 07-01 [gpu_model_runner.py:5348] Model loading took 14.99 GiB memory and 1.234567 seconds
INFO 07-01 [monitor.py:60] torch.compile took 21.50 s in total
INFO 07-01 [gpu_worker.py:560] Available KV cache memory: 54.93 GiB
INFO 07-01 [kv_cache_utils.py:2177] GPU KV cache size: 449,968 tokens
INFO 07-01 [gpu_model_runner.py:6845] Graph capturing finished in 12 secs, took 0.61 GiB
INFO 07-01 [gpu_worker.py:793] CUDA graph pool memory: 0.58 GiB (actual), 0.6 GiB (estimated), difference: 0.02 GiB.
INFO 07-01 [gpu_worker.py:857] Free memory on device (78.6/79.18 GiB) on startup. Desired GPU memory utilization is \
(0.9, 71.26 GiB). Actual usage is 14.99 GiB for weight, 1.1 GiB for peak activation, 0.22 GiB for non-torch memory, \
and 0.58 GiB for CUDAGraph memory."""


def faults():
    pairs = (f.partition("=") for f in os.environ.get("FAKE_ENGINE", "").split(",") if f)
    return {k: int(v or 1) for k, _, v in pairs}


class EngineDeadError(Exception):
    pass


class Request:
    def __init__(self, n_prompt, n_output):
        self.n_prompt, self.left, self.queue, self.fresh = n_prompt, n_output, asyncio.Queue(), True


class AsyncLLM:
    @classmethod
    def from_engine_args(cls, args):
        assert json.loads(Path(args.model, "config.json").read_text())["vocab_size"] > 0
        faulty = faults()
        if "child" in faulty:
            subprocess.Popen(["sleep", "600"], start_new_session=bool(faulty["child"] > 1))
        if "hang" in faulty:
            time.sleep(600)
        if "oom" in faulty:
            os.write(1, b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.\n")
            raise RuntimeError("Engine core initialization failed. See root cause above.")
        os.write(1, LOG.encode() + b"\n")
        return cls(args, faulty)

    def __init__(self, args, faulty):
        self.args, self.faults, self.errored = args, faulty, False
        self.n_seen, self.running, self.loop = 0, [], None
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(
                num_gpu_blocks=28123,
                block_size=16,
                kv_cache_size_tokens=449968,
                enable_prefix_caching=args.enable_prefix_caching,
            ),
            scheduler_config=SimpleNamespace(
                max_num_batched_tokens=args.max_num_batched_tokens,
                max_num_seqs=args.max_num_seqs,
                async_scheduling=True,
            ),
            model_config=SimpleNamespace(max_model_len=args.max_model_len),
            max_concurrent_batches=2,
            use_v2_model_runner=False,
        )

    async def collective_rpc(self, method):
        if "norpc" in self.faults:
            raise NotImplementedError(method)
        module, _, name = self.args.worker_extension_cls.rpartition(".")
        extension = getattr(importlib.import_module(module), name)

        class Worker(extension):
            rank = 0
            init_snapshot = SimpleNamespace(total_memory=85_520_809_984, free_memory=84_000_000_000)
            model_runner = SimpleNamespace(model_memory_usage=16_100_000_001)
            peak_activation_memory = 1_200_000_002
            non_torch_memory = 230_000_003
            available_kv_cache_memory_bytes = 58_980_000_004
            cudagraph_memory_estimate = 644_245_094
            requested_memory = 76_968_728_985

        n = self.args.tensor_parallel_size * self.args.pipeline_parallel_size
        return [getattr(Worker(), method)() | {"rank": r} for r in range(n)]

    async def _steps(self):
        while True:
            if not self.running:
                await asyncio.sleep(0.0005)
                continue
            batch = self.running[: self.args.max_num_seqs]
            prefill = sum(r.n_prompt for r in batch if r.fresh)
            await asyncio.sleep(STEP_S + SEQ_S * len(batch) + PREFILL_S * prefill)
            if self.errored:
                for r in self.running:
                    r.queue.put_nowait(EngineDeadError("EngineCore encountered an issue."))
                return
            for r in batch:
                r.fresh, r.left = False, r.left - 1
                r.queue.put_nowait(1)
                if not r.left and r in self.running:
                    self.running.remove(r)

    async def generate(self, prompt, params, request_id):
        if self.loop is None:
            self.loop = asyncio.create_task(self._steps())
        if self.errored:
            raise EngineDeadError("EngineCore encountered an issue.")
        ids = prompt["prompt_token_ids"]
        assert ids
        assert all(isinstance(i, int) for i in ids)
        self.n_seen += 1
        if len(ids) == self.faults.get("bad"):
            raise ValueError("CUDA out of memory in this request")
        if self.n_seen == self.faults.get("die"):
            os.write(1, b"RuntimeError: NCCL error: unhandled system error\n")
            self.errored = True
        request = Request(len(ids), params.max_tokens)
        if len(ids) == self.faults.get("stall"):
            await asyncio.sleep(3600)
        self.running.append(request)
        try:
            for i in range(params.max_tokens):
                got = await request.queue.get()
                if isinstance(got, Exception):
                    raise got
                finished = i == params.max_tokens - 1
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=[7])], finished=finished, num_cached_tokens=0)
        finally:
            if request in self.running:
                self.running.remove(request)

    def shutdown(self, timeout=None):
        if "stuck" in self.faults:
            time.sleep(600)
