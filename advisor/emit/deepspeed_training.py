"""What to run for a DeepSpeed training job: ds_config, launch line, pipeline split, each line with its reason."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from advisor.emit.deepspeed import explain_config, flat_keys, hostfile, launcher_line
from advisor.emit.names import comment, model_argument
from advisor.errors import DomainError
from advisor.laws.bubble import stage_layers
from advisor.schema import Model
from advisor.schema.training import TrainJob
from advisor.units import plural

Config = dict[str, Any]

REASONS = {
    "train_micro_batch_size_per_gpu": "sequences of one GPU in one micro-step: what activations are sized by",
    "gradient_accumulation_steps": "micro-steps of one optimizer step; with a pipeline, the microbatches in flight",
    "train_batch_size": "micro batch x accumulation x data-parallel ranks, asserted by DeepSpeed",
    "gradient_clipping": "largest gradient norm",
    "steps_per_print": "progress every ten steps",
    "bf16": "weights, activations and gradients in bfloat16",
    "fp16": "weights, activations and gradients in float16, with loss scaling",
    "optimizer.type": "fused Adam on the GPU, DeepSpeedCPUAdam where the optimizer is offloaded",
    "optimizer.params.lr": "yours to choose",
    "optimizer.params.betas": "Adam's decay rates",
    "optimizer.params.weight_decay": "yours to choose",
    "zero_optimization.stage": "1 shards optimizer states, 2 also gradients, 3 also parameters",
    "zero_optimization.reduce_bucket_size": "elements reduced at a time; 2 bytes each on every GPU",
    "zero_optimization.allgather_bucket_size": "elements gathered at a time (stages 1 and 2)",
    "zero_optimization.overlap_comm": "reduce while the backward pass runs; takes a second bucket",
    "zero_optimization.contiguous_gradients": "gradients in one buffer, against fragmentation",
    "zero_optimization.offload_optimizer.device": "optimizer states off the GPU: 18 bytes a parameter and rank there",
    "zero_optimization.offload_optimizer.pin_memory": "pinned memory for the host link's full rate",
    "zero_optimization.offload_optimizer.nvme_path": "a directory on a local NVMe drive: change it to yours",
    "zero_optimization.offload_param.device": "parameters off the GPU (stage 3 only)",
    "zero_optimization.offload_param.pin_memory": "pinned memory for the host link's full rate",
    "zero_optimization.offload_param.nvme_path": "a directory on a local NVMe drive: change it to yours",
    "zero_optimization.stage3_prefetch_bucket_size": "elements fetched ahead of use",
    "zero_optimization.stage3_param_persistence_threshold": "smaller parameters stay gathered",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "write whole weights, not shards",
    "zero_optimization.zero_hpz_partition_size": "ZeRO++ hpZ: a second copy of the weights sharded inside a node",
    "zero_optimization.zero_quantized_weights": "ZeRO++ qwZ: int8 weights in the gathers",
    "zero_optimization.zero_quantized_gradients": "ZeRO++ qgZ: int4 gradients, acts only between nodes",
    "tensor_parallel.autotp_size": "GPUs that share each layer (AutoTP)",
    "pipeline.activation_checkpoint_interval": "checkpoint every layer; the number of stages is set in the code",
}


def training_config(job: TrainJob) -> Config:
    """Return the ds_config of a job, only keys that DeepSpeed 0.19.8 knows.

    Raises DomainError for ZeRO stage 2 or 3 with a pipeline, which DeepSpeed refuses.
    """
    if job.pp > 1 and job.zero_stage > 1:
        raise DomainError(f"ZeRO stage {job.zero_stage} refuses pipeline parallelism; use stage 1 with pp {job.pp}")
    if job.n_chunks > 1:
        raise DomainError("interleaved chunks are Megatron-LM's schedule, which DeepSpeed cannot run; use n_chunks 1")
    zero: Config = {"stage": job.zero_stage}
    if job.zero_stage:
        zero["reduce_bucket_size"] = int(job.bucket_params)
        zero["contiguous_gradients"] = True
    if job.zero_stage in (1, 2):
        zero["allgather_bucket_size"] = int(job.bucket_params)
    if job.has_overlap is not None and job.pp == 1:
        zero["overlap_comm"] = job.has_overlap
    for block, device in (("offload_optimizer", job.offload_optimizer), ("offload_param", job.offload_param)):
        if device != "none":
            zero[block] = {"device": device, "pin_memory": True}
            if device == "nvme":
                zero[block]["nvme_path"] = "/local_nvme"
    if job.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        if job.hpz_ranks:
            zero["zero_hpz_partition_size"] = job.hpz_ranks
        if job.has_quantized_weights:
            zero["zero_quantized_weights"] = True
        if job.has_quantized_gradients:
            zero["zero_quantized_gradients"] = True
    config: Config = {
        "train_micro_batch_size_per_gpu": job.micro_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "train_batch_size": job.train_batch_size,
        "steps_per_print": 10,
        "gradient_clipping": 1.0,
        job.dtype: {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "zero_optimization": zero,
    }
    if job.tp > 1 and job.pp == 1:
        # AutoTP derives the data-parallel size itself and refuses a total batch that it did not compute
        config["tensor_parallel"] = {"autotp_size": job.tp}
        del config["train_batch_size"]
    if job.pp > 1 and job.is_checkpointed:
        config["pipeline"] = {"activation_checkpoint_interval": 1}
    return config


def explain_training(job: TrainJob) -> dict[str, str]:
    """Return why each line of the job's ds_config is there, by dotted key."""
    return explain_config(training_config(job), REASONS)


