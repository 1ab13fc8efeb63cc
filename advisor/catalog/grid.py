"""Carbon intensity of electricity by country, from `data/energy/grid.toml`."""

from __future__ import annotations

from pathlib import Path

from advisor.catalog.files import data_root, read_toml
from advisor.errors import BadData, UnknownName


def read_grid(root: Path | None = None) -> dict[str, float]:
    """Return the carbon intensity of each country's electricity [kg CO2e/kWh], by lower-case name with hyphens."""
    path = (root or data_root()) / "energy" / "grid.toml"
    table = read_toml(path).get("kgco2e_per_kwh")
    if not isinstance(table, dict) or not all(isinstance(v, int | float) and v >= 0 for v in table.values()):
        raise BadData(str(path), "[kgco2e_per_kwh] must hold one number of at least 0 a country")
    return {name: float(value) for name, value in table.items()}


def grid_kgco2e_per_kwh(country: str, root: Path | None = None) -> float:
    """Return the carbon intensity of a country's electricity [kg CO2e/kWh]; UnknownName with the nearest names."""
    table = read_grid(root)
    key = "-".join(country.strip().lower().split())
    key = ALIASES.get(key, key)
    if key not in table:
        raise UnknownName("grid", country, table, f"Grids: {', '.join(sorted(table))}.")
    return table[key]


ALIASES = {
    "us": "united-states",
    "usa": "united-states",
    "uk": "united-kingdom",
    "gb": "united-kingdom",
    "de": "germany",
    "fr": "france",
    "se": "sweden",
    "no": "norway",
    "ie": "ireland",
    "in": "india",
    "jp": "japan",
    "pl": "poland",
    "uae": "united-arab-emirates",
    "korea": "south-korea",
}
