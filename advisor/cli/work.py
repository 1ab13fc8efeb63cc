"""Commands that read a document: audit of claims, check of a ds_config."""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

from pydantic import ValidationError

from advisor.catalog import load_catalog
from advisor.cli.text import bullet, format_interval, out, print_json
from advisor.errors import BadData, printable
from advisor.schema import SCHEMA_VERSION, first_error

MAX_CLAIMS_BYTES = 4 * 2**20


def _text_of(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise BadData(printable(path, 200), "no such file")
    if path.stat().st_size > MAX_CLAIMS_BYTES:
        raise BadData(printable(path, 200), f"is larger than {MAX_CLAIMS_BYTES:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadData(printable(path, 200), "is not text in UTF-8") from None


def check(args: argparse.Namespace) -> int:
    """Print what DeepSpeed would refuse or silently ignore in a ds_config; 1 when there is any."""
    from advisor.predict.deepspeed_config import check_ds_config

    where = printable(args.file, 200)
    try:
        config = json.loads(_text_of(args.file))
    except (ValueError, RecursionError):
        raise BadData(where, "is not JSON") from None
    if not isinstance(config, dict):
        raise BadData(where, "must hold one JSON object, as DeepSpeed reads it")
    faults = check_ds_config(config, world_size=args.ranks, tp=args.tp)
    if args.json:
        rows = [{"key": f.key, "effect": f.effect, "why": f.why, "fix": f.fix} for f in faults]
        print_json({"schema_version": SCHEMA_VERSION, "faults": rows})
    else:
        out("\n".join("\n".join(bullet(str(f) + ".")) for f in faults) or "DeepSpeed 0.19.8 takes every line of it.")
    return 1 if faults else 0


def audit(args: argparse.Namespace) -> int:
    """Print a verdict on every claim of a file."""
    from advisor.recommend.audit import audit as audit_of
    from advisor.schema.claims import ClaimsFile

    path = Path(args.file)
    text = _text_of(args.file)
    try:
        claims = ClaimsFile.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise BadData(printable(path, 200), f"is not TOML: {error}") from None
    except ValidationError as error:
        raise BadData(printable(path, 200), first_error(error)) from None
    catalog = load_catalog()
    report = audit_of(claims, catalog)
    if args.json:
        print_json({"schema_version": SCHEMA_VERSION} | report.model_dump(mode="json"))
        return 0
    out(report.title + (f" ({report.url})" if report.url else ""))
    for f in report.findings:
        ours = f" Ours: {format_interval(f.quantity, f.ours)}." if f.ours is not None and f.quantity else ""
        scenario = (
            f" It would hold {'' if f.scenario.startswith('as ') else 'with '}{f.scenario}." if f.scenario else ""
        )
        out()
        out(f"{f.verdict.upper()}: {printable(f.text, 300)}")
        out("\n".join(bullet(f"{f.why}.{ours}{scenario}".replace("..", "."))))
        out("\n".join(bullet(f"source: {f.source}")))
    counts = {v: sum(f.verdict == v for f in report.findings) for v in {f.verdict for f in report.findings}}
    out()
    out(", ".join(f"{n} {v}" for v, n in sorted(counts.items(), key=lambda pair: -pair[1])))
    return 0
