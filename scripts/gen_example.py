"""Writes the worked example of README.md: what `advisor recommend` prints today, some sections left out."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

from gen_accuracy import with_block

from advisor.cli import run as advisor

ROOT = Path(__file__).resolve().parents[1]
ARGS = ["recommend", "--model", "70b", "--gpus", "8xA100"]
LEFT_OUT = ("Rejected", "Notes")
N_QUANTITIES = 9


def sections(text: str) -> list[list[str]]:
    """Return the blocks of the answer: lines between empty ones."""
    blocks: list[list[str]] = [[]]
    for line in text.rstrip().splitlines():
        if line.strip():
            blocks[-1].append(line.rstrip())
        elif blocks[-1]:
            blocks.append([])
    return blocks


def trimmed(text: str) -> str:
    """Return the answer without the sections that only matter on second reading, and with the first quantities."""
    kept = []
    for block in sections(text):
        if block[0].startswith(LEFT_OUT):
            kept.append(f"{block[0]}: ... ({sum(line.startswith('  - ') for line in block)} entries)")
        elif block[0].startswith("Best plan"):
            kept.append("\n".join([*block[: N_QUANTITIES + 1], "  ..."]))
        else:
            kept.append("\n".join(block))
    return "\n\n".join(kept)


def main() -> int:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = advisor(ARGS)
    if code:
        return code
    page = ROOT / "README.md"
    block = f"```\n$ advisor {' '.join(ARGS)}\n{trimmed(said.getvalue())}\n```"
    page.write_text(with_block(page.read_text(encoding="utf-8"), "example", block), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
