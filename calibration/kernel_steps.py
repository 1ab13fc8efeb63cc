"""Recorded kernels made short: one layer and what lies between two steps, medians over all that were recorded."""

from __future__ import annotations

import gzip
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from calibration.errors import JobError

ANCHORS = ("FlashAttnFwd", "flash_fwd", "unified_attention", "BatchDecode", "BatchPrefill", "fmha")
"""What attention kernels are called; one of them is in each layer."""
NOT_ANCHORS = ("Combine", "combine", "prepare", "reduce_segments")
MIN_LAYERS = 4

Event = tuple[str, float, float]
"""Name, start [us], length [us]."""


def _is_anchor(name: str) -> bool:
    return any(a in name for a in ANCHORS) and not any(n in name for n in NOT_ANCHORS)


def _medians(pieces: list[list[Event]]) -> list[list[Any]]:
    """Return [name, median length] of each kernel of pieces that have the same kernels in the same order."""
    return [
        [names[0], round(statistics.median(e[2] for e in column), 3)]
        for column in zip(*pieces, strict=True)
        if (names := [e[0] for e in column])
    ]


def condense(line: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a recorded line says of one layer, and of what lies between two steps; None if it has no layers.

    `layer`: [name, us] of its kernels from its attention on to the next one's; `layer_us`: from attention to attention;
    `between`: the same from the last layer's attention to the first one's of the next step, which so holds a layer's
    kernels too; `between_us`; `idle_us`: the longest time in it without a kernel.
    """
    events: list[Event] = [(line["kernels"][k], start, length) for k, start, length in line["events"]]
    anchors = [i for i, e in enumerate(events) if _is_anchor(e[0])]
    pieces = [(events[a:b], events[b][1] - events[a][1]) for a, b in pairwise(anchors)]
    kinds = Counter(tuple(e[0] for e in piece) for piece, _ in pieces)
    if not kinds or kinds.most_common(1)[0][1] < MIN_LAYERS:
        return None
    layer = kinds.most_common(1)[0][0]
    found = {k: line[k] for k in ("run_id", "what", "n", "n_context_tokens") if k in line}
    for name, wanted in (("layer", layer), ("between", _between(kinds, layer))):
        mine = [(piece, us) for piece, us in pieces if tuple(e[0] for e in piece) == wanted]
        if not mine:
            continue
        found[name] = _medians([piece for piece, _ in mine])
        found[f"{name}_us"] = round(statistics.median(us for _, us in mine), 3)
        if name == "between":
            found["idle_us"] = round(statistics.median(_longest_gap(piece, us) for piece, us in mine), 3)
    return found


def _between(kinds: Counter[tuple[str, ...]], layer: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the most frequent piece that is longer than two layers: sampling and preparing lie in it."""
    for names, count in kinds.most_common():
        if len(names) > 2 * len(layer) and count > 1:
            return names
    return None


def _longest_gap(piece: list[Event], until_us: float) -> float:
    ends = [start + length for _, start, length in piece]
    starts = [start for _, start, _ in piece[1:]] + [piece[0][1] + until_us]
    return max(0.0, *(start - end for start, end in zip(starts, ends, strict=True)))


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a recorded file. Raises JobError when it is none."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for text in file:
                yield json.loads(text)
    except (OSError, EOFError, ValueError) as err:
        raise JobError(f"'{path}' is not a file of recorded kernels ({type(err).__name__})") from None


def condense_files(paths: Iterable[Path], out: Path) -> tuple[int, int]:
    """Write the condensed lines of some recorded files; return how many there are and how many had no layers."""
    lines = [(path, line) for path in paths for line in read_lines(path)]
    try:
        shortened = [condense(line) for _, line in lines]
    except (KeyError, TypeError, ValueError, IndexError) as err:
        raise JobError(f"a line of '{lines[0][0]}' or a later file is not of recorded kernels ({err!r})") from None
    kept = [short for short in shortened if short is not None]
    with gzip.GzipFile(out, "wb", mtime=0) as file:
        file.write("".join(json.dumps(short) + "\n" for short in kept).encode())
    return len(kept), len(lines) - len(kept)
