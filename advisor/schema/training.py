"""A training or fine-tuning job on DeepSpeed, and what is predicted of it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from advisor.schema.base import Name, NonNegativeInt, Noun, PositiveFloat, PositiveInt
from advisor.schema.provenance import Interval, Note
from advisor.schema.result import Breakdown

OffloadTarget = Literal["none", "cpu", "nvme"]


class TrainJob(Noun):
    """How a model is trained: ZeRO stage, offload, parallel degrees, batch. `n_gpus = tp * pp * dp`."""

    model: Name
    zero_stage: int = Field(default=2, ge=0, le=3, description="1 optimizer states, 2 + gradients, 3 + parameters")
    offload_optimizer: OffloadTarget = "none"
    offload_param: OffloadTarget = "none"
    micro_batch_size: PositiveInt = Field(default=1, le=65536, description="sequences of one GPU in one micro-step")
    sequence_length: PositiveInt = Field(default=2048, le=10**7)
    gradient_accumulation_steps: PositiveInt = Field(default=1, le=10**6, description="micro-steps of one step")
    tp: PositiveInt = Field(default=1, le=1024)
    pp: PositiveInt = Field(default=1, le=1024)
    dp: PositiveInt = Field(default=1, le=65536)
    n_chunks: PositiveInt = Field(default=1, le=64, description="model chunks a stage (interleaved schedule)")
    stage_layers: tuple[NonNegativeInt, ...] = Field(default=(), description="layers of each stage, empty = even")
    is_checkpointed: bool = Field(default=False, description="full activation checkpointing")
    dtype: Literal["bf16", "fp16"] = "bf16"
    optimizer: Literal["fused-adam", "cpu-adam"] = "fused-adam"
    stack: Literal["transformers", "fused", "megatron"] = Field(
        default="transformers",
        description="model code: eager transformers, fused kernels with flash attention, or Megatron of 2022",
    )
    lora_rank: NonNegativeInt = Field(default=0, le=65536, description="0 = all parameters are trained")
    lora_targets: Literal["attention", "all-linear"] = "attention"
    bucket_params: PositiveFloat = Field(default=5e8, description="reduce_bucket_size and allgather_bucket_size")
    has_overlap: bool | None = Field(default=None, description="overlap_comm; default: only in stage 3")
    hpz_ranks: NonNegativeInt = Field(default=0, description="ZeRO++ zero_hpz_partition_size, 0 = off")
    has_quantized_weights: bool = Field(default=False, description="ZeRO++ zero_quantized_weights")
    has_quantized_gradients: bool = Field(default=False, description="ZeRO++ zero_quantized_gradients")
    total_tokens: NonNegativeInt = Field(default=0, description="tokens to train on, 0 = no total asked")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stage_layers and len(self.stage_layers) != self.pp:
            raise ValueError(f"stage_layers names {len(self.stage_layers)} stages, pp is {self.pp}")
        return self

    @property
    def n_gpus(self) -> int:
        """Return the GPUs of the job."""
        return self.tp * self.pp * self.dp

    @property
    def train_batch_size(self) -> int:
        """Return the sequences of one optimizer step, all GPUs together."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.dp


class TrainPrediction(Noun):
    """Predicted step time, memory and traffic of one job; every number with a 90 % interval."""

    quantities: dict[str, Interval]
    breakdowns: tuple[Breakdown, ...] = ()
    notes: tuple[Note, ...] = ()

    def __getitem__(self, name: str) -> float:
        """Return the value of a quantity by its name."""
        return self.quantities[name].value


class TrainPlan(Noun):
    """One job that fits, what is predicted of it, and what to run."""

    rank: int
    job: TrainJob
    prediction: TrainPrediction
    usd_per_h: float
    usd_per_million_tokens: float
    command: str = Field(description="launch line; it names the script and ds_config.json")
    reasons: tuple[str, ...] = ()


class TrainRejected(Noun):
    """Jobs that cannot run for one reason, and the nearest number that would."""

    job: TrainJob
    reason: str
    nearest: str = ""
    count: int = Field(default=1, description="how many jobs share this reason")


class TrainAnswer(Noun):
    """The answer to 'how do I train this model here': plans from best to worst, and why others cannot run."""

    model: str
    gpus: str
    best: TrainPlan | None
    plans: tuple[TrainPlan, ...]
    rejected: tuple[TrainRejected, ...]
    n_considered: int
    why: tuple[str, ...] = ()
    flips: tuple[str, ...] = Field(default=(), description="where the best plan stops being the best")
    alternatives: tuple[str, ...] = Field(default=(), description="the best plan of each other kind, how far behind")
    notes: tuple[Note, ...] = ()
