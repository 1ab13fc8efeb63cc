"""The launch line: which options appear, for which release and card, and that no name breaks a reader."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from typing import Any

import promql_parser
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.emit import ARTEFACTS, Launch, explain_flags, launch_notes, vllm_command, vllm_serve_args
from advisor.emit.names import LABEL_MAX_LENGTH, comment, label
from advisor.errors import DomainError
from advisor.schema import Quantization

HOSTILE = [
    "a; rm -rf ~",
    "$(touch /tmp/owned)",
    "$$(HOSTNAME) $$$ $",
    "`id`",
    "it's",
    'say "hi"',
    "a\\b",
    "${HOME}",
    "a: b # c",
    "{{ template }}",
    "[x]",
    "&anchor *alias",
    "%s %d {0}",
    "'''",
    "-----",
    "né 模型",
]


def args(launch: Launch) -> list[str]:
    return vllm_serve_args(launch.deployment, launch.model, launch.gpu, launch.facts)


def value(launch: Launch, flag: str) -> str:
    words = args(launch)
    return words[words.index(flag) + 1]


def notes(launch: Launch) -> str:
    return " ".join(
        f"{n.level}: {n.text}" for n in launch_notes(launch.deployment, launch.model, launch.gpu, launch.facts)
    )


def test_a_default_plan_needs_only_what_its_numbers_rest_on(make: Any) -> None:
    launch = make.launch(
        max_num_seqs=1024, max_num_batched_tokens=8192, gpu_memory_utilization=0.92, prefix_caching=True
    )
    assert args(launch) == ["vllm", "serve", "meta-llama/Llama-3.1-8B", "--max-model-len", "4096"]


@pytest.mark.parametrize(
    ("version", "card", "capability", "memory_bytes", "seqs", "tokens"),
    [
        ("0.11.2", "h100-sxm-80gb", "9.0", 85e9, None, None),
        ("0.26.0", "a100-sxm-80gb", "8.0", 85e9, "1024", "8192"),
        ("0.26.0", "l4", "8.9", 24e9, "1024", "8192"),
        ("0.26.0", "b200", "10.0", 192e9, None, None),
        ("0.33.0", "b200", "10.0", 192e9, None, "8192"),
    ],
)
def test_limits_appear_where_they_differ_from_that_release_on_that_card(
    make: Any, version: str, card: str, capability: str, memory_bytes: float, seqs: str | None, tokens: str | None
) -> None:
    gpu = make.gpu(card, capability, memory_bytes)
    launch = make.launch(version=version, card=gpu, max_num_seqs=1024, max_num_batched_tokens=8192)
    words = args(launch)
    for flag, expected in (("--max-num-seqs", seqs), ("--max-num-batched-tokens", tokens)):
        assert (words[words.index(flag) + 1] if flag in words else None) == expected


def test_the_memory_share_is_written_where_releases_disagree(make: Any) -> None:
    assert "--gpu-memory-utilization" not in args(make.launch(version="0.18.1", gpu_memory_utilization=0.9))
    assert value(make.launch(version="0.20.2", gpu_memory_utilization=0.9), "--gpu-memory-utilization") == "0.9"


def test_fp8_is_quantised_on_load_and_awq_is_not(make: Any) -> None:
    assert value(make.launch(weight_dtype="fp8"), "--quantization") == "fp8"
    assert "checkpoint in its place" not in notes(make.launch(weight_dtype="fp8"))
    awq = make.launch(weight_dtype="awq-int4")
    assert value(awq, "--quantization") == "awq"
    assert "AWQ checkpoint in its place" in notes(awq)


def test_a_checkpoint_in_the_plan_s_own_format_needs_no_flag(make: Any) -> None:
    stored = make.model(quantization=Quantization(method="awq", weight_bits=4, group_size=128))
    assert "--quantization" not in args(make.launch(of=stored, weight_dtype="awq-int4"))
    assert "unquantised checkpoint" in notes(make.launch(of=stored, weight_dtype="bf16"))


def test_volta_computes_in_half_and_cuda_13_builds_are_refused(make: Any) -> None:
    card = make.gpu("v100-sxm-32gb", "7.0", 34e9)
    old = make.launch(version="0.11.2", card=card)
    assert value(old, "--dtype") == "half"
    assert "error" not in notes(old)
    assert "error: vLLM 0.26.0 is built for CUDA 13.0" in notes(make.launch(card=card))
    assert "fp8 weights need compute capability 8.0" in notes(
        make.launch(version="0.11.2", card=card, weight_dtype="fp8")
    )


def test_several_nodes_and_experts(make: Any) -> None:
    wide = make.launch(tp=8, pp=2)
    two = wide.deployment.model_copy(update={"n_nodes": 2})
    assert "--distributed-executor-backend ray" in vllm_command(two, wide.model, wide.gpu, wide.facts)
    assert "overlaps them" in " ".join(n.text for n in launch_notes(two, wide.model, wide.gpu, wide.facts))
    newest = make.facts("0.33.0")
    assert "overlaps them" not in " ".join(n.text for n in launch_notes(two, wide.model, wide.gpu, newest))
    experts = make.launch(of=make.moe_model(), tp=2, dp=4, ep=8)
    assert {"--enable-expert-parallel", "--data-parallel-size"} <= set(args(experts))
    with pytest.raises(DomainError, match="dense"):
        args(make.launch(ep=2))


def test_impossible_limits_are_refused(make: Any) -> None:
    with pytest.raises(DomainError, match="one token of budget"):
        args(make.launch(max_num_seqs=512, max_num_batched_tokens=256))


def test_every_option_has_a_reason(any_plan: Launch) -> None:
    explained = explain_flags(any_plan.deployment, any_plan.model, any_plan.gpu, any_plan.facts)
    assert [word for option, _ in explained for word in shlex.split(option)] == args(any_plan)[3:]
    assert all(len(why) > 10 for _, why in explained)


@pytest.mark.parametrize("name", ["", "  ", "--model", "-x", "a\nb", "a\x00b", "a\x1b[31m"])
def test_names_that_no_line_can_hold_are_refused(make: Any, name: str) -> None:
    with pytest.raises(DomainError, match="cannot stand in a command"):
        args(make.launch(of=make.model(hf_id=name or " ", name="x")))


def shell_words(script: str) -> list[list[str]]:
    """What bash would run: every simple command's words, read by bash with the commands replaced by a printer."""
    stub = 'show() { printf "%s\\0" "$@"; printf "\\n\\0"; }; vllm() { show vllm "$@"; }; '
    stub += 'exec() { "$@"; }; nsys() { show nsys "$@"; }\n'
    done = subprocess.run(["bash", "-c", stub + script], capture_output=True, check=False, timeout=20)
    return [part.split("\0") for part in done.stdout.decode().split("\0\n\0") if part.strip("\0\n")]


