"""The commands: what each takes, and which function of the library answers it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

import advisor
from advisor.cli.parse import (
    OBJECTIVES,
    Parser,
    Run,
    add_deployment,
    add_money,
    add_output,
    add_target,
    add_workload,
    backends,
    caches,
    count,
    number,
    positive,
    weights,
    whole,
    within,
)
from advisor.cli.study import add_study
from advisor.cli.training_options import add_training_job

TASKS = ("serve", "batch", "train", "mixed")
Add = Callable[[argparse.ArgumentParser], None]


def handler(module: str, name: str) -> Run:
    """Return a command's function, imported when it is called: `advisor models` must not load the simulator."""

    def call(args: argparse.Namespace) -> int:
        return int(getattr(import_module(f"advisor.cli.{module}"), name)(args))

    return call


def _recommend(p: argparse.ArgumentParser) -> None:
    add_target(p)
    add_workload(p)
    add_money(p)
    g = p.add_argument_group("search")
    g.add_argument(
        "--task", choices=TASKS, help="serve (default), batch: offline, a deep queue; train and mixed as the commands"
    )
    g.add_argument("--objective", choices=OBJECTIVES, help="default cost")
    g.add_argument(
        "--backend", dest="backends", type=backends, metavar="LIST", help="vllm, deepspeed (all paths) or names"
    )
    g.add_argument(
        "--weight-dtype",
        dest="weight_dtypes",
        type=weights,
        metavar="LIST",
        help="allowed formats, such as bf16,fp8,awq-int4",
    )
    g.add_argument("--kv-dtype", dest="kv_dtypes", type=caches, metavar="LIST", help="allowed cache formats")
    g.add_argument("--plans", type=count, metavar="N", help="plans to show (default 10)")
    g.add_argument("--finalists", type=count, metavar="N", help="plans to simulate (default 6, 0 = closed form only)")
    add_output(p)


def _compare(p: argparse.ArgumentParser) -> None:
    add_target(p)
    add_workload(p)
    add_money(p)
    p.add_argument("--objective", choices=OBJECTIVES, help="default cost")
    add_output(p)


def _predict(p: argparse.ArgumentParser) -> None:
    add_target(p)
    add_deployment(p)
    add_workload(p)
    add_money(p)
    p.add_argument("--closed-form", action="store_true", help="steady state only, no simulation")
    add_output(p)


def _models(p: argparse.ArgumentParser) -> None:
    p.add_argument("query", nargs="?", default="", help="part of a name")
    p.add_argument("--json", action="store_true", help="print one JSON object with a schema_version")


def _gpus(p: argparse.ArgumentParser) -> None:
    p.add_argument("query", nargs="?", default="", help="part of a name")
    p.add_argument("--json", action="store_true", help="print one JSON object with a schema_version")


