"""The command line: python -m calibration COMMAND."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from calibration.errors import CalibrationError, JobError

if TYPE_CHECKING:
    from calibration.jobs import Job


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m calibration", description="Short real engine runs that become run records."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run-vllm", "run the cells of one job on one vLLM engine start"),
        ("run-job", "run one job of any kind"),
    ):
        run = commands.add_parser(name, help=text)
        run.add_argument("--job", required=True, help="a JSON file with one job")
        run.add_argument("--out", required=True, help="run records are appended here, one line a cell")
        run.add_argument("--rows", help="one line a cell with its requests, gzipped when the name ends in .gz")
        run.add_argument("--errors", help="errors and skipped cells (default OUT.errors)")
        run.add_argument("--log", help="what the engine prints (default OUT.RUN_ID.log)")
        run.add_argument("--known", action="append", help="a further file whose cells of this run need not run again")
        run.add_argument("--shared", action="store_true", help="let other runs append to OUT at the same time")
        run.add_argument("--deadline-unix", type=float, help="stop starting cells at this time")
    live = commands.add_parser("run-endpoint", help="run the cells of one job against a running server")
    live.add_argument("--endpoint", required=True, help="its URL, such as http://localhost:8000")
    live.add_argument("--job", required=True, help="a JSON file with one job that describes what the server runs")
    live.add_argument("--out", required=True, help="run records are appended here, one line a cell")
    live.add_argument("--rows", help="one line a cell with its requests, gzipped when the name ends in .gz")
    live.add_argument("--errors", help="errors and skipped cells (default OUT.errors)")
    live.add_argument("--known", action="append", help="a further file whose cells of this run need not run again")
    many = commands.add_parser("run-many", aliases=["run"], help="run several jobs side by side on this host's GPUs")
    many.add_argument("--jobs", required=True, help="a JSON file with a list of jobs")
    many.add_argument(
        "--out-dir", required=True, help="folder for records.jsonl, rows.jsonl.gz, errors.jsonl, logs.txt"
    )
    many.add_argument("--deadline-s", type=float, default=540.0, help="all engines are stopped before this")
    many.add_argument("--gpus", help="GPU ids to use, with commas (default: all visible ones)")
    many.add_argument("--min-start-s", type=float, default=60.0, help="start no engine with less time left than this")
    ops = commands.add_parser("build-ops", help="build the DeepSpeed ops that jobs need, so that no job waits for them")
    ops.add_argument("--jobs", required=True, help="a JSON file with a list of jobs")
    check = commands.add_parser("check", help="find noisy, throttled or contaminated records")
    check.add_argument("files", nargs="+", help="files of run records")
    check.add_argument("--notes", action="store_true", help="print notes, too")
    plan = commands.add_parser("plan", help="choose the cells that tell most about the coefficients")
    plan.add_argument(
        "--model", action="append", required=True, help="a name in calibration/models.py; repeat for more"
    )
    plan.add_argument("--gpu", default="h100-sxm-80gb", help="catalogue name of the GPU")
    plan.add_argument("--gpus", type=int, default=1, help="GPUs of the host")
    plan.add_argument("--minutes", type=float, default=10.0, help="wall time, engine starts included")
    plan.add_argument(
        "--tp", default="", help="tensor-parallel degrees to choose from, with commas (default: 1, 2, 4 ...)"
    )
    plan.add_argument("--quantization", default="none", help="none, fp8 or both with a comma")
    plan.add_argument("--max-model-len", type=int, default=16384, help="longest sequence of the engines")
    plan.add_argument(
        "--design", default="calibration.plan_model:serving_design", help="MODULE:FUNCTION that makes the law's design"
    )
    plan.add_argument("--out", help="write the jobs here, for run-many")
    bundle = commands.add_parser("bundle", help="build what a GPU host without a package registry needs")
    bundle.add_argument("--out", required=True, help="folder for the bundle")
    bundle.add_argument(
        "--part",
        action="append",
        default=[],
        help="vllm (125 MB), deepspeed (5 MB) or fastgen (50 MB); this package always",
    )
    short = commands.add_parser("condense-kernels", help="make recorded kernels short enough to keep: medians a layer")
    short.add_argument("files", nargs="+", help="files of recorded kernels (RUN_ID-kernels.jsonl.gz)")
    short.add_argument("--out", required=True, help="file to write (.jsonl.gz)")
    raw = commands.add_parser("import-raw", help="turn lines of the first DeepSpeed scripts into run records")
    raw.add_argument("raw", help="a file of such lines")
    raw.add_argument("--out", required=True, help="run records are written here")
    raw.add_argument("--note", default="", help="what a reader must know of the circumstances; goes into each record")
    return parser


def _plan(args: argparse.Namespace) -> int:
    import json

    from calibration.jobs import parse_job
    from calibration.plan import make_plan, starts_for, table
    from calibration.plan_model import load_design

    starts = starts_for(args.model, args.gpus, args.tp, args.quantization, args.max_model_len)
    design = load_design(args.design, args.gpu)
    plan = make_plan(design, starts, args.gpus, args.minutes, progress=lambda text: print(text, file=sys.stderr))
    print(table(plan))
    if args.out:
        jobs = plan.jobs()
        for job in jobs:
            parse_job(job)
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(jobs, file, indent=1)
        print(f"jobs written to '{args.out}': python -m calibration run --jobs {args.out} --out-dir results")
    return 0


def _bundle(args: argparse.Namespace) -> int:
    from calibration.bundle import build

    print(build(args.out, args.part))
    return 0


def _check(args: argparse.Namespace) -> int:
    from calibration import check

    records, findings = [], []
    for path in args.files:
        more, wrong = check.read(path)
        records += more
        findings += wrong
    findings += check.check_all(records)
    for finding in sorted(findings, key=lambda f: check.SEVERITIES.index(f.severity)):
        if finding.severity != "note" or args.notes:
            print(finding)
    for line in check.noise_floor(records):
        print(line)
    counts = [sum(f.severity == s for f in findings) for s in check.SEVERITIES]
    starts = len({r["run_id"] for r in records})
    print(f"{len(records)} records of {starts} starts: {counts[0]} bad, {counts[1]} doubtful, {counts[2]} notes")
    return 1 if counts[0] else 0


def _need_new(path: str) -> None:
    if os.path.exists(path):
        raise JobError(f"'{path}' is there already; records are never overwritten")


def _condense_kernels(args: argparse.Namespace) -> int:
    from pathlib import Path

    from calibration.kernel_steps import condense_files

    _need_new(args.out)
    n_kept, n_left = condense_files([Path(f) for f in args.files], Path(args.out))
    print(f"{n_kept} steps written to '{args.out}'" + (f", {n_left} without layers left out" if n_left else ""))
    return 0


def _import_raw(args: argparse.Namespace) -> int:
    from calibration.import_raw import convert
    from calibration.records import Appender, finite

    _need_new(args.out)
    try:
        with open(args.raw, encoding="utf-8") as file:
            records, failures = convert(file, args.note)
    except OSError as err:
        raise JobError(f"cannot read '{args.raw}': {err.strerror}") from None
    out = Appender(args.out)
    for record in records:
        if warning := out.append(finite(record)):
            raise CalibrationError(warning)
    print(f"{len(records)} records written to '{args.out}'")
    for failure in failures:
        print(f"left out: {failure}")
    return 0


def _one_job(path: str) -> Job:
    from calibration.jobs import read_jobs

    jobs = read_jobs(path)
    if len(jobs) != 1:
        raise JobError(f"'{path}' holds {len(jobs)} jobs; use run-many, or a file with one")
    return jobs[0]


def _run_endpoint(args: argparse.Namespace) -> int:
    from calibration.http_runner import run_job

    job = _one_job(args.job)
    return run_job(job, args.out, endpoint=args.endpoint, rows=args.rows, errors=args.errors, known=args.known)


def _run_job(args: argparse.Namespace) -> int:
    job = _one_job(args.job)
    if job.kind == "vllm":
        from calibration.vllm_runner import run_job
    else:
        from calibration.deepspeed_runner import run_job

    return run_job(
        job,
        args.out,
        rows=args.rows,
        errors=args.errors,
        log=args.log,
        known=args.known,
        shared=args.shared,
        deadline=args.deadline_unix,
    )


def _run_many(args: argparse.Namespace) -> int:
    from calibration.jobs import read_jobs
    from calibration.orchestrate import run_many

    jobs = read_jobs(args.jobs)
    return run_many(jobs, args.out_dir, deadline_s=args.deadline_s, gpus=args.gpus, min_start_s=args.min_start_s)


def _build_ops(args: argparse.Namespace) -> int:
    from calibration.cuda_build import build_ops
    from calibration.deepspeed_runner import engine_env, ops_needed
    from calibration.jobs import read_jobs

    for job in read_jobs(args.jobs):
        if ops := ops_needed(job):
            os.environ.update({k: str(v) for k, v in job.env.items()})
            env = engine_env(1)
            build_ops(ops, env)
            print(f"{', '.join(ops)}: ready in '{env['TORCH_EXTENSIONS_DIR']}'", flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = _parser().parse_args(argv)
    commands = {
        "run-vllm": _run_job,
        "run-job": _run_job,
        "run-many": _run_many,
        "run": _run_many,
        "plan": _plan,
        "bundle": _bundle,
        "build-ops": _build_ops,
        "check": _check,
        "condense-kernels": _condense_kernels,
        "import-raw": _import_raw,
        "run-endpoint": _run_endpoint,
    }
    try:
        return commands[args.command](args)
    except CalibrationError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.status


if __name__ == "__main__":
    sys.exit(main())
