"""One way to run a model: backend, parallel degrees, precisions, engine settings."""

from typing import Literal

from pydantic import Field

from advisor.schema.base import Name, NonNegativeFloat, NonNegativeInt, Noun, PositiveInt

Backend = Literal[
    "vllm",
    "deepspeed-zero-inference",
    "deepspeed-autotp",
    "deepspeed-kernel-injection",
    "deepspeed-fastgen",
]
WeightDtype = Literal["bf16", "fp16", "fp8", "awq-int4", "gptq-int4", "mxfp4", "int8", "int4"]
KvDtype = Literal["bf16", "fp16", "fp8"]


class Speculative(Noun):
    """Speculative decoding: a draft proposes tokens, the model checks them in one step."""

    n_draft_tokens: PositiveInt = Field(le=32)
    acceptance_frac: float = Field(ge=0, le=1, description="probability that one draft token is accepted")
    draft_cost_frac: NonNegativeFloat = Field(
        default=0.05, description="time of one draft token as a share of one decode step"
    )


class Deployment(Noun):
    """Everything an engine needs to be told, and where it runs. `n_gpus = tp * pp * dp`."""

    backend: Backend = "vllm"
    engine_version: str = "0.26.0"
    model: Name
    gpu: Name
    tp: PositiveInt = Field(default=1, le=1024)
    pp: PositiveInt = Field(default=1, le=1024)
    dp: PositiveInt = Field(default=1, le=65536)
    ep: PositiveInt = Field(default=1, le=65536, description="GPUs that share the experts; overlays tp and dp")
    n_nodes: PositiveInt = Field(default=1, description="nodes that one replica spans")
    weight_dtype: WeightDtype = "bf16"
    kv_dtype: KvDtype = "bf16"
    max_model_len: PositiveInt = Field(default=4096, le=10**9)
    max_num_batched_tokens: PositiveInt = Field(default=8192, le=10**9)
    max_num_seqs: PositiveInt = Field(default=256, le=10**7)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    prefix_caching: bool = False
    enforce_eager: bool = False
    kv_block_tokens: PositiveInt = Field(default=16, le=65536)
    n_kv_blocks: NonNegativeInt = Field(default=0, description="0 = what the memory law finds")
    speculative: Speculative | None = None
    static_batch: NonNegativeInt = Field(default=0, description="sequences of one static batch (DeepSpeed), 0 = none")
    offload: Literal["none", "cpu", "nvme"] = "none"
    kv_offload: Literal["none", "cpu"] = Field(default="none", description="where ZeRO-Inference keeps the cache")

    @property
    def n_gpus(self) -> int:
        """Return the GPUs that all replicas use together."""
        return self.tp * self.pp * self.dp