def kubernetes_expands(text: str) -> str:
    """What a container gets of an argument: third_party/forked/golang/expansion of Kubernetes, no variable defined."""
    out, i = [], 0
    while i < len(text):
        if text[i] == "$" and i + 1 < len(text):
            if text[i + 1] == "(" and ")" in text[i:]:
                raise AssertionError(f"{text} refers to a variable")
            out.append("$" if text[i + 1] == "$" else text[i : i + 2])
            i += 2
        else:
            out.append(text[i])
            i += 1
    return "".join(out)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_reach_every_reader_unchanged(make: Any, name: str) -> None:
    launch = make.launch(of=make.model(hf_id=name if not name.startswith("-") else "x" + name, name=name))
    wanted = launch.model.hf_id
    assert shell_words(ARTEFACTS["vllm"](launch))[0][2] == wanted
    assert wanted in shell_words(ARTEFACTS["nsys"](launch))[0]
    assert shlex.split(vllm_command(launch.deployment, launch.model, launch.gpu, launch.facts))[2] == wanted
    compose = yaml.safe_load(ARTEFACTS["compose"](launch))
    assert re.sub(r"\$\$", "$", compose["services"]["vllm"]["command"][1]) == wanted
    assert not re.search(r"(?<!\$)(\$\$)*\$(?!\$)", compose["services"]["vllm"]["command"][1])
    pod = next(yaml.safe_load_all(ARTEFACTS["kubernetes"](launch)))["spec"]["template"]["spec"]
    assert kubernetes_expands(pod["containers"][0]["command"][2]) == wanted
    job = next(yaml.safe_load_all(ARTEFACTS["kuberay"](launch)))
    assert shlex.split(job["spec"]["entrypoint"])[2] == wanted
    tree = ast.parse(ARTEFACTS["locust"](launch))
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "CONFIG"
    ]
    assert isinstance(calls[0].value, ast.Call)
    assert json.loads(ast.literal_eval(calls[0].value.args[0]))["model"] == wanted


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_folders_reach_every_reader_unchanged(make: Any, name: str) -> None:
    folder = f"/srv/{name}"
    launch = make.launch(of=make.model(hf_id="", name="mine", folder=folder))
    assert shell_words(ARTEFACTS["vllm"](launch))[0][2] == folder
    assert shlex.split(vllm_command(launch.deployment, launch.model, launch.gpu, launch.facts))[2] == folder
    service = yaml.safe_load(ARTEFACTS["compose"](launch))["services"]["vllm"]
    assert service["command"][1].replace("$$", "$") == folder
    (bind,) = [v for v in service["volumes"] if isinstance(v, dict)]
    assert (bind["type"], bind["read_only"]) == ("bind", True)
    assert bind["source"].replace("$$", "$") == bind["target"].replace("$$", "$") == folder
    if ":" in folder:
        with pytest.raises(DomainError, match="Kubernetes mounts no path with ':'"):
            ARTEFACTS["kubernetes"](launch)
        return
    pod = next(yaml.safe_load_all(ARTEFACTS["kubernetes"](launch)))["spec"]["template"]["spec"]
    assert kubernetes_expands(pod["containers"][0]["command"][2]) == folder
    assert {"name": "model", "mountPath": folder, "readOnly": True} in pod["containers"][0]["volumeMounts"]
    assert {"name": "model", "hostPath": {"path": folder, "type": "Directory"}} in pod["volumes"]


