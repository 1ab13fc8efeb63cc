"""The committed DeepSpeed coefficients are what their fit gives, and every one has an origin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.fit.deepspeed import eager_coefficients, inject_coefficients, model_of, zero_coefficients
from advisor.fit.deepspeed_training import training_coefficients, two_rates

ROOT = Path(__file__).resolve().parents[2]
RECORDS = [json.loads(x) for x in (ROOT / "data/runs/deepspeed-0.19.8_h100.jsonl").read_text().splitlines()]
PUBLIC = json.loads((ROOT / "data/golden/deepspeed_public.json").read_text())
COMMITTED = load_catalog().coefficients("deepspeed")


def test_the_committed_set_is_the_fit_s_output() -> None:
    found = eager_coefficients(RECORDS) | inject_coefficients(RECORDS)
    found |= zero_coefficients(RECORDS, PUBLIC) | training_coefficients(RECORDS, model_of)
    for name, c in found.items():
        assert COMMITTED.coefficients[name].value == pytest.approx(c.value, rel=1e-3), name
        assert COMMITTED.coefficients[name].source == c.source


def test_every_coefficient_has_a_source_and_keeps_to_its_bounds() -> None:
    runs = {r["run_id"] for r in RECORDS}
    for name, c in COMMITTED.coefficients.items():
        assert c.source, name
        assert c.bounds[0] <= c.low <= c.value <= c.high <= c.bounds[1], name
        for part in c.source.split("; "):
            if part.startswith("deepspeed-0.19.8__"):
                assert part.split(" ")[0] in runs


def test_held_out_errors_travel_with_the_set() -> None:
    assert COMMITTED.report is not None
    held = [e for g, e in COMMITTED.report.median_abs_error.items() if g.startswith("held out")]
    assert len(held) > 20
    assert np.median(held) < 0.10


def test_two_rates_find_what_made_the_data() -> None:
    # t = F / (0.5 peak) + 3 A / bandwidth on three made-up passes
    rows = [(f, a, f / (0.5 * 989.4e12) + 3 * a / 3350e9) for f, a in ((1e12, 1e9), (5e12, 2e9), (2e13, 1e10))]
    assert two_rates(rows) == pytest.approx((0.5, 3.0))
