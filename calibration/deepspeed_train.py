"""Rank side of DeepSpeed training: a few timed steps with ZeRO, or with a pipeline. Run by deepspeed_runner only."""

from __future__ import annotations

import itertools
import time
from typing import Any

from calibration import deepspeed_rank as rank
from calibration.deepspeed_rank import Mark, Out
from calibration.deepspeed_work import llama_dims, train_flops_per_token

WARMUP_STEPS = 4  # ZeRO-3 records its trace in the first two, and Adam's moments appear at the first
OFFLOADS = ("none", "optimizer", "optimizer+parameters", "parameters")
ZERO_OPTIONS = (
    "overlap_comm",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
    "zero_quantized_gradients",
)
Fields = dict[str, Any]


def ds_config(cell: Fields) -> Fields:
    """Return the DeepSpeed configuration of a training cell."""
    zero: Fields = {"stage": cell["zero_stage"]} | {k: cell[k] for k in ZERO_OPTIONS if k in cell}
    host = {"device": "cpu", "pin_memory": True}
    offload = cell.get("offload", "none")
    if offload.startswith("optimizer"):
        zero["offload_optimizer"] = host
    if offload.endswith("parameters"):
        zero["offload_param"] = host
    adam: Fields = {"lr": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0.1}
    if cell.get("torch_adam"):
        adam["torch_adam"] = True
    config: Fields = {
        "train_micro_batch_size_per_gpu": cell["micro_batch_size"],
        "gradient_accumulation_steps": cell.get("gradient_accumulation_steps", 1),
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": adam},
        "steps_per_print": 10**9,
    }
    if cell.get("grad_accum_dtype"):
        config["data_types"] = {"grad_accum_dtype": cell["grad_accum_dtype"]}
    if cell.get("tp", 1) > 1:
        config["tensor_parallel"] = {"autotp_size": cell["tp"]}
    return config


def _initialize(model: Any, cell: Fields, **more: Any) -> tuple[Any, Fields]:
    """Return the engine and what its records say of it; torch's AdamW stands in when FusedAdam cannot be built."""
    import deepspeed

    config = ds_config(cell) | more
    try:
        engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
        return engine, {}
    except Exception as err:
        offloaded = cell.get("offload", "none") != "none"
        if cell.get("torch_adam") or offloaded or "out of memory" in str(err).lower():
            raise
        config = ds_config({**cell, "torch_adam": True}) | more
        engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
        return engine, {"fused_adam_error": f"{type(err).__name__}: {err}"[:300]}


