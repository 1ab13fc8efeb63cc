"""Cells: what one measurement asks of an engine, and the requests it sends."""

from __future__ import annotations

import array
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from calibration.errors import JobError
from calibration.output import cell_name

PROMPT_CLIP = (8, 3500)
OUTPUT_CLIP = (4, 1500)
RESERVED_IDS = 100  # special tokens sit at both ends of a vocabulary
MAX_REQUESTS = 100_000


@dataclass(frozen=True)
class Cell:
    """One measurement: a load, its lengths and its limits."""

    kind: str
    prompt_tokens: int
    output_tokens: int
    concurrency: int = 0
    n_requests: int = 0
    arrivals_per_s: float = 0.0
    rate_frac: float = 0.0
    duration_s: float = 0.0
    sigma: float = 0.0
    prompt_clip: tuple[int, int] = PROMPT_CLIP
    output_clip: tuple[int, int] = OUTPUT_CLIP
    shared_prefix_tokens: int = 0
    n_prefixes: int = 1
    prefix_warm: bool = True
    guard_s: float = 120.0
    expected_s: float = 0.0
    repeat: int = 0

    @property
    def lengths(self) -> dict[str, Any]:
        """The record's `lengths`."""
        if not self.sigma:
            return {"kind": "fixed", "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        return {
            "kind": "lognormal",
            "prompt_tokens_mean": self.prompt_tokens,
            "output_tokens_mean": self.output_tokens,
            "sigma": self.sigma,
            "prompt_clip": list(self.prompt_clip),
            "output_clip": list(self.output_clip),
        }

    @property
    def longest_tokens(self) -> int:
        """Tokens of a sequence that the cell surely holds (the drawn ones are checked when they are drawn)."""
        if not self.sigma:
            return self.prompt_tokens + self.output_tokens
        return min(self.prompt_tokens, self.prompt_clip[1]) + min(self.output_tokens, self.output_clip[1])

    @property
    def label(self) -> str:
        """A short text for progress lines."""
        what = f"{self.kind} {self.prompt_tokens}/{self.output_tokens}"
        what += f" sigma {self.sigma:g}" if self.sigma else ""
        what += f" prefix {self.shared_prefix_tokens}" if self.shared_prefix_tokens else ""
        if self.kind == "closed":
            return f"{what} c{self.concurrency}"
        return f"{what} {self.rate_frac:.0%}" if self.rate_frac else f"{what} {self.arrivals_per_s:g}/s"

    def cell_id(self) -> str:
        """A name that depends on what is measured, not on its place in the list or its limits."""
        what = {k: v for k, v in asdict(self).items() if k not in ("guard_s", "expected_s")}
        return cell_name(what)


def _from_text(text: str) -> dict[str, Any]:
    part = text.split(",")
    try:
        if part[0] == "c":
            cell: dict[str, Any] = dict(
                zip(("prompt_tokens", "output_tokens", "concurrency"), map(int, part[1:4]), strict=True)
            )
            return {"kind": "closed", **cell, **({"n_requests": int(part[4])} if len(part) > 4 else {})}
        if part[0] == "p":
            rate = {"arrivals_per_s": float(part[3][1:])} if part[3][:1] == "r" else {"rate_frac": float(part[3])}
            sigma = {"sigma": float(part[5])} if len(part) > 5 else {}
            lengths = {"prompt_tokens": int(part[1]), "output_tokens": int(part[2])}
            return {"kind": "poisson", **lengths, **rate, "duration_s": float(part[4]), **sigma}
    except (ValueError, IndexError):
        pass
    raise JobError(
        f"cell '{text[:80]}' is not 'c,PROMPT,OUTPUT,CONCURRENCY[,REQUESTS]' "
        "or 'p,PROMPT,OUTPUT,FRACTION|rRATE,SECONDS[,SIGMA]'"
    )


def default_requests(concurrency: int) -> int:
    """Requests of a closed cell that names none: enough rounds to reach the steady state, few enough to be short."""
    return max(4, 3 * concurrency if concurrency < 128 else 2 * concurrency)


def parse_cell(spec: str | dict[str, Any], max_model_len: int | None = None) -> Cell:
    """Return a checked cell. Raises JobError that names the field and the rule."""
    raw = _from_text(spec) if isinstance(spec, str) else dict(spec)
    known = set(Cell.__dataclass_fields__)
    if unknown := sorted(set(raw) - known):
        raise JobError(f"cell has no field '{unknown[0]}'; allowed: {', '.join(sorted(known))}")
    for name in ("prompt_clip", "output_clip"):
        if name in raw:
            raw[name] = tuple(raw[name])
    try:
        cell = Cell(**raw)
    except TypeError as err:
        raise JobError(f"cell {json.dumps(raw)[:120]}: {err}") from None
    if cell.kind == "closed" and cell.concurrency and not cell.n_requests:
        cell = Cell(**{**asdict(cell), "n_requests": default_requests(cell.concurrency)})
    _check(cell, max_model_len)
    return cell


