"""Where a number comes from."""

from typing import Literal

from pydantic import Field

from advisor.schema.base import Noun


class Source(Noun):
    """One citation: what it supports, where it stands, when it was read, the words or figures quoted."""

    field: str = Field(description="name of the field or coefficient that this supports, or '*' for all")
    title: str = Field(description="document: datasheet, file in a public repository, run id")
    url: str = Field(default="", description="address of the document, empty for own runs")
    date: str = Field(default="", description="ISO date of the document or of the reading")
    quote: str = Field(default="", description="the words or figures that the number rests on")


class Interval(Noun):
    """A value with the interval that covers the truth with probability 0.9; unit as in the field name."""

    value: float
    low: float
    high: float


class Note(Noun):
    """A remark that travels with a result."""

    level: Literal["info", "warning", "error"] = "info"
    text: str
