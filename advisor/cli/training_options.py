"""Options of `advisor train` that fix a part of the job instead of searching it."""

from __future__ import annotations

import argparse
from typing import Any

from advisor.cli.parse import UsageError, count, natural, positive
from advisor.errors import printable

PLACES = ("none", "cpu", "nvme")
FIELDS = {
    "zero_stage": "zero_stage",
    "micro_batch": "micro_batch_size",
    "tp": "tp",
    "pp": "pp",
    "offload_optimizer": "offload_optimizer",
    "offload_param": "offload_param",
    "checkpointing": "is_checkpointed",
    "stack": "stack",
    "dtype": "dtype",
    "lora_targets": "lora_targets",
    "stage_layers": "stage_layers",
    "chunks": "n_chunks",
    "bucket": "bucket_params",
    "overlap": "has_overlap",
    "hpz": "hpz_ranks",
    "quantized_weights": "has_quantized_weights",
    "quantized_gradients": "has_quantized_gradients",
}
"""Option -> field of TrainJob."""


def layers(text: str) -> tuple[int, ...]:
    """Return layers of each pipeline stage, '8,8,8,8'."""
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise argparse.ArgumentTypeError(f"'{printable(text)}' is no list of layers a stage, such as 7,8,8,9")
    return found


def add_training_job(p: argparse.ArgumentParser) -> None:
    """Add what fixes a part of the job; all of it is searched or DeepSpeed's default otherwise."""
    g = p.add_argument_group("fix a part of the job instead of searching it")
    g.add_argument(
        "--zero-stage", type=count, choices=(0, 1, 2, 3), help="1 optimizer states, 2 + gradients, 3 + weights sharded"
    )
    g.add_argument("--micro-batch", type=positive, metavar="N", help="sequences of one GPU in a micro-step")
    g.add_argument("--tp", type=positive, metavar="N", help="tensor-parallel degree (AutoTP)")
    g.add_argument("--pp", type=positive, metavar="N", help="pipeline stages")
    g.add_argument("--stage-layers", type=layers, metavar="LIST", help="layers of each stage, such as 7,8,8,9")
    g.add_argument("--chunks", type=positive, metavar="N", help="interleaved chunks a stage (--stack megatron only)")
    g.add_argument("--offload-optimizer", choices=PLACES, help="where the optimizer states rest")
    g.add_argument("--offload-param", choices=PLACES, help="where the parameters rest (stage 3)")
    g.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, help="full activation checkpointing, or none"
    )
    g.add_argument("--overlap", action=argparse.BooleanOptionalAction, help="overlap_comm")
    g.add_argument("--bucket", type=positive, metavar="N", help="elements of reduce and gather buckets (default 5e8)")
    g.add_argument(
        "--hpz", type=natural, metavar="K", help="ZeRO++ hpZ: a second copy of the weights over K ranks (0 = none)"
    )
    g.add_argument("--quantized-weights", action="store_true", default=None, help="ZeRO++ qwZ: int8 weights in gathers")
    g.add_argument(
        "--quantized-gradients", action="store_true", default=None, help="ZeRO++ qgZ: int4 gradients between nodes"
    )
    g.add_argument("--stack", choices=("transformers", "fused", "megatron"), help="model code (default transformers)")
    g.add_argument("--dtype", choices=("bf16", "fp16"), help="arithmetic (default bf16)")
    g.add_argument("--lora-targets", choices=("attention", "all-linear"), help="adapted matrices (default attention)")


def fixed_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of TrainJob that the command line fixes. Raises UsageError for options that need another."""
    given = {field: getattr(args, flag) for flag, field in FIELDS.items() if getattr(args, flag) is not None}
    if "stage_layers" in given and "pp" not in given:
        raise UsageError(f"--stage-layers names {len(given['stage_layers'])} stages; also give --pp")
    if len(given.get("stage_layers", ())) not in (0, given.get("pp")):
        raise UsageError(
            f"--stage-layers names {len(given['stage_layers'])} stages, --pp is {given['pp']}; give one each"
        )
    if "lora_targets" in given and not args.lora_rank:
        raise UsageError("--lora-targets needs --lora-rank")
    return given