def _check(cell: Cell, max_model_len: int | None) -> None:
    def need(ok: bool, rule: str) -> None:
        if not ok:
            raise JobError(f"cell '{cell.label}': {rule}")

    need(cell.kind in ("closed", "poisson"), "kind must be 'closed' or 'poisson'")
    need(1 <= cell.prompt_tokens <= 10**6 and 1 <= cell.output_tokens <= 10**6, "lengths must be 1 to 1000000 tokens")
    need(0 <= cell.sigma <= 3, "sigma must be 0 (fixed lengths) to 3")
    need(
        0 <= cell.shared_prefix_tokens < max(cell.prompt_tokens, 1), "shared_prefix_tokens must be below prompt_tokens"
    )
    need(cell.n_prefixes >= 1, "n_prefixes must be at least 1")
    need(cell.guard_s > 0, "guard_s must be positive")
    for low, high in (cell.prompt_clip, cell.output_clip):
        need(1 <= low <= high, "a clip is [lowest, highest] with 1 <= lowest <= highest")
    if cell.kind == "closed":
        need(cell.concurrency >= 1, "concurrency must be at least 1")
        need(1 <= cell.n_requests <= MAX_REQUESTS, f"n_requests must be 1 to {MAX_REQUESTS}")
    else:
        need(cell.duration_s > 0, "duration_s must be positive")
        need((cell.arrivals_per_s > 0) != (cell.rate_frac > 0), "give one of arrivals_per_s and rate_frac, positive")
        need(cell.arrivals_per_s * cell.duration_s <= MAX_REQUESTS, f"at most {MAX_REQUESTS} arrivals")
    if max_model_len is not None:
        need(
            cell.longest_tokens <= max_model_len,
            f"its {cell.longest_tokens} tokens exceed max_model_len {max_model_len}",
        )


@dataclass
class Ask:
    """One request to send: when (seconds after the start, open loop only), which tokens, how many back."""

    at_s: float
    prompt: list[int]
    n_output: int


class Prompts:
    """Draws prompts of random token ids: no tokenizer, no text, no repetition that a prefix cache could use."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self.span = max(1, vocab_size - 2 * RESERVED_IDS)
        self.first = RESERVED_IDS if vocab_size > 2 * RESERVED_IDS else 0
        self.rng = random.Random(f"prompts-{seed}")
        self.seed = seed

    def draw(self, n_tokens: int, rng: random.Random | None = None) -> list[int]:
        """Return `n_tokens` token ids."""
        words = array.array("I", (rng or self.rng).randbytes(4 * n_tokens))
        return [self.first + w % self.span for w in words]

    def prefix(self, group: int, n_tokens: int) -> list[int]:
        """Return the shared first tokens of a group of prompts."""
        return self.draw(n_tokens, random.Random(f"prefix-{self.seed}-{group}"))


def _length(rng: random.Random, mean: int, sigma: float, clip: tuple[int, int]) -> int:
    return max(clip[0], min(clip[1], int(mean * rng.lognormvariate(-(sigma**2) / 2, sigma))))


def arrivals(cell: Cell, rate_per_s: float, seed: int) -> Iterator[tuple[float, int, int]]:
    """Yield (arrival time [s], prompt tokens, output tokens): `Random(seed)` gives a gap, then two lengths.

    As many draws as it takes to pass `duration_s` (Poisson; the last arrival lies after it) or `n_requests` of
    them, all at 0 (closed). Anyone with the seed can replay them.
    """
    rng = random.Random(seed)
    at_s, n = 0.0, 0
    while at_s < cell.duration_s if cell.kind == "poisson" else n < cell.n_requests:
        at_s += rng.expovariate(rate_per_s) if cell.kind == "poisson" else 0.0
        if cell.sigma:
            prompt = _length(rng, cell.prompt_tokens, cell.sigma, cell.prompt_clip)
            yield at_s, prompt, _length(rng, cell.output_tokens, cell.sigma, cell.output_clip)
        else:
            yield at_s, cell.prompt_tokens, cell.output_tokens
        n += 1


def requests(cell: Cell, rate_per_s: float, seed: int, vocab_size: int, max_model_len: int = 10**9) -> list[Ask]:
    """Return all requests of a cell, drawn before the clock starts. Raises JobError when one is too long."""
    prompts = Prompts(vocab_size, seed)
    shared = [prompts.prefix(g, cell.shared_prefix_tokens) for g in range(cell.n_prefixes)]
    asks = []
    for i, (at_s, n_prompt, n_output) in enumerate(arrivals(cell, rate_per_s, seed)):
        if n_prompt + n_output > max_model_len:
            raise JobError(
                f"it draws a sequence of {n_prompt + n_output} tokens, max_model_len is {max_model_len}: "
                "lower the upper ends of prompt_clip and output_clip"
            )
        head = shared[i % len(shared)][:n_prompt]
        asks.append(Ask(at_s, head + prompts.draw(n_prompt - len(head)), n_output))
    return asks
