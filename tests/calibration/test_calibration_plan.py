"""The plan against designs whose optimum is known."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from calibration.cells import Cell
from calibration.errors import JobError
from calibration.jobs import parse_job, read_jobs
from calibration.orchestrate import n_cells
from calibration.plan import Knowledge, candidates, make_plan, starts_for, table
from calibration.plan_model import FiniteDifferences, load_design

STARTS = [{"run_id": "one", "model": "llama-3.1-8b", "max_model_len": 4096, "max_num_seqs": 256}]


class Line:
    """ln(y) = a + b x, with x from -1 (concurrency 1) to 1 (concurrency 256)."""

    names = ("a", "b")
    prior_sd = np.array([10.0, 10.0])

    def __init__(self, start_s=60.0, seconds=10.0):
        self.begin, self.each = start_s, seconds

    def x(self, cell):
        return np.log2(cell.concurrency) / 4 - 1

    def rows(self, start, cell):
        return np.array([[1.0, self.x(cell)]]), np.array([0.02])

    def seconds(self, start, cell):
        return self.each

    def start_s(self, start):
        return self.begin


def test_a_line_is_measured_at_its_ends():
    # D-optimal design of a straight line on an interval: half of the points at either end (Fedorov 1972, ch. 2)
    plan = make_plan(Line(), STARTS, 1, (60 + 8 * 10 + 1) / 60)
    at = [s.cell.concurrency for s in plan.steps]
    assert len(at) == 8
    assert sorted(at) == [1] * 4 + [256] * 4
    # least squares on those points: var(a) = noise^2 / n, var(b) the same, as x = -1 and 1
    assert plan.sd_after == pytest.approx([0.02 / np.sqrt(8)] * 2, rel=1e-3)


def test_covariance_is_that_of_least_squares():
    rng = np.random.default_rng(1)
    rows, noise, prior = rng.normal(size=(7, 4)), rng.uniform(0.1, 1, 7), rng.uniform(0.5, 2, 4)
    known = Knowledge(prior)
    gains = 0.0
    for i in range(7):
        gains += known.gain(rows[i : i + 1], noise[i : i + 1])
        known.add(rows[i : i + 1], noise[i : i + 1])
    precision = np.diag(prior**-2.0) + (rows / noise[:, None]).T @ (rows / noise[:, None])
    assert known.covariance == pytest.approx(np.linalg.inv(precision), abs=1e-12)
    # gains add up to the whole: ln det of the precision, before and after
    whole = np.linalg.slogdet(precision)[1] + 2 * np.log(prior).sum()
    assert gains == pytest.approx(whole)


def test_greedy_choice_is_near_the_best_set_of_its_size():
    rng = np.random.default_rng(3)
    pool = rng.normal(size=(12, 3))

    def gain(chosen):
        return np.linalg.slogdet(np.eye(3) + pool[list(chosen)].T @ pool[list(chosen)])[1]

    best = max(gain(c) for c in itertools.combinations(range(12), 4))
    known, left, got = Knowledge(np.ones(3)), list(range(12)), 0.0
    for _ in range(4):
        i = max(left, key=lambda j: known.gain(pool[j : j + 1], np.ones(1)))
        got += known.gain(pool[i : i + 1], np.ones(1))
        known.add(pool[i : i + 1], np.ones(1))
        left.remove(i)
    assert (1 - 1 / np.e) * best <= got <= best + 1e-9


class TwoStarts(Line):
    """Start 'one' tells of a only, 'two' of b only."""

    def rows(self, start, cell):
        return np.array([[1.0, 0.0] if start["run_id"] == "one" else [0.0, 1.0]]), np.array([0.02])


def two_starts():
    return [STARTS[0], STARTS[0] | {"run_id": "two"}]


def test_starts_run_side_by_side_and_inside_the_time():
    plan = make_plan(TwoStarts(), two_starts(), 2, 2.0)
    assert plan.opened == [0, 1] or plan.opened == [1, 0]
    assert plan.wall_s <= 120
    assert plan.gpu_s == pytest.approx(2 * 60 + 10 * len(plan.steps))
    # one GPU: both starts one after the other, if both are worth their start
    alone = make_plan(TwoStarts(), two_starts(), 1, 4.0)
    assert len(alone.opened) == 2
    assert alone.wall_s <= 240


def test_a_start_that_does_not_fit_is_left_out():
    starts = [STARTS[0] | {"run_id": "two", "tp": 4}, STARTS[0]]
    plan = make_plan(TwoStarts(), [s | {"run_id": r} for s, r in zip(starts, ("two", "one"), strict=True)], 2, 2.0)
    assert plan.opened == [1]
    assert plan.sd_after[1] == 10  # nothing was learnt of what only the other start tells


def test_a_plan_becomes_jobs_that_can_run():
    plan = make_plan(Line(), STARTS, 1, 3.0)
    (raw,) = plan.jobs()
    job = parse_job(raw)
    assert len(job.parsed_cells()) == len(plan.steps)
    assert sum(c["expected_s"] for c in raw["cells"]) == pytest.approx(10.0 * len(plan.steps))
    text = table(plan)
    assert "1 engine start(s), 12 cells, about 3.0 min" in text
    assert "closed 64/16 c1" in text


def test_candidates_respect_the_engine():
    assert all(c.prompt_tokens + c.output_tokens <= 300 and c.concurrency <= 64 for c in candidates(300, 64))
    assert Cell("closed", 16384, 256, concurrency=1, n_requests=4) in candidates(32768, 256)


@pytest.mark.parametrize(
    ("starts", "gpus", "minutes", "says"),
    [
        ([], 1, 10, "no engine start"),
        (STARTS, 1, 0.5, "too short"),
        ([STARTS[0] | {"tp": 4}], 2, 10, "more than 2 GPU"),
    ],
)
def test_what_cannot_be_planned_is_said(starts, gpus, minutes, says):
    with pytest.raises(JobError, match=says):
        make_plan(Line(), starts, gpus, minutes)


def law(coefficients, start, cell):
    """A step law by hand: t = a + b * concurrency, throughput its inverse."""
    step = coefficients["fixed_s"] + coefficients["seq_s"] * cell.concurrency
    return {
        "tpot_p50_s": step,
        "requests_per_s": cell.concurrency / (step * cell.output_tokens),
        "duration_s": 20 * step,
    }


def test_finite_differences_are_the_derivatives():
    design = FiniteDifferences(law, {"fixed_s": 0.006, "seq_s": 1e-4}, {"fixed_s": 0.3, "seq_s": 0.5})
    rows, noise = design.rows(STARTS[0], Cell("closed", 64, 16, concurrency=60, n_requests=60))
    # d ln t / d ln a = a / t: both terms are 6 ms, so one half each; throughput is the inverse of t
    assert rows == pytest.approx(np.array([[0.5, 0.5], [-0.5, -0.5]]), abs=1e-4)
    assert noise == pytest.approx([0.04, 0.04])  # 2 %, twice that as the cell is short
    plan = make_plan(design, STARTS, 1, 3.0)
    # where one term or the other rules comes first
    first, second = (s.cell.concurrency for s in plan.steps[:2])
    assert first == 1
    assert second >= 64
    assert plan.steps[0].gain_nats > plan.steps[-1].gain_nats
    assert (plan.sd_after < 0.02).all()


def test_starts_to_choose_from():
    starts = starts_for(["llama-3.1-8b", "llama-2-7b"], 4, "", "none,fp8", 16384)
    assert len(starts) == 2 * 3 * 2
    assert {s["tp"] for s in starts} == {1, 2, 4}
    assert {s["max_model_len"] for s in starts if s["model"] == "llama-2-7b"} == {4096}
    with pytest.raises(JobError, match="tp 'x' is not a list"):
        starts_for(["llama-3.1-8b"], 1, "x", "none", 4096)
    with pytest.raises(JobError, match="quantization 'int3'"):
        starts_for(["llama-3.1-8b"], 1, "", "int3", 4096)
    with pytest.raises(JobError, match="no design 'nowhere:none'"):
        load_design("nowhere:none", "h100-sxm-80gb")


def test_ready_made_job_sets_are_sound():
    sets = sorted((Path(__file__).resolve().parents[2] / "calibration" / "job_sets").glob("*.json"))
    assert len(sets) >= 4
    for path in sets:
        for job in read_jobs(str(path)):
            assert n_cells(job) >= 2
            if job.kind == "vllm":
                assert job.limit_s >= job.budget_s + 120  # time for the start


def test_starts_that_do_not_fit_are_left_out_with_the_reason():
    class Picky(Line):
        def seconds(self, start, cell):
            if start["run_id"] == "big":
                raise JobError("big: does not fit")
            return self.each

    said = []
    plan = make_plan(Picky(), [STARTS[0] | {"run_id": "big"}, STARTS[0]], 1, 3.0, said.append)
    assert plan.opened == [1]
    assert "left out: big: does not fit" in said
    with pytest.raises(JobError, match="big: does not fit"):
        make_plan(Picky(), [STARTS[0] | {"run_id": "big"}], 1, 3.0)


def test_the_serving_law_expects_the_times_that_were_measured():
    design = load_design("calibration.plan_model:serving_design", "h100-sxm-80gb")
    start = {"run_id": "8b", "model": "llama-3.1-8b", "tp": 1, "max_model_len": 16384, "max_num_seqs": 256}
    path = Path(__file__).resolve().parents[2] / "data/runs/vllm-0.26.0_h100.jsonl"
    ratios = []
    for record in map(json.loads, path.read_text().splitlines()):
        if record["run_id"].endswith("8b-bf16") and record["load"]["kind"] == "closed":
            load, lengths = record["load"], record["lengths"]
            sizes = lengths["prompt_tokens"], lengths["output_tokens"]
            cell = Cell("closed", *sizes, concurrency=load["concurrency"], n_requests=load["n_requests"])
            ratios.append((design.seconds(start, cell) - 0.5) / record["measured"]["duration_s"])
    assert len(ratios) > 10
    assert np.median(np.abs(np.log(ratios))) < 0.1
    assert max(np.abs(np.log(ratios))) < 0.7


def test_the_command_line_plans_and_refuses(run, tmp_path, monkeypatch):
    out = tmp_path / "jobs.json"
    status, text = run(
        "plan", "--model", "llama-3.2-1b", "--minutes", "2", "--tp", "1", "--max-model-len", "300", "--out", out
    )
    assert status == 0, text
    assert "1 engine start(s)" in text
    (job,) = read_jobs(str(out))
    assert job.model == "llama-3.2-1b"
    for args, says in (
        (("--model", "llama-3.2-1b", "--gpu", "h1000"), "unknown GPU 'h1000'"),
        (("--model", "lama"), "unknown model 'lama'"),
        (("--model", "llama-3.1-70b", "--tp", "1"), "does not fit"),
        (("--model", "llama-3.2-1b", "--tp", "2"), "more than 1 GPU"),
    ):
        status, text = run("plan", *args)
        assert status == 2
        assert says in text
        assert "Traceback" not in text
