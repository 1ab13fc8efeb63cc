"""What to run for a DeepSpeed inference deployment: launch line, script and configuration, each line explained."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from advisor.emit.names import comment, model_argument
from advisor.errors import DomainError, UnknownName, printable
from advisor.schema import Deployment, Model

HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
SCRIPT_NAMES = {
    "deepspeed-zero-inference": "zero_inference.py",
    "deepspeed-autotp": "init_inference.py",
    "deepspeed-kernel-injection": "init_inference.py",
    "deepspeed-fastgen": "fastgen_client.py",
}
MII_PORT = 8000
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}

LINEAR_WORDS = {
    "llama": ("self_attn", "mlp"),
    "opt": ("self_attn", "fc"),
    "bloom": ("self_attention", "mlp"),
    "falcon": ("self_attention", "mlp"),
}
"""Words in the names of a family's linear layers in transformers; every other family is named as Llama is."""

Config = dict[str, Any]


def _checked(deployment: Deployment) -> str:
    """Return the script of the deployment's backend, or raise for one that is not DeepSpeed's or not in its formats."""
    if deployment.backend not in SCRIPT_NAMES:
        raise UnknownName("DeepSpeed backend", deployment.backend, SCRIPT_NAMES, f"Known: {', '.join(SCRIPT_NAMES)}")
    is_packed = (deployment.backend, deployment.weight_dtype) == ("deepspeed-zero-inference", "int4")
    if deployment.weight_dtype not in TORCH_DTYPES and not is_packed:
        raise DomainError(f"weight_dtype '{deployment.weight_dtype}' does not run in DeepSpeed here; use bf16 or fp16")
    return SCRIPT_NAMES[deployment.backend]


def command_for(deployment: Deployment, model: Model) -> str:
    """Return the shell line that starts one replica; `inference_script` gives the file that it names.

    ZeRO-Inference starts all its ranks (dp) as one job; the other paths start one tensor-parallel group a replica.
    """
    script = _checked(deployment)
    name = model_argument(model)
    if deployment.backend == "deepspeed-fastgen":
        words = ["python", "-m", "mii.entrypoints.openai_api_server", "--model", name]
        words += ["--tensor-parallel", str(deployment.tp), "--port", str(MII_PORT)]
        words += ["--max-length", str(deployment.max_model_len)]
        return shlex.join(words)
    ranks = deployment.dp if deployment.backend == "deepspeed-zero-inference" else deployment.tp
    batch = str(max(1, deployment.static_batch))
    return shlex.join(["deepspeed", "--num_gpus", str(ranks), script, "--model", name, "--batch", batch])


def zero_inference_config(deployment: Deployment, model: Model) -> Config:
    """Return the ds_config of ZeRO-Inference: stage 3 without an optimizer, weights where `offload` says."""
    zero: Config = {
        "stage": 3,
        "stage3_prefetch_bucket_size": 2 * model.d_model**2,
        "stage3_param_persistence_threshold": model.d_model,
        "stage3_max_live_parameters": 1_000_000_000,
    }
    if deployment.offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if deployment.offload == "nvme":
        zero["offload_param"] = {
            "device": "nvme",
            "nvme_path": "/local_nvme",
            "pin_memory": True,
            "buffer_count": 5,
            "buffer_size": 100_000_000,
        }
    config: Config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000_000,
        _computing_dtype(deployment): {"enabled": True},
        "zero_optimization": zero,
    }
    if deployment.weight_dtype == "int4":
        packed = {"num_bits": 4, "group_size": 64, "group_dim": 1, "symmetric": False}
        words = LINEAR_WORDS.get(model.family, LINEAR_WORDS["llama"])
        config["weight_quantization"] = {"post_init_quant": {word: dict(packed) for word in words}}
    return config


def _computing_dtype(deployment: Deployment) -> str:
    """Return the 16-bit format of a deployment; DeepSpeed packs weights to 4 bits from fp16 alone."""
    return "fp16" if deployment.weight_dtype == "int4" else deployment.weight_dtype


