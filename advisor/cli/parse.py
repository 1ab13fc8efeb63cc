"""Parsing of the command line: one sentence for every mistake, types that say what they accept, shared options."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, get_args

from advisor.errors import AdvisorError, nearest, printable
from advisor.schema.deployment import Backend, KvDtype, WeightDtype
from advisor.schema.request import Objective
from advisor.schema.workload import Metric, Statistic

BACKENDS: tuple[str, ...] = get_args(Backend)
WEIGHT_DTYPES: tuple[str, ...] = get_args(WeightDtype)
KV_DTYPES: tuple[str, ...] = get_args(KvDtype)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
METRICS: tuple[str, ...] = get_args(Metric)
STATISTICS: tuple[str, ...] = get_args(Statistic)
PRICE_KINDS = ("on-demand", "spot", "reserved", "own")
Run = Callable[[argparse.Namespace], int]
FIELD_FLAGS = {
    "price_usd_per_gpu_h": "price",
    "budget_usd_per_h": "budget",
    "electricity_usd_per_kwh": "electricity-price",
    "grid_kgco2e_per_kwh": "grid-carbon",
    "power_cap_w": "power-cap",
    "n_finalists": "finalists",
    "max_plans": "plans",
    "weight_dtypes": "weight-dtype",
    "kv_dtypes": "kv-dtype",
    "backends": "backend",
    "arrivals_per_s": "rate",
    "host_memory_bytes_per_gpu": "host-memory",
    "nvme_bytes": "nvme-size",
    "nvme_bytes_per_s": "nvme-rate",
    "network_bytes_per_s_per_gpu": "network",
}


class UsageError(AdvisorError):
    """The words of the command line mean nothing."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one sentence, without the usage text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.HelpFormatter)
        super().__init__(*args, **kwargs)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name the nearest choice, not only all of them."""
        known = [str(choice) for choice in action.choices or ()]
        if action.choices is None or value in action.choices:
            return
        near = nearest(str(value).lower(), known)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        what = "command" if action.metavar == "COMMAND" else "value"
        raise argparse.ArgumentError(action, f"unknown {what} '{printable(value)}'; {hint}")

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing the usage text and exiting."""
        text = message.removeprefix("argument ").removeprefix("COMMAND: ")
        if text.endswith(": expected one argument"):
            flag = text.split(":")[0].split("/")[0]
            text = f"{flag} needs a value; one that begins with '-' is written {flag}=VALUE"
        if text.endswith("are required: COMMAND"):
            text = "give a command, such as advisor recommend --model 70b --gpus 8xA100; advisor --help lists them"
        raise UsageError(printable(text, 400))


