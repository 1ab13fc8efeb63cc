"""A coefficient that is wrong is found from what a server does, by its effect on both cells."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.catalog import load_catalog
from advisor.recommend.ask import ask
from advisor.recommend.one import deployment_of, predict_one
from advisor.schema import ClosedLoad, FixedLengths, Prediction, Request, Workload
from advisor.verify.compare import LIGHT, LOAD, Row, compare
from advisor.verify.suspects import WEIGHTS, suspect_text, suspects

QUESTION = ask(Request(model="8b", gpus="1xH100", rate=1), load_catalog())
DEPLOYMENT = deployment_of(QUESTION, {"tp": 1})
LENGTHS = FixedLengths(prompt_tokens=2000, output_tokens=60)
CELLS = {
    LIGHT: Workload(lengths=LENGTHS, load=ClosedLoad(concurrency=1, n_requests=4)),
    LOAD: Workload(lengths=LENGTHS, load=ClosedLoad(concurrency=24, n_requests=48)),
}


def vary(name: str, factor: float, workload: Workload) -> Prediction:
    assert QUESTION.vllm is not None
    one = QUESTION.vllm.coefficients[name]
    changed = QUESTION.vllm.coefficients | {name: one.model_copy(update={"value": factor * one.value})}
    other = replace(QUESTION, workload=workload, vllm=QUESTION.vllm.model_copy(update={"coefficients": changed}))
    return predict_one(other, DEPLOYMENT).prediction


def predict(workload: Workload) -> Prediction:
    return predict_one(replace(QUESTION, workload=workload), DEPLOYMENT).prediction


@pytest.mark.parametrize(
    ("name", "factor", "cells"),
    [
        ("stream_eff_bf16", 0.75, CELLS),
        ("gemm_eff_bf16", 0.7, CELLS),
        ("kv_eff", 0.7, CELLS),
        # in a closed loop a later client falls into another step: its gaps are no straight line
        ("submit_s", 4.0, {LIGHT: CELLS[LIGHT]}),
    ],
)
def test_the_wrong_coefficient_is_named(name: str, factor: float, cells: dict[str, Workload]) -> None:
    """A server that is what the law says with one coefficient changed: the change is found, and its size."""
    assert QUESTION.vllm is not None
    rows: tuple[Row, ...] = ()
    for cell, workload in cells.items():
        truth = vary(name, factor, workload).quantities
        rows += compare(cell, predict(workload), {n: truth[n].value for n in WEIGHTS})
    found = suspects(rows, cells, QUESTION.vllm.coefficients, vary, predict)
    near = [s for s in found if s.explained_frac > found[0].explained_frac - 0.05]
    suspect = next(s for s in near if s.name == name)
    assert suspect.explained_frac > 0.9
    assert suspect.factor == pytest.approx(factor, rel=0.3)
    assert found[0].name in suspect_text(found)


def test_without_gaps_nothing_is_suspected() -> None:
    assert QUESTION.vllm is not None
    assert suspects((), CELLS, QUESTION.vllm.coefficients, vary, predict) == ()
    assert suspect_text(()) == ""