INFERENCE_REASONS = {
    "train_micro_batch_size_per_gpu": "required by the parser, without effect on inference",
    "steps_per_print": "no progress lines",
    "bf16": "computes in bfloat16",
    "fp16": "computes in float16",
    "zero_optimization.stage": "3 is the only stage that shards weights; 1 and 2 do nothing for inference",
    "zero_optimization.stage3_prefetch_bucket_size": "elements fetched ahead: about two matrices of d_model x d_model",
    "zero_optimization.stage3_param_persistence_threshold": "norms and biases stay on the GPU",
    "zero_optimization.stage3_max_live_parameters": "limits what is fetched ahead (the default)",
    "zero_optimization.offload_param.device": "where the weights rest; every pass streams all of them",
    "zero_optimization.offload_param.pin_memory": "pinned memory is needed to reach the host link's rate",
    "zero_optimization.offload_param.nvme_path": "a directory on a local NVMe drive: change it to yours",
    "zero_optimization.offload_param.buffer_count": "pinned buffers between drive and GPU",
    "zero_optimization.offload_param.buffer_size": "elements of one such buffer",
} | {
    f"weight_quantization.post_init_quant.{layer}.{key}": why
    for layer in {word for words in LINEAR_WORDS.values() for word in words}
    for key, why in {
        "num_bits": "linear layers whose name holds this word are packed",
        "group_size": "weights that share a scale and a minimum",
        "group_dim": "groups run along the input of a layer",
        "symmetric": "each group has its own minimum",
    }.items()
}


