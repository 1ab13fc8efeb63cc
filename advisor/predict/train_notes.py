"""Remarks on a training job."""

from __future__ import annotations

from advisor.laws.zero import estimator_bytes
from advisor.predict.train_memory import Sizes
from advisor.schema import Cluster, CoefficientSet, Note
from advisor.schema.training import TrainJob
from advisor.units import format_bytes


def notes_of(cluster: Cluster, job: TrainJob, sizes: Sizes, coefficients: CoefficientSet) -> list[Note]:
    """Return remarks on a job: what its numbers rest on, and settings that do nothing here."""
    notes = []
    if cluster.gpu.name != coefficients.gpu:
        notes.append(
            Note(level="warning", text=f"fitted on {coefficients.gpu}; {cluster.gpu.name} is scaled by datasheet")
        )
    if "bf16" not in cluster.gpu.peak_flops_per_s:
        notes.append(Note(text=f"{cluster.gpu.label} has no bf16 arithmetic: fp16 with loss scaling"))
    if job.zero_stage == 3:
        notes.append(
            Note(text="stage 3 runs host hooks in every module: small models are bound by the host, not by the GPU")
        )
    if job.has_quantized_gradients and cluster.n_nodes == 1:
        notes.append(Note(level="warning", text="quantised gradients act only between nodes: no effect on one node"))
    if job.hpz_ranks and cluster.n_nodes == 1:
        notes.append(
            Note(
                level="warning",
                text="hpZ keeps gathers off the network between nodes: one node only pays its memory",
            )
        )
    if job.pp > 1 and job.tp > 1 and job.stack != "megatron":
        notes.append(
            Note(
                level="warning",
                text="a pipeline of split layers needs layers that split themselves (Megatron-LM's): AutoTP stops at a"
                " pipeline",
            )
        )
    if job.offload_optimizer != "none" or job.offload_param != "none":
        host = format_bytes(cluster.host_memory_bytes_per_gpu)
        drives = f"{format_bytes(cluster.nvme_bytes)} at {format_bytes(cluster.nvme_bytes_per_s)}/s on a node's drives"
        notes.append(Note(text=f"offload counts on {host} of host memory a GPU, {drives}; yours may differ"))
    if job.zero_stage > 1:
        places = {("none", "none"): "none", ("cpu", "none"): "optimizer", ("nvme", "none"): "optimizer"}
        where = places.get((job.offload_optimizer, job.offload_param), "both")
        s = sizes.shapes
        largest = max(s.embedding_params, s.d_model * max(s.d_ff, s.n_heads * s.d_head)) / job.tp
        bytes_ = estimator_bytes(sizes.n_params, job.dp, job.zero_stage, largest_layer_params=largest, offload=where)
        text = f"DeepSpeed's own estimator says {format_bytes(bytes_)} a GPU: model states alone, without activations,"
        notes.append(Note(text=f"{text} buckets, gathered parameters and the copies of a step"))
    if job.n_chunks > 1:
        notes.append(
            Note(
                level="warning",
                text="interleaved chunks are Megatron-LM's: DeepSpeed's own engine has 1F1B and DualPipeV only",
            )
        )
    if job.zero_stage == 3 and sizes.n_params / job.dp < 5e8:
        notes.append(Note(text="with few parameters a rank, stage 3's bucket can exceed its saving"))
    if cluster.n_nodes > 1:
        rate = format_bytes(cluster.internode_bytes_per_s_per_gpu)
        text = f"the network between nodes ({rate}/s a GPU) rests on published runs, none of ours"
        notes.append(Note(level="warning", text=text))
    elif job.n_gpus > 2:
        notes.append(Note(text="communication was measured on two GPUs of one node"))
    return notes
