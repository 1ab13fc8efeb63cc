#!/usr/bin/env bash
# Build a slim vLLM 0.26.0 bundle for a Hopper GPU host (x86-64, Python 3.12, torch 2.11.0+cu130 already
# there) that reaches no package registry. About 5 minutes on two cores; 130 MB in three parts.
#   usage: make_vllm_bundle.sh OUTDIR          needs: uv (pip install uv), xz
# Left out, and what that costs: FlashAttention-2 (Hopper uses FA3), FlashInfer (its sampler and all-reduce
# fusion), FlashMLA and DeepGEMM (DeepSeek-type models), the Rust front end, tokenizer data.
set -euo pipefail
out=$(realpath -m "$1"); here=$(dirname "$(realpath "$0")"); work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
uv pip install -q --no-deps --target "$work/site" --python-version 3.12 --python-platform x86_64-manylinux_2_35 \
   --only-binary :all: -r "$here/vllm-0.26.0-requirements.txt"
cd "$work/site"
rm -rf vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/vllm-rs vllm/_qutlass_C.abi3.so vllm/_flashmla*.so \
       vllm/third_party/fmha_sm100 vllm/third_party/deep_gemm mistral_common/data pycountry/locales
find . -name __pycache__ -type d -prune -exec rm -rf {} +
mkdir -p "$out"/part1 "$out"/part2 "$out"/part3
pack() { tar -cf - "${@:2}" | xz -T2 -6 > "$1"; }
pack "$out/part1/c.tar.xz"   vllm/_C_stable_libtorch.abi3.so
pack "$out/part2/moe.tar.xz" vllm/_moe_C_stable_libtorch.abi3.so          # MoE models only
pack "$out/part3/fa3.tar.xz" vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so
pack "$out/part3/rest.tar.xz" --exclude=_C_stable_libtorch.abi3.so --exclude=_moe_C_stable_libtorch.abi3.so --exclude=_vllm_fa3_C.abi3.so .
du -sh "$out"/*
