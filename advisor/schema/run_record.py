"""The run record, schema 1: one measured cell of one engine start."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from advisor.schema.base import Name, NonNegativeFloat, NonNegativeInt, Noun, PositiveFloat, PositiveInt


class OpenNoun(Noun):
    """A noun that keeps fields it does not know: a record may carry more than the schema names."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class Percentiles(OpenNoun):
    """Statistics of one latency over the requests of a cell [s]."""

    mean: NonNegativeFloat
    p50: NonNegativeFloat
    p90: NonNegativeFloat
    p95: NonNegativeFloat
    p99: NonNegativeFloat


class BoardPower(OpenNoun):
    """Board power summed over the engine's GPUs [W]."""

    mean: NonNegativeFloat
    max: NonNegativeFloat | None = None
    sm_clock_mhz: NonNegativeFloat | None = None
    n_gpus: PositiveInt = 1


class Measured(OpenNoun):
    """What the client and the power meter saw."""

    n_requests: NonNegativeInt | None = None
    duration_s: PositiveFloat | None = None
    requests_per_s: NonNegativeFloat | None = None
    output_tokens_per_s: NonNegativeFloat | None = None
    input_tokens_per_s: NonNegativeFloat | None = None
    ttft_s: Percentiles | None = None
    tpot_s: Percentiles | None = None
    e2e_s: Percentiles | None = None
    itl_max_s: Percentiles | None = None
    board_power_w: BoardPower | None = None
    energy_j: NonNegativeFloat | None = None


class Startup(OpenNoun):
    """The engine's own figures at start, per GPU."""

    weights_bytes: NonNegativeFloat | None = None
    peak_activation_bytes: NonNegativeFloat | None = None
    non_torch_bytes: NonNegativeFloat | None = None
    cuda_graph_bytes: NonNegativeFloat | None = None
    kv_cache_bytes: NonNegativeFloat | None = None
    kv_cache_tokens: NonNegativeInt | None = None
    n_kv_blocks: PositiveInt | None = None
    kv_block_tokens: PositiveInt | None = None
    device_memory_bytes: PositiveFloat | None = None
    startup_s: NonNegativeFloat | None = None


class RunRecord(OpenNoun):
    """One cell. `load` and `lengths` are checked when they become a Workload."""

    schema_: Literal[1] = Field(alias="schema")
    run_id: Name
    engine: Name
    engine_version: Name
    gpu: Name
    n_gpus: PositiveInt
    interconnect: str = "nvlink"
    idle_power_w: NonNegativeFloat | None = None
    power_limit_w_per_gpu: PositiveFloat | None = None
    model: Name
    hf_config: dict[str, Any]
    random_weights: bool = True
    tp: PositiveInt = 1
    pp: PositiveInt = 1
    dp: PositiveInt = 1
    weight_dtype: Name = "bf16"
    kv_dtype: Name = "bf16"
    max_model_len: PositiveInt | None = None
    max_num_batched_tokens: PositiveInt | None = None
    max_num_seqs: PositiveInt | None = None
    gpu_memory_utilization: PositiveFloat | None = None
    prefix_caching: bool = False
    enforce_eager: bool = False
    startup: Startup | None = None
    load: dict[str, Any] | None = None
    lengths: dict[str, Any] | None = None
    measured: Measured
