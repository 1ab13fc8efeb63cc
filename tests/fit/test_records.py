"""Run records: what is read, and that every broken file is named with its line and rule, never a traceback."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.catalog import load_catalog
from advisor.errors import AdvisorError, BadData
from advisor.fit.objective import run_cell, targets, values_for
from advisor.fit.records import cell_of, cells_of, has_one_route, is_serving, parse_records, read_records
from advisor.schema import FixedLengths, PoissonLoad

CATALOG = load_catalog()
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def record(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "schema": 1,
        "run_id": "some-start",
        "engine": "vllm",
        "engine_version": "0.26.0",
        "gpu": "h100-sxm-80gb",
        "n_gpus": 1,
        "model": "a-model-nobody-knows",
        "hf_config": CONFIG,
        "max_num_batched_tokens": 8192,
        "max_num_seqs": 256,
        "load": {"kind": "closed", "concurrency": 4, "n_requests": 16},
        "lengths": {"kind": "fixed", "prompt_tokens": 200, "output_tokens": 20},
        "measured": {"n_requests": 16, "requests_per_s": 10.0},
    }
    return base | changes


def line(**changes: Any) -> str:
    return json.dumps(record(**changes))


def test_every_published_file_reads_whole(root: Path) -> None:
    files = sorted((root / "data" / "runs").glob("*.jsonl"))
    assert len(files) >= 6
    for file in files:
        n_lines = sum(1 for text in file.read_text(encoding="utf-8").splitlines() if text.strip())
        assert len(read_records(file)) == n_lines


def test_a_model_outside_the_catalogue_comes_from_its_config() -> None:
    cell = cell_of(parse_records(line(), "x")[0], CATALOG)
    assert cell.model.n_layers == 8
    assert cell.model.n_kv_heads == 4
    assert cell.deployment.model == "a-model-nobody-knows"
    assert cell.traffics[0].concurrency == 4


@pytest.mark.parametrize(
    ("clients", "client", "n"), [(1, "", 1), (4, "", 3), (256, "", 3), (257, "", 1), (4, "http", 1)]
)
def test_a_burst_is_replayed_with_each_first_group_and_all_else_once(clients: int, client: str, n: int) -> None:
    """Nothing else is random about it: the requests are the same."""
    load = {"kind": "closed", "concurrency": clients, "n_requests": 80}
    cell = cell_of(parse_records(line(load=load, client=client), "x")[0], CATALOG)
    assert len(cell.traffics) == n
    assert all(traffic is cell.traffics[0] for traffic in cell.traffics)
    assert targets(cell) == targets(replace(cell, traffics=cell.traffics[:1])), "as certain as with one replay"


def test_the_first_group_of_a_burst_is_one_to_three_requests() -> None:
    """Of 48 clients with 300 tokens, an 8B: measured 2 and 2 in two rounds; 1 to 5 over ten models."""
    runs = Path(__file__).resolve().parents[2] / "data" / "runs"
    cells = cells_of(read_records(runs / "vllm-0.26.0_h100-21.jsonl"), CATALOG)
    cell = next(c for c in cells if c.run_id.endswith("__8b-r") and c.traffics[0].concurrency == 48)
    theta = {name: c.value for name, c in CATALOG.coefficients("vllm").coefficients.items()}
    tokens = [np.sort((s.submitted_s + s.ttft_s)[:48]) for s in run_cell(cell, values_for(cell, theta, {}))]
    assert [int((first < first[0] + 1e-6).sum()) for first in tokens] == [1, 2, 3]


def test_engine_defaults_fill_what_a_record_leaves_out() -> None:
    cell = cell_of(parse_records(line(max_num_batched_tokens=None, max_num_seqs=None), "x")[0], CATALOG)
    assert cell.deployment.max_num_batched_tokens == 8192
    assert cell.deployment.max_num_seqs in (256, 1024)
    assert cell.deployment.gpu_memory_utilization == 0.9


def test_a_power_limit_reaches_the_board() -> None:
    low = cell_of(parse_records(line(power_limit_w_per_gpu=400.0), "x")[0], CATALOG)
    assert low.gpu.board_power_w == 400
    assert cell_of(parse_records(line(power_limit_w_per_gpu=1.0), "x")[0], CATALOG).gpu.board_power_w == 700


def test_the_realised_count_and_mean_lengths_are_the_clients() -> None:
    text = line(
        load={"kind": "poisson", "arrivals_per_s": 5.0, "duration_s": 20.0},
        lengths={"kind": "lognormal", "prompt_tokens_mean": 300, "output_tokens_mean": 100, "sigma": 0.5},
        measured={"n_requests": 90, "requests_per_s": 4.5, "input_tokens_per_s": 1440.0, "output_tokens_per_s": 405.0},
    )
    cell = cell_of(parse_records(text, "x")[0], CATALOG)
    assert isinstance(cell.workload.load, PoissonLoad)
    assert cell.workload.load.n_requests == 90
    assert len(cell.traffics) == 5
    for traffic in cell.traffics:
        assert len(traffic.prompt_tokens) == 90
        assert traffic.prompt_tokens.mean() == pytest.approx(1440 / 4.5, rel=0.01)
        assert traffic.output_tokens.mean() == pytest.approx(405 / 4.5, rel=0.01)


def test_other_engines_records_are_read_and_left_to_their_own_fit() -> None:
    records = parse_records("\n".join([line(), line(engine="deepspeed"), line(load=None)]), "x")
    assert [is_serving(r) for r in records] == [True, False, False]
    assert len(cells_of(records, CATALOG)) == 1
    assert isinstance(cells_of(records, CATALOG)[0].workload.lengths, FixedLengths)


@pytest.mark.parametrize(
    ("name", "changes", "is_one"),
    [
        ("gpt-oss-20b", {}, True),
        ("qwen3-30b-a3b", {}, False),
        ("gpt-oss-20b", {"random_weights": False}, False),
        ("gpt-oss-20b", {"command": {"n_tensors_changed_to_spread_routing": 144}}, False),
        ("qwen3-30b-a3b", {"command": {"n_tensors_changed_to_spread_routing": 0}}, True),
        ("gpt-oss-20b", {"command": {"n_tensors_changed_to_spread_routing": "none: no such method"}}, True),
    ],
)
def test_random_routers_send_all_tokens_one_way_unless_they_were_changed(
    name: str, changes: dict[str, Any], is_one: bool
) -> None:
    found = parse_records(line(**{"random_weights": True, **changes}), "x.jsonl")[0]
    assert has_one_route(found, CATALOG.model(name)[0]) == is_one


def test_unknown_fields_are_kept() -> None:
    assert (parse_records(line(my_note="kept"), "x")[0].model_extra or {})["my_note"] == "kept"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"schema": 1, ', "line 1 is not one whole JSON"),
        (line() + "\n" + line()[:200], "line 2 is not one whole JSON"),
        ("[]", "line 1"),
        ("null", "line 1"),
        ("not json at all", "line 1"),
        ("[" * 100_000, "line 1"),
        (line(schema=2), "schema"),
        (line(tp=0), "tp"),
        (line(n_gpus="many"), "n_gpus"),
        (line(measured={"requests_per_s": -1.0}), "requests_per_s"),
        (line(measured={"requests_per_s": float("nan")}), "requests_per_s"),
        (line(measured={"duration_s": float("inf")}), "duration_s"),
        (line(measured=None), "measured"),
        ("\n\n" + line(hf_config=None), "line 3"),
    ],
)
def test_a_broken_line_is_named_with_its_rule(
    text: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(BadData, match=r"runs\.jsonl") as caught:
        read_records("runs.jsonl")
    assert what in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00binary"])
def test_files_without_records_are_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_bytes(content)
    with pytest.raises(BadData):
        read_records(file)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.jsonl", tmp_path):
        with pytest.raises(BadData, match="cannot be read"):
            read_records(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": "h100-sxm-81gb"},
        {"hf_config": {}},
        {"hf_config": {**CONFIG, "hidden_size": -1}},
        {"hf_config": {**CONFIG, "num_attention_heads": 0}},
        {"weight_dtype": "fp3"},
        {"load": {"kind": "closed"}},
        {"load": {"kind": "thundering-herd"}},
        {"load": {"kind": "poisson", "arrivals_per_s": 0}},
        {"lengths": {"kind": "fixed", "prompt_tokens": 0, "output_tokens": 1}},
        {"engine_version": "99.1"},
        {"engine_version": "latest"},
    ],
)
def test_what_cannot_be_replayed_is_explained(changes: dict[str, Any]) -> None:
    found = parse_records(line(**changes), "x")[0]
    with pytest.raises(AdvisorError) as caught:
        cell_of(found, CATALOG)
    assert len(str(caught.value)) > 20


@given(st.text(max_size=200))
def test_any_other_text_is_refused_in_a_sentence(text: str) -> None:
    if any(part.strip() for part in text.splitlines()):
        with pytest.raises(BadData, match="line"):
            parse_records(text, "x")
    else:
        assert parse_records(text, "x") == []


@given(st.integers(1, 600))
def test_a_record_cut_anywhere_is_refused(cut: int) -> None:
    whole = line()
    if cut < len(whole):
        with pytest.raises(BadData):
            parse_records(whole[:cut], "x")