def unknown_word(parser: argparse.ArgumentParser, word: str) -> UsageError:
    """Return the error for a word that no option or argument takes, with the nearest option."""
    known = sorted(parser._option_string_actions)
    target = word.lstrip("-").split("=")[0].replace("-", "_")
    metric, _, statistic = target.partition("_")
    if "--slo" in known and metric in METRICS and statistic in ("", *STATISTICS):
        wanted = f"{metric}_{statistic or 'p99'}={'500ms' if metric in ('ttft', 'e2e') else '50ms'}"
        return UsageError(f"unknown option '{printable(word)}'; targets are one option, such as --slo {wanted}")
    near = nearest(word.split("=")[0], known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"see {parser.prog} --help"
    return UsageError(f"unknown option or word '{printable(word)}'; {hint}")


def require(args: argparse.Namespace) -> None:
    """Raise UsageError when a command that asks about a model lacks the model or the GPUs."""
    if getattr(args, "plan", None):
        return
    lacks = [f"--{name}" for name in ("model", "gpus") if getattr(args, name, "") is None]
    if lacks:
        example = "--model 70b --gpus 8xA100"
        raise UsageError(f"{args.command} needs {' and '.join(lacks)}, such as advisor {args.command} {example}")


def count(text: str) -> int:
    """Return a whole number; scientific notation such as 1e3 is understood."""
    try:
        value = float(text) if any(c in text for c in ".eE") else int(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"'{printable(text)}' is not a whole number")


def number(text: str) -> float:
    """Return a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), float("-inf")):
        raise argparse.ArgumentTypeError(f"'{printable(text)}' is not a finite number")
    return value


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    value = count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{printable(text)}' is not a whole number of at least 1")
    return value


def natural(text: str) -> int:
    """Return a whole number of at least 0."""
    value = count(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"'{printable(text)}' is not a whole number of at least 0")
    return value


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return a type for a whole number in [low, high]."""

    def read(text: str) -> int:
        value = count(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"'{printable(text)}' is not a whole number from {low:,} to {high:,}")
        return value

    return read


def within(low: float, high: float, *, below: bool = False) -> Callable[[str], float]:
    """Return a type for a number in [low, high]; with `below`, less than `high`."""

    def read(text: str) -> float:
        value = number(text)
        if not low <= value <= high or (below and value == high):
            rest = f"below {high:g}" if below else f"at most {high:g}"
            raise argparse.ArgumentTypeError(f"'{printable(text)}' is not a number of at least {low:g} and {rest}")
        return value

    return read


_SIZE = re.compile(r"([0-9.eE+-]+) ?([kmgtp]?)(i?)(b|bit)?(/s|ps)?", re.IGNORECASE)
_STEPS = " kmgtp"


def size(example: str) -> Callable[[str], float]:
    """Return a type for bytes or bytes a second such as '128GB', '512GiB', '3.8TB', '6GB/s' or '400Gb/s'.

    A rate of lower-case b or of bits is in bits; without a unit the number is in bytes.
    """

    def read(text: str) -> float:
        match = _SIZE.fullmatch(text.strip())
        try:
            value = float(match[1]) if match else float("nan")
        except ValueError:
            value = float("nan")
        if match is None or not 0 <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"cannot read '{printable(text)}'; write it such as {example}")
        value *= (1024.0 if match[3] else 1000.0) ** _STEPS.index(match[2].lower() or " ")
        unit = match[4] or "B"
        return value / 8 if match[5] and (unit == "b" or unit.lower() == "bit") else value

    return read


def names(kind: str, known: Sequence[str], aliases: dict[str, tuple[str, ...]] | None = None) -> Callable[[str], Any]:
    """Return a type for a comma list of names out of `known`; an alias stands for several."""

    def read(text: str) -> tuple[str, ...]:
        found: list[str] = []
        for word in filter(None, (w.strip().lower() for w in text.split(","))):
            if word in (aliases or {}):
                found += (aliases or {})[word]
            elif word in known:
                found.append(word)
            else:
                near = nearest(word, [*known, *(aliases or {})])
                hint = (
                    f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join([*(aliases or {}), *known])}"
                )
                raise argparse.ArgumentTypeError(f"unknown {kind} '{printable(word)}'; {hint}")
        if not found:
            raise argparse.ArgumentTypeError(f"no {kind} in '{printable(text)}'; known: {', '.join(known)}")
        return tuple(dict.fromkeys(found))

    read.__name__ = kind
    return read


weights = names("weight format", WEIGHT_DTYPES)
caches = names("cache format", KV_DTYPES)
backends = names(
    "backend", BACKENDS, {"deepspeed": tuple(b for b in BACKENDS if b.startswith("deepspeed")), "all": BACKENDS}
)


