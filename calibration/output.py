"""Where a run writes, and the environment that it gives its engine."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from calibration.errors import CalibrationError, EngineDied, first_error
from calibration.records import Appender

PR_SET_PDEATHSIG = 1
ENV_DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # NVLink multicast can take the GPUs of a shared host out of service
    "NCCL_NVLS_ENABLE": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}


def die_with_parent() -> None:
    """Ask the kernel to end this child when its parent dies, kill -9 included (for `preexec_fn`)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_on(cpus: Iterable[int]) -> Callable[[], None]:
    """Return a `preexec_fn`: the child keeps to some hardware threads (none named: to no fewer), and dies with us."""
    chosen = set(cpus)

    def prepare() -> None:
        die_with_parent()
        if chosen:
            os.sched_setaffinity(0, chosen)

    return prepare


def cell_name(what: Any) -> str:
    """Return a short name for what a cell measures."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


class Output:
    """Where a run writes: records, rows, errors; progress goes to the terminal, what the engine prints to a log."""

    def __init__(self, out: str, rows: str | None, errors: str | None, log: str, *, shared: bool) -> None:
        self.out = out
        self.records = Appender(out, shared=shared)
        self.rows = Appender(rows, shared=shared, is_gzip=rows.endswith(".gz")) if rows else None
        self.errors_path = errors or f"{out}.errors"
        self.shared = shared
        self.errors: Appender | None = None
        self.log = Path(log)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        self.terminal = os.fdopen(os.dup(1), "w", buffering=1)
        self.is_captured = False
        self.started = time.monotonic()

    def capture(self) -> None:
        """Send this process's and its children's stdout and stderr to the log."""
        sys.stdout.flush()
        sys.stderr.flush()
        fd = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)
        self.is_captured = True

    def log_text(self) -> str:
        """Return what this run has logged so far."""
        with open(self.log, "rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")

    def say(self, text: str) -> None:
        """Print one progress line."""
        try:
            print(text.replace("\n", " "), file=self.terminal, flush=True)
        except OSError:
            self.terminal = open(os.devnull, "w")  # noqa: SIM115 - the reader is gone, the run goes on

    def record(self, record: dict[str, Any], columns: list[str] | None = None, rows: list[Any] | None = None) -> None:
        """Write a record and the rows of its requests."""
        if warning := self.records.append(record):
            self.say(f"warning: {warning}")
        if self.rows is not None and rows is not None:
            head = {"run_id": record["run_id"], "cell_id": record["cell_id"], "columns": columns}
            self.rows.append(head | {"rows": rows})

    def error(self, run_id: str, what: str, **more: Any) -> None:
        """Write an error line to the side file."""
        if self.errors is None:
            self.errors = Appender(self.errors_path, shared=self.shared)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self.errors.append({"run_id": run_id, "at": at, "error": what[:1000], **more})

    def attempt(self, run_id: str, work: Callable[[], int]) -> int:
        """Do the work of a run and return its exit status, or that of the error that ended it; close the files."""
        try:
            return work()
        except KeyboardInterrupt:
            self.say(f"{run_id}: stopped; the records so far are in '{self.out}'")
            return 130
        except CalibrationError as err:
            self.error(run_id, str(err), kind=type(err).__name__)
            self.say(f"error: {err}")
            return err.status
        except Exception as err:
            if self.is_captured:
                traceback.print_exc()  # into the log
            self.error(run_id, first_error(err), kind="crash")
            self.say(f"error: {run_id}: {first_error(err)}")
            return EngineDied.status
        finally:
            self.close()

    def close(self) -> None:
        """Close the files; records that could not be written go to the terminal."""
        for lost in self.records.close():
            self.say("unwritten record: " + json.dumps(lost))
        for appender in (self.rows, self.errors):
            if appender is not None:
                appender.close()


def prepare_env() -> None:
    """Set what an engine needs on a host without network, and what a shared host must not have; yours wins."""
    for name, value in ENV_DEFAULTS.items():
        os.environ.setdefault(name, value)
    root = str(Path(__file__).resolve().parent.parent)  # engine workers import calibration.vllm_probe
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH")) if p)