def _show(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", help="a model, a GPU, a workload preset, or 'coefficients'")
    p.add_argument("--json", action="store_true", help="print one JSON object with a schema_version")


def _audit(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE", help="claims file, such as data/claims/vllm-vs-deepspeed-2025.toml")
    p.add_argument("--json", action="store_true", help="print one JSON object with a schema_version")


def _records(p: argparse.ArgumentParser) -> None:
    p.add_argument("--max-steps", type=count, default=8, metavar="N", help="steps of the fit at most (default 8)")
    p.add_argument("--json", action="store_true", help="print one JSON object with a schema_version")


def _validate(p: argparse.ArgumentParser) -> None:
    p.add_argument("files", nargs="+", metavar="FILE.jsonl", help="run records, one JSON object a line")
    p.add_argument("--rows", metavar="OUT.csv", help="also write every prediction beside its measurement")
    p.add_argument("--cross", action="store_true", help="leave one engine start out, refit, predict it (minutes)")
    _records(p)


def _fit(p: argparse.ArgumentParser) -> None:
    p.add_argument("files", nargs="*", metavar="FILE.jsonl", help="your own run records, beside the shipped ones")
    p.add_argument("--out", metavar="FOLDER", help="write vllm.json, accuracy.json and accuracy_cells.json there")
    _records(p)


def _simulate(p: argparse.ArgumentParser) -> None:
    add_target(p)
    add_deployment(p)
    add_workload(p)
    g = p.add_argument_group("replay")
    g.add_argument("--arrivals", choices=("poisson", "gamma", "constant"), default="poisson", help="default poisson")
    g.add_argument("--cv", type=number, default=2.0, metavar="F", help="gamma: variation of the gaps (default 2)")
    g.add_argument("--requests", type=count, metavar="N", help="requests to send")
    g.add_argument("--duration", type=number, metavar="S", help="seconds in which requests arrive")
    g.add_argument("--trace", metavar="CSV", help="replay a trace: columns t_s, prompt_tokens, output_tokens")
    g.add_argument("--trace-name", default="", metavar="NAME", help="rows whose column 'trace' holds this")
    g.add_argument("--out", metavar="CSV", help="write every request")
    add_output(p)


def _capacity(p: argparse.ArgumentParser) -> None:
    add_target(p)
    add_deployment(p)
    add_workload(p)
    add_money(p)
    add_output(p)


def _power(p: argparse.ArgumentParser) -> None:
    add_target(p)
    add_deployment(p)
    add_workload(p)
    add_money(p)
    g = p.add_argument_group("own hardware, hosted price, rack")
    g.add_argument("--capex-per-gpu", type=number, metavar="USD", help="price of your own GPU with its share of node")
    g.add_argument("--years", type=number, metavar="N", help="years that it is used (default 4)")
    g.add_argument("--utilisation", type=number, metavar="F", help="share of hours with this load (default 1)")
    g.add_argument("--hosted-in", type=number, metavar="USD", help="price of a hosted API, per million input tokens")
    g.add_argument("--hosted-out", type=number, metavar="USD", help="the same, per million output tokens")
    g.add_argument("--rack-kw", type=number, metavar="KW", help="power of one rack: how many nodes fit")
    add_output(p)


def _plan_file(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("plan file")
    g.add_argument("--plan", metavar="JSON", help="output of recommend --json or predict --json, instead of the above")
    g.add_argument("--rank", type=count, metavar="N", help="which of its plans (default: the best)")


def _emit(p: argparse.ArgumentParser) -> None:
    names = "vllm, compose, kubernetes, ray, kuberay, slurm, locust, nsys, prometheus"
    p.add_argument("artefact", help=f"{names}, deepspeed, deepspeed-command or deepspeed-config")
    add_target(p)
    add_deployment(p)
    add_workload(p)
    add_money(p)
    _plan_file(p)
    p.add_argument("--out", metavar="PATH", help="file or folder to write to, instead of printing")


def _verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("url", nargs="?", default="", help="OpenAI-compatible endpoint, such as http://localhost:8000")
    p.add_argument("--endpoint", default="", metavar="URL", help="the same as an option")
    add_target(p)
    add_deployment(p)
    add_workload(p)
    _plan_file(p)
    g = p.add_argument_group("load test")
    g.add_argument("--requests", type=count, metavar="N", help="requests of the loaded cell")
    g.add_argument("--duration", type=number, metavar="S", help="seconds in which its requests arrive (open loop)")
    g.add_argument("--light", type=count, default=8, metavar="N", help="requests one at a time before it (default 8)")
    g.add_argument("--served-model", default="", metavar="NAME", help="name that the server gives the model")
    g.add_argument("--key", default="", metavar="KEY", help="API key (default: OPENAI_API_KEY)")
    g.add_argument("--timeout", type=number, default=120.0, metavar="S", help="of one request (default 120)")
    g.add_argument("--record", metavar="JSONL", help="append the run records, which `advisor fit` reads, to this file")
    g.add_argument("--report", metavar="JSON", help="also write the report to this file")
    add_output(p)


def _train(p: argparse.ArgumentParser) -> None:
    add_target(p)
    g = p.add_argument_group("training")
    g.add_argument("--global-batch", type=positive, default=64, metavar="N", help="sequences a step (default 64)")
    g.add_argument("--sequence-length", type=positive, default=2048, metavar="N", help="tokens (default 2048)")
    g.add_argument("--lora-rank", type=count, default=0, metavar="N", help="train adapters of this rank (0 = all)")
    g.add_argument("--tokens", type=positive, default=0, metavar="N", help="tokens to train on")
    g.add_argument("--objective", choices=("throughput", "cost", "energy"), help="default throughput")
    g.add_argument("--price", type=number, metavar="USD", help="your price of one GPU hour")
    g.add_argument("--out", metavar="FOLDER", help="write the best plan's ds_config, script, hostfile, explanations")
    add_training_job(p)
    add_output(p)


def _mixed(p: argparse.ArgumentParser) -> None:
    from advisor.schema.mixed import MOST_HOURS, START_S  # its classes are this command's alone

    add_target(p)
    add_workload(p)
    add_money(p)
    g = p.add_argument_group("the day and the offline work")
    g.add_argument(
        "--night-frac", type=within(0, 1), default=0.2, metavar="F", help="lowest load over peak (default 0.2)"
    )
    g.add_argument(
        "--peak-hour", type=within(0, 24, below=True), default=14.0, metavar="H", help="hour of the peak (default 14)"
    )
    g.add_argument(
        "--headroom", type=within(0, 1, below=True), default=0.2, metavar="F", help="capacity kept free (default 0.2)"
    )
    g.add_argument(
        "--restart",
        type=within(0, 3600),
        metavar="S",
        help=f"seconds that GPUs lose when they start other work (default {START_S:.0f} and the time of the weights)",
    )
    g.add_argument("--batch-tokens", type=positive, default=0, metavar="N", help="tokens of an offline queue")
    g.add_argument("--batch-deadline", type=whole(1, MOST_HOURS), default=24, metavar="H", help="hours (default 24)")
    g.add_argument("--train-tokens", type=positive, default=0, metavar="N", help="tokens of a training job")
    g.add_argument("--train-model", default="", metavar="NAME", help="model to train (default: the served one)")
    g.add_argument(
        "--train-gpus", type=positive, default=0, metavar="N", help="GPUs of the training job (default: searched)"
    )
    g.add_argument("--train-deadline", type=whole(1, MOST_HOURS), default=24, metavar="H", help="hours (default 24)")
    g.add_argument("--lora-rank", type=count, default=0, metavar="N", help="train adapters of this rank (0 = all)")
    add_output(p)


def _check(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE", help="a ds_config, such as ds_config.json")
    p.add_argument("--ranks", type=count, metavar="N", help="GPUs of the run: also checks the batch sizes")
    p.add_argument("--tp", type=count, default=1, metavar="N", help="tensor-parallel degree (default 1)")
    p.add_argument("--json", action="store_true", help="print one JSON object with a schema_version")


COMMANDS: dict[str, tuple[str, Add, Run]] = {
    "recommend": ("Rank every legal way to run a model on the GPUs.", _recommend, handler("serve", "recommend")),
    "predict": ("Predict one deployment.", _predict, handler("serve", "predict")),
    "compare": ("vLLM and DeepSpeed side by side for one scenario.", _compare, handler("serve", "compare")),
    "simulate": ("Replay traffic request by request.", _simulate, handler("simulation", "simulate")),
    "capacity": ("Largest rate within targets, GPUs a load needs.", _capacity, handler("simulation", "capacity")),
    "power": ("Power, energy, emissions and money of one deployment, power limits.", _power, handler("power", "power")),
    "train": ("Rank the ways to train or fine-tune a model with DeepSpeed.", _train, handler("training", "train")),
    "mixed": ("One GPU budget for serving and offline work, hour by hour.", _mixed, handler("training", "mixed")),
    "emit": ("Write the files that start a plan.", _emit, handler("artefacts", "emit")),
    "verify": ("Load a live endpoint and compare it with the prediction.", _verify, handler("verify", "verify")),
    "study": ("Ask one question for a whole grid; resumable, parallel, sharded.", add_study, handler("study", "study")),
    "models": ("List the models of the catalogue.", _models, handler("data", "models")),
    "gpus": ("List the GPUs of the catalogue with their prices.", _gpus, handler("data", "gpus")),
    "show": ("Show a model, a GPU, a workload or the fitted coefficients.", _show, handler("data", "show")),
    "validate": ("Predict run records and print the errors.", _validate, handler("records", "validate")),
    "fit": ("Fit the coefficients to run records.", _fit, handler("records", "fit")),
    "check": ("Find what DeepSpeed would refuse or ignore in a ds_config.", _check, handler("work", "check")),
    "audit": ("Judge published claims against physics, measurements and rules.", _audit, handler("work", "audit")),
}


def build_parser(only: str = "") -> Parser:
    """Return the parser of the whole command line; of one command's options alone when `only` names it."""
    parser = Parser(prog="advisor", description=advisor.__doc__)
    parser.add_argument("--version", action="version", version=f"advisor {advisor.__version__}")
    subs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (text, add, run) in COMMANDS.items():
        sub = subs.add_parser(name, help=text, description=text)
        if name == only or only not in COMMANDS:
            add(sub)
        sub.set_defaults(run=run, command=name)
    return parser


def command_parser(parser: Parser, command: str) -> argparse.ArgumentParser:
    """Return the parser of one command."""
    subs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = subs.choices[command]
    return found