def add_target(p: argparse.ArgumentParser) -> None:
    """Add what every prediction needs: model and GPUs."""
    g = p.add_argument_group("what and where")
    g.add_argument("--model", metavar="NAME", help="required: name, hub id, short name ('70b') or config.json path")
    g.add_argument(
        "--gpus",
        metavar="SPEC",
        help="8xA100, 2x8xH100 (nodes x GPUs), 4x./card.toml; commas compare pools",
    )
    g.add_argument("--engine-version", metavar="V", help="vLLM release (default 0.26.0)")
    g.add_argument(
        "--host-memory", type=size("128GB"), metavar="SIZE", help="host memory a GPU, for offload (default 192GB)"
    )
    g.add_argument(
        "--nvme-size", type=size("7.68TB"), metavar="SIZE", help="room on a node's NVMe drives (default 3.84TB)"
    )
    g.add_argument(
        "--nvme-rate", type=size("12GB/s"), metavar="RATE", help="what a node reads from them (default 6GB/s)"
    )
    g.add_argument(
        "--network", type=size("50GB/s or 400Gb/s"), metavar="RATE", help="of each GPU between nodes (default 200Gb/s)"
    )


def add_workload(p: argparse.ArgumentParser) -> None:
    """Add lengths, load and targets."""
    g = p.add_argument_group("traffic and targets")
    g.add_argument("--workload", metavar="PRESET", help="chat (default), rag, summarise, code, agent, batch")
    g.add_argument(
        "--prompt-tokens", "--isl", type=count, metavar="N", help="prompt length; fixed unless --length-sigma"
    )
    g.add_argument("--output-tokens", "--osl", type=count, metavar="N", help="output length")
    g.add_argument("--length-sigma", type=number, metavar="S", help="lognormal spread of both lengths (0 = fixed)")
    g.add_argument("--rate", type=number, metavar="R", help="requests/s, Poisson arrivals")
    g.add_argument("--concurrency", type=count, metavar="N", help="clients in a closed loop, instead of --rate")
    g.add_argument(
        "--slo", default="", metavar="TARGETS", help="such as ttft_p99=500ms,tpot_p99=50ms; none = best effort"
    )
    g.add_argument("--shared-prefix-tokens", type=count, metavar="N", help="system prompt that all requests share")
    g.add_argument("--conversation-hit-frac", type=number, metavar="F", help="share of the rest that is cached")
    g.add_argument(
        "--max-model-len", type=count, metavar="N", help="context to serve (default: what the traffic needs)"
    )
    g.add_argument("--seed", type=count, metavar="N", help="seed of the drawn requests (default 0)")


def add_money(p: argparse.ArgumentParser) -> None:
    """Add prices, caps and carbon."""
    g = p.add_argument_group("money and power")
    g.add_argument("--price", type=number, metavar="USD", help="your price of one GPU hour, instead of published ones")
    g.add_argument("--provider", metavar="NAME", help="take this provider's published price")
    g.add_argument("--price-kind", choices=PRICE_KINDS, help="default on-demand")
    g.add_argument("--budget", type=number, metavar="USD", help="most USD an hour")
    g.add_argument("--power-cap", metavar="P", help="most power of all boards, such as 2.4kW")
    g.add_argument("--electricity-price", type=number, metavar="USD", help="USD per kWh, where you pay it yourself")
    g.add_argument("--pue", type=number, metavar="F", help="facility power over board power (default 1)")
    g.add_argument("--grid-carbon", type=number, metavar="KG", help="kgCO2e per kWh of your grid")
    g.add_argument("--grid", metavar="COUNTRY", help="instead of --grid-carbon: the country's yearly mean, such as us")


def add_output(p: argparse.ArgumentParser) -> None:
    """Add the form of the answer."""
    p.add_argument("--json", action="store_true", help="print one JSON object with a schema_version")
    p.add_argument("-v", "--verbose", action="store_true", help="all breakdowns and notes")


