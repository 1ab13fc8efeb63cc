"""Recorded kernels made short: one layer and what lies between two steps, medians over all that were recorded."""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from calibration.errors import JobError
from calibration.kernel_probe import KINDS

ANCHORS = ("FlashAttnFwd", "flash_fwd", "unified_attention", "BatchDecode", "BatchPrefill", "fmha")
"""What attention kernels are called; one of them is in each layer."""
NOT_ANCHORS = ("Combine", "combine", "prepare", "reduce_segments")
MIN_LAYERS = 4
DIFFERENT = tuple(name for name, kind in KINDS.items() if kind.is_pair)
"""Recordings whose steps differ from one to the next."""
LONGER = 1.5
"""Kernels from the last layer's attention to the next step's first one, over those of a layer, at least."""

Event = tuple[str, float, float]
"""Name, start [us], length [us]."""
Piece = tuple[list[Event], float]
"""Kernels from one attention on, time until the next one [us]."""


def _is_anchor(name: str) -> bool:
    return any(a in name for a in ANCHORS) and not any(n in name for n in NOT_ANCHORS)


def _medians(pieces: list[list[Event]]) -> list[list[Any]]:
    """Return [name, median length] of each kernel of pieces that have the same kernels in the same order."""
    return [
        [column[0][0], round(statistics.median(length for _, _, length in column), 3)]
        for column in zip(*pieces, strict=True)
    ]


def condense(line: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a recorded line says of one layer, and of what lies between two steps; None if it has no layers.

    `layer`: [name, us] of its kernels from its attention on to the next one's; `layer_us`: from attention to attention;
    `between`: the same from the last layer's attention to the first one's of the next step, which so holds a layer's
    kernels too; `between_us`; `idle_us`: the longest time in it without a kernel.

    Bursts and prompts among decodes have steps that differ: theirs are `steps`, each with its `n_tokens`,
    `n_sequences`, `n_new`, `at_us` (of its first attention), `layer` and `layer_us`.
    """
    events: list[Event] = [(line["kernels"][k], start, length) for k, start, length in line["events"]]
    anchors = [i for i, e in enumerate(events) if _is_anchor(e[0])]
    found = {k: line[k] for k in ("run_id", "what", "n", "n_tokens", "n_context_tokens") if k in line}
    if line["what"] in DIFFERENT:
        steps = _steps(events, anchors, line["steps"])
        return found | {"steps": steps} if steps else None
    kinds = _kinds(events, anchors)
    if not kinds or len(kinds[0][1]) < MIN_LAYERS:
        return None
    names, layers = kinds[0]
    found |= _described("layer", layers)
    # sampling and preparing lie in what is longer than two layers
    between = next((mine for kernels, mine in kinds if len(kernels) > 2 * len(names) and len(mine) > 1), None)
    if between:
        idle_us = statistics.median(_longest_gap(events, us) for events, us in between)
        found |= _described("between", between) | {"idle_us": round(idle_us, 3)}
    return found


def _kinds(events: list[Event], anchors: list[int]) -> list[tuple[tuple[str, ...], list[Piece]]]:
    """Return the pieces from one attention to the next by their kernels, the most frequent kernels first."""
    kinds: dict[tuple[str, ...], list[Piece]] = {}
    for a, b in pairwise(anchors):
        names = tuple(name for name, _, _ in events[a:b])
        kinds.setdefault(names, []).append((events[a:b], events[b][1] - events[a][1]))
    return sorted(kinds.items(), key=lambda kind: -len(kind[1]))


def _steps(events: list[Event], anchors: list[int], noted: list[list[int]]) -> list[dict[str, Any]]:
    """Return a layer of each step; none unless what was recorded has as many steps as were noted, or one more.

    A recording may begin within a step that had been launched before.
    """
    if len(anchors) < MIN_LAYERS:
        return []
    longest = LONGER * statistics.median(b - a for a, b in pairwise(anchors))
    cuts = [0, *(k + 1 for k, (a, b) in enumerate(pairwise(anchors)) if b - a > longest), len(anchors)]
    parts = [anchors[a:b] for a, b in pairwise(cuts)]
    parts = parts[len(parts) == len(noted) + 1 :]
    if len(parts) != len(noted):
        return []
    found = []
    for mine, (n_tokens, n_sequences, n_new) in zip(parts, noted, strict=True):
        kinds = _kinds(events, mine)
        if not kinds or len(kinds[0][1]) < MIN_LAYERS:
            return []
        step = {"n_tokens": n_tokens, "n_sequences": n_sequences, "n_new": n_new, "at_us": events[mine[0]][1]}
        found.append(step | _described("layer", kinds[0][1]))
    return found


def _described(name: str, pieces: list[Piece]) -> dict[str, Any]:
    us = round(statistics.median(us for _, us in pieces), 3)
    return {name: _medians([events for events, _ in pieces]), f"{name}_us": us}


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
    shortened = []
    for path in paths:
        try:
            shortened += [condense(line) for line in read_lines(path)]
        except (KeyError, TypeError, ValueError, IndexError) as err:
            raise JobError(f"a line of '{path}' is not of recorded kernels ({err!r})") from None
    kept = [short for short in shortened if short is not None]
    with gzip.GzipFile(out, "wb", mtime=0) as file:
        file.write("".join(json.dumps(short) + "\n" for short in kept).encode())
    return len(kept), len(shortened) - len(kept)