def flat_keys(config: Config, prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of every leaf of a configuration; `bf16.enabled` is reported as `bf16`."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and set(value) == {"enabled"}:
            found.append((dotted, value["enabled"]))
        elif isinstance(value, dict):
            found += flat_keys(value, f"{dotted}.")
        else:
            found.append((dotted, value))
    return found


def explain_config(config: Config, reasons: dict[str, str] = INFERENCE_REASONS) -> dict[str, str]:
    """Return why each line of a configuration is there, by dotted key; KeyError would mean an unexplained line."""
    return {key: reasons[key] for key, _ in flat_keys(config)}


_ARGUMENTS = """\
import argparse
import json

import torch
import deepspeed
import transformers

parser = argparse.ArgumentParser()
parser.add_argument("--model", default={model})  # hub id or directory
parser.add_argument("--batch", type=int, default={batch})  # prompts of one static batch
parser.add_argument("--prompts", default="prompts.jsonl")  # one JSON string a line
parser.add_argument("--max-new-tokens", type=int, default=128)
parser.add_argument("--local_rank", type=int, default=-1)  # set by the deepspeed launcher
args = parser.parse_args()

tokenizer = transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
"""

_LOOP = """
with open(args.prompts) as lines:
    prompts = [json.loads(line) for line in lines]
{share}
for start in range(0, len(prompts), args.batch):  # a static batch: all wait for the longest answer
    group = tokenizer(prompts[start : start + args.batch], return_tensors="pt", padding=True).to({device})
    with torch.no_grad():
        answers = {target}.generate(**group, max_new_tokens=args.max_new_tokens, do_sample=False{extra})
    for text in tokenizer.batch_decode(answers, skip_special_tokens=True):
        print(json.dumps(text), flush=True)
"""

_ZERO = """
config = json.loads({config})

deepspeed.init_distributed()  # one process a GPU; the launcher sets rank and world size
settings = transformers.integrations.HfDeepSpeedConfig(config)  # keep it alive: weights load already sharded
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.{dtype})
{packed}engine = deepspeed.initialize(model=model, config=config)[0]  # no optimizer: this is ZeRO-Inference
engine.module.eval()
device = torch.device("cuda", deepspeed.comm.get_rank() % torch.cuda.device_count())
rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
"""

_PACK = """\
import gc

from deepspeed.inference.quantization.quantization import _init_group_wise_weight_quantization

gc.collect()
gc.freeze()  # packing collects garbage after every layer: set aside what lives, or it takes minutes
model = _init_group_wise_weight_quantization(model, config)  # packs the linear layers to 4 bits; experimental
gc.unfreeze()
"""

_INIT = """
deepspeed.init_distributed()  # one process a GPU of the tensor-parallel group
model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.{dtype})
engine = deepspeed.init_inference(
    model,
    config={{
        "dtype": torch.{dtype},  # weights and activations
        "tensor_parallel": {{"tp_size": {tp}}},  # GPUs that share each layer
        "replace_with_kernel_inject": {inject},  # {why}
        "max_out_tokens": {length},  # prompt + answer; sizes the workspace of injected kernels
    }},
)
device = torch.device("cuda", deepspeed.comm.get_rank() % torch.cuda.device_count())
"""

_MII = """\
# {title}
# Start the server first: {command}
# It needs: pip install deepspeed-mii pyzmq fschat uvicorn pydantic-settings ('fastchat' on PyPI is another project).
import json
import urllib.request

URL = "http://127.0.0.1:{port}/v1/completions"  # OpenAI style
body = json.dumps({{"model": {model}, "prompt": "The capital of France is", "max_tokens": 32}}).encode()
request = urllib.request.Request(URL, body, {{"Content-Type": "application/json"}})
print(urllib.request.urlopen(request, timeout=600).read().decode())
"""


def inference_script(deployment: Deployment, model: Model) -> str:
    """Return the Python file that `command_for` names (for FastGen: a client of its server)."""
    _checked(deployment)
    name = json.dumps(model_argument(model), ensure_ascii=False)
    dtype = TORCH_DTYPES[_computing_dtype(deployment)]
    title = comment(f"{deployment.backend}, {model.name}, DeepSpeed {deployment.engine_version}")
    if deployment.backend == "deepspeed-fastgen":
        command = comment(command_for(deployment, model), 300)
        return _MII.format(title=title, command=command, port=MII_PORT, model=name)
    head = f"# {title}\n# Run: {comment(command_for(deployment, model), 300)}\n"
    # transformers' HfDeepSpeedConfig does not start without accelerate
    more = " accelerate" if deployment.backend == "deepspeed-zero-inference" else ""
    head += f"# It needs: pip install deepspeed transformers{more}\n"
    head += _ARGUMENTS.format(model=name, batch=max(1, deployment.static_batch))
    if deployment.backend == "deepspeed-zero-inference":
        config = zero_inference_config(deployment, model)
        reasons = "".join(
            f"# {key} = {json.dumps(value)}: {INFERENCE_REASONS[key]}\n" for key, value in flat_keys(config)
        )
        text = json.dumps(json.dumps(config))
        # every rank must run the same number of passes, so the list is cut to a multiple of the ranks' batches
        share = "prompts = prompts[: len(prompts) // (world * args.batch) * world * args.batch][rank::world]"
        # the cache of all layers but the one at work and the next waits in host memory
        cache = ', cache_implementation="offloaded"' if deployment.kv_offload == "cpu" else ""
        loop = _LOOP.format(share=share, device="device", target="engine.module", extra=", synced_gpus=True" + cache)
        packed = _PACK if deployment.weight_dtype == "int4" else ""
        return head + "\n" + reasons + _ZERO.format(config=text, dtype=dtype, packed=packed) + loop
    inject = deployment.backend == "deepspeed-kernel-injection"
    why = "fused kernels; needs transformers 4, fails on 5" if inject else "plain transformers layers, split by AutoTP"
    body = _INIT.format(dtype=dtype, tp=deployment.tp, inject=inject, why=why, length=deployment.max_model_len)
    return head + body + _LOOP.format(share="", device="device", target="engine", extra="")


def hostfile(hosts: Sequence[str], gpus_per_node: int) -> str:
    """Return DeepSpeed's hostfile: one `name slots=n` line a node, first node first.

    Raises DomainError for a name that is not a host name or address.
    """
    for host in hosts:
        if not HOST_NAME.fullmatch(host):
            raise DomainError(f"'{printable(host)}' is not a host name; letters, digits, '.' and '-' are allowed")
    if not hosts or gpus_per_node < 1:
        raise DomainError(
            f"a hostfile needs at least one host and one GPU a node, got {len(hosts)} and {gpus_per_node}"
        )
    return "".join(f"{host} slots={gpus_per_node}\n" for host in hosts)


def launcher_line(script: str, arguments: Sequence[str], *, n_nodes: int, gpus_per_node: int) -> str:
    """Return the `deepspeed` line that starts `script` on every GPU; several nodes need the hostfile beside it."""
    words = ["deepspeed"]
    words += ["--num_gpus", str(gpus_per_node)] if n_nodes == 1 else ["--hostfile", "hostfile"]
    return shlex.join([*words, script, *arguments])
