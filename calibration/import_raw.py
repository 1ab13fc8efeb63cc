"""Turns lines of the first DeepSpeed scripts (times in ms, memory in GiB) into run records.

Those lines hold no idle power and, with several ranks, the power of the first one only: such fields are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from calibration.deepspeed_work import llama_dims, train_flops_per_token
from calibration.errors import JobError
from calibration.gpus import catalogue_name
from calibration.models import MODELS

Line = dict[str, Any]
GIB = 2**30
SHAPES = {
    "125m": "llama-shape-125m",
    "1.3b": "llama-shape-1.3b",
    "3b": "llama-shape-3b",
    "7b": "llama-2-7b",
    "8b": "llama-3.1-8b",
    "13b": "llama-2-13b",
    "30b": "llama-shape-30b",
}
OFFLOAD = {
    "none": "none",
    "opt": "optimizer",
    "both": "optimizer+parameters",
    "param": "parameters",
    "cpu": "parameters",
}
PHASES = {
    "before": "before",
    "fwd_peak": "forward_peak",
    "fwd_end": "forward_end",
    "bwd_peak": "backward_peak",
    "bwd_end": "backward_end",
    "step_peak": "optimizer_peak",
    "step_end": "optimizer_end",
}
MEMORY = {
    "peak_alloc": "peak_allocated_bytes",
    "peak_reserved": "peak_reserved_bytes",
    "alloc": "allocated_bytes",
    "reserved": "reserved_bytes",
    "dev_used": "device_used_bytes",
    "host_rss": "host_rss_bytes",
}


def _bytes(gib: float) -> int:
    return round(gib * GIB)


def _memory(mem: Line) -> dict[str, int]:
    return {name: _bytes(mem[key]) for key, name in MEMORY.items() if mem.get(key) is not None}


def _power(power: Line, n_gpus: int) -> dict[str, Any]:
    if not power or "inst_mean_w" not in power:
        return {}
    board = {
        "mean": power["inst_mean_w"],
        "max": power["inst_max_w"],
        "sm_clock_mhz": power["sm_mhz"],
        "n_gpus": 1,
        "n_samples": power["n"],
    }
    if n_gpus > 1:  # the first rank's board alone says nothing of the sum
        return {"board_power_first_rank_w": board}
    return {"board_power_w": board, "energy_j": power["energy_w"] * power["window_s"]}


def _common(line: Line, versions: Line, tag: str, engine: str, n_gpus: int) -> Line:
    case = line["case"]
    model = SHAPES[case["model"]]
    gpu = catalogue_name(versions["gpu"])
    version = versions["deepspeed"]
    powers = [line.get("power")] + [p.get("power") for p in line.get("points", ())]
    limit = next((p["limit_w"] for p in powers if p and "limit_w" in p), None)
    config = MODELS[model]
    return {
        "schema": 1,
        "run_id": f"deepspeed-{version}__{gpu}__{tag}",
        "engine": engine,
        "engine_version": versions["transformers"] if engine == "transformers" else version,
        "torch_version": versions["torch"],
        "transformers_version": versions["transformers"],
        "gpu": gpu,
        "n_gpus": n_gpus,
        "interconnect": "nvlink",
        **({"power_limit_w_per_gpu": limit} if limit else {}),
        "model": model,
        "hf_config": config,
        "random_weights": True,
        "n_params": sum_params(config),
        "tp": case.get("tp", 1),
        "pp": 1,
        "dp": n_gpus // case.get("tp", 1),
        "weight_dtype": case.get("dtype", "bf16"),
        "kv_dtype": case.get("dtype", "bf16"),
    }


def sum_params(config: Line) -> int:
    """Return the parameters of a Llama-like config."""
    return llama_dims(config)["n_params"]


def _train(line: Line) -> Iterator[Line]:
    case = line["case"]
    n, offload = case["world"], OFFLOAD[case.get("offload", "none")]
    gas, tokens = case.get("gas", 1), case["mbs"] * case["seq"]
    tag = f"zero{case['stage']}-{case['model']}-{n}gpu" if n > 1 else f"zero{case['stage']}-{case['model']}"
    tag += "-ckpt" if case.get("ckpt") else ""
    tag += f"-offload-{offload.replace('+', '-')}" if offload != "none" else ""
    steady, mem = line["mem"]["steady"], line["mem"]
    measured = {
        "step_s": line["step_ms"] / 1e3,
        "step_p90_s": line["step_ms_p90"] / 1e3,
        "step_min_s": line["step_ms_min"] / 1e3,
        "wall_step_s": line["wall_step_ms"] / 1e3,
        "forward_s": line["fwd_ms"] / 1e3,
        "backward_s": line["bwd_ms"] / 1e3,
        "optimizer_s": line["opt_ms"] / 1e3,
        "n_steps": line["n_steps"],
        "tokens_per_s": line["tokens_per_s"],
        "model_flops_per_s_per_gpu": line["tflops_per_gpu"] * 1e12,
        **_memory(steady),
        "phase_bytes": {name: _bytes(mem["phase_peaks"][k]) for k, name in PHASES.items() if k in mem["phase_peaks"]},
        "after_init_bytes": _memory(mem["after_init"]),
        "after_first_step_bytes": _memory(mem["after_first_step"]),
        **_power(line["power"], n),
    }
    yield _common(line, line["versions"], tag, "deepspeed-zero-train", n) | {
        "n_params": line["params"],
        "zero_stage": case["stage"],
        "offload": offload,
        "micro_batch_size": case["mbs"],
        "sequence_length": case["seq"],
        "gradient_accumulation_steps": gas,
        "tokens_per_step": tokens * gas * n,
        "activation_checkpointing": bool(case.get("ckpt")),
        "optimizer": line["basic_optimizer"],
        "zero_optimizer": line["optimizer"],
        "startup": {
            "device_memory_bytes": _bytes(steady["dev_total"]),
            "startup_s": line["t_build_s"] + line["t_init_s"],
        },
        "measured": measured,
    }


def _pipe(line: Line) -> Iterator[Line]:
    case = line["case"]
    n, p = case["world"], case["stages"]
    config = MODELS[SHAPES[case["model"]]]
    for point in line["points"]:
        m = point["m"]
        names = ("forward_s", "backward_s", "optimizer_s", "reduce_s", "step_s")
        stages = [dict(zip(names, (v / 1e3 for v in row), strict=True)) for row in point["per_rank_fwd_bwd_opt_red_T"]]
        flops = train_flops_per_token(config, case["seq"]) * point["tokens_per_s"] / n
        measured = {
            "step_s": point["T_ms"] / 1e3,
            "wall_step_s": point["wall_ms"] / 1e3,
            "busy_max_s": point["busy_max_ms"] / 1e3,
            "optimizer_s": point["opt_ms"] / 1e3,
            "reduce_s": point["reduce_ms"] / 1e3,
            "bubble_frac": point["bubble_busy"],
            "stages": stages,
            "n_steps": case["steps"],
            "tokens_per_s": point["tokens_per_s"],
            "model_flops_per_s_per_gpu": flops,
            **_memory(point["mem"]),
            **_power(point["power"], n),
        }
        common = _common(line, line["versions"], f"pipe{p}-{case['model']}", "deepspeed-pipe-train", n)
        yield common | {
            "pp": p,
            "dp": n // p,
            "zero_stage": case["zero"],
            "offload": "none",
            "n_stages": p,
            "n_microbatches": m,
            "gradient_accumulation_steps": m,
            "micro_batch_size": case["mbs"],
            "sequence_length": case["seq"],
            "tokens_per_step": case["mbs"] * case["seq"] * m * (n // p),
            "activation_checkpointing": bool(case["ckpt"]),
            "measured": measured,
        }


def _infer(line: Line) -> Iterator[Line]:
    case = line["case"]
    zero = line["script"] == "ds_zero_infer.py"
    mode = "zero" if zero else case["mode"]
    engines = {"zero": "deepspeed-zero-inference", "hf": "transformers"}
    for point in line["points"]:
        if not point.get("ok"):
            continue
        n, batch = case["world"], point["batch"]
        decode_s, prefill_s = point["decode_ms"] / 1e3, point["prefill_ms"] / 1e3
        tag = {"zero": f"zero-infer-{case['model']}-{OFFLOAD[case.get('offload', 'none')]}"}.get(
            mode, f"infer-{mode}-{case['model']}-tp{case.get('tp', 1)}"
        )
        measured = {
            "prefill_s": prefill_s,
            "decode_step_s": decode_s,
            "decode_tokens_per_s": batch * n / decode_s if zero else batch / decode_s,
            "prefill_tokens_per_s": batch * point["prompt"] * (n if zero else 1) / prefill_s,
            **{k: point[r] / 1e3 for k, r in _OPTIONAL_MS.items() if r in point},
            **({"weights_bytes_per_s": point["eff_gb_s"] * 1e9} if zero else {}),
            **_memory(point["mem"]),
            **_power(point["power"], n),
        }
        record = _common(line, line["versions"], tag, engines.get(mode, "deepspeed-inference"), n) | {
            "load": {"kind": "batch", "batch_size": batch},
            "lengths": {"kind": "fixed", "prompt_tokens": point["prompt"], "output_tokens": point["gen"]},
            "startup": {
                "weights_bytes": _bytes(line["mem"]["after_init"]["alloc"]),
                "startup_s": line["t_build_s"] + line["t_init_s"],
            },
            "measured": measured,
        }
        if zero:
            record |= {"zero_stage": 3, "offload": OFFLOAD[case["offload"]], "weight_bits": case["quant"] or 16}
        else:
            record["mode"] = {"hf": "eager", "ds": "autotp", "inject-manual": "kernel-injection"}[mode]
        yield record


_OPTIONAL_MS = {
    "prefill_min_s": "prefill_min_ms",
    "decode_p90_s": "decode_p90_ms",
    "decode_max_s": "decode_max_ms",
    "decode_wall_s": "decode_wall_ms",
}
_SCRIPTS = {"ds_train_zero.py": _train, "ds_pipe.py": _pipe, "ds_infer.py": _infer, "ds_zero_infer.py": _infer}


def convert(lines: Iterable[str], note: str = "") -> tuple[list[Line], list[str]]:
    """Return the run records of raw lines, and one sentence a case or point that failed.

    `note` goes into every record: what a reader must know of the circumstances.
    """
    records, failures = [], []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except ValueError:
            raise JobError(f"line {number} is not JSON") from None
        if line.get("schema"):
            raise JobError(f"line {number} is a run record already")
        case = line.get("case") or {}
        name = f"{line.get('script')} {case.get('model')} {case.get('mode') or case.get('parts') or ''}".strip()
        if not line.get("ok"):
            failures.append(f"line {number}, {name}: {line.get('error')}")
            continue
        if line["script"] not in _SCRIPTS:
            raise JobError(f"line {number}: nothing converts the output of '{line['script']}'")
        records += [r | {"notes": note} if note else r for r in _SCRIPTS[line["script"]](line)]
        for point in line.get("points", ()):
            if not point.get("ok", True):
                where = f"batch {point.get('batch')}, prompt {point.get('prompt')}"
                failures.append(f"line {number}, {name}, {where}: {str(point.get('error'))[:120]}")
    return records, failures
