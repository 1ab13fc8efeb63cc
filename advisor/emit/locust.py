"""The Locust file of a workload: a fixed script with the workload's lengths and arrivals written into it."""

from __future__ import annotations

import ast
import json
from importlib.resources import files
from typing import Any

from advisor.emit.launch import Launch
from advisor.emit.names import comment, model_argument
from advisor.schema import ClosedLoad, Model, Workload

_SCRIPT = "load_script.py"
_PLACE = 'CONFIG: dict[str, Any] = json.loads("{}")'
# Token ids below are control tokens in common vocabularies; the upper bound is the vocabulary itself.
FIRST_TOKEN_ID = 100
CLOSED_RUN_TIME = "5m"


def load_config(workload: Workload, served_model: str, vocab_size: int, seed: int = 0) -> dict[str, Any]:
    """Return what the load script needs to know: workload, served model name, token ids to draw from, seed."""
    is_endless = isinstance(workload.load, ClosedLoad) and workload.load.n_requests is None
    low = min(FIRST_TOKEN_ID, max(0, vocab_size - 2))
    return {
        "workload": workload.model_dump(mode="json"),
        "model": served_model,
        "token_range": [low, max(low + 1, vocab_size)],
        "seed": seed,
        "run_time": CLOSED_RUN_TIME if is_endless else None,
    }


def load_script(config: dict[str, Any], title: str) -> str:
    """Return the Locust file for a configuration; the configuration is a string literal of JSON, never code."""
    text = files("advisor.emit").joinpath(_SCRIPT).read_text(encoding="utf-8")
    literal = f"CONFIG: dict[str, Any] = json.loads({json.dumps(config)!r})"
    if _PLACE not in text:
        raise AssertionError("the load script lost the line that holds its configuration")
    script = f"# {comment(title)}\n{text.replace(_PLACE, literal, 1)}"
    ast.parse(script)
    return script


def locust_file(model: Model, workload: Workload) -> str:
    """Return the Locust file of a workload for a server of this model, whatever engine runs it."""
    config = load_config(workload, model_argument(model), model.vocab_size)
    return load_script(config, f"workload {workload.name} for {model.name}")


def emit_locust(launch: Launch) -> str:
    """Return the Locust file of the plan's workload."""
    return locust_file(launch.model, launch.workload)
