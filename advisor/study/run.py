"""One run of a study: the cells that the result file lacks, computed in batches, written as they come."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from advisor.catalog import load_catalog
from advisor.schema.study import Study, StudySummary
from advisor.study.backends import check_backend, results, workers_of
from advisor.study.cell import Row, basis
from advisor.study.grid import Cell, Grid, Shard
from advisor.study.store import Store
from advisor.study.table import is_parquet, write_parquet

BATCH_S = 2.0
"""Time that a batch should take: a thousand times what it costs to send, and little to lose in a kill."""
MAX_BATCH = 512
MAX_REASONS = 100
SHOWN_REASONS = 5


@dataclass
class Progress:
    """How far a run is."""

    n_cells: int
    n_skipped: int
    n_done: int = 0
    busy_s: float = 0.0
    by_status: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, rows: list[Row], seconds: float) -> None:
        """Count the rows of a batch."""
        self.n_done += len(rows)
        self.busy_s += seconds
        for row in rows:
            self.by_status[row["status"]] += 1
            # reasons that hold numbers of their own are many; the first ones are enough to see what is wrong
            if row["reason"] and (row["reason"] in self.reasons or len(self.reasons) < MAX_REASONS):
                self.reasons[row["reason"]] += 1

    def batch_cells(self, n_workers: int) -> int:
        """Return the cells of the next batch: BATCH_S of work, but less when the rest must be shared out."""
        if not self.n_done:
            return 1
        fair = (self.n_cells - self.n_skipped - self.n_done) // (4 * max(n_workers, 1))
        wanted = int(BATCH_S * self.n_done / max(self.busy_s, 1e-9))
        return max(1, min(wanted, fair, MAX_BATCH))


Report = Callable[[Progress], None]


def _batches(cells: Iterator[Cell], progress: Progress, n_workers: int) -> Iterator[list[Cell]]:
    batch: list[Cell] = []
    for cell in cells:
        batch.append(cell)
        if len(batch) >= progress.batch_cells(n_workers):
            yield batch
            batch = []
    if batch:
        yield batch


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until a batch is on the disk and counted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _: held.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if held:
        signal.raise_signal(held[0])


def _light(study: Study) -> Study:
    """Return the study without its lists, which a worker does not need: a batch names its own cells."""
    return study.model_copy(update={"models": ("-",), "gpus": ("-",), "workloads": (), "slos": (), "seeds": ()})


def run_study(
    study: Study,
    out: Path,
    *,
    n_workers: int | None = None,
    backend: str = "processes",
    address: str | None = None,
    shard: Shard | None = None,
    is_resumed: bool = True,
    report: Report | None = None,
) -> StudySummary:
    """Compute the cells of a study (of one shard of it) that `out` lacks, and return what was done.

    out        : .jsonl, appended to; with .parquet, the rows are kept in the .jsonl beside it and written as a table at
                 the end
    n_workers  : processes; None = the cores of this machine, or the whole cluster
    address    : of an existing Ray or Dask cluster; None starts one on this machine
    is_resumed : cells that `out` holds are skipped; False refuses a file that holds any
    report     : called after each batch
    Ctrl-C ends the run with `is_complete` false; every finished cell is on disk. Raises AdvisorError.
    """
    check_backend(backend, n_workers)
    n_workers, shard = workers_of(backend, n_workers), shard or Shard()
    as_table = is_parquet(out)
    rows_path = out.with_suffix(".jsonl") if as_table else out
    grid = Grid(study)
    start = perf_counter()
    is_complete = True
    with Store(rows_path, basis(load_catalog().root), is_resumed=is_resumed) as store:
        mine = (cell for cell in grid if shard.holds(cell.id))
        n_cells = n_skipped = 0
        for cell in mine:
            n_cells += 1
            n_skipped += cell.id in store.done
        progress = Progress(n_cells, n_skipped)
        if report:
            report(progress)
        if n_cells > n_skipped:
            todo = (c for c in grid if shard.holds(c.id) and c.id not in store.done)
            found = results(
                _light(study),
                _batches(todo, progress, n_workers),
                backend=backend,
                n_workers=min(n_workers, n_cells - n_skipped),
                address=address,
            )
            try:
                for rows, seconds in found:
                    with _undisturbed():
                        store.append(rows)
                        progress.add(rows, seconds)
                    if report:
                        report(progress)
            except KeyboardInterrupt:
                is_complete = False
            finally:
                found.close()
    if as_table and is_complete:
        write_parquet(rows_path, out)
    elapsed_s = perf_counter() - start
    return StudySummary(
        study=study.name,
        out=str(out if is_complete else rows_path),
        shard=str(shard),
        n_cells=n_cells,
        n_skipped=n_skipped,
        n_done=progress.n_done,
        n_by_status=dict(progress.by_status),
        reasons=tuple(progress.reasons.most_common(SHOWN_REASONS)),
        is_complete=is_complete,
        n_workers=n_workers,
        elapsed_s=elapsed_s,
        busy_frac=min(1.0, progress.busy_s / (elapsed_s * n_workers)) if n_workers else None,
    )