def add_deployment(p: argparse.ArgumentParser) -> None:
    """Add what fixes one deployment; unset options are the engine's defaults."""
    g = p.add_argument_group("deployment")
    g.add_argument("--backend", choices=BACKENDS, default="vllm", help="default vllm")
    g.add_argument("--tp", type=count, metavar="N", help="tensor parallel degree (default: smallest that fits)")
    g.add_argument("--pp", type=count, metavar="N", help="pipeline stages (default 1)")
    g.add_argument("--dp", type=count, metavar="N", help="replicas (default: as many as the GPUs hold)")
    g.add_argument("--weight-dtype", choices=WEIGHT_DTYPES, help="default: the checkpoint's own")
    g.add_argument("--kv-dtype", choices=KV_DTYPES, help="default: the computing format")
    g.add_argument("--max-num-seqs", type=count, metavar="N", help="sequences that run together")
    g.add_argument("--max-num-batched-tokens", type=count, metavar="N", help="tokens of one step")
    g.add_argument("--gpu-memory-utilization", type=number, metavar="F", help="share of memory for vLLM")
    g.add_argument("--no-prefix-caching", action="store_true", help="reuse no prompt prefixes")
    g.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs")
    g.add_argument(
        "--static-batch", type=count, metavar="N", help="sequences of one DeepSpeed batch (default: the most that fit)"
    )
    g.add_argument(
        "--offload",
        choices=("none", "cpu", "nvme"),
        help="where ZeRO-Inference keeps the weights (default: the first that holds them)",
    )
    g.add_argument("--kv-offload", choices=("none", "cpu"), help="where ZeRO-Inference keeps the cache (default none)")


def request_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a Request that the command line sets; what is not given keeps the schema's default."""
    from advisor.recommend.ask import parse_power_w, parse_slo

    given = vars(args)
    plain = {
        "model": "model",
        "gpus": "gpus",
        "task": "task",
        "workload": "workload",
        "prompt_tokens": "prompt_tokens",
        "output_tokens": "output_tokens",
        "length_sigma": "length_sigma",
        "rate": "rate",
        "concurrency": "concurrency",
        "objective": "objective",
        "max_model_len": "max_model_len",
        "engine_version": "engine_version",
        "price": "price_usd_per_gpu_h",
        "provider": "provider",
        "price_kind": "price_kind",
        "budget": "budget_usd_per_h",
        "electricity_price": "electricity_usd_per_kwh",
        "pue": "pue",
        "grid_carbon": "grid_kgco2e_per_kwh",
        "plans": "max_plans",
        "finalists": "n_finalists",
        "seed": "seed",
        "host_memory": "host_memory_bytes_per_gpu",
        "nvme_size": "nvme_bytes",
        "nvme_rate": "nvme_bytes_per_s",
        "network": "network_bytes_per_s_per_gpu",
        "backends": "backends",
        "weight_dtypes": "weight_dtypes",
        "kv_dtypes": "kv_dtypes",
    }
    fields = {name: given[flag] for flag, name in plain.items() if given.get(flag) is not None}
    if (given.get("slo") or "").strip().lower() == "none":
        fields["is_best_effort"] = True
    elif given.get("slo"):
        fields["slo"] = parse_slo(given["slo"])
    if given.get("grid") is not None:
        if given.get("grid_carbon") is not None:
            raise UsageError("give --grid or --grid-carbon, not both")
        fields["grid_kgco2e_per_kwh"] = grid_intensity(given["grid"])
    if given.get("power_cap") is not None:
        fields["power_cap_w"] = parse_power_w(given["power_cap"])
    shared, hits = given.get("shared_prefix_tokens"), given.get("conversation_hit_frac")
    if shared is not None or hits is not None:
        fields["prefix"] = {"shared_prefix_tokens": shared or 0, "conversation_hit_frac": hits or 0.0}
    return fields


def grid_intensity(text: str) -> float:
    """Return kgCO2e per kWh from a country or from a number."""
    from advisor.catalog.grid import grid_kgco2e_per_kwh

    try:
        value = float(text)
    except ValueError:
        return grid_kgco2e_per_kwh(text)
    if not 0.0 <= value < 10.0:
        raise UsageError(f"--grid {printable(text)} is no carbon intensity: kg CO2e per kWh lie between 0 and 10")
    return value


def flag_of(field: str) -> str:
    """Return the option that sets a field of the request."""
    return "--" + FIELD_FLAGS.get(field, field).replace("_", "-")


def complain(text: str) -> None:
    """Print one sentence to stderr."""
    sys.stderr.write(f"advisor: {' '.join(text.split())}\n")
