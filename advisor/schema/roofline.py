"""A card's roofline and where the phases of serving lie under it."""

from pydantic import Field

from advisor.schema.base import Name, NonNegativeFloat, Noun, PositiveFloat


class OperatingPoint(Noun):
    """What one GPU does in one kind of step."""

    name: Name = Field(description="prefill, decode, or whole run")
    what: str = Field(description="the step in words: tokens, sequences, context")
    n_tokens: NonNegativeFloat = Field(description="tokens computed in the step, the whole replica's")
    seconds: PositiveFloat = Field(description="time of the step [s]")
    flops_per_byte: PositiveFloat = Field(description="useful operations per byte moved to or from device memory")
    flops_per_s: PositiveFloat = Field(description="useful operations a second of one GPU")
    is_host_bound: bool = Field(default=False, description="the GPU waits for the launch of the step")


class Roofline(Noun):
    """The two ceilings of a card, what the fit says that kernels reach of them, and the operating points."""

    gpu: Name
    peak_flops_per_s: PositiveFloat = Field(description="dense peak of the weights' format, from the datasheet")
    memory_bandwidth_bytes_per_s: PositiveFloat = Field(description="from the datasheet")
    reached_flops_per_s: PositiveFloat = Field(description="large matrices at the fitted efficiency")
    reached_bytes_per_s: PositiveFloat = Field(description="streamed weights at the fitted efficiency")
    points: tuple[OperatingPoint, ...] = Field(description="prefill, decode and the whole run at this load")
    prefill: tuple[OperatingPoint, ...] = Field(description="prompts from short to the step's token budget")
    decode: tuple[OperatingPoint, ...] = Field(description="batches from one sequence to the most that run together")

    @property
    def ridge_flops_per_byte(self) -> float:
        """Return the intensity above which the card is limited by arithmetic, not by memory."""
        return self.peak_flops_per_s / self.memory_bandwidth_bytes_per_s
