"""What a deployment draws, costs and emits, and what a lower power limit would change."""

from pydantic import Field

from advisor.schema.base import Fraction, Name, NonNegativeFloat, NonNegativeInt, Noun, PositiveFloat, PositiveInt
from advisor.schema.provenance import Interval, Note
from advisor.schema.result import Breakdown, Plan


class LimitRow(Noun):
    """A deployment whose boards run at a power limit, under the same traffic."""

    limit_w: PositiveFloat = Field(description="of one board")
    clock_frac: Fraction = Field(description="clock of a busy board over its nominal clock")
    speed_frac: Fraction = Field(description="speed of a step over its speed at the board's own limit")
    board_power_w: NonNegativeFloat = Field(description="mean of all boards")
    requests_per_s: NonNegativeFloat
    output_tokens_per_s: NonNegativeFloat
    energy_j_per_output_token: NonNegativeFloat = Field(description="boards alone")
    node_energy_j_per_output_token: NonNegativeFloat = Field(description="boards and the rest of their nodes")
    latency_s: dict[str, float] = Field(description="ttft_p99_s and the like; empty when saturated")
    is_saturated: bool
    meets_slo: bool = Field(description="serves the load, within every target where there are targets")


class RackFit(Noun):
    """How many nodes a rack's power feeds with every board at its limit."""

    rack_w: PositiveFloat
    gpus_per_node: PositiveInt
    node_reserve_w: PositiveFloat = Field(description="power that one node must be given: boards and the rest")
    n_nodes: NonNegativeInt
    n_deployments: NonNegativeInt = Field(description="copies of this deployment that those nodes hold")
    output_tokens_per_s: NonNegativeFloat = Field(description="of all copies, each under this traffic")
    best_limit_w: PositiveFloat | None = Field(default=None, description="lower limit that keeps the targets")
    n_nodes_at_best_limit: NonNegativeInt | None = None


class PowerReport(Noun):
    """Power, energy, emissions and money of one deployment at the load that it serves."""

    model: Name
    plan: Plan
    board_power: Breakdown | None = Field(description="None where only the sum is known (DeepSpeed)")
    energy: dict[str, Interval] = Field(description="boards alone")
    node_energy: dict[str, Interval] = Field(description="whole nodes: CPUs, fans, network cards, losses too")
    money: dict[str, Interval] = Field(description="empty where no price is known")
    limits: tuple[LimitRow, ...] = ()
    best_energy_limit_w: PositiveFloat | None = Field(default=None, description="fewest J per token of the boards")
    best_node_energy_limit_w: PositiveFloat | None = Field(default=None, description="fewest J per token of the nodes")
    best_slo_limit_w: PositiveFloat | None = Field(
        default=None, description="fewest J per token of the nodes among limits that keep load and targets"
    )
    rack: RackFit | None = None
    notes: tuple[Note, ...] = ()
