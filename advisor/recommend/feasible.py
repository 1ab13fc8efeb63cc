"""What cannot run, why, and the nearest number that would: formats, context, memory, budget, power."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from advisor.predict.footprint import footprint
from advisor.recommend.ask import Pool, Question
from advisor.recommend.space import (
    Layout,
    base_deployment,
    engine_settings,
    format_fault,
    kv_dtype_for,
    layouts,
    replicas,
    weight_dtypes,
)
from advisor.schema import Cluster, Deployment, Gpu, KvDtype, Model, Rejected
from advisor.units import format_bytes

COUNTS = (1, 2, 4, 8, 16, 32, 64)
SMALLER = {"fp8": "quantised on load", "awq-int4": "with an AWQ checkpoint"}


@dataclass
class Rejections:
    """Rejected deployments, grouped: for each pool, backend and kind the one nearest to running, and how many."""

    _groups: dict[tuple[str, str, str], tuple[float, Rejected]] = field(default_factory=dict)

    def add(self, pool: str, kind: str, shortfall: float, rejected: Rejected) -> None:
        """Count a rejection; the group shows the one with the smallest shortfall."""
        key = (pool, rejected.backend, kind)
        before = self._groups.get(key)
        if before is None:
            self._groups[key] = (shortfall, rejected)
            return
        nearest = min((before, (shortfall, rejected)), key=lambda pair: pair[0])
        total = before[1].count + rejected.count
        self._groups[key] = (nearest[0], nearest[1].model_copy(update={"count": total}))

    def join(self, others: Rejections) -> None:
        """Count the rejections of somebody else as well."""
        for (pool, _, kind), (shortfall, rejected) in others._groups.items():
            self.add(pool, kind, shortfall, rejected)

    def all(self) -> tuple[Rejected, ...]:
        """Return one rejection a group, the most frequent first."""
        return tuple(sorted((r for _, r in self._groups.values()), key=lambda r: -r.count))


@dataclass(frozen=True)
class Fits:
    """The deployments of one pool that fit in memory, in the order in which the sweep sees them."""

    pool: Pool
    deployments: list[Deployment]


def _formats(question: Question, gpu: Gpu) -> list[tuple[str, str]]:
    request, model = question.request, question.model
    pairs = []
    for weight in weight_dtypes(model, gpu, request.weight_dtypes):
        kvs: tuple[KvDtype, ...] = request.kv_dtypes or (kv_dtype_for(weight, model, gpu),)
        pairs += [(str(weight), str(kv)) for kv in kvs]
    return pairs


def fitting(question: Question, pool: Pool, rejections: Rejections) -> Fits:
    """Return the vLLM deployments of a pool that can run, and add those that cannot to `rejections`."""
    model, cluster, gpu = question.model, pool.cluster, pool.cluster.gpu
    base = base_deployment(model, gpu, question.facts, max_model_len=question.max_model_len)
    settings = engine_settings(gpu, question.facts, question.max_model_len)
    spread = list(layouts(model, cluster))
    found: list[Deployment] = []
    for weight, kv in _formats(question, gpu):
        fault = question.context_fault or format_fault(model, gpu, weight, kv, question.facts)
        if fault:
            kind = "context" if question.context_fault else f"format {weight} {kv}"
            n = sum(len(replicas(at.max_dp)) for at in spread) * len(settings)
            shown = base.model_copy(update={"weight_dtype": weight, "kv_dtype": kv})
            rejections.add(pool.name, kind, 0, Rejected(**_why(shown, fault), count=n))
            continue
        for at in spread:
            for seqs, tokens in settings:
                one = base.model_copy(
                    update={
                        "tp": at.tp,
                        "pp": at.pp,
                        "n_nodes": at.n_nodes,
                        "weight_dtype": weight,
                        "kv_dtype": kv,
                        "max_num_seqs": seqs,
                        "max_num_batched_tokens": tokens,
                    }
                )
                counts = replicas(at.max_dp)
                room = footprint(model, gpu, one, question.facts)
                if room.is_ok:
                    found += [one if dp == 1 else one.model_copy(update={"dp": dp}) for dp in counts]
                else:
                    short = room.weights_bytes + room.activation_bytes
                    rejected = Rejected(**_why(one, (room.reason, room.nearest)), count=len(counts))
                    rejections.add(pool.name, f"memory {weight}", short, rejected)
    return Fits(pool, found)


def _why(deployment: Deployment, fault: tuple[str, str]) -> dict[str, object]:
    return {"backend": deployment.backend, "deployment": deployment, "reason": fault[0], "nearest": fault[1]}


def smallest_fit(question: Question, model: Model, gpu: Gpu, weight: str) -> Deployment | None:
    """Return the deployment with the fewest of these cards that holds the model, None up to 64 of them."""
    kv = kv_dtype_for(weight, model, gpu)
    if format_fault(model, gpu, weight, kv, question.facts):
        return None
    base = base_deployment(model, gpu, question.facts, max_model_len=question.max_model_len)
    for n in COUNTS:
        per_node = min(n, gpu.max_gpus_per_node)
        cluster = Cluster(gpu=gpu, n_nodes=max(1, n // per_node), gpus_per_node=per_node)
        for at in _spanning(model, cluster, n):
            one = base.model_copy(
                update={
                    "tp": at.tp,
                    "pp": at.pp,
                    "n_nodes": at.n_nodes,
                    "weight_dtype": weight,
                    "kv_dtype": kv,
                }
            )
            if footprint(model, gpu, one, question.facts).is_ok:
                return one
    return None


def _spanning(model: Model, cluster: Cluster, n: int) -> list[Layout]:
    return [at for at in layouts(model, cluster) if at.tp * at.pp == n]


def what_would_fit(question: Question, gpus: Iterable[Gpu]) -> list[str]:
    """Return sentences on what would hold the model: more of the same card, other formats, other cards."""
    if question.context_fault or question.vllm is None:
        return []
    model = question.model
    sentences = []
    mine = {p.cluster.gpu.name: p.cluster.gpu for p in question.pools}
    for gpu in mine.values():
        own = weight_dtypes(model, gpu, question.request.weight_dtypes)[0]
        more = smallest_fit(question, model, gpu, own)
        if more is not None:
            sentences.append(f"{spec(more, gpu)} would hold {model.name} in {own}.")
        if model.quantization is None and not question.request.weight_dtypes:
            for weight, how in SMALLER.items():
                less = smallest_fit(question, model, gpu, weight)
                if less is not None and (more is None or less.n_gpus < more.n_gpus):
                    sentences.append(f"{spec(less, gpu)} would hold it in {weight} ({how}): --weight-dtype {weight}.")
    others = []
    for gpu in gpus:
        if gpu.name not in mine and gpu.vendor == "nvidia":
            own = weight_dtypes(model, gpu, question.request.weight_dtypes)[0]
            other = smallest_fit(question, model, gpu, own)
            if other is not None:
                others.append((other.n_gpus, -gpu.memory_bandwidth_bytes_per_s, spec(other, gpu)))
    if others:
        sentences.append(f"Other cards that would hold it: {', '.join(text for _, _, text in sorted(others)[:5])}.")
    return sentences


def spec(deployment: Deployment, gpu: Gpu) -> str:
    """Return the GPUs of a deployment as a spec with their memory, such as '2xh100-sxm-80gb (170 GB)'."""
    n = deployment.n_gpus
    text = (
        f"{n}x{gpu.name}" if n <= gpu.max_gpus_per_node else f"{deployment.n_nodes}x{gpu.max_gpus_per_node}x{gpu.name}"
    )
    return f"{text} ({format_bytes(n * gpu.device_memory_bytes)})"
