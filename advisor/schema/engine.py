"""Facts about one release of a serving engine: its defaults, what its scheduler does, which options it knows."""

import re
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from advisor.errors import BadData, UnknownName, printable
from advisor.schema.base import Fraction, Noun, PositiveInt, first_error

EntryPoint = Literal["api_server", "llm_class"]
V2Rule = Literal["none", "listed-dense-unquantised", "listed", "dense-or-listed", "all"]
BLACKWELL_DATACENTRE_MAJOR = 10
_VERSION = re.compile(r"v?(\d{1,4}(?:\.\d{1,4}){1,3})(?:[.+-]?(?:post|dev|rc|a|b)?\d*)?")


def version_key(version: str) -> tuple[int, ...]:
    """Return a version as numbers that compare in release order; empty for text that is no version."""
    match = _VERSION.fullmatch(version.strip()[:40])
    if not match:
        return ()
    numbers = [int(part) for part in match.group(1).split(".")]
    return tuple(numbers + [0] * (4 - len(numbers)))


class BatchDefault(Noun):
    """One rule of the engine's default limits: what it requires of the card, and the limits by entry point."""

    min_memory_bytes: float = Field(default=0, description="memory that the driver reports must reach this")
    not_in_name: str = Field(default="", description="text that the card's lower-case name must not contain")
    not_compute_capability: str = ""
    max_num_batched_tokens: dict[EntryPoint, PositiveInt]
    max_num_seqs: dict[EntryPoint, PositiveInt]


