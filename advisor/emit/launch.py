"""What every artefact is made from: plan, model, cluster, workload, targets, and the engine release's facts."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from advisor.emit.names import comment, label, model_argument
from advisor.emit.vllm import Flag, launch_notes, serve_flags
from advisor.errors import DomainError
from advisor.schema import Cluster, Deployment, EngineFacts, Gpu, Model, Plan, Slo, Workload

PORT = 8000
RAY_PORT = 6379
# A cold start downloads the checkpoint, compiles and captures graphs: 1 TB at 1 GB/s and the rest.
STARTUP_LIMIT_S = 1800
# A stopping server finishes what it has begun: the slowest answers, within reason.
DRAIN_S = (30, 600)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One plan ready to be written down as an artefact."""

    plan: Plan
    model: Model
    cluster: Cluster
    workload: Workload
    slo: Slo
    facts: EngineFacts

    @property
    def deployment(self) -> Deployment:
        """Return the plan's deployment."""
        return self.plan.deployment

    @property
    def gpu(self) -> Gpu:
        """Return the cluster's GPU."""
        return self.cluster.gpu

    @property
    def name(self) -> str:
        """Return an RFC 1123 label for the service."""
        return label(f"vllm-{self.model.name}")

    @property
    def is_one_engine(self) -> bool:
        """Return whether the data-parallel ranks belong to one engine (experts are spread over them)."""
        return self.deployment.ep > 1 and self.deployment.dp > 1

    @property
    def n_replicas(self) -> int:
        """Return how many engines can run apart from each other."""
        return 1 if self.is_one_engine else self.deployment.dp

    @property
    def replica(self) -> Deployment:
        """Return the deployment of one engine."""
        return self.deployment.model_copy(update={"dp": self.deployment.dp // self.n_replicas})

    @property
    def gpus_per_replica(self) -> int:
        """Return the GPUs of one engine."""
        return self.replica.n_gpus

    @property
    def nodes_per_replica(self) -> int:
        """Return the nodes that one engine needs."""
        return max(self.deployment.n_nodes, math.ceil(self.gpus_per_replica / self.cluster.gpus_per_node))

    @property
    def gpus_per_node(self) -> int:
        """Return the GPUs that one engine uses on each of its nodes."""
        return math.ceil(self.gpus_per_replica / self.nodes_per_replica)

    @property
    def cpus_per_node(self) -> int:
        """Return the cores that one engine wants on a node.

        Its processes poll: one a GPU, the engine core, the API server with its tokeniser. Our records say what it costs
        when they share cores (docs/methodology.md, host); two a GPU and four more leave none waiting.
        """
        return 2 * self.gpus_per_node + 4

    @property
    def drain_s(self) -> int:
        """Return how long a stopping server gets for the answers that it has begun: the plan's E2E P99 [s]."""
        found = self.plan.prediction.quantities.get("e2e_p99_s")
        low, high = DRAIN_S
        return low if found is None else min(max(low, math.ceil(found.high)), high)

    @property
    def running_per_replica(self) -> int | None:
        """Return the requests that one engine has in hand at the plan's load (rate times E2E, Little), None unknown."""
        q = self.plan.prediction.quantities
        if self.plan.prediction.is_saturated or "requests_per_s" not in q or "e2e_mean_s" not in q:
            return None
        return max(1, math.ceil(q["requests_per_s"].value * q["e2e_mean_s"].value / self.n_replicas))

    def reasons(self) -> list[str]:
        """Return why the launch line has each of its options."""
        flags = serve_flags(self.replica.model_copy(update={"n_nodes": 1}), self.model, self.gpu, self.facts)
        return [f"{flag.name}: {flag.why}" for flag in flags if flag.why]

    def serve_args(self, deployment: Deployment, extra: tuple[Flag, ...] = (), executor: str = "") -> list[str]:
        """Return ['serve', model, options...] for one engine; `executor` '' leaves the choice to vLLM."""
        flags = serve_flags(deployment.model_copy(update={"n_nodes": 1}), self.model, self.gpu, self.facts)
        if executor:
            flags.append(Flag("--distributed-executor-backend", executor, ""))
        args = ["serve", model_argument(self.model)]
        for flag in [*flags, *extra]:
            args += [flag.name, flag.value] if flag.value else [flag.name]
        return args

    def shell(self, deployment: Deployment, extra: tuple[Flag, ...] = (), executor: str = "") -> str:
        """Return the launch line of one engine for a POSIX shell."""
        return shlex.join(["vllm", *self.serve_args(deployment, extra, executor)])

    def header(self, what: str, *usage: str) -> str:
        """Return comment lines: what the file is, how to use it, what to know before."""
        lines = [what, f"{self.model.name} on {self.deployment.n_gpus} x {self.gpu.label}, vLLM {self.facts.version}"]
        notes = launch_notes(self.deployment, self.model, self.gpu, self.facts)
        lines += [*usage, *(f"{note.level}: {note.text}" for note in notes)]
        return "".join(f"# {comment(line, 150)}\n" for line in lines)

    def image(self) -> str:
        """Return the container image of this release.

        Raises:
            DomainError: the card is not NVIDIA's; its image is tied to the vendor's own releases.
        """
        if self.gpu.vendor != "nvidia":
            raise DomainError(
                f"no container artefact for {self.gpu.label}: its vendor ties vLLM images to its own releases; "
                "use 'vllm' (the launch line) inside the vendor's image"
            )
        return f"vllm/vllm-openai:v{self.facts.version}"

    def need_one_node(self, artefact: str) -> None:
        """Raise DomainError when one engine of the plan does not fit one node."""
        if self.nodes_per_replica > 1:
            raise DomainError(
                f"{artefact} runs on one node, but one replica of this plan needs {self.gpus_per_replica} GPUs on "
                f"{self.nodes_per_replica} nodes; use kubernetes, ray or slurm"
            )


class _PlainDumper(yaml.SafeDumper):  # type: ignore[misc]
    """A dumper that writes equal parts out instead of pointing from one to the other."""

    def ignore_aliases(self, data: Any) -> bool:
        """Never write an anchor."""
        return True


def dump_yaml(*documents: dict[str, Any]) -> str:
    """Return documents as YAML text; every string is quoted by the dumper where YAML needs it."""
    text: str = yaml.dump_all(
        documents, Dumper=_PlainDumper, sort_keys=False, allow_unicode=False, width=10**6, explicit_start=True
    )
    return text
