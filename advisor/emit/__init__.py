"""Artefacts: what a person runs to get the plan, one file an artefact.

`emit(name, ...)` returns the text of one artefact of `ARTEFACTS`. Every text is built by a dumper or quoted for its
reader; names that cannot be quoted safely are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advisor.emit.artefacts import (
        ARTEFACTS,
        DEEPSPEED_ARTEFACTS,
        FILE_NAMES,
        PURPOSES,
        artefacts_for,
        emit,
        file_name,
    )
    from advisor.emit.launch import Launch
    from advisor.emit.nsys import nsys_command
    from advisor.emit.vllm import explain_flags, launch_notes, vllm_command, vllm_serve_args

__all__ = [
    "ARTEFACTS",
    "DEEPSPEED_ARTEFACTS",
    "FILE_NAMES",
    "PURPOSES",
    "Launch",
    "artefacts_for",
    "emit",
    "explain_flags",
    "file_name",
    "launch_notes",
    "nsys_command",
    "vllm_command",
    "vllm_serve_args",
]
_HOMES = {
    "Launch": "launch",
    "nsys_command": "nsys",
    "explain_flags": "vllm",
    "launch_notes": "vllm",
    "vllm_command": "vllm",
    "vllm_serve_args": "vllm",
}


def __getattr__(name: str) -> Any:
    # lazily: an answer needs one line of shell, not every writer and a YAML dumper
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'artefacts')}"), name)
