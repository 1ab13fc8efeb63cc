"""The command line's contract: exit codes, one sentence for mistakes, JSON, tables that fit, every command once."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advisor.cli import run
from advisor.cli.commands import COMMANDS, build_parser, command_parser
from advisor.cli.parse import size

Cli = Callable[..., tuple[int, str, str]]
FAST = ("--finalists", "2")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = run(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def json_of(cli: Cli, *words: str) -> Any:
    code, out, err = cli(*words, "--json")
    assert (code, err) == (0, "")
    form = json.loads(out)
    assert form["schema_version"] == "1"
    return form


def test_recommend_prints_what_a_person_needs(cli: Cli) -> None:
    code, out, err = cli("recommend", "--model", "70b", "--gpus", "8xA100", *FAST)
    assert (code, err) == (0, "")
    for part in ("took llama-3.3-70b", "Why", "Best plan", "Rejected", "Notes", "Run it", "vllm serve meta-llama/"):
        assert part in out
    lines = out.splitlines()
    assert "vllm serve" in lines[-1], "the command to copy stands last"
    assert max(len(line) for line in lines[:-1]) <= 100


def test_recommend_json_is_the_contract(cli: Cli) -> None:
    form = json_of(cli, "recommend", "--model", "8b", "--gpus", "2xH100", "--rate", "2", *FAST)
    best = form["best"]
    assert best["backend"] == "vllm"
    assert best["command"].startswith("vllm serve ")
    assert set(best["prediction"]["ttft_p99_s"]) == {"value", "low", "high"}
    assert form["plans"][0] == best
    assert all(r["reason"] for r in form["rejected"])
    assert form["request"]["rate"] == 2


def test_rejected_reasons_when_nothing_fits(cli: Cli) -> None:
    words = ("recommend", "--model", "70b", "--gpus", "1xL4", "--backend", "vllm")
    form = json_of(cli, *words)
    assert form["best"] is None
    assert form["plans"] == []
    assert "weights" in form["rejected"][0]["reason"]
    _, out, _ = cli(*words)
    assert "Nothing fits" in out
    assert "8xl4" in out


def test_targets_and_aliases_reach_the_request(cli: Cli) -> None:
    words = ["--isl", "300", "--osl", "50", "--rate", "3", "--slo", "ttft_p99=500ms,tpot_p99=50ms"]
    form = json_of(cli, "recommend", "--model", "8b", "--gpus", "1xH100", *words, "--power-cap", "2.4kW", *FAST)
    request = form["request"]
    assert (request["prompt_tokens"], request["output_tokens"], request["power_cap_w"]) == (300, 50, 2400)
    assert [t["max_s"] for t in request["slo"]["targets"]] == [0.5, 0.05]
    none = json_of(cli, "recommend", "--model", "8b", "--gpus", "1xH100", "--slo", "none", *FAST)
    assert none["request"]["is_best_effort"]


def test_predict_and_its_refusals(cli: Cli) -> None:
    one = json_of(cli, "predict", "--model", "8b", "--gpus", "2xH100", "--tp", "2", "--rate", "1")
    assert one["deployment"]["tp"] == 2
    assert one["deployment"]["dp"] == 1
    assert one["prediction"]["tpot_p50_s"]["value"] > 0
    code, _, err = cli("predict", "--model", "70b", "--gpus", "1xH100")
    assert code == 2
    assert "nearest that fits" in err
    code, _, err = cli("predict", "--model", "8b", "--gpus", "2xH100", "--tp", "3")
    assert code == 2
    assert "legal: 1, 2" in err
    code, out, _ = cli("predict", "--model", "8b", "--gpus", "1xH100", "--rate", "1", "-v")
    assert code == 0
    for name in ("memory per GPU", "decode step", "time to first token:", "board power:"):
        assert name in out


def test_deepspeed_is_predicted_too(cli: Cli) -> None:
    words = ("--backend", "deepspeed-autotp", "--static-batch", "8", "--rate", "0.5")
    one = json_of(cli, "predict", "--model", "llama-2-7b", "--gpus", "1xH100", *words)
    assert one["backend"] == "deepspeed-autotp"
    assert one["deployment"]["static_batch"] == 8
    # unset, the batch is the largest that fits and that the clients fill, and the weights go where they find room
    for clients in (4, 8):
        words = ("--backend", "deepspeed-autotp", "--concurrency", str(clients), "--prompt-tokens", "128")
        some = json_of(cli, "predict", "--model", "llama-2-7b", "--gpus", "1xH100", *words)
        assert some["deployment"]["static_batch"] == clients
    streamed = ("predict", "--model", "70b", "--gpus", "1xH100", "--backend", "deepspeed-zero-inference")
    found = json_of(cli, *streamed)["deployment"]
    assert found["offload"] == "cpu"
    assert found["static_batch"] > 1
    assert json_of(cli, *streamed, "--host-memory", "32GB")["deployment"]["offload"] == "nvme"


def test_compare_puts_both_sides_beside_each_other(cli: Cli) -> None:
    code, out, _ = cli("compare", "--model", "llama-2-7b", "--gpus", "1xH100", "--rate", "1")
    assert code == 0
    for name in ("vLLM", "DS FastGen", "DS AutoTP", "DS ZeRO-Inference", "host memory"):
        assert name in out
    tables = [line for line in out.splitlines() if not line.startswith("  ")]
    assert max(map(len, tables)) <= 100


def test_compare_shows_an_overloaded_side_at_its_own_limit(cli: Cli) -> None:
    words = ("compare", "--model", "llama-2-7b", "--gpus", "1xH100", "--rate", "3")
    code, out, _ = cli(*words)
    assert code == 0
    shown = [x.split("P99")[1] for x in out.splitlines() if x.startswith("at 80% of its limit: E2E P99")]
    assert shown
    assert not any("-" in cells for cells in shown)
    form = json_of(cli, *words)
    own = form["at_own_limit"]
    plans = {p["rank"]: p for p in form["plans"]}
    for backend, rank in form["best_by_backend"].items():
        best, alone = plans[rank], own[backend]
        assert alone["prediction"]["requests_per_s"]["value"] == pytest.approx(
            own["share"] * alone["requests_per_s"], rel=0.05
        )
        assert not alone["is_saturated"]
        if best["is_saturated"]:
            assert alone["requests_per_s"] == pytest.approx(best["prediction"]["requests_per_s"]["value"])
        else:
            assert alone["requests_per_s"] > 3
    assert json_of(cli, *words[:-1], "0.05")["at_own_limit"] is None


def test_simulate_replays_and_writes_every_request(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "requests.csv"
    words = ("--rate", "5", "--requests", "120", "--arrivals", "gamma", "--cv", "2", "--out", str(target))
    form = json_of(cli, "simulate", "--model", "8b", "--gpus", "1xH100", *words)
    assert form["totals"]["n_requests"] == 120
    assert form["latency"]["ttft_s"]["p50"] <= form["latency"]["ttft_s"]["p99"]
    assert len(target.read_text().splitlines()) == 121
    code, out, _ = cli("simulate", "--model", "8b", "--gpus", "1xH100", *words)
    assert code == 0
    assert "running" in out
    code, _, err = cli("simulate", "--model", "8b", "--gpus", "1xH100", "--concurrency", "4", "--duration", "3")
    assert code == 2
    assert "--rate" in err


def test_capacity_says_how_many_gpus_a_load_needs(cli: Cli) -> None:
    words = ("--rate", "60", "--slo", "ttft_p99=500ms,tpot_p99=30ms")
    form = json_of(cli, "capacity", "--model", "8b", "--gpus", "1xH100", *words)
    each = form["max_requests_per_s_per_replica"]
    assert form["n_replicas"] == -(-60 // each)
    assert form["n_gpus"] == form["n_replicas"] * form["deployment"]["tp"]


def test_train_mixed_emit_audit(cli: Cli, root: Path, tmp_path: Path) -> None:
    assert json_of(cli, "train", "--model", "8b", "--gpus", "4xH100")["best"]["job"]["zero_stage"] in range(4)
    mixed = json_of(cli, "mixed", "--model", "8b", "--gpus", "4xH100", "--rate", "30", "--batch-tokens", "1e9")
    assert mixed["best"] in ("share", "split")
    code, out, _ = cli("emit", "compose", "--model", "8b", "--gpus", "1xH100", "--tp", "1", "--rate", "1")
    assert code == 0
    assert "vllm/vllm-openai" in out
    code, out, _ = cli("emit", "vllm", "--model", "8b", "--gpus", "1xH100", "--tp", "1", "--out", str(tmp_path))
    assert (tmp_path / "serve.sh").read_text().startswith("#!")
    report = json_of(cli, "audit", str(root / "data" / "claims" / "vllm-vs-deepspeed-2025.toml"))
    assert {f["verdict"] for f in report["findings"]} >= {"wrong", "consistent"}


def test_one_of_a_kind_is_singular_and_no_change_has_no_sign(cli: Cli) -> None:
    small = ("--model", "1b", "--gpus", "1xL4")
    for command in (
        ("mixed", *small, "--rate", "1", "--batch-tokens", "1000000"),
        ("capacity", *small, "--rate", "1"),
        ("train", "--model", "8b", "--gpus", "2x8xH100", "--hpz", "0"),
    ):
        code, out, err = cli(*command)
        assert code == 0, err
        # a number that ends in 1, such as 2.1 or 21, is not one
        assert not re.search(r"(?<![\d.,x])1 (GPUs|replicas|hours|starts|groups|cells|nodes|idle GPU hours)\b", out)
        assert not re.search(r"(?<![\d.])[-+]0(\.0)? ?%", out)


def test_models_gpus_and_show(cli: Cli) -> None:
    names = {m["name"] for m in json_of(cli, "models")["models"]}
    assert len(names) >= 30
    assert {m["name"] for m in json_of(cli, "models", "mixtral")["models"]} == {"mixtral-8x7b", "mixtral-8x22b"}
    assert len(json_of(cli, "gpus")["gpus"]) >= 18
    assert json_of(cli, "show", "llama-3.1-8b")["n_params"] == 8_030_261_248
    assert json_of(cli, "show", "l40s")["name"] == "l40s"
    assert json_of(cli, "show", "chat")["source"]
    assert "vllm" in json_of(cli, "show", "coefficients")["coefficients"]
    for words in (("models",), ("gpus",), ("show", "h100"), ("show", "8b"), ("show", "rag"), ("show", "coefficients")):
        code, out, _ = cli(*words)
        assert code == 0
        assert out.strip()


def test_validate_predicts_records_without_refitting(cli: Cli, root: Path, tmp_path: Path) -> None:
    source = sorted((root / "data" / "runs").glob("vllm-*.jsonl"))[0]
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(source.read_text().splitlines()[:6]) + "\n")
    rows = tmp_path / "rows.csv"
    form = json_of(cli, "validate", str(few), "--rows", str(rows))
    assert set(form) >= {"overall", "runs"}
    assert set(form["overall"]["requests_per_s"]) == {"median", "p90", "bias", "n"}
    assert "relative_error" in rows.read_text().splitlines()[0]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no command": ([], "such as advisor recommend"),
    "unknown command": (["recomend"], "recommend"),
    "unknown option": (["recommend", "--modle", "8b"], "did you mean --model"),
    "no model": (["recommend", "--gpus", "1xH100"], "needs --model"),
    "unknown model": (["recommend", "--model", "lama-3-8", "--gpus", "1xH100"], "unknown model"),
    "unknown size": (["recommend", "--model", "70c", "--gpus", "1xH100"], "did you mean 70b"),
    "target as an option": (
        ["recommend", "--model", "8b", "--gpus", "1xH100", "--ttft", "500ms"],
        "such as --slo ttft_p99=500ms",
    ),
    "unknown gpu": (["recommend", "--model", "8b", "--gpus", "8xA1000"], "did you mean"),
    "zero gpus": (["recommend", "--model", "8b", "--gpus", "0xA100"], "at least 1"),
    "negative rate": (
        ["recommend", "--model", "8b", "--gpus", "1xH100", "--rate", "-3"],
        "--rate must be greater than 0",
    ),
    "nan": (["recommend", "--model", "8b", "--gpus", "1xH100", "--rate", "nan"], "finite"),
    "huge": (["recommend", "--model", "8b", "--gpus", "1xH100", "--rate", "1e30"], "less than or equal"),
    "both loads": (["recommend", "--model", "8b", "--gpus", "1xH100", "--rate", "1", "--concurrency", "2"], "not both"),
    "bad target": (["recommend", "--model", "8b", "--gpus", "1xH100", "--slo", "p99=1"], "cannot read target"),
    "bad power": (["recommend", "--model", "8b", "--gpus", "1xH100", "--power-cap", "lots"], "cannot read power"),
    "bad list": (["recommend", "--model", "8b", "--gpus", "1xH100", "--weight-dtype", "fp9"], "did you mean fp8"),
    "no value": (["recommend", "--model", "8b", "--gpus", "1xH100", "--rate"], "--rate needs a value"),
    "missing config": (["recommend", "--model", "./nowhere/config.json", "--gpus", "1xH100"], "no such file"),
    "missing claims": (["audit", "nowhere.toml"], "no such file"),
    "missing records": (["validate", "nowhere.jsonl"], "nowhere.jsonl"),
    "capacity without targets": (["capacity", "--model", "8b", "--gpus", "1xH100", "--slo", "none"], "--slo"),
    "command": (["recomend", "--model", "8b", "--gpus", "1xH100"], "did you mean recommend"),
    "choice": (["recommend", "--model", "8b", "--gpus", "1xH100", "--task", "tran"], "did you mean train"),
    "too many plans": (["recommend", "--model", "8b", "--gpus", "1xH100", "--plans", "5000"], "--plans"),
    "hour of day": (["mixed", "--model", "8b", "--gpus", "1xH100", "--rate", "1", "--peak-hour", "25"], "--peak-hour"),
    "tokens": (["mixed", "--model", "8b", "--gpus", "1xH100", "--rate", "1", "--batch-tokens", "-5"], "--batch-tokens"),
    "host memory": (["train", "--model", "8b", "--gpus", "1xH100", "--host-memory", "lots"], "such as 128GB"),
    "no network": (["train", "--model", "8b", "--gpus", "2x8xH100", "--network", "0"], "--network"),
    "stage 3 in a pipeline": (
        ["train", "--model", "8b", "--gpus", "8xH100", "--zero-stage", "3", "--pp", "4"],
        "use stage 1 with pp 4",
    ),
    "targets of a training": (
        ["recommend", "--model", "8b", "--gpus", "1xH100", "--task", "train", "--slo", "ttft_p99=1s"],
        "--slo does not apply to --task train",
    ),
    "provider": (["recommend", "--model", "8b", "--gpus", "1xH100", "--provider", "nimbus"], "Published prices: aws,"),
    "offload by vllm": (
        ["predict", "--model", "8b", "--gpus", "1xH100", "--offload", "cpu"],
        "--offload is a setting of DeepSpeed's",
    ),
    "offload by autotp": (
        ["predict", "--model", "llama-2-7b", "--gpus", "1xH100", "--backend", "deepspeed-autotp", "--offload", "cpu"],
        "deepspeed-zero-inference",
    ),
    "sequences of autotp": (
        [
            "predict",
            "--model",
            "llama-2-7b",
            "--gpus",
            "1xH100",
            "--backend",
            "deepspeed-autotp",
            "--max-num-seqs",
            "8",
        ],
        "--max-num-seqs is a setting of vLLM",
    ),
    "artefact": (["emit", "composse", "--model", "8b", "--gpus", "1xH100", "--tp", "1"], "did you mean compose"),
}


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("128GB", 128e9), ("512 GiB", 512 * 2**30), ("3.84TB", 3.84e12), ("6GB/s", 6e9), ("400Gb/s", 50e9), ("1e9", 1e9)],
)
def test_sizes_and_rates_are_read_as_they_are_written(text: str, n_bytes: float) -> None:
    assert size("")(text) == pytest.approx(n_bytes)


def test_what_the_node_has_reaches_the_answer(cli: Cli) -> None:
    train = ("train", "--model", "70b", "--gpus", "8xH100", "--zero-stage", "3", "--offload-optimizer", "cpu")
    assert json_of(cli, *train)["best"] is not None
    poor = json_of(cli, *train, "--host-memory", "64GB")
    assert poor["best"] is None
    assert "64.0 GB is there" in json.dumps(poor["rejected"])
    slow, fast = (
        json_of(cli, "train", "--model", "8b", "--gpus", "2x8xH100", "--zero-stage", "3", "--network", rate)
        for rate in ("25Gb/s", "400Gb/s")
    )
    steps = [x["best"]["prediction"]["quantities"]["step_s"]["value"] for x in (slow, fast)]
    assert steps[0] > 1.2 * steps[1]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(cli: Cli, name: str) -> None:
    words, part = MISTAKES[name]
    code, out, err = cli(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("advisor: ")
    assert len(err.splitlines()) == 1
    assert part in err


HOSTILE = {
    "layers": {"num_hidden_layers": 1e30},
    "nan": {"hidden_size": float("nan")},
    "negative": {"num_attention_heads": -8},
    "text": {"vocab_size": "'; rm -rf /"},
    "list": {"intermediate_size": [1, 2]},
    "missing": {"hidden_size": None},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_config_is_one_sentence(cli: Cli, tmp_path: Path, name: str) -> None:
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    good = json_of(cli, "recommend", "--model", str(path), "--gpus", "1xH100", "--rate", "1", "--finalists", "0")
    assert good["best"]["backend"] == "vllm"
    config |= HOSTILE[name]
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    code, out, err = cli("recommend", "--model", str(path), "--gpus", "1xH100")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_every_command_has_help_and_a_line_in_the_reference(cli: Cli, root: Path) -> None:
    page = (root / "docs" / "cli.md").read_text()
    parser = build_parser()
    for name in COMMANDS:
        code, out, _ = cli(name, "--help")
        assert code == 0
        assert name in out
        assert f"## `advisor {name}`" in page
        for action in command_parser(parser, name)._actions:
            assert action.help, f"{name} {action.dest} has no help"
    code, out, _ = cli("--version")
    assert code == 0
    assert re.fullmatch(r"advisor \d+\.\d+\.\d+\n", out)


def test_a_reader_that_closes_the_pipe_is_no_error(root: Path) -> None:
    shell = f"{sys.executable} -m advisor models | head -1"
    done = subprocess.run(["sh", "-c", shell], cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("model")
    assert "Traceback" not in done.stderr
