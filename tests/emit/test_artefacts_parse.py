"""Every artefact is read by the real parser or schema of its tool."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import check_jsonschema
import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml

from advisor.emit import ARTEFACTS, DEEPSPEED_ARTEFACTS, FILE_NAMES, Launch, artefacts_for, emit, file_name
from advisor.errors import DomainError, UnknownName
from advisor.schema import Backend, Interval, Prediction

COMPOSE_SCHEMA = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor" / "compose-spec.json"
KUBERNETES = "1.34"
# Options of `nsys profile`, Nsight Systems user guide 2025.3, "CLI Profile Command Switch Options".
NSYS_OPTIONS = {
    "--output": r".+",
    "--trace": r"(cuda|nvtx|osrt|cublas|cudnn)(,(cuda|nvtx|osrt|cublas|cudnn))*",
    "--trace-fork-before-exec": r"true|false",
    "--cuda-graph-trace": r"graph|node",
    "--capture-range": r"none|cudaProfilerApi|nvtx|hotkey",
    "--capture-range-end": r"none|stop|stop-shutdown|repeat(:\d+)?|repeat-shutdown:\d+",
    "--delay": r"\d+",
    "--duration": r"\d+",
}


def bash_accepts(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def words(script: str) -> list[str]:
    """The words of the command that `exec` or `srun` starts, as bash itself splits them."""
    line = script.replace("\\\n", " ")
    start = next(part for part in line.splitlines() if part.strip().startswith(("exec vllm", "exec nsys")))
    return shlex.split(start)[1:]


def documents(text: str) -> list[dict[str, Any]]:
    assert not re.search(r": [&*]id\d", text)
    return list(yaml.safe_load_all(text))


def kubernetes_accepts(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def pod_is_valid(template: dict[str, Any]) -> None:
    """A pod template inside a custom resource, read by the strict schema of a Deployment."""
    labels = template["metadata"]["labels"]
    spec = {"selector": {"matchLabels": labels}, "template": template}
    kubernetes_accepts({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": spec})


def test_every_artefact_has_a_file_name() -> None:
    assert set(FILE_NAMES) == {*ARTEFACTS, *DEEPSPEED_ARTEFACTS}
    assert len(set(FILE_NAMES.values())) == len(FILE_NAMES)


def test_vllm_script_starts_the_plan(any_plan: Launch) -> None:
    script = ARTEFACTS["vllm"](any_plan)
    bash_accepts(script)
    assert words(script)[:3] == ["vllm", "serve", any_plan.model.hf_id]
    assert ast.literal_eval(words(script)[words(script).index("--max-model-len") + 1]) == 4096


def test_compose_meets_the_compose_specification(narrow: Launch) -> None:
    (document,) = documents(ARTEFACTS["compose"](narrow))
    jsonschema.validate(document, json.loads(COMPOSE_SCHEMA.read_text()))
    service = document["services"]["vllm"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == narrow.deployment.n_gpus <= narrow.cluster.gpus_per_node
    assert service["image"].endswith(f":v{narrow.facts.version}")


def test_kubernetes_meets_the_strict_schemas(narrow: Launch) -> None:
    deployment, service, scaler, *budget = documents(ARTEFACTS["kubernetes"](narrow))
    for document in (deployment, service, scaler, *budget):
        kubernetes_accepts(document)
    assert len(budget) == (narrow.n_replicas > 1), "a single replica has none to spare"
    pod = deployment["spec"]["template"]
    gpus = int(pod["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus * deployment["spec"]["replicas"] == narrow.deployment.n_gpus
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert scaler["spec"]["minReplicas"] == narrow.n_replicas


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_a_replica_on_two_nodes_becomes_a_leader_worker_set(make: Any, version: str) -> None:
    plan = make.launch(version=version, tp=8, pp=2, dp=2, n_nodes=4)
    group, service, scaler, budget = documents(ARTEFACTS["kubernetes"](plan))
    assert (group["apiVersion"], group["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    # Fields of LeaderWorkerSetSpec and LeaderWorkerTemplate, kubernetes-sigs/lws api/leaderworkerset/v1.
    assert set(group["spec"]) <= {
        "replicas",
        "leaderWorkerTemplate",
        "rolloutStrategy",
        "startupPolicy",
        "networkConfig",
    }
    known = {"size", "restartPolicy", "leaderTemplate", "workerTemplate", "subGroupPolicy", "resizePolicy"}
    assert set(template) <= known
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    assert template["size"] == 2
    for part in ("leaderTemplate", "workerTemplate"):
        pod_is_valid(template[part])
    gpus = int(template["workerTemplate"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert gpus * template["size"] == plan.gpus_per_replica
    assert "--headless" in template["workerTemplate"]["spec"]["containers"][0]["command"]
    assert "--headless" not in template["leaderTemplate"]["spec"]["containers"][0]["command"]
    for document in (service, scaler, budget):
        kubernetes_accepts(document)
    assert budget["spec"]["selector"]["matchLabels"] == service["spec"]["selector"], "leaders stand for their groups"


def test_a_pod_passes_review(make: Any) -> None:
    """What a platform engineer asks of a manifest: limits, probes with patience, drain, no privileges, no key in it."""
    plan = make.launch(tp=4, dp=2)
    seen = {"e2e_p99_s": 80.0, "e2e_mean_s": 12.0, "requests_per_s": 5.0}
    quantities = {name: Interval(value=v, low=v, high=1.5 * v) for name, v in seen.items()}
    plan = dataclasses.replace(
        plan, plan=plan.plan.model_copy(update={"prediction": Prediction(quantities=quantities)})
    )
    deployment, service, scaler, budget = documents(ARTEFACTS["kubernetes"](plan))
    kubernetes_accepts(deployment)
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(container["resources"]["requests"]["cpu"]) >= 4 + 2, "a process a GPU, engine core, API server"
    # the slowest answers of the plan (1.5 x 80 s) end before vLLM is told to stop, and it is not killed on the way
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "120"]
    assert spec["terminationGracePeriodSeconds"] > 120
    assert all(container[p]["timeoutSeconds"] > 1 for p in ("startupProbe", "readinessProbe", "livenessProbe"))
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["automountServiceAccountToken"] is spec["enableServiceLinks"] is False
    assert all("value" not in variable for variable in container["env"]), "keys come from secrets"
    wanted = {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in scaler["spec"]["metrics"]}
    # Little's law: 5 requests/s for 12 s are 60 in hand, 30 a replica
    assert wanted == {"vllm_num_requests_running": "30", "vllm_num_requests_waiting": "1"}
    known = {name.replace(":", "_") for name in plan.facts.metrics.values()}
    assert set(wanted) <= known, "metrics that this release exports"
    assert budget["spec"]["maxUnavailable"] == 1
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]


def test_every_option_is_explained_where_a_line_is_written(any_plan: Launch) -> None:
    for name in ("kubernetes", "slurm", "ray", "kuberay"):
        try:
            text = ARTEFACTS[name](any_plan)
        except DomainError:
            continue
        head = "\n".join(line for line in text.splitlines() if line.startswith("# "))
        for reason in any_plan.reasons():
            assert reason[:140] in head, name


def test_ray_script_counts_its_nodes(make: Any) -> None:
    plan = make.launch(tp=8, pp=2, n_nodes=2)
    script = ARTEFACTS["ray"](plan)
    bash_accepts(script)
    assert "--num-gpus=8" in script
    assert "-ge 2 ]" in script
    assert words(script)[-2:] == ["--distributed-executor-backend", "ray"]
    refused = subprocess.run(["bash", "-s"], input=script, capture_output=True, text=True, check=False)
    assert refused.returncode != 0


def test_kuberay_is_a_ray_job_with_valid_pods(any_plan: Launch) -> None:
    job, service = documents(ARTEFACTS["kuberay"](any_plan))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pod_is_valid(cluster["headGroupSpec"]["template"])
    workers = cluster.get("workerGroupSpecs", [])
    for group in workers:
        pod_is_valid(group["template"])
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    n_nodes = 1 + sum(group["replicas"] for group in workers)
    assert n_nodes == any_plan.nodes_per_replica
    assert shlex.split(job["spec"]["entrypoint"])[:2] == ["vllm", "serve"]
    kubernetes_accepts(service)


def test_slurm_script_asks_for_the_plan(any_plan: Launch) -> None:
    script = ARTEFACTS["slurm"](any_plan)
    bash_accepts(script)
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, re.MULTILINE))
    n_array = int(asked["array"].split("-")[1]) + 1
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) * n_array == any_plan.deployment.n_gpus
    assert script.index("#SBATCH") < script.index("set -euo")


def test_nsys_options_exist(narrow: Launch) -> None:
    script = ARTEFACTS["nsys"](narrow)
    bash_accepts(script)
    command = words(script)
    assert command[:2] == ["nsys", "profile"]
    options = command[2 : command.index("vllm")]
    for option in options:
        name, value = option.split("=", 1)
        assert re.fullmatch(NSYS_OPTIONS[name], value), option
    if "--profiler-config" in command:
        assert json.loads(command[command.index("--profiler-config") + 1]) == {"profiler": "cuda"}


def test_alert_rules_are_promql_on_metrics_that_exist(any_plan: Launch) -> None:
    (document,) = documents(ARTEFACTS["prometheus"](any_plan))
    rules = document["groups"][0]["rules"]
    assert len(rules) == len(any_plan.slo.targets) + 3
    known = {name.removesuffix("_total") for name in any_plan.facts.metrics.values()}
    for rule in rules:
        promql_parser.parse(rule["expr"])
        used = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in re.findall(r"vllm:\w+", rule["expr"])}
        assert used <= known
        assert re.fullmatch(r"[A-Z][A-Za-z0-9]+", rule["alert"])
    assert [rule["expr"].rsplit(" > ")[1] for rule in rules[:2]] == ["0.5", "0.05"]


def test_locust_reads_the_script(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "locustfile.py"
    path.write_text(ARTEFACTS["locust"](make.launch()))
    command = [sys.executable, "-m", "locust", "-f", str(path), "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Client" in listed.stdout, listed.stderr


def test_an_unknown_artefact_is_named_with_its_neighbour(make: Any) -> None:
    plan = make.launch()
    with pytest.raises(UnknownName, match="kubernetes"):
        emit("kubernets", plan.plan, plan.model, plan.cluster, plan.workload, plan.slo)


def test_the_catalogue_knows_the_plan_s_release(make: Any) -> None:
    plan = make.launch(version="0.11.2")
    text = emit("compose", plan.plan, plan.model, plan.cluster, plan.workload, plan.slo)
    assert text == ARTEFACTS["compose"](plan)


@pytest.mark.parametrize("name", ["compose", "nsys"])
def test_a_plan_on_two_nodes_says_which_artefact_can(make: Any, name: str) -> None:
    with pytest.raises(DomainError, match="use kubernetes, ray or slurm"):
        ARTEFACTS[name](make.launch(tp=8, pp=2, n_nodes=2))


@pytest.mark.parametrize("name", ["kubernetes", "slurm"])
def test_a_release_without_its_own_launcher_points_to_ray(make: Any, name: str) -> None:
    with pytest.raises(DomainError, match="use the ray artefact"):
        ARTEFACTS[name](make.launch(version="0.9.2", tp=8, pp=2, n_nodes=2))


def test_other_backends_have_no_vllm_artefact(make: Any) -> None:
    plan = make.launch(backend="deepspeed-autotp")
    with pytest.raises(DomainError, match=r"deepspeed-autotp.*it has deepspeed, deepspeed-command"):
        emit("compose", plan.plan, plan.model, plan.cluster, plan.workload, plan.slo)


@pytest.mark.parametrize("backend", get_args(Backend))
def test_every_backend_has_the_artefacts_that_it_names(make: Any, backend: str) -> None:
    plan = make.launch(backend=backend, version="0.26.0", static_batch=8, offload="cpu")
    names = artefacts_for(backend)
    assert names
    for name in names:
        text = emit(name, plan.plan, plan.model, plan.cluster, plan.workload, plan.slo)
        if FILE_NAMES[name].endswith(".py"):
            ast.parse(text)
        elif FILE_NAMES[name].endswith(".sh"):
            bash_accepts(text)
        elif FILE_NAMES[name].endswith(".json"):
            assert json.loads(text)["zero_optimization"]["stage"] == 3
        else:
            assert documents(text)
    if backend not in ("vllm", "deepspeed-fastgen"):
        command = emit("deepspeed-command", plan.plan, plan.model, plan.cluster, plan.workload, plan.slo)
        assert file_name("deepspeed", plan.deployment) in shlex.split(command.splitlines()[1])


def test_containers_for_other_vendors_are_refused_in_words(make: Any) -> None:
    card = make.gpu("mi300x", capability="", memory_bytes=206e9, vendor="amd", family="cdna3", link="xgmi")
    with pytest.raises(DomainError, match="vendor"):
        ARTEFACTS["compose"](make.launch(card=card))


def test_importing_the_artefacts_leaves_the_process_alone() -> None:
    assert importlib.util.find_spec("advisor.emit") is not None
    code = "import sys, advisor.emit; assert not {'locust', 'gevent'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