def zero_train(case: Fields, cells: list[Fields], out: Out) -> None:
    """Time the steps of one cell (its process ends with it: ZeRO's buffers cannot be given back)."""
    import deepspeed
    import torch

    deepspeed.init_distributed(verbose=False)
    (cell,) = cells
    index, config = cell["index"], case["hf_config"]
    seq, micro, gas = cell["sequence_length"], cell["micro_batch_size"], cell.get("gradient_accumulation_steps", 1)
    dev, began = rank.device(), time.perf_counter()
    more = {"max_position_embeddings": max(seq, 2048), "use_cache": False}
    fields = {k: v for k, v in config.items() if k not in more}
    rank.load_hf(config)
    if cell["zero_stage"] == 3 and cell.get("tp", 1) == 1:
        with deepspeed.zero.Init(config_dict_or_path=ds_config(cell), dtype=torch.bfloat16):
            model = rank.hf_model(fields, torch.bfloat16, **more)
    else:
        with torch.device(dev):
            model = rank.hf_model(fields, torch.bfloat16, **more)
    if cell.get("activation_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    n_params = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    engine, notes = _initialize(model, cell)
    rank.sync()
    startup_s, after_init = time.perf_counter() - began, rank.memory()
    r, tp = torch.distributed.get_rank(), cell.get("tp", 1)
    generator = torch.Generator().manual_seed(7 + r // tp)
    data = [torch.randint(0, config["vocab_size"], (micro, seq), generator=generator).to(dev) for _ in range(4)]

    def step(i: int, marks: list[tuple[Mark, ...]] | None = None) -> Any:
        loss = None
        for m in range(gas):
            ids = data[(i + m) % len(data)]
            a = Mark()
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            b = Mark()
            engine.backward(loss)
            c = Mark()
            engine.step()
            if marks is not None:
                marks.append((a, b, c, Mark()))
        return loss

    rank.reset_peak()
    first_loss = float(step(0).detach())
    rank.sync()
    after_first = rank.memory()
    warm = time.perf_counter()
    for i in range(1, WARMUP_STEPS):
        step(i)
    rank.sync()
    per_step = (time.perf_counter() - warm) / (WARMUP_STEPS - 1)
    steps = int(cell.get("n_steps") or min(40, max(5, cell.get("window_s", 3.0) / max(per_step, 1e-4))))
    steps = rank.gathered(steps)[0]

    rank.reset_peak()
    starts: list[Mark] = []
    marks: list[tuple[Mark, ...]] = []
    begin = time.perf_counter()
    for i in range(steps):
        starts.append(Mark())
        loss = step(i, marks)
    starts.append(Mark())
    rank.sync()
    end = time.perf_counter()
    times = [a.seconds_to(b) for a, b in itertools.pairwise(starts)]
    parts: list[list[float]] = [
        [sum(x[k].seconds_to(x[k + 1]) for x in marks[i * gas : (i + 1) * gas]) for i in range(steps)] for k in range(3)
    ]
    tokens = micro * seq * gas * (torch.distributed.get_world_size() // tp)
    step_s = rank.median(times)
    world = torch.distributed.get_world_size()
    measured = {
        "step_s": step_s,
        "step_p90_s": rank.p90(times),
        "step_min_s": min(times),
        "wall_step_s": (end - begin) / steps,
        **dict(zip(("forward_s", "backward_s", "optimizer_s"), map(rank.median, parts), strict=True)),
        "n_steps": steps,
        "tokens_per_s": tokens / step_s,
        "model_flops_per_s_per_gpu": train_flops_per_token(config, seq) * tokens / step_s / world,
        "first_loss": first_loss,
        "last_loss": float(loss.detach()),
        **rank.peak_fields(),
        "after_init_bytes": after_init,
        "after_first_step_bytes": after_first,
        "phase_bytes": _phases(engine, data[0], gas),
    }
    made = {
        "n_params": n_params,
        "tp": tp,
        "dp": world // tp,
        "zero_stage": cell["zero_stage"],
        "offload": cell.get("offload", "none"),
        "micro_batch_size": micro,
        "sequence_length": seq,
        "gradient_accumulation_steps": gas,
        "tokens_per_step": tokens,
        "activation_checkpointing": bool(cell.get("activation_checkpointing")),
        "optimizer": type(getattr(engine, "basic_optimizer", None)).__name__,
        "zero_optimizer": type(engine.optimizer).__name__,
        "startup": {"startup_s": startup_s, **_device(after_init)},
        **notes,
        **rank.versions(),
    }
    out.cell(index, (begin, end), made, measured)


def _device(mem: dict[str, int]) -> dict[str, int]:
    return {k: v for k, v in mem.items() if k == "device_memory_bytes"}


def _phases(engine: Any, ids: Any, gas: int) -> dict[str, int]:
    """Return the memory of one more step, phase by phase; empty on a CPU."""
    found: dict[str, int] = {}

    def note(name: str) -> None:
        mem = rank.memory()
        if "peak_allocated_bytes" in mem:
            found[f"{name}_peak"], found[f"{name}_end"] = mem["peak_allocated_bytes"], mem["allocated_bytes"]
        rank.reset_peak()

    rank.reset_peak()
    note("before")
    found.pop("before_peak", None)
    if "before_end" in found:
        found["before"] = found.pop("before_end")
    loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    note("forward")
    engine.backward(loss)
    del loss
    note("backward")
    if gas == 1:
        engine.step()
        note("optimizer")
    return found


def _layers(config: Fields) -> tuple[list[Any], Any]:
    """Return the LayerSpecs of a Llama-like model without rotary embedding (its time is small), and the loss."""
    import torch
    import torch.nn.functional as F
    from deepspeed.pipe import LayerSpec
    from torch import nn

    s = llama_dims(config)
    h, hd = s["d_model"], s["d_head"]

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(h))

        def forward(self, x: Any) -> Any:
            return F.rms_norm(x, (h,), self.weight, 1e-5)

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(s["vocab_size"], h)

        def forward(self, ids: Any) -> Any:
            return self.emb(ids)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2 = Norm(), Norm()
            self.q = nn.Linear(h, s["n_heads"] * hd, bias=False)
            self.k = nn.Linear(h, s["n_kv_heads"] * hd, bias=False)
            self.v = nn.Linear(h, s["n_kv_heads"] * hd, bias=False)
            self.o = nn.Linear(s["n_heads"] * hd, h, bias=False)
            self.gate = nn.Linear(h, s["d_ff"], bias=False)
            self.up = nn.Linear(h, s["d_ff"], bias=False)
            self.down = nn.Linear(s["d_ff"], h, bias=False)

        def forward(self, x: Any) -> Any:
            b, n, _ = x.shape
            y = self.n1(x)
            q = self.q(y).view(b, n, s["n_heads"], hd).transpose(1, 2)
            k = self.k(y).view(b, n, s["n_kv_heads"], hd).transpose(1, 2)
            v = self.v(y).view(b, n, s["n_kv_heads"], hd).transpose(1, 2)
            repeat = s["n_heads"] // s["n_kv_heads"]
            if repeat > 1:
                k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.o(a.transpose(1, 2).reshape(b, n, -1))
            y = self.n2(x)
            return x + self.down(F.silu(self.gate(y)) * self.up(y))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = Norm()
            self.lm = nn.Linear(h, s["vocab_size"], bias=False)

        def forward(self, x: Any) -> Any:
            return self.lm(self.norm(x))

    def loss(logits: Any, labels: Any) -> Any:
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), labels.view(-1))

    return [LayerSpec(Embed), *(LayerSpec(Block) for _ in range(s["n_layers"])), LayerSpec(Head)], loss


