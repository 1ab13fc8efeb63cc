"""config.json texts of public architectures, enough for an engine to build the model with random weights."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from calibration.errors import JobError

Config = dict[str, Any]


def _llama(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, vocab: int, ctx: int) -> Config:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": d_model,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "intermediate_size": d_ff,
        "vocab_size": vocab,
        "max_position_embeddings": ctx,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def _qwen3(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int) -> Config:
    extra = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "rms_norm_eps": 1e-6}
    return _llama(d_model, n_layers, n_heads, n_kv_heads, d_ff, 151936, 40960) | extra | {"rope_theta": 1000000.0}


def _qwen2(d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int) -> Config:
    extra = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6}
    return _llama(d_model, n_layers, n_heads, n_kv_heads, d_ff, 152064, 32768) | extra | {"rope_theta": 1000000.0}


_LLAMA2 = {"rope_theta": 10000.0}
_AWQ = {
    "quantization_config": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": None,
    }
}
MODELS: dict[str, Config] = {
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008, 32000, 4096) | _LLAMA2,
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824, 32000, 4096) | _LLAMA2,
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672, 32000, 4096) | _LLAMA2,
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256, 131072),
    "llama-3.1-70b": _llama(8192, 80, 64, 8, 28672, 128256, 131072),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, 131072) | {"head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, 131072) | {"head_dim": 128, "tie_word_embeddings": True},
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13824),
    "qwen3-8b": _qwen3(4096, 36, 32, 8, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 8, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 8, 25600),
    "mixtral-8x7b": _llama(4096, 32, 32, 8, 14336, 32000, 32768)
    | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "rope_theta": 1000000.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "router_aux_loss_coef": 0.02,
        "output_router_logits": False,
    },
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 4, 6144)
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_window_layers": 48,
    },
}
# Llama layers at sizes that no published model has: for training runs that must fit on few GPUs, and for tests
MODELS |= {
    "llama-shape-tiny": _llama(128, 2, 4, 2, 384, 512, 2048),
    "llama-shape-125m": _llama(768, 12, 12, 12, 2048, 32000, 2048),
    "llama-shape-1.3b": _llama(2048, 24, 16, 16, 5504, 32000, 2048),
    "llama-shape-3b": _llama(3072, 28, 24, 8, 8192, 32000, 2048),
    "llama-shape-30b": _llama(6656, 60, 52, 52, 17920, 32000, 2048),
}
for _name in ("llama-3.1-8b", "llama-3.1-70b", "qwen2.5-14b"):
    MODELS[f"{_name}-awq"] = MODELS[_name] | _AWQ


def resolve(model: str | Config) -> tuple[str, Config]:
    """Return a catalogue name and the config.json of a job's model.

    `model` is a key of `MODELS`, a path to a folder or file with a config.json, or a config dict (its `_name`
    names it). Raises JobError when it is none of these.
    """
    if isinstance(model, dict):
        config = {k: v for k, v in model.items() if k != "_name"}
        if not config.get("architectures"):
            raise JobError("a model given as an object must be a config.json: it has no 'architectures'")
        return str(model.get("_name") or config["architectures"][0]), config
    if model in MODELS:
        return model, dict(MODELS[model])
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            config = json.loads(path.read_text())
        except ValueError as err:
            raise JobError(f"model '{model}' is not JSON: {err}") from None
        return (path.parent.name if path.name == "config.json" else path.stem), config
    near = difflib.get_close_matches(str(model), MODELS, n=3, cutoff=0.3)
    raise JobError(f"unknown model '{model}'; did you mean {' or '.join(near) or ', '.join(MODELS)}? A path works too.")
