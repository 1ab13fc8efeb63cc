"""Commands about run records: validate, fit."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

from advisor.cli.text import bullet, out, print_json, table
from advisor.errors import BadData, printable
from advisor.units import format_change, format_frac


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{text[:98]:<98}")
        sys.stderr.flush()


def _done() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r" + " " * 98 + "\r")


def _writable(name: str) -> Path:
    path = Path(name)
    if not path.parent.is_dir():
        raise BadData(printable(name), "its folder does not exist; give a path in an existing folder")
    if path.is_dir():
        raise BadData(printable(name), "is a folder; give a file name")
    return path


def _error_rows(tables: dict[str, dict[str, dict[str, float]]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, errors in tables.items():
        for metric, e in errors.items():
            shown = (
                format_frac(e["median"]),
                format_frac(e["p90"]),
                format_change(e["bias"], 1).replace("%", " %"),
                f"{e['n']:.0f}",
            )
            rows.append((name, metric, *shown))
            name = ""
    return rows


def validate(args: argparse.Namespace) -> int:
    """Predict every record without refitting and print the errors."""
    from advisor.fit.validate import summary
    from advisor.fit.validate import validate as errors_of

    rows_path = _writable(args.rows) if args.rows else None
    if args.cross:
        return _cross(args)
    rows = errors_of(args.files, progress=lambda n, of: _progress(f"{n} of {of} cells"))
    _done()
    form = summary(rows)
    if rows_path is not None:
        with rows_path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["run_id", "cell", "load", "lengths", "metric", "measured", "predicted", "relative_error"])
            for r in rows:
                writer.writerow(
                    [
                        r.run_id,
                        r.cell,
                        r.load,
                        r.lengths,
                        r.metric,
                        f"{r.measured:.9g}",
                        f"{r.predicted:.9g}",
                        f"{r.error:.6f}",
                    ]
                )
    if args.json:
        print_json(form)
        return 0
    head = ("engine start", "metric", "median", "P90", "bias", "n")
    out("\n".join(table(head, _error_rows({**form["runs"], "overall": form["overall"]}), left=2)))
    out("Relative errors of predictions; median and P90 of their size, bias with sign. Nothing was refitted.")
    out("Power is compared in cells of a second or more.")
    return 0


def _cross(args: argparse.Namespace) -> int:
    _, accuracy = _fit(args, args.files)
    if args.json:
        print_json(accuracy)
        return 0
    head = ("engine start left out", "metric", "median", "P90", "bias", "n")
    out("\n".join(table(head, _error_rows({**accuracy["by_run"], "overall": accuracy["overall"]}), left=2)))
    covered = ", ".join(f"{m} {format_frac(v)}" for m, v in accuracy["coverage_of_90_percent_intervals"].items())
    out(f"90 % intervals set by the other starts cover: {covered}.")
    return 0


def _fit(args: argparse.Namespace, files: list[str]) -> tuple[Any, dict[str, Any]]:
    from advisor.catalog import load_catalog
    from advisor.fit.run import fit_all

    catalog = load_catalog()
    start = {name: c.value for name, c in catalog.coefficients("vllm").coefficients.items()}
    known = {str(p.resolve()) for p in (catalog.root / "runs").glob("*.jsonl")}
    extra = [f for f in files if str(Path(f).resolve()) not in known]
    result = fit_all(
        catalog.root / "runs",
        catalog.root / "fitted" / "transfer.toml",
        catalog,
        extra=extra,
        max_steps=args.max_steps,
        start=start,
        say=_progress,
    )
    _done()
    return result


def fit(args: argparse.Namespace) -> int:
    """Fit the coefficients on the shipped records and further files; write them when --out names a folder."""
    from advisor.fit.run import write_accuracy, write_json

    folder = Path(args.out) if args.out else None
    if folder is not None and not folder.is_dir():
        raise BadData(printable(args.out), "is not an existing folder; coefficients and accuracy are written there")
    coefficients, accuracy = _fit(args, args.files)
    form = coefficients.model_dump(mode="json")
    if folder is not None:
        write_json(folder / "vllm.json", form)
        write_accuracy(folder, accuracy)
    if args.json:
        print_json({"schema_version": "1", "coefficients": form, "accuracy": accuracy})
        return 0
    rows = []
    for name, c in coefficients.coefficients.items():
        mark = "at bound" if c.is_at_bound else ""
        rows.append((name, f"{c.value:.4g}", f"{c.low:.4g}", f"{c.high:.4g}", c.unit, mark))
    out("\n".join(table(("coefficient", "value", "low", "high", "unit", ""), rows)))
    report = coefficients.report
    if report is not None:
        out(
            f"{report.n_coefficients} coefficients from {report.n_cells} cells of {len(report.run_ids)} engine starts; "
            f"condition number {report.condition_number:.2g}."
        )
        for note in report.notes:
            out("\n".join(bullet(note)))
    head = ("left-out starts", "metric", "median", "P90", "bias", "n")
    out("\n".join(table(head, _error_rows({"overall": accuracy["overall"]}), left=2)))
    return 0
