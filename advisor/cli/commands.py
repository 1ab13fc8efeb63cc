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
    weights,
)

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
    g.add_argument("--task", choices=("serve", "batch"), help="batch: offline, a deep queue, no targets")
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
    p.add_argument("--out", metavar="FOLDER", help="write vllm.json and accuracy.json there")
    _records(p)


COMMANDS: dict[str, tuple[str, Add, Run]] = {
    "recommend": ("Rank every legal way to run a model on the GPUs.", _recommend, handler("serve", "recommend")),
    "predict": ("Predict one deployment.", _predict, handler("serve", "predict")),
    "compare": ("vLLM and DeepSpeed side by side for one scenario.", _compare, handler("serve", "compare")),
    "models": ("List the models of the catalogue.", _models, handler("data", "models")),
    "gpus": ("List the GPUs of the catalogue with their prices.", _gpus, handler("data", "gpus")),
    "show": ("Show a model, a GPU, a workload or the fitted coefficients.", _show, handler("data", "show")),
    "validate": ("Predict run records and print the errors.", _validate, handler("records", "validate")),
    "fit": ("Fit the coefficients to run records.", _fit, handler("records", "fit")),
    "audit": ("Judge published claims against physics, measurements and rules.", _audit, handler("work", "audit")),
}


def build_parser() -> Parser:
    """Return the parser of the whole command line."""
    parser = Parser(prog="advisor", description=advisor.__doc__)
    parser.add_argument("--version", action="version", version=f"advisor {advisor.__version__}")
    subs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (text, add, run) in COMMANDS.items():
        sub = subs.add_parser(name, help=text, description=text)
        add(sub)
        sub.set_defaults(run=run, command=name)
    return parser


def command_parser(parser: Parser, command: str) -> argparse.ArgumentParser:
    """Return the parser of one command."""
    subs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    found: argparse.ArgumentParser = subs.choices[command]
    return found