class EngineFacts(Noun):
    """What one release of vLLM does when it is told nothing, read from its source; `cite` says where."""

    name: str = "vllm"
    version: str = Field(description="release that was asked for")
    read_version: str = Field(description="newest release not after it whose source was read")
    date: str = ""
    main_cuda: str = Field(description="CUDA release that the wheels on the package index are built for")
    min_compute_capability: str
    notes: tuple[str, ...] = ()
    batch_defaults: tuple[BatchDefault, ...] = Field(min_length=1, description="the first rule that fits decides")
    gpu_memory_utilization: Fraction
    kv_block_tokens: PositiveInt
    has_async_scheduling: bool = Field(description="on by default: the next step is scheduled while one runs")
    async_needs_pp1: bool = Field(description="pipeline parallelism switches it off")
    async_executors: tuple[str, ...] = Field(description="executors that can do it: mp, uni, ray, external_launcher")
    v2_runner_rule: V2Rule = Field(description="which models use model runner V2")
    v2_runner_architectures: tuple[str, ...] = ()
    v2_runner_adds_batch: bool = Field(description="model runner V2 keeps pp + 1 batches in flight")
    reserves_full_prompt: bool = Field(description="a request is admitted only when its whole prompt fits the KV cache")
    watermark_frac: Fraction = Field(description="share of the KV blocks kept free when requests are admitted")
    chunked_prefill: bool
    prefix_caching: bool
    graph_mode: str
    graph_max_tokens: PositiveInt
    graph_max_tokens_blackwell: PositiveInt
    graph_follows_seqs: bool = Field(description="largest graph = min(2 * max_num_seqs, graph_max_tokens)")
    graph_coarse_from_tokens: int = Field(ge=0, description="from here graphs come in steps of 16, not 8; 0 = never")
    graph_adds_batch_limit: bool = Field(description="max_num_batched_tokens itself is captured when small enough")
    graph_adds_seqs_limit: bool = Field(description="max_num_seqs itself is captured when small enough")
    reserves_graph_memory: bool = Field(description="runner V1 subtracts graph memory before it sizes the KV cache")
    v2_reserves_graph_memory: bool = Field(description="runner V2 subtracts graph memory too")
    custom_all_reduce_limit_bytes: PositiveInt
    custom_all_reduce_worlds: tuple[PositiveInt, ...]
    custom_all_reduce_bytes: dict[str, dict[int, PositiveInt]] = Field(description="lower limits where multicast works")
    symm_mem_bytes: dict[str, dict[int, PositiveInt]] = Field(
        description="limits of the multicast kernel, by capability"
    )
    flashinfer_all_reduce: bool = Field(description="FlashInfer's all-reduce is asked before the custom one")
    flashinfer_all_reduce_bytes: dict[str, dict[int, PositiveInt]] = Field(default={})
    kv_dtypes: tuple[str, ...]
    quantizations: tuple[str, ...]
    quantizes_on_load: tuple[str, ...] = Field(description="methods that work on an unquantised checkpoint")
    quantization_min_capability: dict[str, str] = Field(default={}, description="method -> compute capability")
    attention_backends: tuple[str, ...] = Field(description="order of preference, grouped-query attention")
    attention_backends_blackwell: tuple[str, ...]
    flags: tuple[str, ...] = Field(default=(), description="options of this release that not every release has")
    removed_flags: tuple[str, ...] = Field(default=(), description="options that an earlier release had")
    metrics: dict[str, str] = Field(description="names of the Prometheus metrics: ttft, tpot, itl, e2e, queue, ...")
    cite: dict[str, str] = Field(default={}, description="field -> release, file and lines where it was read")

    @classmethod
    def from_table(cls, table: dict[str, Any], version: str) -> Self:
        """Return the facts for a version: every release up to it, merged, the later one winning.

        Raises:
            UnknownName: the version is no version, or lies before the first or after the last release that was read.
            BadData: the table is not what data/engines describes.
        """
        name = str(table.get("name", "engine"))
        releases = sorted(table.get("release", []), key=lambda r: version_key(str(r.get("version", ""))))
        known = [str(release["version"]) for release in releases]
        wanted = version_key(version)
        usable = [release for release in releases if version_key(str(release["version"])) <= wanted]
        if not usable or wanted[:2] > version_key(known[-1])[:2]:
            hint = (
                f"Releases known: {known[0]} to {known[-1]} ({', '.join(known)})." if known else "No release is known."
            )
            raise UnknownName(f"{name} version", version, known, hint)
        merged: dict[str, Any] = {}
        cites: dict[str, str] = {}
        flags: list[str] = []
        removed: list[str] = []
        for release in usable:
            entry = dict(release)
            cites |= {field: f"{name} {release['version']} {at}" for field, at in entry.pop("cite", {}).items()}
            gone = entry.pop("removed_flags", [])
            flags = [flag for flag in [*flags, *entry.pop("new_flags", [])] if flag not in gone]
            removed += gone
            merged |= entry
            if "notes" not in entry:
                merged["notes"] = []
        read_version = merged.pop("version")
        try:
            return cls(
                name=name,
                version=version.strip().removeprefix("v"),
                read_version=read_version,
                cite=cites,
                flags=tuple(flags),
                removed_flags=tuple(removed),
                **merged,
            )
        except ValidationError as error:
            raise BadData(f"engine facts of {name} {printable(version)}", first_error(error)) from error

    @property
    def is_exact(self) -> bool:
        """Return whether this very release was read, not an earlier one that stands for it."""
        return version_key(self.version) == version_key(self.read_version)

    def _batch_default(self, memory_bytes: float, gpu_name: str, compute_capability: str) -> BatchDefault:
        for rule in self.batch_defaults:
            if memory_bytes < rule.min_memory_bytes:
                continue
            if rule.not_in_name and rule.not_in_name in gpu_name.lower():
                continue
            if rule.not_compute_capability and rule.not_compute_capability == compute_capability:
                continue
            return rule
        return self.batch_defaults[-1]

    def max_num_seqs_default(
        self,
        memory_bytes: float,
        gpu_name: str,
        entry_point: EntryPoint = "api_server",
        *,
        compute_capability: str = "",
        max_num_batched_tokens: int | None = None,
    ) -> int:
        """Return the limit of running sequences [count] when none is given; `memory_bytes` as the driver reports."""
        rule = self._batch_default(memory_bytes, gpu_name, compute_capability)
        tokens = max_num_batched_tokens or rule.max_num_batched_tokens[entry_point]
        return min(rule.max_num_seqs[entry_point], tokens)

    def max_num_batched_tokens_default(
        self,
        memory_bytes: float,
        gpu_name: str,
        entry_point: EntryPoint = "api_server",
        *,
        compute_capability: str = "",
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
    ) -> int:
        """Return the token budget of one step [tokens] when none is given.

        The engine also caps it at max_num_seqs * max_model_len; give both to apply that.
        """
        rule = self._batch_default(memory_bytes, gpu_name, compute_capability)
        tokens = rule.max_num_batched_tokens[entry_point]
        if max_model_len:
            tokens = min(tokens, (max_num_seqs or rule.max_num_seqs[entry_point]) * max_model_len)
        return tokens

    def uses_v2_runner(self, *, architecture: str = "", is_moe: bool = False, is_quantized: bool = False) -> bool:
        """Return whether a model runs on model runner V2, from its config.json architecture and kind."""
        listed = architecture in self.v2_runner_architectures
        return {
            "none": False,
            "listed-dense-unquantised": listed and not is_moe and not is_quantized,
            "listed": listed,
            "dense-or-listed": listed or not is_moe,
            "all": True,
        }[self.v2_runner_rule]

    def subtracts_graph_memory(
        self, *, architecture: str = "", is_moe: bool = False, is_quantized: bool = False
    ) -> bool:
        """Return whether the CUDA graphs' memory is taken off before the KV cache is sized, or comes on top of both."""
        v2 = self.uses_v2_runner(architecture=architecture, is_moe=is_moe, is_quantized=is_quantized)
        return self.v2_reserves_graph_memory if v2 else self.reserves_graph_memory

    def schedules_async(self, pp: int = 1, *, executor: str = "mp") -> bool:
        """Return whether the next step is scheduled while one runs; executor is mp, uni, ray or external_launcher."""
        return self.has_async_scheduling and executor in self.async_executors and not (self.async_needs_pp1 and pp > 1)

    def n_concurrent_batches(
        self,
        pp: int = 1,
        is_moe: bool = False,
        *,
        architecture: str = "",
        is_quantized: bool = False,
        executor: str = "mp",
    ) -> int:
        """Return how many batches the engine keeps in flight: 1 means that scheduling waits for each step's end."""
        if not self.schedules_async(pp, executor=executor):
            return pp
        v2 = self.uses_v2_runner(architecture=architecture, is_moe=is_moe, is_quantized=is_quantized)
        if v2 and self.v2_runner_adds_batch:
            return pp + 1
        return 2 if pp == 1 else pp

    def graph_capture_sizes(
        self, max_num_seqs: int, max_num_batched_tokens: int = 10**9, compute_capability: str = ""
    ) -> tuple[int, ...]:
        """Return the batch sizes [tokens] that have a CUDA graph, ascending; a step is padded to the next one."""
        is_blackwell = compute_capability.split(".")[0] == str(BLACKWELL_DATACENTRE_MAJOR)
        ceiling = self.graph_max_tokens_blackwell if is_blackwell else self.graph_max_tokens
        top = min(2 * max_num_seqs, ceiling) if self.graph_follows_seqs else ceiling
        adds_seqs = self.graph_adds_seqs_limit and max_num_seqs <= top
        top = min(top, max_num_batched_tokens)
        coarse = self.graph_coarse_from_tokens or top + 1
        sizes = {size for size in (1, 2, 4) if size <= top}
        sizes |= set(range(8, min(top + 1, coarse), 8)) | set(range(coarse, top + 1, 16))
        if self.graph_adds_batch_limit and max_num_batched_tokens <= top:
            sizes.add(max_num_batched_tokens)
        if adds_seqs and max_num_seqs <= max_num_batched_tokens:
            sizes.add(max_num_seqs)
        return tuple(sorted(sizes))

    def custom_all_reduce_max_bytes(
        self, compute_capability: str, world: int, *, has_nvlink: bool = True, has_multicast: bool = True
    ) -> int:
        """Return the message size [bytes] up to which vLLM's own all-reduce kernel is used, 0 = never.

        It needs one node and, above two GPUs, NVLink between all of them. Where NVSwitch multicast works
        (`has_multicast`), the size shrinks because a multicast kernel takes the larger messages.
        """
        if world not in self.custom_all_reduce_worlds or (world > 2 and not has_nvlink):
            return 0
        multicast = self.symm_mem_max_bytes(compute_capability, world) if has_nvlink and has_multicast else 0
        lower = self.custom_all_reduce_bytes.get(compute_capability, {}).get(world) if multicast else None
        return min(self.custom_all_reduce_limit_bytes, lower or self.custom_all_reduce_limit_bytes)

    def symm_mem_max_bytes(self, compute_capability: str, world: int) -> int:
        """Return the message size [bytes] up to which the multicast kernel is used (bf16, NVSwitch), 0 = never."""
        return self.symm_mem_bytes.get(compute_capability, {}).get(world, 0)

    def flashinfer_all_reduce_max_bytes(self, compute_capability: str, world: int) -> int:
        """Return the message size [bytes] up to which FlashInfer's all-reduce is used first, 0 = never."""
        if not self.flashinfer_all_reduce:
            return 0
        return self.flashinfer_all_reduce_bytes.get(compute_capability, {}).get(world, 0)
