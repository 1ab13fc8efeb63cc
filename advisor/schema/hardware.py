"""GPUs, nodes and clusters: datasheet facts, each with a source."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from advisor.schema.base import Name, NonNegativeFloat, NonNegativeInt, Noun, PositiveFloat, PositiveInt
from advisor.schema.provenance import Source

# Bounds of a card's figures, a hundred times today's largest: a wrong power of ten in a file is an error.
MAX_BYTES, MAX_BYTES_PER_S, MAX_FLOPS_PER_S, MAX_BOARD_W = 3e13, 1e15, 1e18, 2e5
MIN_BYTES, MIN_BYTES_PER_S, MIN_FLOPS_PER_S = 1e8, 1e9, 1e10

Dtype = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "int8", "fp4"]


class Gpu(Noun):
    """One GPU. Peaks are dense (no sparsity), bandwidths decimal and one direction."""

    name: Name = Field(description="catalogue name such as 'h100-sxm-80gb'")
    label: Name = Field(description="name for people, such as 'NVIDIA H100 SXM 80 GB'")
    aliases: tuple[str, ...] = Field(default=(), description="other names that resolve to this one")
    vendor: Literal["nvidia", "amd", "other"]
    family: Name = Field(description="architecture: volta, ampere, ada, hopper, blackwell, cdna3")
    compute_capability: str = Field(default="", description="CUDA compute capability, such as '9.0'")
    memory_bytes: PositiveFloat = Field(
        ge=MIN_BYTES, le=MAX_BYTES, description="datasheet memory, decimal bytes as the vendor means it"
    )
    device_memory_bytes: PositiveFloat = Field(
        ge=MIN_BYTES, le=MAX_BYTES, description="memory that the driver reports to a process"
    )
    memory_bandwidth_bytes_per_s: PositiveFloat = Field(ge=MIN_BYTES_PER_S, le=MAX_BYTES_PER_S)
    peak_flops_per_s: dict[Dtype, Annotated[float, Field(ge=MIN_FLOPS_PER_S, le=MAX_FLOPS_PER_S)]] = Field(
        description="dense peak per dtype"
    )
    board_power_w: PositiveFloat = Field(le=MAX_BOARD_W, description="default board power limit")
    idle_power_w: NonNegativeFloat = Field(description="board power with no work and a driver loaded")
    link: Literal["nvlink", "pcie", "xgmi"] = Field(description="how GPUs of one node talk to each other")
    link_bytes_per_s: PositiveFloat = Field(le=MAX_BYTES_PER_S, description="one direction, per GPU, within a node")
    host_link_bytes_per_s: PositiveFloat = Field(
        le=MAX_BYTES_PER_S, description="one direction, host to GPU (PCIe or C2C)"
    )
    n_sms: NonNegativeInt = Field(default=0, le=4096, description="streaming multiprocessors or CUs, 0 = unknown")
    max_gpus_per_node: PositiveInt = Field(default=8, le=1024)
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_half_precision(self) -> Self:
        if not {"bf16", "fp16"} & set(self.peak_flops_per_s):
            raise ValueError("peak_flops_per_s must name bf16 or fp16")
        if self.idle_power_w >= self.board_power_w:
            raise ValueError("idle_power_w must be below board_power_w")
        if self.device_memory_bytes > 1.1 * self.memory_bytes:
            raise ValueError(
                "device_memory_bytes, what the driver reports, cannot exceed memory_bytes of the datasheet"
            )
        return self


class Cluster(Noun):
    """`n_nodes` equal nodes of `gpus_per_node` GPUs; the node is what NVLink or PCIe spans."""

    gpu: Gpu
    n_nodes: PositiveInt = Field(default=1, le=100_000)
    gpus_per_node: PositiveInt = Field(le=1024)
    host_memory_bytes_per_gpu: NonNegativeFloat = Field(
        default=192e9, description="host memory that a GPU's process may use for offload"
    )
    nvme_bytes_per_s: NonNegativeFloat = Field(default=6e9, description="NVMe read rate a node, for offload")
    nvme_bytes: NonNegativeFloat = Field(default=3.84e12, description="room on a node's NVMe drives, for offload")
    internode_bytes_per_s_per_gpu: PositiveFloat = Field(
        default=25e9, description="network rate per GPU between nodes, one direction (200 Gb/s NIC a GPU)"
    )
    has_nvlink: bool = Field(default=True, description="false: the card's links are not connected, use PCIe")

    @property
    def n_gpus(self) -> int:
        """Return all GPUs of all nodes."""
        return self.n_nodes * self.gpus_per_node


class Price(Noun):
    """Rent of one GPU for one hour, as published on a day."""

    gpu: Name
    provider: Name
    instance: str = ""
    region: str = ""
    kind: Literal["on-demand", "spot", "reserved", "own"]
    usd_per_gpu_h: PositiveFloat
    n_gpus_per_instance: PositiveInt = 1
    date: Name
    source: Name
