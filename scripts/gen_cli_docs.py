"""Writes docs/cli.md from the command line's own definitions; `--check` only says whether the page is current."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from advisor.cli import app
from typer.main import get_command

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# Command line

Every command, from its own help; `make docs` rewrites this page and a test compares it. Exit codes: 0 an answer, 2 bad
input (one sentence says what would be accepted). `--json` prints one object with a `schema_version`.
"""


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Each command a user can type, with its full name, parents first."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from commands(child, f"{path} {name}")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def default_of(param: click.Parameter) -> str:
    shown = getattr(param, "show_default", True)
    if isinstance(shown, str):
        return cell(shown)
    value = param.default
    if param.required:
        return "required"
    if value is None or value == () or callable(value) or shown is False or "UNSET" in repr(value).upper():
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else cell(str(value))}`"


def parameter_row(param: click.Parameter, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    if param.param_type_name == "argument":
        names = f"`{param.make_metavar(context)}`"
    choices = getattr(param.type, "choices", None)
    kind = " \\| ".join(f"`{c}`" for c in choices) if choices else param.type.name
    return f"| {names} | {kind} | {default_of(param)} | {cell(getattr(param, 'help', None) or '')} |"


def section(path: str, command: click.Command) -> str:
    context = click.Context(command, info_name=path)
    params = [p for p in command.params if not getattr(p, "hidden", False) and "--help" not in p.opts]
    lines = [f"## `{path}`", "", (command.help or "").replace("\b", "").strip(), ""]
    if params:
        lines += ["| option | value | default | |", "|---|---|---|---|"]
        lines += [parameter_row(p, context) for p in params]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    root = get_command(app)
    text = "\n".join([HEAD, *(section(path, command) for path, command in commands(root, "advisor"))])
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
        return 0
    if PAGE.is_file() and PAGE.read_text() == text:
        return 0
    sys.stderr.write(f"{PAGE.name} is not what the command line says now: run `make docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
