"""Commands about serving: recommend, predict, compare."""

from __future__ import annotations

import argparse

from advisor.catalog import load_catalog
from advisor.cli.parse import UsageError, request_fields
from advisor.cli.show_plan import compare_lines, plan_lines, recommendation_lines
from advisor.cli.text import out, print_json
from advisor.errors import DomainError
from advisor.recommend.answer import recommend as answer_of
from advisor.recommend.ask import ask
from advisor.recommend.compare import OWN_SHARE, at_own_limit, duels_json
from advisor.recommend.form import plan_json, prediction_json, recommendation_json
from advisor.recommend.one import deployment_of, predict_one
from advisor.schema import SCHEMA_VERSION, Request


def recommend(args: argparse.Namespace) -> int:
    """Print the ranked plans of a request; training and mixed plans are the commands of that name."""
    if args.task in ("train", "mixed"):
        return _other_task(args)
    answer = answer_of(Request.model_validate(request_fields(args)))
    if args.json:
        print_json(recommendation_json(answer))
    else:
        out("\n".join(recommendation_lines(answer, verbose=args.verbose)))
    return 0


def _other_task(args: argparse.Namespace) -> int:
    """Answer a training or mixed question with the defaults of its command."""
    from advisor.cli import training
    from advisor.cli.commands import build_parser, command_parser

    if args.task == "train" and args.objective == "latency":
        raise DomainError("training has no latency objective; use throughput, cost or energy")
    parser = build_parser()
    known = {action.dest: action for action in command_parser(parser, args.task)._actions}
    for action in command_parser(parser, "recommend")._actions:
        # what is silently dropped would read as if it had been heeded
        if action.dest not in known and getattr(args, action.dest, action.default) != action.default:
            flag = action.option_strings[0]
            if flag != "--task":
                raise UsageError(f"{flag} does not apply to --task {args.task}; see advisor {args.task} --help")
    for dest, action in known.items():
        if not hasattr(args, dest):
            setattr(args, dest, action.default)
    task, args.task = args.task, None
    return training.train(args) if task == "train" else training.mixed(args)


def compare(args: argparse.Namespace) -> int:
    """Print the best plan of vLLM and of each DeepSpeed path side by side."""
    request = Request.model_validate(request_fields(args))
    answer = answer_of(request)
    plans = list(answer.best_by_backend.values())
    is_lopsided = any(p.prediction.is_saturated for p in plans)
    own = at_own_limit(request, plans) if is_lopsided and request.concurrency is None else {}
    if args.json:
        beside = {b: {"requests_per_s": o.requests_per_s} | prediction_json(o.prediction) for b, o in own.items()}
        limits = {"share": OWN_SHARE} | beside if own else None
        print_json(recommendation_json(answer) | {"at_own_limit": limits, "duels": duels_json(plans)})
    else:
        out("\n".join(compare_lines(answer, own)))
    return 0


def predict(args: argparse.Namespace) -> int:
    """Print what one deployment would do."""
    fields = request_fields(args)
    fields.setdefault("is_best_effort", "slo" not in fields)
    question = ask(Request.model_validate(fields), load_catalog())
    deployment = deployment_of(question, chosen(args))
    plan = predict_one(question, deployment, method="steady" if args.closed_form else "simulated")
    if args.json:
        asked = question.request.model_dump(mode="json", exclude_none=True)
        form = {"schema_version": SCHEMA_VERSION, "request": asked, "model": question.model.name}
        print_json(form | plan_json(plan))
    else:
        out("\n".join(plan_lines(question, plan, verbose=args.verbose)))
    return 0


VLLM_ONLY = ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization")


def _check_settings(args: argparse.Namespace) -> None:
    """Raise UsageError for a setting that the backend does not have: dropped, it would read as if it were heeded."""
    backend = args.backend
    if backend == "vllm":
        foreign = [f for f in ("static_batch", "offload", "kv_offload") if getattr(args, f) not in (None, 0, "none")]
        whose = "a setting of DeepSpeed's paths: also give --backend, such as deepspeed-zero-inference"
    elif backend != "deepspeed-zero-inference" and {args.offload, args.kv_offload} - {None, "none"}:
        name = "offload" if args.offload not in (None, "none") else "kv_offload"
        foreign, whose = [name], "a setting of --backend deepspeed-zero-inference"
    else:
        given = [f for f in VLLM_ONLY if getattr(args, f) is not None]
        foreign = [*given, *(f for f in ("enforce_eager", "no_prefix_caching") if getattr(args, f))]
        whose = f"a setting of vLLM; {backend} takes --tp, --dp, --static-batch, --offload and --kv-offload"
    if foreign:
        raise UsageError(f"--{foreign[0].replace('_', '-')} is {whose}")


def chosen(args: argparse.Namespace) -> dict[str, object]:
    """Return the fields of a deployment that the command line sets. Raises UsageError for another backend's."""
    _check_settings(args)
    names = ("backend", "tp", "pp", "dp", "weight_dtype", "kv_dtype", "max_num_seqs", "max_num_batched_tokens")
    fields = {
        name: value
        for name in (*names, "gpu_memory_utilization", "static_batch", "offload", "kv_offload")
        if (value := getattr(args, name)) is not None
    }
    if args.enforce_eager:
        fields["enforce_eager"] = True
    if args.no_prefix_caching:
        fields["prefix_caching"] = False
    return fields
