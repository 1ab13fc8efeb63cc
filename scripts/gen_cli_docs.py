"""Writes docs/cli.md from the command line's own parser; `--check` only says whether the page is current."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from advisor.cli.commands import COMMANDS, build_parser, command_parser

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# Command line

Every command, from its own parser; `make docs` rewrites this page and a test compares it. Exit codes: 0 an answer,
2 bad input (one sentence on stderr says what would be accepted). `--json` prints one object with a `schema_version`.
"""


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def value_of(action: argparse.Action) -> str:
    if action.choices is not None:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    if action.nargs == 0:
        return ""
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return cell(metavar) + (" ..." if action.nargs in ("*", "+") else "")


def row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    optional = action.nargs in ("?", "*")
    kind = value_of(action) if action.option_strings else ("optional" if optional else "required")
    return f"| {names} | {kind} | {cell(action.help or '')} |"


def section(name: str, text: str, parser: argparse.ArgumentParser) -> str:
    lines = [f"## `advisor {name}`", "", text, ""]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if not actions:
            continue
        title = group.title if group.title not in ("positional arguments", "options") else ""
        lines += [f"| {title or ''} | | |", "|---|---|---|", *map(row, actions), ""]
    return "\n".join(lines)


def page() -> str:
    parser = build_parser()
    sections = [section(name, text, command_parser(parser, name)) for name, (text, *_) in COMMANDS.items()]
    return "\n".join([HEAD, *sections]).rstrip() + "\n"


def main() -> int:
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
        return 0
    if PAGE.is_file() and PAGE.read_text() == text:
        return 0
    sys.stderr.write(f"{PAGE.name} is not what the command line says now: run `make docs`\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