def training_command(job: TrainJob, model: Model, *, gpus_per_node: int) -> str:
    """Return the launch line of a job; with several nodes it reads ./hostfile."""
    n_nodes = -(-job.n_gpus // gpus_per_node)
    script = "train_pipeline.py" if job.pp > 1 else "train.py"
    arguments = ["--model", model_argument(model), "--deepspeed_config", "ds_config.json"]
    return launcher_line(script, arguments, n_nodes=n_nodes, gpus_per_node=min(gpus_per_node, job.n_gpus))


_TRAIN = """\
# {title}
# Run: {command}
# It needs: pip install {needs}
import argparse

import deepspeed
import torch
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("--model", default={model})  # hub id or directory
parser.add_argument("--tokens", default="tokens.pt")  # int64 tensor [sequences, {length}]
parser.add_argument("--local_rank", type=int, default=-1)  # set by the deepspeed launcher
parser = deepspeed.add_config_arguments(parser)  # --deepspeed_config
args = parser.parse_args()

deepspeed.init_distributed()
{zero_init}model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.{dtype})
{checkpointing}data = torch.utils.data.TensorDataset(torch.load(args.tokens, weights_only=True))
engine, _, loader, _ = deepspeed.initialize(
    args=args, model=model, model_parameters=[p for p in model.parameters() if p.requires_grad], training_data=data
)
for (tokens,) in loader:
    tokens = tokens.to(engine.device)
    loss = engine(input_ids=tokens, labels=tokens).loss
    engine.backward(loss)
    engine.step()  # updates only at the accumulation boundary
engine.save_checkpoint("checkpoints")
"""

_PIPELINE = """\
# {title}
# Run: {command}
# Blocks a stage: {split}; the embedding goes to the first stage, the head and the loss to the last. A model of
# transformers cannot be pipelined as it is: each layer must be a module that takes and returns tensors. Idle share of
# this schedule with equal stages: (p - 1) / (m + p - 1) = {bubble:.1%}.{split_layers}
import argparse

import deepspeed
from deepspeed.pipe import LayerSpec, PipelineModule
{import_topology}
from my_layers import Block, Embedding, Head, loss_function, training_data  # your model, layer by layer

FIRST_LAYER = {bounds}  # first layer of each stage, embedding and head counted, and the end

{split_class}parser = argparse.ArgumentParser()
parser.add_argument("--model", default={model})
parser.add_argument("--local_rank", type=int, default=-1)  # set by the deepspeed launcher
parser = deepspeed.add_config_arguments(parser)  # --deepspeed_config
args = parser.parse_args()

deepspeed.init_distributed()
layers = [LayerSpec(Embedding), *[LayerSpec(Block, index) for index in range({n_layers})], LayerSpec(Head)]
model = SplitPipeline(
    layers=layers,
    {degrees}
    activation_checkpoint_interval={interval},  # 0 = keep all activations
    loss_fn=loss_function,
)
engine = deepspeed.initialize(
    args=args, model=model, model_parameters=model.parameters(), training_data=training_data()
)[0]
for step in range({steps}):
    loss = engine.train_batch()  # {accumulation} microbatches through {stages} stages, then one update
"""


_IMPORT_TOPOLOGY = "from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology\n"
_STAGES = "num_stages={stages},  # the only place where the number of stages is set; ds_config has no key for it"
_TOPOLOGY = (
    "topology=PipeModelDataParallelTopology(num_pp={stages}, num_mp={tp}, num_dp={dp}),  # the only place where the"
    " degrees are set"
)
_SPLIT_LAYERS = """
# Each block is split over {tp} GPUs: the topology makes the groups, the layers must do the split, each over
# `model.mpu().get_slice_parallel_group()` (Megatron-LM's column and row parallel layers do; AutoTP does not here).\
"""
_SPLIT = """\
class SplitPipeline(PipelineModule):  # PipelineModule can only balance: by parameters, number or type of layers
    def _partition_layers(self, method="given"):
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = FIRST_LAYER
        self._set_bounds(start=FIRST_LAYER[stage], stop=FIRST_LAYER[stage + 1])


"""


def stage_bounds(split: Sequence[int]) -> list[int]:
    """Return the first layer of each pipeline stage and the end; the embedding is layer 0, the head the last one.

    >>> stage_bounds([2, 3])
    [0, 3, 7]
    """
    bounds = [0]
    for stage, n in enumerate(split):
        bounds.append(bounds[-1] + n + (stage == 0) + (stage == len(split) - 1))
    return bounds


LAUNCHER_WORDS = {
    "deepspeed": "DeepSpeed's launcher: one process a GPU, rank and world size in the environment",
    "--num_gpus": "GPUs of this node; without it the launcher takes all that it sees",
    "--hostfile": "the nodes and how many GPUs each has; password-less ssh from this node to all of them",
    "--model": "hub id or directory",
    "--deepspeed_config": "the file above",
}


def explain_files(job: TrainJob, model: Model, *, gpus_per_node: int) -> str:
    """Return what each line of the ds_config and each word of the launch line is for, as Markdown."""
    reasons, command = explain_training(job), training_command(job, model, gpus_per_node=gpus_per_node)
    lines = ["# What each line is for", "", "## ds_config.json", ""]
    lines += [f"- `{key}` = `{json.dumps(value)}`: {reasons[key]}" for key, value in flat_keys(training_config(job))]
    lines += ["", "## The launch line", "", f"    {command}", ""]
    lines += [f"- `{word}`: {why}" for word, why in LAUNCHER_WORDS.items() if word in command.split()]
    script = "train_pipeline.py" if job.pp > 1 else "train.py"
    lines.append(f"- `{script}`: the script beside this file; its comments explain it")
    if job.pp > 1:
        split = list(job.stage_layers) or stage_layers(model.n_layers, job.pp)
        lines += ["", "## The pipeline split", ""]
        for stage, n in enumerate(split):
            ends = ", the embedding" if stage == 0 else ", the head and the loss" if stage == job.pp - 1 else ""
            lines.append(f"- stage {stage}: {n} blocks{ends}")
        if job.tp > 1:
            lines.append(
                f"- each block on {job.tp} GPUs: your layers split themselves, DeepSpeed only makes the groups"
            )
    return "\n".join(lines) + "\n"


def training_files(job: TrainJob, model: Model, *, n_nodes: int, gpus_per_node: int) -> dict[str, str]:
    """Return the text of every file that starts a job, by file name; hosts in the hostfile are placeholders."""
    script = "train_pipeline.py" if job.pp > 1 else "train.py"
    files = {
        "ds_config.json": json.dumps(training_config(job), indent=2) + "\n",
        script: training_script(job, model, gpus_per_node=gpus_per_node),
        "run.sh": f"#!/bin/sh\nset -e\n{training_command(job, model, gpus_per_node=gpus_per_node)}\n",
        "EXPLAINED.md": explain_files(job, model, gpus_per_node=gpus_per_node),
    }
    if n_nodes > 1:
        files["hostfile"] = hostfile([f"node{i}" for i in range(1, n_nodes + 1)], gpus_per_node)
    return files


def training_script(job: TrainJob, model: Model, *, gpus_per_node: int = 8) -> str:
    """Return the Python file that `training_command` names; for a pipeline, the module split."""
    name = json.dumps(model_argument(model), ensure_ascii=False)
    title = comment(f"DeepSpeed training of {model.name}: ZeRO stage {job.zero_stage}, {plural(job.n_gpus, 'GPU')}")
    command = comment(training_command(job, model, gpus_per_node=gpus_per_node), 300)
    if job.pp > 1:
        split = list(job.stage_layers) or stage_layers(model.n_layers, job.pp)
        m, p = job.gradient_accumulation_steps, job.pp
        return _PIPELINE.format(
            title=title,
            command=command,
            model=name,
            split=", ".join(str(n) for n in split),
            bubble=(p - 1) / (m + p - 1),
            n_layers=model.n_layers,
            stages=p,
            bounds=stage_bounds(split),
            import_topology=_IMPORT_TOPOLOGY if job.tp > 1 else "",
            degrees=(_TOPOLOGY if job.tp > 1 else _STAGES).format(stages=p, tp=job.tp, dp=job.dp),
            split_layers=_SPLIT_LAYERS.format(tp=job.tp) if job.tp > 1 else "",
            split_class=_SPLIT,
            interval=1 if job.is_checkpointed else 0,
            steps=max(1, job.total_tokens // (job.train_batch_size * job.sequence_length)),
            accumulation=m,
        )
    checkpointing = ""
    if job.is_checkpointed:
        checkpointing = "model.gradient_checkpointing_enable()  # the ds_config block does not switch it on\n"
    if job.lora_rank:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        if job.lora_targets == "all-linear":
            targets += ["gate_proj", "up_proj", "down_proj"]
        adapter = f"peft.LoraConfig(r={job.lora_rank}, target_modules={json.dumps(targets)})"
        checkpointing += f"import peft\n\nmodel = peft.get_peft_model(model, {adapter})\n"
    zero_init = ""
    # transformers' HfDeepSpeedConfig does not start without accelerate
    needs = ["deepspeed", "transformers"] + ["accelerate"] * (job.zero_stage == 3) + ["peft"] * (job.lora_rank > 0)
    if job.zero_stage == 3:
        zero_init = "settings = transformers.integrations.HfDeepSpeedConfig(args.deepspeed_config)  # shards on load\n"
    return _TRAIN.format(
        title=title,
        command=command,
        needs=" ".join(needs),
        model=name,
        length=job.sequence_length,
        dtype={"bf16": "bfloat16", "fp16": "float16"}[job.dtype],
        checkpointing=checkpointing,
        zero_init=zero_init,
    )