def pipe_train(case: Fields, cells: list[Fields], out: Out) -> None:
    """Time training batches of a pipeline for several numbers of micro-batches on one engine."""
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule

    deepspeed.init_distributed(verbose=False)
    world = torch.distributed.get_world_size()
    config, p = case["hf_config"], case.get("n_stages") or world
    micro, seq, dp = case["micro_batch_size"], case["sequence_length"], world // p
    dev, began = rank.device(), time.perf_counter()
    layers, loss_fn = _layers(config)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(dev):
        partition = case.get("partition_method", "parameters")
        net = PipelineModule(layers=layers, num_stages=p, loss_fn=loss_fn, partition_method=partition)
    torch.set_default_dtype(torch.float32)
    most = max(c["n_microbatches"] for c in cells)
    cell = {**case, "zero_stage": case.get("zero_stage", 1), "gradient_accumulation_steps": most}
    cell["grad_accum_dtype"] = case.get("grad_accum_dtype", "bf16")
    engine, notes = _initialize(net, cell, train_batch_size=micro * most * dp)
    startup_s, after_init = time.perf_counter() - began, rank.memory()
    log: list[tuple[str, Mark, Mark]] = []

    def timed(name: str, call: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            begin = Mark()
            result = call(self, *args, **kwargs)
            log.append((name, begin, Mark()))
            return result

        return run

    engine._INSTRUCTION_MAP = {c: timed(c.__name__, f) for c, f in engine._INSTRUCTION_MAP.items()}
    generator = torch.Generator().manual_seed(torch.distributed.get_rank() // p)
    ids = [torch.randint(0, config["vocab_size"], (micro, seq), generator=generator).to(dev) for _ in range(2)]

    def batches() -> Any:
        i = 0
        while True:
            yield ids[i % 2], ids[i % 2]
            i += 1

    data = batches()
    for cell in sorted(cells, key=lambda c: -c["n_microbatches"]):
        m, n_steps = cell["n_microbatches"], cell.get("n_steps", 5)
        engine.set_train_batch_size(micro * m * dp)
        engine.micro_batches = m
        for _ in range(2):
            engine.train_batch(data_iter=data)
        rank.sync()
        rank.reset_peak()
        log.clear()
        marks: list[Mark] = []
        begin = time.perf_counter()
        for _ in range(n_steps):
            marks.append(Mark())
            engine.train_batch(data_iter=data)
        marks.append(Mark())
        rank.sync()
        end = time.perf_counter()
        times = [a.seconds_to(b) for a, b in itertools.pairwise(marks)]
        spent: dict[str, float] = {}
        for name, a, b in log:
            spent[name] = spent.get(name, 0.0) + a.seconds_to(b) / n_steps
        stages = rank.gathered(_stage(spent, rank.median(times)))
        step_s = max(s["step_s"] for s in stages)
        # the stage that ends last waits for nobody, so the least of the reported times is the work itself
        optimizer_s, reduce_s = min(s["optimizer_s"] for s in stages), min(s["reduce_s"] for s in stages)
        busy_s = max(s["forward_s"] + s["backward_s"] for s in stages)
        tokens = micro * seq * m * dp
        measured = {
            "step_s": step_s,
            "wall_step_s": (end - begin) / n_steps,
            "busy_max_s": busy_s,
            "optimizer_s": optimizer_s,
            "reduce_s": reduce_s,
            "bubble_frac": 1 - busy_s / max(1e-9, step_s - optimizer_s - reduce_s),
            "stages": stages,
            "n_steps": n_steps,
            "tokens_per_s": tokens / step_s,
            "model_flops_per_s_per_gpu": train_flops_per_token(config, seq) * tokens / step_s / world,
            **rank.peak_fields(),
        }
        made = {
            "pp": p,
            "dp": dp,
            "zero_stage": case.get("zero_stage", 1),
            "offload": "none",
            "n_stages": p,
            "n_microbatches": m,
            "gradient_accumulation_steps": m,
            "micro_batch_size": micro,
            "sequence_length": seq,
            "tokens_per_step": tokens,
            "activation_checkpointing": False,
            "startup": {"startup_s": startup_s, **_device(after_init)},
            **notes,
            **rank.versions(),
        }
        out.cell(cell["index"], (begin, end), made, measured)


def _stage(spent: dict[str, float], step_s: float) -> dict[str, float]:
    return {
        "forward_s": spent.get("ForwardPass", 0.0),
        "backward_s": spent.get("BackwardPass", 0.0),
        "optimizer_s": spent.get("OptimizerStep", 0.0),
        "reduce_s": spent.get("ReduceGrads", 0.0) + spent.get("ReduceTiedGrads", 0.0),
        "step_s": step_s,
    }
