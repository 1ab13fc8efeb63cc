"""Every page in every state, run without a browser: it shows what the API returned, and sentences for bad input."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from advisor.errors import UnknownName
from advisor.schema import Request
from advisor.ui.text import plain

Open = Callable[..., AppTest]
Answers = Callable[..., list[Request]]
Words = Callable[[AppTest], str]
Metrics = Callable[[AppTest], dict[str, str]]
Codes = Callable[[AppTest], list[str]]


def test_recommend_answers_without_any_input(
    answers: Answers, open_page: Open, words: Words, metrics: Metrics, codes: Codes
) -> None:
    seen = answers()
    test = open_page("recommend")
    assert not test.exception
    assert not test.error
    assert (seen[0].model, seen[0].gpus) == ("70b", "8xA100")
    shown = metrics(test)
    assert shown["Cost of 1M output tokens"] == "$3.45"
    assert shown["TPOT P99"] == "31.0 ms"
    assert [m.delta for m in test.metric if m.label == "TPOT P99"] == ["27.9 ms to 34.1 ms"]
    assert "vllm serve meta-llama/Llama-3.1-70B --tensor-parallel-size 4" in codes(test)
    assert "advisor recommend --model 70b --gpus 8xA100 --plans 40" in codes(test)
    assert "Costs 16 % less than the next plan" in words(test)


def test_recommend_takes_the_whole_scenario_from_the_url(answers: Answers, open_page: Open) -> None:
    seen = answers()
    query = {
        "model": "qwen3-32b",
        "gpus": "3xH200",
        "workload": "rag",
        "load": "rate",
        "rate": "7.5",
        "prompt": "900",
        "objective": "energy",
        "ttft_p99": "500 ms",
        "backends": "vLLM",
        "usd": "2.5",
    }
    test = open_page("recommend", **query)
    assert not test.exception
    (request,) = seen
    assert request.model == "qwen3-32b"
    assert request.gpus == "3xH200"
    assert request.rate == 7.5
    assert request.prompt_tokens == 900
    assert request.objective == "energy"
    assert request.backends == ("vllm",)
    assert request.price_usd_per_gpu_h == 2.5
    assert [(t.name, t.max_s) for t in request.slo.targets] == [("ttft_p99", 0.5)]


def test_the_equal_command_line_gives_the_same_request(answers: Answers, open_page: Open, codes: Codes) -> None:
    from advisor.cli.commands import build_parser
    from advisor.cli.parse import request_fields

    seen = answers()
    query = {"model": "qwen3-32b", "gpus": "2x8xH100", "load": "clients", "clients": "64", "tpot_p99": "50 ms"}
    query |= {"watts": "9000", "kwh": "0.2", "pue": "1.3", "co2": "0.4", "budget": "80", "weights": "fp8"}
    test = open_page("recommend", **query)
    command = next(c for c in codes(test) if c.startswith("advisor recommend"))
    parsed = request_fields(build_parser().parse_args(shlex.split(command)[1:]))
    assert Request.model_validate(parsed) == seen[0]


def test_notes_and_names_are_shown_as_text_not_as_markup(answers: Answers, open_page: Open) -> None:
    answers()
    test = open_page("recommend")
    (warning,) = test.warning
    assert warning.value.startswith("\\<script\\>")
    assert "\\[x\\](" in warning.value
    assert "\\$1" in warning.value
    assert "\\:red\\[b\\]" in warning.value


def test_recommend_without_a_plan_says_so_and_why(answers: Answers, open_page: Open, words: Words) -> None:
    answers("none")
    test = open_page("recommend")
    assert not test.exception
    assert "No plan runs 70b on 8xA100" in test.error[0].value
    assert "weights need 141 GB, the card has 85 GB. What would fit: TP 2" in words(test)


def test_an_unknown_name_is_one_sentence(answers: Answers, open_page: Open) -> None:
    answers(UnknownName("model", "lama-8b", ["llama-3.1-8b"]))
    test = open_page("recommend", model="lama-8b")
    assert not test.exception
    assert [e.value for e in test.error] == ["unknown model 'lama-8b'; did you mean llama-3.1-8b?"]


def test_an_error_of_the_catalogue_gives_no_advice_for_the_command_line(open_page: Open) -> None:
    for name, query in (("recommend", {"model": "lama-8b"}), ("explore", {"gpus": "8xZ100"})):
        test = open_page(name, **query)
        assert not test.exception
        (error,) = test.error
        assert error.value.startswith("unknown ")
        assert "Run 'advisor" not in error.value
        assert "side bar" in error.value


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret/config.json", "~/x", "8x/etc/card.toml", "tests"])
def test_a_page_reads_no_file_of_its_machine(answers: Answers, open_page: Open, path: str) -> None:
    seen = answers()
    test = open_page("recommend", gpus=path)
    assert "looks like a path" in test.error[0].value
    assert not seen


@pytest.mark.parametrize(
    ("key", "value"), [("rate", "-3"), ("rate", "nan"), ("prompt", "1e99"), ("objective", "luck"), ("pue", "9")]
)
def test_a_broken_url_falls_back_to_what_is_allowed(answers: Answers, open_page: Open, key: str, value: str) -> None:
    seen = answers()
    test = open_page("recommend", load="rate", **{key: value})
    assert not test.exception
    assert seen == [Request(model="70b", gpus="8xA100", rate=5.0, max_plans=40)]


def test_an_overload_has_no_latency_and_says_so(
    open_page: Open, monkeypatch: pytest.MonkeyPatch, answers: Answers, metrics: Metrics
) -> None:
    from advisor.ui import call

    answers()
    fitting = call.find_plans

    def overloaded(request: Request) -> Any:
        full = fitting(request)
        plans = [
            p.model_copy(update={"prediction": p.prediction.model_copy(update={"is_saturated": True})})
            for p in full.plans
        ]
        best = {"vllm": plans[0], "deepspeed-autotp": plans[2]}
        return full.model_copy(update={"plans": tuple(plans), "best": plans[0], "best_by_backend": best})

    monkeypatch.setattr(call, "find_plans", overloaded)
    test = open_page("recommend")
    assert not test.exception
    assert metrics(test)["TTFT P99"] == "no bound"
    assert metrics(test)["TPOT P99"] == "31.0 ms"
    ranked: Any = next(d.value for d in test.dataframe if "targets" in d.value.columns)
    assert set(ranked["targets"]) == {"overload"}
    assert ranked["TTFT P99"].isna().all()
    test = open_page("compare")
    assert not test.exception
    numbers: Any = test.table[0].value.set_index("quantity")
    assert numbers.loc["TTFT P99", "vLLM"] == plain("no bound: overload")


def test_another_plan_can_be_taken_apart(answers: Answers, open_page: Open, words: Words) -> None:
    answers()
    test = open_page("recommend", plan="3")
    assert "DeepSpeed AutoTP · a100-sxm-80gb · TP 8 · DP 1 · bf16" in words(test)


@pytest.mark.parametrize(
    ("gpus", "backend", "name"),
    [
        ("2xH100", "vllm", "prometheus"),
        ("2xH100", "vllm", "kubernetes"),
        ("1xH100", "deepspeed-autotp", "deepspeed"),
        ("1xH100", "deepspeed-autotp", "deepspeed-command"),
    ],
)
def test_the_page_writes_the_files_that_the_command_line_writes(
    open_page: Open, codes: Codes, capsys: pytest.CaptureFixture[str], gpus: str, backend: str, name: str
) -> None:
    from advisor.cli import run
    from advisor.ui.text import BACKENDS

    assert run(["emit", name, "--model", "8b", "--gpus", gpus, "--backend", backend]) == 0
    wanted = capsys.readouterr().out
    test = open_page("recommend", model="8b", gpus=gpus, file=name, backends=BACKENDS[backend])
    assert not test.exception
    assert not test.error
    assert wanted.strip() in [code.strip() for code in codes(test)]


def test_train_shows_the_prediction_of_the_api(open_page: Open, metrics: Metrics) -> None:
    from advisor.catalog import load_catalog
    from advisor.predict.train import predict_train
    from advisor.schema.training import TrainJob
    from advisor.ui.text import show

    test = open_page("train", gpus="8xH100", stage="3: + parameters")
    assert not test.exception
    catalog = load_catalog()
    job = TrainJob(
        model="llama-3.1-8b",
        zero_stage=3,
        dp=8,
        gradient_accumulation_steps=8,
        sequence_length=2048,
        is_checkpointed=True,
    )
    model, cluster = catalog.model("llama-3.1-8b")[0], catalog.clusters("8xH100").clusters[0]
    ours = predict_train(model, cluster, job, catalog.coefficients("deepspeed"))
    assert metrics(test)["Step time"] == show("step_s", ours["step_s"])
    assert metrics(test)["Memory per GPU"] == show("memory_bytes_per_gpu", ours["memory_bytes_per_gpu"])


@pytest.mark.parametrize(
    "query",
    [
        {"stage": "2: + gradients"},
        {"stage": "3: + parameters", "offload": "cpu", "offload_param": "cpu", "micro": "2"},
        {"stage": "1: optimizer states", "train_pp": "4", "checkpointing": "false"},
        {"stage": "1: optimizer states", "train_tp": "2", "stack": "fused", "dtype": "fp16", "lora": "16"},
    ],
)
def test_trains_first_command_is_the_job_of_the_headline(
    open_page: Open, query: dict[str, str], metrics: Metrics, codes: Codes, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    from advisor.cli import run
    from advisor.ui.text import show

    test = open_page("train", gpus="8xH100", **query)
    assert not test.exception
    assert not test.error
    first, second = codes(test)[-1].splitlines()
    assert second.startswith("advisor train ")
    assert run([*shlex.split(first)[1:], "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["plans"]
    found = {name: q["value"] for name, q in only["prediction"]["quantities"].items()}
    for name, title in (("step_s", "Step time"), ("memory_bytes_per_gpu", "Memory per GPU"), ("mfu_frac", "MFU")):
        assert metrics(test)[title] == show(name, found[name])


def test_train_says_what_would_fit(open_page: Open) -> None:
    test = open_page("train", train_model="llama-2-70b", gpus="8xA100", stage="0: nothing sharded")
    assert not test.exception
    assert "This job does not run" in test.error[0].value


def test_train_refuses_degrees_that_do_not_divide(open_page: Open) -> None:
    test = open_page("train", train_tp="3")
    assert [e.value for e in test.error] == ["TP x PP is 3, which does not divide the 8 GPUs"]


def test_trust_lists_every_coefficient(open_page: Open) -> None:
    from advisor.catalog import load_catalog

    test = open_page("trust", engine="deepspeed")
    assert not test.exception
    frame: Any = next(d.value for d in test.dataframe if "coefficient" in d.value.columns)
    assert set(frame["coefficient"]) == set(load_catalog().coefficients("deepspeed").coefficients)


def test_audit_judges_each_claim_of_a_file(open_page: Open, words: Words) -> None:
    test = open_page("audit")
    assert not test.exception
    assert "ZeRO-1 shards parameters" in words(test)
    assert "wrong" in words(test)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("title = ", "not TOML"),
        ("title = 'x'\n[[figures]]\nid = 'a'", "field required"),
        ("title = 'x'\nnonsense = 1", "extra inputs are not permitted"),
        ("title = 'x'\n[[statements]]\nid = 'a'\ntext = 'b'\nrule = 'os.system'", "unknown"),
    ],
)
def test_audit_answers_a_bad_file_with_a_sentence(open_page: Open, text: str, why: str) -> None:
    test = open_page("audit", claims="paste my own")
    test.text_area[0].set_value(text).run()
    assert not test.exception
    assert why in test.error[0].value


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("capacity", {"model": "8b", "gpus": "8xH100", "peak": "12", "ttft_p99": "1.5 s", "offline": "both"}),
        (
            "explore",
            {"model": "8b", "gpus": "2xH100", "at_tp": "2", "at_max_num_seqs": "64", "load": "rate", "usd": "2"},
        ),
        ("compare", {"model": "8b", "gpus": "1xH100"}),
        ("train", {"train_model": "qwen3-8b", "gpus": "8xH100", "micro": "2", "tokens": "1000000000"}),
    ],
)
def test_each_pages_command_is_understood_and_asks_the_same(
    open_page: Open, name: str, query: dict[str, str], codes: Codes
) -> None:
    from advisor.cli.commands import build_parser

    test = open_page(name, **query)
    assert not test.exception
    assert not test.error
    lines = codes(test)[-1].splitlines()
    if name == "explore":  # the second line is the replay, which has the same settings and no money
        replay = build_parser().parse_args(shlex.split(lines.pop())[1:])
        assert (replay.command, replay.tp, replay.max_num_seqs, replay.rate) == ("simulate", 2, 64, 5.0)
    args = build_parser().parse_args(shlex.split(lines[-1])[1:])
    assert args.model == query.get("model", query.get("train_model"))
    assert args.gpus == query["gpus"]
    expected: dict[str, dict[str, Any]] = {
        "capacity": {"command": "mixed", "rate": 12.0, "slo": "ttft_p99=1500ms", "train_model": "llama-3.1-8b"},
        "explore": {"command": "predict", "tp": 2, "max_num_seqs": 64, "rate": 5.0},
        "compare": {"command": "compare"},
        "train": {"command": "train", "global_batch": 128, "sequence_length": 2048, "tokens": 10**9},
    }
    assert {key: getattr(args, key) for key in expected[name]} == expected[name]


def test_compare_shows_the_better_side_first_and_both_in_numbers(answers: Answers, open_page: Open) -> None:
    answers()
    test = open_page("compare")
    assert not test.exception
    assert [s.value for s in test.subheader][:2] == ["vLLM", "DeepSpeed AutoTP"]
    numbers: Any = test.table[0].value.set_index("quantity")
    assert numbers.loc["TPOT P99", "vLLM"] == "31.0 ms (27.9 ms to 34.1 ms)"
    assert numbers.loc["TPOT P99", "DeepSpeed AutoTP"] == "90.0 ms (81.0 ms to 99.0 ms)"


@pytest.mark.parametrize(("is_kept", "mark"), [(False, "better here"), (True, "no winner")])
def test_compare_names_no_winner_where_the_intervals_leave_none(
    answers: Answers, open_page: Open, words: Words, monkeypatch: pytest.MonkeyPatch, is_kept: bool, mark: str
) -> None:
    from advisor.ui import call

    answers()
    both = call.find_plans

    def find(request: Request) -> Any:
        # all take the same time end to end; so the targets decide, where one side misses them
        full = both(request)
        plans = [p.model_copy(update={"meets_slo": is_kept or p.rank == 1}) for p in full.plans]
        best = {"vllm": plans[0], "deepspeed-autotp": plans[2]}
        return full.model_copy(update={"plans": tuple(plans), "best": plans[0], "best_by_backend": best})

    monkeypatch.setattr(call, "find_plans", find)
    shown = words(open_page("compare"))
    assert [m for m in ("better here", "no winner") if m in shown] == [mark]


def test_compare_without_a_plan_gives_the_reasons(answers: Answers, open_page: Open, words: Words) -> None:
    answers("none")
    test = open_page("compare")
    assert not test.exception
    assert "Neither engine runs" in test.error[0].value
    assert "weights need 141 GB" in words(test)


def test_explore_shows_what_predict_says(open_page: Open, metrics: Metrics) -> None:
    from advisor.catalog import load_catalog
    from advisor.recommend.ask import ask
    from advisor.recommend.one import deployment_of, predict_one
    from advisor.ui.text import show

    test = open_page("explore", model="8b", gpus="1xH100", load="rate", rate="4", at_tp="1")
    assert not test.exception
    question = ask(Request(model="8b", gpus="1xH100", rate=4.0, max_plans=40), load_catalog())
    plan = predict_one(question, deployment_of(question, {"tp": 1}))
    assert metrics(test)["TPOT P99"] == show("tpot_p99_s", plan.prediction["tpot_p99_s"])


def test_explore_says_which_degrees_are_legal(open_page: Open) -> None:
    test = open_page("explore", model="8b", gpus="4xH100", at_tp="16")
    assert not test.exception
    assert "tp 16 is not legal" in test.error[0].value
    assert "legal: 1, 2, 4" in test.error[0].value.replace("\\", "")


def test_capacity_serves_every_hour_of_the_chosen_mode(open_page: Open, metrics: Metrics) -> None:
    test = open_page("capacity", model="8b", gpus="4xH100", peak="10", batch_tokens="1000000")
    assert not test.exception
    assert not test.error
    assert int(metrics(test)["Fewest GPUs"]) <= 4


def test_calibrate_waits_for_a_file(open_page: Open) -> None:
    test = open_page("calibrate")
    assert not test.exception
    assert not test.metric
