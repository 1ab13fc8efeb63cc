"""What a GPU hour costs: published prices with date and source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from advisor.catalog.files import read_toml
from advisor.errors import BadData, UnknownName
from advisor.schema import Price, first_error


@dataclass(frozen=True)
class PriceChoice:
    """The price that is used and the other providers' prices of the same kind, cheapest first."""

    price: Price
    alternatives: tuple[Price, ...]


class PriceFiles:
    """Reads `data/prices/` lazily: one TOML file a provider with a list of [[price]] tables."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._prices: tuple[Price, ...] | None = None

    def all(self) -> tuple[Price, ...]:
        """Return every price, provider by provider."""
        if self._prices is None:
            self._prices = tuple(p for path in sorted(self._folder.glob("*.toml")) for p in _read(path))
        return self._prices

    def for_gpu(self, gpu_name: str, provider: str | None = None, kind: str = "on-demand") -> Price | None:
        """Return the price to use for a GPU [USD per GPU hour], None when none is published.

        With a provider, its cheapest instance; without, the median provider (the lower one of the middle pair).
        Errors: UnknownName for a provider that has no price file.
        """
        choice = self.choose(gpu_name, provider, kind)
        return choice.price if choice else None

    def choose(self, gpu_name: str, provider: str | None = None, kind: str = "on-demand") -> PriceChoice | None:
        """Return the price to use and the alternatives, None when none is published."""
        if provider is not None:
            known = sorted({p.provider for p in self.all()})
            if provider.lower() not in known:
                raise UnknownName("provider", provider, known, f"Published prices: {', '.join(known)}.")
        cheapest: dict[str, Price] = {}
        for price in self.all():
            if price.gpu == gpu_name and price.kind == kind:
                best = cheapest.get(price.provider)
                if best is None or price.usd_per_gpu_h < best.usd_per_gpu_h:
                    cheapest[price.provider] = price
        ordered = sorted(cheapest.values(), key=lambda p: (p.usd_per_gpu_h, p.provider))
        if provider is not None:
            taken = cheapest.get(provider.lower())
        else:
            taken = ordered[(len(ordered) - 1) // 2] if ordered else None
        if taken is None:
            return None
        return PriceChoice(taken, tuple(p for p in ordered if p is not taken))


def _read(path: Path) -> list[Price]:
    table = read_toml(path)
    rows = table.pop("price", None)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise BadData(str(path), "must hold [[price]] tables")
    try:
        return [Price.model_validate(table | row) for row in rows]
    except ValidationError as error:
        raise BadData(str(path), first_error(error)) from None
