"""The command `advisor study`: a grid of questions, with progress, resumable."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import TYPE_CHECKING

from advisor.cli.parse import count
from advisor.cli.text import bullet, out, print_json
from advisor.units import format_s

if TYPE_CHECKING:
    from advisor.schema.study import StudySummary
    from advisor.study.run import Progress

LINE_EVERY_S = 10.0
INTERRUPTED = 130


def add_study(p: argparse.ArgumentParser) -> None:
    """Add the options of `advisor study`."""
    p.add_argument("file", metavar="STUDY.toml", help="the grid, such as data/studies/example.toml")
    p.add_argument("--out", metavar="FILE", help="results: .jsonl, or .parquet with pyarrow (default STUDY.jsonl)")
    p.add_argument("--workers", type=count, metavar="N", help="processes (default: the cores, or the whole cluster)")
    p.add_argument("--backend", default="processes", metavar="NAME", help="processes (default), ray or dask")
    p.add_argument("--address", metavar="HOST:PORT", help="of a Ray or Dask cluster (default: one on this machine)")
    p.add_argument("--shard", default="0/1", metavar="I/N", help="part I (from 0) of N, for job arrays (default 0/1)")
    p.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="skip the cells that FILE holds (default); --no-resume refuses such a file",
    )
    p.add_argument("--json", action="store_true", help="print one JSON object with a schema_version")


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """Show how far a run is on stderr: a bar on a terminal, else a line every ten seconds."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("cells", total=None)

        def show(progress: Progress) -> None:
            done = progress.n_skipped + progress.n_done
            bar.update(task, total=progress.n_cells, completed=done, description=_counts(progress))

        yield show


def _counts(progress: Progress) -> str:
    parts = [f"{n} {status}" for status, n in sorted(progress.by_status.items()) if status != "ok"]
    return ", ".join(["cells", *parts])


def _lines() -> Callable[[Progress], None]:
    start = last = monotonic()

    def show(progress: Progress) -> None:
        nonlocal last
        now, rest = monotonic(), progress.n_cells - progress.n_skipped - progress.n_done
        if now - last < LINE_EVERY_S or not progress.n_done:
            return
        last = now
        left = format_s((now - start) / progress.n_done * rest)
        done = progress.n_skipped + progress.n_done
        sys.stderr.write(f"{done:,} of {progress.n_cells:,} {_counts(progress)}; about {left} left\n")
        sys.stderr.flush()

    return show


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _again(args: argparse.Namespace) -> str:
    words = ["advisor", "study", args.file]
    for flag in ("out", "workers", "address"):
        if (value := getattr(args, flag)) is not None:
            words += [f"--{flag}", str(value)]
    words += ["--backend", args.backend] if args.backend != "processes" else []
    words += ["--shard", args.shard] if args.shard != "0/1" else []
    return shlex.join(words)


def _summary_lines(summary: StudySummary) -> list[str]:
    counted = ", ".join(f"{n:,} {status}" for status, n in sorted(summary.n_by_status.items())) or "nothing new"
    skipped = f"; {summary.n_skipped:,} were there already" if summary.n_skipped else ""
    part = f" (shard {summary.shard})" if summary.shard != "0/1" else ""
    lines = [f"{summary.study}{part}: {summary.n_cells:,} cells: {counted}{skipped}"]
    if summary.n_done:
        rate = summary.n_done / summary.elapsed_s
        whose = f" with {summary.n_workers} workers" if summary.n_workers > 1 else ""
        lines.append(f"{format_s(summary.elapsed_s)}{whose}, {rate:.3g} cells/s")
    lines += [line for reason, n in summary.reasons for line in bullet(f"{n:,} x {reason}")]
    return [*lines, f"results: {summary.out}"]


def study(args: argparse.Namespace) -> int:
    """Compute a study and print what was done."""
    from advisor.study import read_study, run_study
    from advisor.study.grid import parse_shard

    shard = parse_shard(args.shard)
    path = Path(args.file)
    asked = read_study(path)
    part = f".{shard.index}-of-{shard.n}" if shard.n > 1 else ""
    target = Path(args.out or f"{path.stem}{part}.jsonl")
    # a batch system ends a job with SIGTERM: the same orderly end as Ctrl-C
    signal.signal(signal.SIGTERM, _stop)
    with _progress() as report:
        summary = run_study(
            asked,
            target,
            n_workers=args.workers,
            backend=args.backend,
            address=args.address,
            shard=shard,
            is_resumed=args.resume,
            report=report,
        )
    if args.json:
        print_json(summary.model_dump(mode="json"))
    else:
        out("\n".join(_summary_lines(summary)))
    if summary.is_complete:
        return 0
    kept = summary.n_skipped + summary.n_done
    sys.stderr.write(f"stopped with {kept:,} of {summary.n_cells:,} cells kept; to go on: {_again(args)}\n")
    return INTERRUPTED
