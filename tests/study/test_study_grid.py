"""Cells of a study: how many, which, under which ids, in which shard."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.errors import BadData, DomainError
from advisor.schema.study import Study, StudyWorkload
from advisor.study import read_study
from advisor.study.grid import Grid, Shard, parse_shard

MODELS = ("llama-3.1-8b", "qwen3-32b", "70b")
GPUS = ("8xA100", "4xH100")


def grid_of(**fields: object) -> Grid:
    return Grid(Study.model_validate({"models": MODELS, "gpus": GPUS} | fields))


@given(
    n_models=st.integers(1, 3),
    n_gpus=st.integers(1, 2),
    rates=st.lists(st.integers(1, 50), min_size=1, max_size=4, unique=True),
    clients=st.lists(st.integers(1, 50), max_size=3, unique=True),
    seeds=st.lists(st.integers(0, 10**6), min_size=1, max_size=5, unique=True),
)
@settings(max_examples=50)
def test_the_grid_is_the_product_of_its_lists(
    n_models: int, n_gpus: int, rates: list[int], clients: list[int], seeds: list[int]
) -> None:
    workloads: list[object] = [{"rate": rates}, "rag"]
    if clients:
        workloads.append({"concurrency": clients})
    study = Study.model_validate(
        {"models": MODELS[:n_models], "gpus": GPUS[:n_gpus], "workloads": workloads, "seeds": seeds}
    )
    cells = list(Grid(study))
    loads = [("chat", r, None) for r in rates] + [("rag", None, None)] + [("chat", None, c) for c in clients]
    expected = set(product(MODELS[:n_models], GPUS[:n_gpus], loads, seeds))
    found = {
        (
            c.model,
            c.gpus,
            (c.workload.preset, *(next(iter(x), None) for x in (c.workload.rate, c.workload.concurrency))),
            c.seed,
        )
        for c in cells
    }
    assert found == expected
    assert len(cells) == len(expected) == study.n_cells
    assert len({c.id for c in cells}) == len(cells)


def test_an_id_depends_on_the_cell_alone() -> None:
    small = {c.id for c in grid_of(models=MODELS[:1], seeds=[7])}
    large = {c.id for c in grid_of(models=tuple(reversed(MODELS)), seeds=[1, 7, 3], slos=["", "none"])}
    assert small < large
    changed = [
        *({"mode": "simulate"}, {"backends": ["vllm"]}, {"n_finalists": 0}, {"engine_version": "0.10.0"}),
        *({"objectives": ["energy"]}, {"slos": ["none"]}, {"seeds": [8]}, {"workloads": ["rag"]}),
        {"mode": "simulate", "deployment": {"tp": 2}},
    ]
    sets = [small, *({c.id for c in grid_of(**({"models": MODELS[:1], "seeds": [7]} | own))} for own in changed)]
    assert sum(len(s) for s in sets) == len(set().union(*sets)), "what changes the answer changes the id"


def test_a_label_does_not_change_the_id() -> None:
    plain, named = ({c.id for c in grid_of(workloads=[{"rate": 2, "name": n}])} for n in ("", "night"))
    assert plain == named


def test_ids_are_the_same_in_another_process() -> None:
    code = (
        "from advisor.study.grid import Grid; from advisor.schema.study import Study;"
        f"print(*[c.id for c in Grid(Study(models={MODELS!r}, gpus={GPUS!r}, seeds=4))])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {" ".join(c.id for c in grid_of(seeds=4)) + "\n"}


def test_a_trace_is_known_by_its_content(tmp_path: Path) -> None:
    ids = []
    for folder, tokens in (("a", 5), ("b", 5), ("c", 6)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "t.csv").write_text(f"time,prompt_tokens,output_tokens\n0,10,{tokens}\n1,10,5\n")
        path = tmp_path / folder / "s.toml"
        path.write_text('models = ["8b"]\ngpus = ["1xL40S"]\nworkloads = ["t.csv"]\n')
        ids.append(next(iter(Grid(read_study(path)))).id)
    assert ids[0] == ids[1] != ids[2]


def test_a_model_file_is_known_by_its_content(tmp_path: Path, root: Path) -> None:
    config = (root / "data/models/llama-3.1-8b.json").read_text()
    ids = []
    for name, text in (("a.json", config), ("b.json", config), ("c.json", config.replace(" ", "  ", 1))):
        (tmp_path / name).write_text(text)
        ids.append(next(iter(grid_of(models=[str(tmp_path / name)]))).id)
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(BadData, match="'models' names the same thing twice"):
        grid_of(models=[str(tmp_path / "a.json"), str(tmp_path / "b.json")])


@given(n=st.integers(1, 40), n_seeds=st.integers(1, 60))
@settings(max_examples=40)
def test_shards_are_disjoint_and_complete(n: int, n_seeds: int) -> None:
    ids = [c.id for c in grid_of(models=MODELS[:1], gpus=GPUS[:1], seeds=n_seeds)]
    parts = [[i for i in ids if Shard(k, n).holds(i)] for k in range(n)]
    assert sorted(i for part in parts for i in part) == sorted(ids)


def test_shards_are_of_equal_size_within_chance() -> None:
    # a binomial share of 1/20 of 20,000 has a standard deviation of 31
    ids = [c.id for c in grid_of(models=MODELS[:1], gpus=GPUS[:1], seeds=20_000)]
    sizes = [sum(Shard(k, 20).holds(i) for i in ids) for k in range(20)]
    assert max(abs(s - 1000) for s in sizes) < 5 * 31


@pytest.mark.parametrize("text", ["", "1", "3/3", "-1/4", "1/0", "a/b", "1/2/3", "0x1/4", "1/99999999999"])
def test_a_senseless_shard_is_refused(text: str) -> None:
    with pytest.raises(DomainError, match="0 to n-1"):
        parse_shard(text)


def test_a_million_cells_are_made_one_at_a_time() -> None:
    grid = iter(grid_of(models=MODELS[:1], gpus=GPUS[:1], workloads=[{"rate": list(range(1, 1001))}], seeds=1000))
    assert [next(grid).seed for _ in range(3)] == [0, 1, 2]


def test_the_example_is_a_study(root: Path, study_file: Callable[..., Path]) -> None:
    study = read_study(root / "data/studies/example.toml")
    assert study.n_cells == sum(1 for _ in Grid(study)) == 24


def test_labels_say_what_the_traffic_is() -> None:
    assert StudyWorkload(prompt_tokens=10, output_tokens=20, rate=(2.5,)).label == "chat 10/20 2.5/s"
    assert StudyWorkload(trace="/some/where/t.csv").label == "t.csv"
