"""GPU specs such as '8xA100', '2x8xH100' and '4xL40S, ./mycard.toml' as clusters."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from advisor.catalog.hardware import GpuFiles, gpu_from_toml
from advisor.errors import DomainError, printable
from advisor.schema import Cluster, Gpu, Note, Price

MAX_GPUS = 100_000
_COUNT = re.compile(r"^\s*(\d{1,12})\s*[x×*]\s*(?=\S)", re.IGNORECASE)
_HELP = "write COUNTxGPU or NODESxCOUNTxGPU, such as 8xA100, 2x8xH100 or 4xL40S"


@dataclass(frozen=True)
class ParsedGpus:
    """The clusters of a spec, in its order, with what was assumed and the prices that a custom card brought."""

    clusters: tuple[Cluster, ...]
    notes: tuple[Note, ...] = ()
    prices: tuple[Price, ...] = ()


def parse_gpus(spec: str, catalog: GpuFiles) -> list[Cluster]:
    """Return the clusters that a spec means; DomainError or UnknownName in one sentence for one that means none."""
    return list(parse_gpu_spec(spec, catalog).clusters)


def parse_gpu_spec(spec: str, catalog: GpuFiles) -> ParsedGpus:
    """Return the clusters that a spec means, with notes.

    Commas separate pools. `8xA100` is one node, `2x8xH100` two nodes of eight; a count above the card's largest node
    becomes several full nodes. A pool may name a TOML file: `8x./mycard.toml`.
    Errors: DomainError for counts that are zero, not divisible into nodes or above 100,000 GPUs; UnknownName for a
    card that is not in the catalogue; BadData for a file that cannot be used.
    """
    pools = [p for p in spec.split(",") if p.strip()]
    if not pools:
        raise DomainError(f"no GPUs in '{printable(spec)}'; {_HELP}")
    if len(pools) > 64:
        raise DomainError(f"at most 64 pools are compared, got {len(pools)}")
    clusters: list[Cluster] = []
    notes: list[Note] = []
    prices: list[Price] = []
    for pool in pools:
        counts, name = _counts_and_name(pool, spec)
        gpu, price, found = _card(name, catalog)
        notes.extend(found)
        if price is not None:
            prices.append(price)
        cluster, split = _cluster(counts, gpu, pool)
        notes.extend(split)
        clusters.append(cluster)
    return ParsedGpus(tuple(clusters), tuple(notes), tuple(prices))


def _counts_and_name(pool: str, spec: str) -> tuple[list[int], str]:
    counts: list[int] = []
    rest = pool
    while (match := _COUNT.match(rest)) and len(counts) < 2:
        counts.append(int(match.group(1)))
        rest = rest[match.end() :]
    rest = rest.strip()
    if not rest or _COUNT.match(rest) or re.match(r"^([-+]?[\d.]+\s*[x×*]|[-+]?\d{1,3}$)", rest):
        raise DomainError(f"cannot read '{printable(pool.strip())}' in '{printable(spec)}': {_HELP}")
    return counts, rest


def _card(name: str, catalog: GpuFiles) -> tuple[Gpu, Price | None, list[Note]]:
    if name.lower().endswith(".toml"):
        gpu, price = gpu_from_toml(Path(name).expanduser())
        return gpu, price, []
    gpu = catalog.get(name)
    others = catalog.others(name, gpu)
    if not others:
        return gpu, None, []
    return gpu, None, [Note(text=f"'{printable(name)}': took {gpu.name}; also {', '.join(others)}.")]


def _cluster(counts: list[int], gpu: Gpu, pool: str) -> tuple[Cluster, list[Note]]:
    shown = printable(pool.strip())
    n_nodes, per_node = counts if len(counts) == 2 else (1, counts[0] if counts else 1)
    if n_nodes < 1 or per_node < 1:
        raise DomainError(f"'{shown}' asks for 0 GPUs; give at least 1")
    if n_nodes * per_node > MAX_GPUS:
        raise DomainError(f"'{shown}' asks for {n_nodes * per_node:,} GPUs; at most {MAX_GPUS:,} are supported")
    limit = gpu.max_gpus_per_node
    notes: list[Note] = []
    if per_node > limit:
        if len(counts) == 2:
            raise DomainError(f"'{shown}': a node holds at most {limit} {gpu.name}, got {per_node}")
        if per_node % limit:
            raise DomainError(
                f"'{shown}': {per_node} GPUs are no whole number of nodes of {limit} {gpu.name}; "
                f"give a multiple of {limit} or NODESxCOUNTxGPU"
            )
        n_nodes, per_node = per_node // limit, limit
        notes.append(Note(text=f"'{shown}': read as {n_nodes} nodes of {limit}."))
    return Cluster(gpu=gpu, n_nodes=n_nodes, gpus_per_node=per_node, has_nvlink=gpu.link != "pcie"), notes
