"""What a day's plan costs, draws and emits in a month, at every provider whose price is known."""

from pydantic import Field

from advisor.schema.base import Name, NonNegativeFloat, Noun, PositiveFloat, PositiveInt
from advisor.schema.provenance import Interval


class CloudBill(Noun):
    """The rent of one month at one provider's price."""

    provider: Name
    kind: Name = Field(description="on-demand, spot or reserved")
    region: str
    date: Name = Field(description="when the price was read")
    usd_per_gpu_h: PositiveFloat
    usd_per_month: NonNegativeFloat = Field(description="the GPUs of the plan, paid day and night")
    usd_per_month_following: NonNegativeFloat = Field(description="only the GPU hours in which they serve or work")


class Month(Noun):
    """A month of 730 hours of the same day."""

    n_gpus: PositiveInt = Field(description="GPUs of the plan, paid day and night")
    gpu_hours_per_day: NonNegativeFloat = Field(description="GPU hours in which GPUs serve or work offline")
    board_power_w: tuple[NonNegativeFloat, ...] = Field(description="mean power of all boards, hour by hour")
    board_kwh: Interval = Field(description="energy of the boards in a month")
    node_kwh: Interval = Field(description="of whole nodes: boards, CPUs, fans, network cards, losses")
    facility_kwh: Interval = Field(description="of whole nodes, times the PUE")
    electricity_usd: Interval | None = Field(default=None, description="None where no price a kWh is given")
    kgco2e: Interval | None = Field(default=None, description="None where no carbon intensity is given")
    own_usd: float | None = Field(default=None, description="own hardware and its electricity, where a price is given")
    bills: tuple[CloudBill, ...]
