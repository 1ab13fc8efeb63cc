"""Commands beside serving: audit of claims."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path

from pydantic import ValidationError

from advisor.catalog import load_catalog
from advisor.cli.text import bullet, format_interval, out, print_json
from advisor.errors import BadData, printable
from advisor.schema import SCHEMA_VERSION, first_error

MAX_CLAIMS_BYTES = 4 * 2**20


def audit(args: argparse.Namespace) -> int:
    """Print a verdict on every claim of a file."""
    from advisor.recommend.audit import audit as audit_of
    from advisor.schema.claims import ClaimsFile

    path = Path(args.file)
    if not path.is_file():
        raise BadData(printable(path, 200), "no such file")
    if path.is_file() and path.stat().st_size > MAX_CLAIMS_BYTES:
        raise BadData(printable(path, 200), f"is larger than {MAX_CLAIMS_BYTES:,} bytes")
    try:
        claims = ClaimsFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
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
        scenario = f" It would hold with {f.scenario}." if f.scenario else ""
        out()
        out(f"{f.verdict.upper()}: {printable(f.text, 300)}")
        out("\n".join(bullet(f"{f.why}.{ours}{scenario}".replace("..", "."))))
        out("\n".join(bullet(f"source: {f.source}")))
    counts = {v: sum(f.verdict == v for f in report.findings) for v in {f.verdict for f in report.findings}}
    out()
    out(", ".join(f"{n} {v}" for v, n in sorted(counts.items(), key=lambda pair: -pair[1])))
    return 0