def test_a_folder_is_named_instead_of_a_name_that_no_engine_can_load(make: Any) -> None:
    launch = make.launch(of=make.model(hf_id="", name="mine", folder="/srv/mine"))
    assert args(launch)[2] == "/srv/mine"
    notes = [n.text for n in launch_notes(launch.deployment, launch.model, launch.gpu, launch.facts)]
    assert any("/srv/mine: weights and tokeniser must lie there too" in text for text in notes)
    assert not any("has no hub id" in text for text in notes)
    plain = make.launch(of=make.model(hf_id="org/m"))
    assert "model" not in [v["name"] for v in pod_volumes(plain)]
    assert [v["name"] for v in pod_volumes(launch)][-1] == "model"


def pod_volumes(launch: Launch) -> list[dict[str, Any]]:
    return next(yaml.safe_load_all(ARTEFACTS["kubernetes"](launch)))["spec"]["template"]["spec"]["volumes"]


TEXT = st.text(min_size=1, max_size=60)


@given(name=TEXT)
@settings(max_examples=60)
def test_any_name_is_refused_or_quoted(make: Any, name: str) -> None:
    try:
        launch = make.launch(of=make.model(hf_id=name, name=name))
        line = vllm_command(launch.deployment, launch.model, launch.gpu, launch.facts)
    except DomainError:
        return
    assert shlex.split(line)[2] == name
    compose = yaml.safe_load(ARTEFACTS["compose"](launch))
    assert compose["services"]["vllm"]["command"][1] == name.replace("$", "$$")
    documents = list(yaml.safe_load_all(ARTEFACTS["kubernetes"](launch)))
    assert kubernetes_expands(documents[0]["spec"]["template"]["spec"]["containers"][0]["command"][2]) == name
    alerts = yaml.safe_load(ARTEFACTS["prometheus"](launch))
    for rule in alerts["groups"][0]["rules"]:
        promql_parser.parse(rule["expr"])
    for line in ARTEFACTS["slurm"](launch).splitlines():
        if line.startswith("#SBATCH"):
            assert re.fullmatch(r"#SBATCH --[a-z-]+(=[\w.:%A-Za-z0-9-]+)?", line)


@given(text=st.text(max_size=200))
def test_labels_are_dns_labels_and_comments_are_one_line(text: str) -> None:
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", label(text))
    assert len(label(text)) <= LABEL_MAX_LENGTH
    assert len(comment(text).splitlines()) <= 1


def test_labels_tell_names_apart() -> None:
    assert label("vllm-llama-3.1-8b") == "vllm-llama-3-1-8b"
    assert label("a b") != label("a  b")
