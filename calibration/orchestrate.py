"""Runs many engine starts on one host, side by side on disjoint GPUs, within one deadline."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from calibration.errors import CalibrationError, EngineMissing
from calibration.gpus import open_nvml, visible
from calibration.jobs import Job
from calibration.output import run_on
from calibration.records import hold_folder

LOG_TAIL_LINES = 150
LOG_TAIL_BYTES = 12_000
STOP_GRACE_S = 4.0
END_MARGIN_S = 10.0  # kept before the deadline to stop engines and write the tails of the logs
MIN_START_S = 60.0  # less time than this is not worth an engine start
PORT_STEP = 200
BAR_WIDTH = 20
CELL_LINE = re.compile(r"\S+ \d+/\d+[ :]")  # what runners say when a cell is over, well or not
ROOT = Path(__file__).resolve().parent.parent


def host_gpus(chosen: str | None = None) -> list[str]:
    """Return the ids of the GPUs to use: those named, those of CUDA_VISIBLE_DEVICES, or all. Raises EngineMissing."""
    if chosen:
        return [g.strip() for g in chosen.split(",") if g.strip()]
    ids = visible(open_nvml())
    if not ids:
        raise EngineMissing("no GPU is visible here (CUDA_VISIBLE_DEVICES is empty)")
    return ids


def n_cells(job: Job) -> int:
    """Return how many cells a job has."""
    if job.kind == "vllm":
        return len(job.cells)
    from calibration.deepspeed_runner import check_cells

    return len(check_cells(job))


def free_port(start: int) -> int:
    """Return a port at or above `start` that nothing listens on."""
    for port in range(start, start + 2000, 7):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    return start


def _stat(pid: str) -> tuple[int, int] | None:
    """Return parent and session of a process from /proc."""
    try:
        text = Path("/proc", pid, "stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return int(fields[1]), int(fields[3])


def family(pid: int) -> list[int]:
    """Return every live process that descends from `pid` or is in its session: what a hung engine leaves behind."""
    seen = {int(p): s for p in os.listdir("/proc") if p.isdigit() and (s := _stat(p))}
    found = {pid}
    grown = True
    while grown:
        more = {p for p, (parent, session) in seen.items() if p not in found and (parent in found or session == pid)}
        found |= more
        grown = bool(more)
    return sorted(found & set(seen))


@dataclass
class Running:
    """A job that has GPUs."""

    job: Job
    gpus: list[str]
    process: subprocess.Popen[str]
    log: Path
    end: float
    asked_to_stop: float = 0.0
    why: str = ""


@dataclass
class Orchestrator:
    """Hands free GPUs to waiting jobs, in order, and stops what overstays."""

    jobs: list[Job]
    out_dir: Path
    gpus: list[str]
    deadline_s: float
    say: Callable[[str], None] = print
    min_start_s: float = MIN_START_S
    work: Path = field(init=False)
    began: float = field(default_factory=time.time)
    running: list[Running] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", str(self.out_dir.resolve())).strip("-")[-80:]
        self.work = Path(tempfile.gettempdir()) / f"calibration-{os.getuid()}-{name}"
        self.work.mkdir(parents=True, exist_ok=True)
        self.n_cells = max(1, sum(n_cells(j) for j in self.jobs))
        self.n_done = 0
        self.lines: queue.Queue[str] = queue.Queue()
        self.port = random.Random(os.getpid()).randrange(21000, 38000)

    @property
    def deadline(self) -> float:
        """When engines must have been told to stop."""
        return self.began + self.deadline_s - END_MARGIN_S

    def tell(self, text: str) -> None:
        """Print one line with the seconds since the start and the share of the cells that are over."""
        self.n_done += bool(CELL_LINE.match(text))
        share = min(1.0, self.n_done / self.n_cells)
        bar = ("#" * round(share * BAR_WIDTH)).ljust(BAR_WIDTH, ".")
        line = f"[{time.time() - self.began:5.0f}s {bar} {self.n_done}/{self.n_cells}] {text}"
        with contextlib.suppress(OSError):
            self.say(line)
        with contextlib.suppress(OSError), open(self.out_dir / "progress.txt", "a") as file:
            file.write(line + "\n")

    def start(self, job: Job, gpus: list[str]) -> None:
        """Start a job on some GPUs in a session of its own."""
        now = time.time()
        end = min(now + job.limit_s, self.deadline)
        spec, log = self.work / f"{job.run_id}.job.json", self.work / f"{job.run_id}.log"
        spec.write_text(json.dumps(job.as_json()))
        slot = (
            self.work / f"cache-gpu{gpus[0]}"
        )  # jobs that share a first GPU never overlap, so neither do their caches
        self.port = free_port(self.port + PORT_STEP)
        # the replicas of one start would all begin their search for free ports there, and take each other's
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            **({"VLLM_PORT": str(self.port)} if job.dp == 1 else {}),
            "MASTER_PORT": str(self.port + PORT_STEP // 2),
            "VLLM_CACHE_ROOT": str(slot / "vllm"),
            "TORCH_EXTENSIONS_DIR": str(slot / "torch_extensions"),
            "TRITON_CACHE_DIR": str(slot / "triton"),
            "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p),
            "PYTHONUNBUFFERED": "1",
            **{k: str(v) for k, v in job.env.items()},
        }
        command = [sys.executable, "-m", "calibration", "run-job", "--job", str(spec), "--shared"]
        command += ["--out", str(self.out_dir / "records.jsonl"), "--errors", str(self.out_dir / "errors.jsonl")]
        command += [
            "--rows",
            str(self.out_dir / "rows.jsonl.gz"),
            "--log",
            str(log),
            "--deadline-unix",
            f"{end - 3:.1f}",
        ]
        process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=run_on(job.cpus),
        )
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()
        self.running.append(Running(job, gpus, process, log, end))
        self.tell(f"{job.run_id}: started on GPU {','.join(gpus)}, {end - now:.0f} s at most")

    def _read(self, stream: IO[str] | None) -> None:
        for line in stream or ():
            self.lines.put(line.rstrip("\n"))

    def free(self) -> list[str]:
        """Return the GPUs that no job holds."""
        taken = {g for r in self.running for g in r.gpus}
        return [g for g in self.gpus if g not in taken]

    def assign(self, waiting: list[Job]) -> None:
        """Start waiting jobs that fit on the free GPUs; say why for those that never will."""
        for job in list(waiting):
            left = self.deadline - time.time()
            if job.gpus_needed > len(self.gpus):
                self._give_up(job, waiting, f"needs {job.gpus_needed} GPUs, this host has {len(self.gpus)}")
            elif away := sorted(set(job.cpus) - os.sched_getaffinity(0)):
                self._give_up(job, waiting, f"hardware thread {away[0]} is not there, or not ours")
            elif left < self.min_start_s:
                self._give_up(job, waiting, f"not started: {max(left, 0):.0f} s left")
            elif job.gpus_needed <= len(self.free()):
                waiting.remove(job)
                try:
                    self.start(job, self.free()[: job.gpus_needed])
                except OSError as err:
                    self._give_up(job, [], f"could not be started: {err}")

    def _give_up(self, job: Job, waiting: list[Job], why: str) -> None:
        with contextlib.suppress(ValueError):
            waiting.remove(job)
        self.results[job.run_id] = why
        self.tell(f"{job.run_id}: {why}")

    def stop(self, run: Running, why: str) -> None:
        """Ask a job to end, then make it."""
        now = time.time()
        if not run.asked_to_stop:
            run.asked_to_stop, run.why = now, why
            self.tell(f"{run.job.run_id}: {why}, stopping it")
            with contextlib.suppress(ProcessLookupError):
                run.process.terminate()
        elif now - run.asked_to_stop > STOP_GRACE_S:
            self.kill(run)

    def kill(self, run: Running) -> None:
        """Kill a job with everything that it started."""
        for pid in family(run.process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.process.wait(5)

    def reap(self, run: Running) -> None:
        """Note how a job ended, free its GPUs, keep the tail of its log."""
        status = run.process.poll()
        for pid in family(run.process.pid):  # an engine process that outlived its parent
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self.running.remove(run)
        result = run.why or ("ended" if status == 0 else f"failed with status {status}")
        self.results[run.job.run_id] = result
        time.sleep(0.1)
        self.drain()
        self.tell(f"{run.job.run_id}: {result}")
        self.write_logs()

    def write_logs(self) -> None:
        """Write the last lines of every log into one file."""
        parts = []
        for job in self.jobs:
            log = self.work / f"{job.run_id}.log"
            if log.exists():
                with open(log, "rb") as file:
                    file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
                    tail = file.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
                parts.append(f"===== {job.run_id} =====\n" + "\n".join(tail) + "\n")
        with contextlib.suppress(OSError):
            fresh = self.out_dir / "logs.txt.new"
            fresh.write_text("\n".join(parts))
            fresh.replace(self.out_dir / "logs.txt")

    def drain(self) -> None:
        """Print what the jobs have said."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.tell(self.lines.get_nowait())

    def run(self) -> int:
        """Run all jobs; return 0 when each of them ended by itself without an error, else 1."""
        waiting = list(self.jobs)
        self.tell(f"{len(waiting)} jobs, GPUs {','.join(self.gpus)}, {self.deadline_s:.0f} s; logs in {self.work}")
        try:
            while waiting or self.running:
                self.assign(waiting)
                self.drain()
                for run in list(self.running):
                    if run.process.poll() is not None:
                        self.reap(run)
                    elif time.time() > self.deadline:
                        self.stop(run, "the deadline is here")
                    elif time.time() > run.end:
                        self.stop(run, "its time limit is over")
                time.sleep(0.1)
        except KeyboardInterrupt:
            self.tell("stopped by a signal")
        finally:
            for run in list(self.running):
                run.why = run.why or "stopped"
                self.kill(run)
                self.reap(run)
            self.drain()
            self.write_logs()
        good = sum(r == "ended" for r in self.results.values())
        self.tell(f"{good} of {len(self.jobs)} jobs ended well; records in {self.out_dir / 'records.jsonl'}")
        return 0 if good == len(self.jobs) else 1


def run_many(
    jobs: Iterable[Job],
    out_dir: str,
    *,
    deadline_s: float,
    gpus: str | None = None,
    min_start_s: float = MIN_START_S,
) -> int:
    """Run jobs on this host's GPUs and return the exit status. See `Orchestrator`."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CalibrationError(f"cannot make the folder '{out_dir}': {err.strerror}") from None
    if shutil.disk_usage(folder).free < 50e6:
        print(f"warning: less than 50 MB are free in '{out_dir}'", flush=True)
    with hold_folder(folder):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        say: Any = lambda text: print(text, flush=True)  # noqa: E731
        return Orchestrator(list(jobs), folder, host_gpus(gpus), deadline_s, say, min_start_s).run()
