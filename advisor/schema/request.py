"""What a user asks: model, hardware, traffic, targets, money."""

from typing import Literal, Self

from pydantic import Field, model_validator

from advisor.schema.base import NonNegativeFloat, NonNegativeInt, Noun, PositiveFloat, PositiveInt
from advisor.schema.deployment import Backend, KvDtype, WeightDtype
from advisor.schema.workload import MAX_TOKENS, PrefixSharing, Slo

Objective = Literal["cost", "latency", "throughput", "energy"]
Task = Literal["serve", "batch", "train", "mixed"]


class Request(Noun):
    """One question to the advisor.

    Give either `rate` (open loop, requests/s) or `concurrency` (closed loop); with neither, the preset's load is used.
    """

    model: str = Field(
        min_length=1, max_length=4096, description="catalogue name, hub id, short name or config.json path"
    )
    gpus: str = Field(min_length=1, max_length=400, description="'8xA100', '2x8xH100', '4xL40S'; commas compare pools")
    task: Task = "serve"
    workload: str = Field(default="chat", description="preset: chat, rag, summarise, code, agent, batch")
    prompt_tokens: PositiveInt | None = Field(default=None, le=MAX_TOKENS)
    output_tokens: PositiveInt | None = Field(default=None, le=MAX_TOKENS)
    length_sigma: NonNegativeFloat | None = Field(default=None, le=4)
    rate: PositiveFloat | None = Field(default=None, le=1e7, description="requests/s")
    concurrency: PositiveInt | None = Field(default=None, le=10**6)
    prefix: PrefixSharing | None = None
    slo: Slo = Field(default=Slo(), description="latency targets; empty = usual ones for online serving")
    is_best_effort: bool = Field(default=False, description="no latency targets at all, also no usual ones")
    objective: Objective = "cost"
    backends: tuple[Backend, ...] = ()
    weight_dtypes: tuple[WeightDtype, ...] = Field(
        default=(), description="allowed weight formats; empty = the checkpoint's own (no quality change)"
    )
    kv_dtypes: tuple[KvDtype, ...] = Field(default=(), description="allowed KV-cache formats; empty = the engine's own")
    max_model_len: PositiveInt | None = Field(default=None, le=10**9)
    engine_version: str = "0.26.0"
    price_usd_per_gpu_h: PositiveFloat | None = None
    host_memory_bytes_per_gpu: NonNegativeFloat | None = Field(
        default=None, le=1e14, description="host memory that a GPU's process may use for offload"
    )
    nvme_bytes: NonNegativeFloat | None = Field(default=None, le=1e17, description="room on a node's NVMe drives")
    nvme_bytes_per_s: NonNegativeFloat | None = Field(default=None, le=1e13, description="NVMe read rate of a node")
    network_bytes_per_s_per_gpu: PositiveFloat | None = Field(
        default=None, ge=1e6, le=1e13, description="network rate between nodes of each GPU, one direction"
    )
    provider: str | None = None
    price_kind: Literal["on-demand", "spot", "reserved", "own"] = "on-demand"
    power_cap_w: PositiveFloat | None = None
    budget_usd_per_h: PositiveFloat | None = None
    electricity_usd_per_kwh: NonNegativeFloat = 0.0
    pue: float = Field(default=1.0, ge=1, le=5)
    grid_kgco2e_per_kwh: NonNegativeFloat | None = None
    max_plans: PositiveInt = Field(default=10, le=1000)
    n_finalists: NonNegativeInt = Field(default=6, le=100, description="plans that are simulated, 0 = closed form only")
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_load(self) -> Self:
        if self.rate is not None and self.concurrency is not None:
            raise ValueError("give rate or concurrency, not both")
        return self
