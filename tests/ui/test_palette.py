"""Series that appear together can be told apart, by whoever looks: by colour for any colour vision, or by shape."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from plotly.colors import sample_colorscale

from advisor.schema import Breakdown, Interval, Part, Request, Slo
from advisor.ui import call, charts, charts_plans, charts_trust
from advisor.ui.text import BACKENDS

APART = 20.0
"""Distance in CIE Lab (1976) that two series keep: eight times a just noticeable one (2.3, Mahy et al. 1994)."""
# Machado, Oliveira, Fernandes 2009, A Physiologically-based Model for Simulation of Color Vision Deficiency,
# doi:10.1109/TVCG.2009.113, table 1, severity 1.0; on linear RGB.
VISIONS = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# IEC 61966-2-1: linear sRGB to CIE XYZ, white point D65.
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour: str) -> Any:
    """Linear RGB of '#RRGGBB'."""
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(colour: str, vision: str) -> Any:
    """CIE Lab of a colour as somebody sees it."""
    xyz = TO_XYZ @ np.clip(VISIONS[vision] @ linear(colour), 0, 1) / WHITE
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def apart(a: str, b: str) -> float:
    """Smallest distance of two colours over all visions."""
    return min(float(np.linalg.norm(lab(a, v) - lab(b, v))) for v in VISIONS)


def contrast(a: str, b: str) -> float:
    """Contrast ratio of WCAG 2.2."""
    dark, light = sorted(float(TO_XYZ[1] @ linear(c)) for c in (a, b))
    return (light + 0.05) / (dark + 0.05)


def test_the_simulation_knows_which_colours_are_confused() -> None:
    # the classic: a red and a green of one lightness are one colour without M cones, and far apart with them
    red, green = "#C85A3C", "#8A7A1E"
    assert float(np.linalg.norm(lab(red, "full") - lab(green, "full"))) > 40
    assert float(np.linalg.norm(lab(red, "deuteranopia") - lab(green, "deuteranopia"))) < 15
    assert lab("#FFFFFF", "full") == pytest.approx([100, 0, 0], abs=0.1)
    # sRGB red in CIE Lab, D65 (Lindbloom's calculator)
    assert lab("#FF0000", "full") == pytest.approx([53.24, 80.09, 67.20], abs=0.05)


def test_any_two_colours_of_the_charts_are_apart_for_any_vision() -> None:
    pairs = {(a, b): apart(a, b) for a, b in combinations((*charts.COLOURS, charts.GREY), 2)}
    assert min(pairs.values()) >= APART, min(pairs, key=lambda p: pairs[p])


def test_colours_stand_out_on_both_grounds(root: Path) -> None:
    theme = tomllib.loads((root / ".streamlit" / "config.toml").read_text())["theme"]
    grounds = [theme[name]["backgroundColor"] for name in ("light", "dark")]
    for colour in (*charts.COLOURS, charts.GREY):
        # Okabe and Ito's orange and sky blue have 2.2 and 2.3 on white; marks and bars of them have words or shapes too
        assert min(contrast(colour, ground) for ground in grounds) >= 2.2, colour
    assert theme["chartCategoricalColors"] == list(charts.COLOURS), "streamlit's own charts use the same"


@pytest.mark.parametrize("scale", [charts_plans.SCALE, charts_trust.COLOURS], ids=["third axis", "error grid"])
def test_a_scale_of_colours_keeps_its_order_for_any_vision(scale: Any) -> None:
    steps = sample_colorscale(scale, [0.0, 0.25, 0.5, 0.75, 1.0], colortype="tuple")
    shades = [f"#{round(255 * r):02X}{round(255 * g):02X}{round(255 * b):02X}" for r, g, b in steps]
    for vision in VISIONS:
        ends = np.linalg.norm(lab(shades[0], vision) - lab(shades[-1], vision))
        assert ends >= 40, vision
        far = [float(np.linalg.norm(lab(s, vision) - lab(shades[0], vision))) for s in shades]
        assert far == sorted(far), vision


def looks(trace: Any) -> dict[str, str]:
    """How a series is drawn: its colour, and what else sets it apart."""
    marker, line = getattr(trace, "marker", None), getattr(trace, "line", None)
    symbol = getattr(marker, "symbol", None)
    pattern = getattr(marker, "pattern", None)
    colour = (marker.color if marker and isinstance(marker.color, str) else None) or (line.color if line else None)
    return {
        "colour": str(colour),
        "symbol": str(symbol[0] if isinstance(symbol, tuple) else symbol),
        "dash": str((line.dash if line else None) or "solid"),
        "hatch": str((pattern.shape if pattern else None) or ""),
    }


def parted(n: int) -> Breakdown:
    return Breakdown(name="b", unit="s", total=n, parts=tuple(Part(name=f"part {i}", value=1.0) for i in range(n)))


def roofline() -> Any:
    return charts_plans.roofline(call.look(Request(model="8b", gpus="1xH100", rate=2.0), {"tp": 1}).roofline, "H100")


def rows_of_limits() -> Any:
    from advisor.recommend.power import Terms

    return call.power(Request(model="8b", gpus="1xH100", rate=2.0), {"tp": 1}, Terms()).limits


def cloud(a_plan: Callable[..., Any]) -> Any:
    plans = [a_plan(i + 1, name, tpot_s=0.03, usd=3.0 + i) for i, name in enumerate(BACKENDS)]
    return charts_plans.pareto(plans, "usd_per_h", "tpot_p99_s", Slo())


def pipeline() -> Any:
    return charts_plans.slots(
        [("stage 0", "forward", 0, 1), ("stage 1", "forward", 1, 2), ("stage 0", "backward", 3, 4)]
    )


def curves() -> Any:
    one = {name: Interval(value=1, low=0.9, high=1.1) for name in ("ttft_p99_s", "ttft_p50_s")}
    return charts.curves([(1.0, one), (2.0, one)], tuple(one), "requests_per_s", Slo())


FIGURES: dict[str, Callable[[], Any]] = {
    "a bar of nine parts": lambda: charts.stacked({"b": parted(9)}),
    "a bar of twenty parts": lambda: charts.stacked({"b": parted(20)}),
    "curves": curves,
    "over time": lambda: charts.over_time([0, 1], {name: [1, 2] for name in ("a", "b", "c", "d")}, "t"),
    "hours": lambda: charts.hours(["0"], {name: [1] for name in ("serving", "batch", "training", "idle")}, 4),
    "roofline": roofline,
    "power limits": lambda: charts_plans.power_limits(rows_of_limits(), {}),
    "pipeline": pipeline,
    "predicted against measured": lambda: charts_trust.against(
        {f"model {i}": [(1.0, 1.1, "w")] for i in range(15)}, "s", "TTFT"
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_series_that_appear_together_can_be_told_apart(name: str) -> None:
    told_apart(FIGURES[name]())


def test_engines_can_be_told_apart(a_plan: Callable[..., Any]) -> None:
    told_apart(cloud(a_plan))


def told_apart(figure: Any) -> None:
    drawn = [t for t in figure.data if t.name]
    assert len(drawn) > 1
    for a, b in combinations(drawn, 2):
        one, other = looks(a), looks(b)
        differ = {key for key in one if one[key] != other[key]}
        is_line = "lines" in (getattr(a, "mode", "") or "") and "lines" in (getattr(b, "mode", "") or "")
        both = f"{a.name} and {b.name}: {one}, {other}"
        if is_line:
            assert differ & {"dash", "symbol"}, f"lines cross: {both}"
        elif not differ - {"colour"}:
            assert one["colour"].startswith("#"), both
            assert apart(one["colour"], other["colour"]) >= APART, both
