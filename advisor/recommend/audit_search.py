"""What an author may have run: the scenarios that a claim leaves open, and our prediction of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from advisor.errors import AdvisorError
from advisor.predict.deepspeed import deepspeed_deployments, feasible_deepspeed, predict_deepspeed
from advisor.predict.deepspeed_step import weight_bytes_of
from advisor.predict.serving import predict_vllm
from advisor.predict.shapes import shapes_of
from advisor.recommend.claims import Names
from advisor.schema import (
    ClosedLoad,
    Cluster,
    Deployment,
    EngineFacts,
    FixedLengths,
    Gpu,
    Model,
    Prediction,
    Workload,
)
from advisor.schema.claims import Setup
from advisor.units import format_bytes, plural

Serve = Callable[[Model, Cluster, Deployment, Workload], Prediction]
"""A serving model of vLLM; raises AdvisorError for a deployment that it cannot run."""


def vllm_serve(names: Names) -> Serve | None:
    """Return this project's replay of vLLM with the catalogue's coefficients; None when there are none."""
    try:
        fitted, power = names.coefficients("vllm"), names.coefficients("power")
        table = names.engine("vllm")
    except AdvisorError:
        return None

    def serve(model: Model, cluster: Cluster, deployment: Deployment, workload: Workload) -> Prediction:
        facts = EngineFacts.from_table(table, deployment.engine_version)
        return predict_vllm(model, cluster, deployment, workload, fitted, facts=facts, power=power)

    return serve


PROMPTS = (16, 128, 512, 2048)
OUTPUTS = (1, 16, 128, 512)
CLIENTS = (1, 16, 128)
USUAL_PROMPT, USUAL_OUTPUT = 128, 64
"""Shortest lengths of ordinary chat traffic (Azure 2023 conversation trace: medians 1020 and 129 tokens)."""
MAX_CANDIDATES = 4
CROWDS = (4, 16)
"""Times the clients of the busiest scenario that are tried before a rate is called out of reach."""
MOST_SEQS = 1024
"""Sequences that vLLM runs together by default on its largest cards."""


@dataclass(frozen=True)
class Scenario:
    """One guess at what the author ran, and what we predict of it."""

    prompt_tokens: int
    output_tokens: int
    clients: int
    deployment: Deployment
    prediction: Prediction

    @property
    def is_usual(self) -> bool:
        """Return whether the lengths are those of ordinary traffic."""
        return self.prompt_tokens >= USUAL_PROMPT and self.output_tokens >= USUAL_OUTPUT

    def __str__(self) -> str:
        """Return the scenario as text."""
        d = self.deployment
        batch = f", static batch {d.static_batch}" if d.static_batch else ""
        return (
            f"{self.prompt_tokens} prompt and {self.output_tokens} output tokens, {plural(self.clients, 'client')},"
            f" {d.backend} tp {d.tp} dp {d.dp}{batch}"
        )


class Auditor:
    """The figures' side of an audit: candidate deployments and scenarios of a setup, computed once."""

    def __init__(self, names: Names, serve: Serve | None) -> None:
        self.names = names
        self.serve = serve
        self._scenarios: dict[Setup, list[Scenario]] = {}

    def hardware(self, setup: Setup) -> tuple[Model, Gpu, Cluster]:
        """Return model, GPU and cluster of a setup; UnknownName for a name that the catalogue lacks."""
        model = self.names.model(setup.model)[0]
        gpu = self.names.gpu(setup.gpu)
        per_node = min(setup.n_gpus, gpu.max_gpus_per_node)
        return model, gpu, Cluster(gpu=gpu, gpus_per_node=per_node, n_nodes=math.ceil(setup.n_gpus / per_node))

    def deployments(self, setup: Setup) -> list[Deployment]:
        """Return what the author may have run: the legal plans of the backend that use all GPUs."""
        model, _, cluster = self.hardware(setup)
        if setup.backend in (None, "vllm"):
            legal = [t for t in (8, 4, 2, 1) if cluster.gpus_per_node % t == 0 and model.n_heads % t == 0]
            weights = weight_bytes_of(shapes_of(model), setup.weight_dtype)
            fitting = [t for t in legal if weights / t < 0.9 * cluster.gpu.device_memory_bytes] or legal[:1]
            # the widest split has the lowest latency, the narrowest the most replicas: the others lie between
            degrees = [setup.tp] if setup.tp else list(dict.fromkeys((fitting[0], fitting[-1])))
            found = [
                Deployment(
                    backend="vllm",
                    model=model.name,
                    gpu=cluster.gpu.name,
                    tp=tp,
                    dp=max(1, cluster.n_gpus // tp),
                    weight_dtype=setup.weight_dtype,
                    kv_dtype="fp16" if setup.weight_dtype == "fp16" else "bf16",
                    max_model_len=min(model.max_context_tokens, 4096),
                )
                for tp in degrees
            ]
        else:
            batches = (setup.static_batch,) if setup.static_batch else (32,)
            found = deepspeed_deployments(model, cluster, backends=(setup.backend,), batches=batches)
        return [d for d in found if setup.tp in (0, d.tp)]

    def _predict(self, model: Model, cluster: Cluster, d: Deployment, workload: Workload) -> Prediction | None:
        try:
            if d.backend == "vllm":
                return self.serve(model, cluster, d, workload) if self.serve else None
            coefficients = self.names.coefficients("deepspeed")
            if feasible_deepspeed(model, cluster, d, workload, coefficients):
                return None
            return predict_deepspeed(model, cluster, d, workload, coefficients)
        except AdvisorError:
            return None

    def fault(self, setup: Setup) -> str:
        """Return why no deployment of a setup runs, empty where one does or the reason is not known."""
        model, _, cluster = self.hardware(setup)
        shapes, device = shapes_of(model), cluster.gpu.device_memory_bytes * cluster.n_gpus
        weights = weight_bytes_of(shapes, setup.weight_dtype)
        if setup.backend in (None, "vllm"):
            if weights <= device:
                return ""
            room = f"{cluster.n_gpus} x {cluster.gpu.label} hold {format_bytes(device)}"
            return f"the weights alone take {format_bytes(weights)}, {room}"
        work = Workload(
            lengths=FixedLengths(prompt_tokens=USUAL_PROMPT, output_tokens=USUAL_OUTPUT), load=ClosedLoad(concurrency=1)
        )
        coefficients = self.names.coefficients("deepspeed")
        faults = [feasible_deepspeed(model, cluster, d, work, coefficients) for d in self.deployments(setup)]
        return faults[0][0] if faults and all(faults) and faults[0] else ""

    def crowded(self, setup: Setup, quantity: str) -> list[Scenario]:
        """Return the scenario with the most of a rate, and the ordinary one, again with far more clients."""
        model, _, cluster = self.hardware(setup)
        found = []
        for some in (self.scenarios(setup), [s for s in self.scenarios(setup) if s.is_usual]):
            best = max(some, key=lambda s: s.prediction[quantity], default=None)
            if best is None or best.deployment.backend != "vllm":
                continue
            for times in CROWDS:
                clients = times * max(CLIENTS)
                d = best.deployment.model_copy(update={"max_num_seqs": MOST_SEQS})
                lengths = FixedLengths(prompt_tokens=best.prompt_tokens, output_tokens=best.output_tokens)
                workload = Workload(lengths=lengths, load=ClosedLoad(concurrency=clients))
                prediction = self._predict(model, cluster, d, workload)
                if prediction is not None:
                    found.append(Scenario(best.prompt_tokens, best.output_tokens, clients, d, prediction))
        return found

    def scenarios(self, setup: Setup) -> list[Scenario]:
        """Return predictions over lengths, clients and deployments that the claim leaves open."""
        if setup not in self._scenarios:
            self._scenarios[setup] = list(self._search(setup))
        return self._scenarios[setup]

    def _search(self, setup: Setup) -> Iterator[Scenario]:
        model, _, cluster = self.hardware(setup)
        prompts = (setup.prompt_tokens,) if setup.prompt_tokens else PROMPTS
        outputs = (setup.output_tokens,) if setup.output_tokens else OUTPUTS
        candidates = self.deployments(setup)[:MAX_CANDIDATES]
        for prompt, output, clients, d in itertools.product(prompts, outputs, CLIENTS, candidates):
            if prompt + output > min(model.max_context_tokens, d.max_model_len):
                continue
            workload = Workload(
                lengths=FixedLengths(prompt_tokens=prompt, output_tokens=output), load=ClosedLoad(concurrency=clients)
            )
            prediction = self._predict(model, cluster, d, workload)
            if prediction is not None:
                yield Scenario(prompt, output, clients, d, prediction)
