"""The first bursts of a fresh engine: kernels of the LM head that are not loaded yet hold up a launch once each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.fit.objective import read_rows, run_cell, values_for
from advisor.fit.records import Cell, cells_of, parse_records, read_records
from advisor.predict.engine_state import LOAD_HEAD_S, LOAD_ROWS_S, head_of
from tests.fit.test_records import line

CATALOG = load_catalog()
RUNS = Path(__file__).resolve().parents[2] / "data" / "runs"
THETA = {name: c.value for name, c in CATALOG.coefficients("vllm").coefficients.items()}
ALL = {head_of(n) for n in range(1, 400)} - {0}


def heads(*loads: dict[str, Any], **record: Any) -> list[set[int]]:
    lines = "\n".join(line(load=load, **({"startup": {"startup_s": 60.0}} | record)) for load in loads)
    return [set(cell.cold_heads) for cell in cells_of(parse_records(lines, "x.jsonl"), CATALOG)]


def closed(concurrency: int) -> dict[str, Any]:
    return {"kind": "closed", "concurrency": concurrency, "n_requests": 300}


def test_a_start_loads_each_kernel_once_up_to_the_most_sequences_that_it_ran() -> None:
    first, second, third, last = heads(closed(1), closed(40), closed(8), closed(256))
    assert first == second == ALL
    assert third == last == {head_of(n) for n in range(41, 193)} - {0}
    assert min(third) == head_of(41)


def test_an_open_load_is_taken_to_have_run_what_littles_law_says_and_half_as_many_again() -> None:
    waits = dict.fromkeys(("mean", "p50", "p90", "p95", "p99"), 2.0)
    measured = {"n_requests": 300, "requests_per_s": 10.0, "e2e_s": waits}
    poisson = {"kind": "poisson", "arrivals_per_s": 10.0, "duration_s": 30.0}
    _, after = heads(poisson, closed(4), measured=measured)
    assert after == {head_of(n) for n in range(31, 193)} - {0}


@pytest.mark.parametrize(
    "record",
    [{"warm_up": "lm head kernels"}, {"startup": {"n_kv_blocks": 1000}}, {"startup": None}],
    ids=["warmed up", "a server that was there before", "unknown"],
)
def test_other_engines_are_taken_as_warm(record: dict[str, Any]) -> None:
    assert heads(closed(64), **record) == [set()]


def test_every_number_of_sequences_has_one_kernel_and_the_kernels_are_in_order() -> None:
    numbers = [head_of(n) for n in range(130, 193)]
    assert set(numbers) == {max(ALL)}
    assert [head_of(n) for n in range(9, 129)] == sorted(head_of(n) for n in range(9, 129))
    assert {head_of(n) for n in (*range(9), 129, *range(193, 1100))} == {0}


def burst(run: str, file: str, rows: str) -> tuple[Cell, np.ndarray[Any, Any]]:
    """The cell of 64 clients with 512 tokens of a start, and when its first 64 first tokens came [s]."""
    records = [r for r in read_records(RUNS / file) if r.run_id.endswith(f"__{run}")]
    cell = next(
        c
        for c in cells_of(records, CATALOG)
        if (c.record.load or {}).get("concurrency") == 64 and (c.record.lengths or {}).get("prompt_tokens") == 512
    )
    found = read_rows(RUNS / "rows" / rows)[cell.run_id, str((cell.record.model_extra or {})["cell_id"])]
    return cell, np.sort([row[0] + row[1] for row in found])[:64]


def first_tokens(cell: Cell) -> np.ndarray[Any, Any]:
    one = replace(cell, traffics=cell.traffics[:1])  # an engine that wakes as it does in the mean
    sim = run_cell(one, values_for(one, THETA, {}))[0]
    return np.sort(sim.submitted_s + sim.ttft_s)[:64]


@pytest.mark.parametrize(
    ("run", "file"), [("8b-bf16-c", "h100-5"), ("14b-awq", "h100-5"), ("8b-bf16-d", "h100-9"), ("3b-bf16-c", "h100-10")]
)
def test_a_measured_burst_comes_as_late_as_cold_kernels_make_it(run: str, file: str) -> None:
    cell, real = burst(run, f"vllm-0.26.0_{file}.jsonl", f"vllm-0.26.0_{file}.jsonl.gz")
    assert {head_of(n) for n in (17, 33, 49)} <= cell.cold_heads

    def error(tokens: np.ndarray[Any, Any]) -> float:
        return float(np.abs(np.log(tokens / real)).mean())

    cold, warm = error(first_tokens(cell)), error(first_tokens(replace(cell, cold_heads=frozenset())))
    assert cold < 0.15
    assert cold < 0.5 * warm


def test_cold_kernels_hold_up_but_lose_nothing() -> None:
    cell, _ = burst("8b-bf16-d", "vllm-0.26.0_h100-9.jsonl", "vllm-0.26.0_h100-9.jsonl.gz")
    values = values_for(cell, THETA, {})
    cold = run_cell(cell, values)[0]
    warm = run_cell(replace(cell, cold_heads=frozenset()), values)[0]
    assert cold.total("tokens") == warm.total("tokens")
    assert (first_tokens(cell) >= first_tokens(replace(cell, cold_heads=frozenset())) - 1e-9).all()
    assert cold.duration_s <= warm.duration_s + len(ALL) * (LOAD_HEAD_S + 0.05)


def rows(*cells: tuple[dict[str, Any], int], **record: Any) -> list[int]:
    lines = "\n".join(
        line(
            load=load,
            lengths={"kind": "fixed", "prompt_tokens": n, "output_tokens": 1},
            startup={"startup_s": 60.0},
            **record,
        )
        for load, n in cells
    )
    return [cell.cold_rows for cell in cells_of(parse_records(lines, "x.jsonl"), CATALOG)]


def test_a_start_loads_the_kernels_of_odd_rows_once() -> None:
    """Prompts within the CUDA graphs, of whole tiles and of as many tokens as the memory profile's load none."""
    one = closed(1)
    assert rows((one, 300), (one, 1024), (one, 6000), (one, 700), (one, 900)) == [513, 513, 513, 513, 0]
    assert rows((closed(4), 300), (one, 700)) == [513, 0], "several prompts add up to such a number"
    assert rows((closed(4), 40), (one, 700)) == [513, 513], "but not if all fit into a graph"
    assert rows((one, 700), warm_up="lm head kernels") == [513], "single tokens load no others"
    assert rows((one, 700), weight_dtype="fp8") == [0], "kernels of vLLM's own"


def test_the_first_prompt_of_an_odd_length_is_late_and_no_other() -> None:
    """3B, 700 tokens: measured 42 ms, then 29 to 32."""
    run = "vllm-0.26.0__h100-sxm-80gb__3b-r"
    cells = cells_of(read_records(RUNS / "vllm-0.26.0_h100-21.jsonl"), CATALOG)
    cell = next(c for c in cells if c.run_id == run and c.traffics[0].prompt_tokens[0] == 700)
    cold, warm = first_tokens(cell), first_tokens(replace(cell, cold_rows=0))
    assert cold[0] - warm[0] == pytest.approx(LOAD_ROWS_S, rel=0.2)
    assert np.allclose(np.diff(cold), np.diff(warm), rtol=0.02)
