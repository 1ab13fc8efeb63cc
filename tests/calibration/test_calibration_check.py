"""check: each rule against a record that breaks it and only it."""

import copy
import json
from pathlib import Path

import pytest

from calibration.check import check_all, check_record, check_startup, noise_floor, read, repeats

ROOT = Path(__file__).resolve().parents[2]
GOOD = json.loads((ROOT / "data/runs/vllm-0.26.0_h100.jsonl").read_text().splitlines()[3])


def changed(**paths):
    """Return GOOD with some values replaced; `measured__tpot_s__p50=3` goes three levels down."""
    record = copy.deepcopy(GOOD)
    for path, value in paths.items():
        *parents, last = path.split("__")
        at = record
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = value
    return record


def says(findings):
    return [(f.severity, f.what) for f in findings if f.severity != "note"]


def test_the_first_committed_records_hold_nothing_bad():
    records, wrong = read(str(ROOT / "data/runs/vllm-0.26.0_h100.jsonl"))
    assert wrong == []
    assert len(records) == 65
    assert [f for f in check_all(records) if f.severity == "bad"] == []
    assert check_record(GOOD) == []


@pytest.mark.parametrize(
    ("change", "severity", "text"),
    [
        ({"measured__ttft_s__p50": float("nan")}, "bad", "measured.ttft_s.p50 is not a number"),
        ({"measured__energy_j": -1.0}, "bad", "negative"),
        ({"measured__requests_per_s": 50.0}, "bad", "requests in the system with"),
        ({"measured__n_requests": 5}, "bad", "requests ended"),
        ({"measured__tpot_s__p90": 1.0}, "bad", "percentiles of tpot_s are out of order"),
        ({"measured__board_power_w__mean": 900.0}, "bad", "above the limit of 700 W"),
        ({"measured__board_power_w__n_gpus": 4}, "bad", "power of 4 GPU(s), the engine has 1"),
        ({"measured__board_power_w__throttled_frac": {"thermal": 0.4}}, "bad", "throttled (thermal) for 40%"),
        ({"host": {"before_used_bytes": [40e9]}}, "bad", "another process held 40.0 GB"),
        ({"idle_power_w": 250.0}, "doubtful", "idle power of 250 W a GPU"),
        ({"measured__n_short_answers": 3}, "doubtful", "3 answers have another length"),
        (
            {"measured__itl_s": {"p99": 0.1}, "measured__itl_max_s": {"p99": 2.0}},
            "doubtful",
            "a pause of 2.0 s between two tokens, 20 x the 99th percentile",
        ),
        (
            {
                "host": {"max_sm_clock_mhz": 1980},
                "measured__board_power_w__sm_clock_mhz": 1200,
                "measured__board_power_w__mean": 400.0,
            },
            "doubtful",
            "SM clock 1200 of 1980 MHz",
        ),
    ],
)
def test_each_rule_finds_its_fault(change, severity, text):
    found = says(check_record(changed(**change)))
    assert any(s == severity and text in what for s, what in found), found


def test_energy_and_power_must_agree_where_power_is_instantaneous():
    power = GOOD["measured"]["board_power_w"]["mean"]
    change = {"measured__energy_j": 1.4 * power * 10, "measured__duration_s": 10.0}
    assert not says(check_record(changed(**change)))  # the driver's one-second average is known to lag
    found = says(check_record(changed(**change, measured__board_power_w__is_instant=True)))
    assert found == [("doubtful", "the energy counter says 1.40 x the sampled power")]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"startup__kv_cache_tokens": 100}, "100 KV tokens, but 28123 blocks of 16"),
        ({"startup__weights_bytes": 50e9}, "its parts fill"),
        ({"startup__device_used_bytes": [99e9]}, "more memory in use than the device has"),
    ],
)
def test_start_up_figures_must_add_up(change, text):
    assert check_startup(GOOD) == []
    assert text in check_startup(changed(**change))[0].what


def test_repeats_show_drift_within_a_start_and_the_noise_between_starts():
    slower = changed(measured__requests_per_s=GOOD["measured"]["requests_per_s"] * 0.9)
    other = changed(run_id="another-start", measured__requests_per_s=GOOD["measured"]["requests_per_s"] * 1.01)
    assert any(
        "drift: requests_per_s differs by 10.5% within the same start" in f.what for f in check_all([GOOD, slower])
    )
    assert not any("drift" in f.what for f in check_all([GOOD, other]))
    ((_, is_across, spreads),) = repeats([GOOD, other])
    assert is_across
    assert spreads["requests_per_s"] == pytest.approx(0.01 / 1.005)
    assert noise_floor([GOOD, other])[0].startswith(
        "between starts: requests_per_s of 1 repeated cells spreads by 1.0%"
    )


def test_records_that_verify_wrote_are_checked_like_our_own():
    named = changed(cell="load"), changed(cell="light", run_id="another-start")
    assert not [f for f in check_all(named) if f.severity == "bad"]


def test_a_cell_that_is_there_twice_is_found():
    twice = changed(cell_id="abc")
    assert any(f.what == "is there twice" for f in check_all([twice, twice]))


def test_lines_that_are_no_records_are_named(run, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(
        json.dumps(GOOD) + '\n{"schema": 1\n[]\n{"schema": 1, "run_id": "x"}\n' + json.dumps(GOOD | {"schema": 2})
    )
    records, wrong = read(str(path))
    assert len(records) == 1
    assert ["torn line" in wrong[0].what, "lacks schema" in wrong[1].what] == [True, True]
    assert wrong[2].where.endswith(":4")
    assert "schema 2" in wrong[3].what
    status, text = run("check", path)
    assert status == 1
    assert "1 records of 1 starts: 4 bad" in text
    status, text = run("check", tmp_path / "none.jsonl")
    assert status == 2
    assert "cannot read" in text
