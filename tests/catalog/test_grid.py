"""Carbon intensity of grids: names, order of magnitude, and what a wrong name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from advisor.catalog.grid import ALIASES, grid_kgco2e_per_kwh, read_grid
from advisor.errors import BadData, UnknownName


def test_grids_lie_between_hydropower_and_coal() -> None:
    table = read_grid()
    assert len(table) >= 15
    # IPCC AR5 annex III, life cycle: hydropower 24 g, coal 820 g a kWh
    assert all(0.02 < value < 0.82 for value in table.values())
    assert table["france"] < table["germany"] < table["poland"]


@pytest.mark.parametrize("name", ["United States", "us", " USA ", "united-states"])
def test_people_write_countries_in_many_ways(name: str) -> None:
    assert grid_kgco2e_per_kwh(name) == read_grid()["united-states"]


def test_aliases_lead_to_grids() -> None:
    assert set(ALIASES.values()) <= set(read_grid())


def test_an_unknown_grid_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="germany"):
        grid_kgco2e_per_kwh("germny")


def test_a_broken_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "energy").mkdir()
    (tmp_path / "energy" / "grid.toml").write_text('[kgco2e_per_kwh]\nnowhere = "much"\n')
    with pytest.raises(BadData, match="one number"):
        read_grid(tmp_path)
