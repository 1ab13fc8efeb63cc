#!/usr/bin/env bash
# Fetch the wheels that the DeepSpeed scripts need on the GPU host (cp312, manylinux x86_64) into the folder $1.
#   fetch_deepspeed_wheels.sh DIR            core: deepspeed + hjson + pydantic + pydantic-core + annotated-types   (about 4.5 MB)
#   fetch_deepspeed_wheels.sh DIR fastgen    core + deepspeed-kernels + deepspeed-mii + pyzmq + ujson               (about 50 MB)
# Already on the GPU host: einops msgpack ninja numpy packaging psutil py-cpuinfo tqdm torch transformers
# accelerate nvidia-ml-py typing-extensions typing-inspection grpcio protobuf requests tabulate pillow werkzeug aiohttp.
# deepspeed is an sdist: its wheel is built here with DS_BUILD_OPS=0 (pure Python; the ops JIT-compile on the GPU host).
# The folder must hold one version of each package, nothing else: start from an empty one.
set -euo pipefail
DIR=${1:?usage: fetch_wheels.sh DIR [fastgen]}
SET=${2:-core}
DS=${DS_VERSION:-0.19.8}
PY=${PYTHON:-python3}
mkdir -p "$DIR"
DIR=$(cd "$DIR" && pwd)
TMP=$(mktemp -d)
trap 'rm -rf "$TMP"' EXIT
dl() {
    "$PY" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_26_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --platform manylinux1_x86_64 --platform any -d "$DIR" "$@"
}
# 1. deepspeed: sdist -> pure-Python wheel, in a throw-away venv (setup.py needs torch only when it builds ops)
"$PY" -m pip download -q --no-deps --no-build-isolation --no-binary deepspeed -d "$TMP" "deepspeed==$DS" 2>/dev/null ||
    "$PY" -m pip download -q --no-deps --no-binary deepspeed -d "$TMP" "deepspeed==$DS"
if ! "$PY" -c 'import setuptools, wheel, packaging, cpuinfo' 2>/dev/null; then
    "$PY" -m venv "$TMP/v"
    PYB="$TMP/v/bin/python"
    "$PYB" -m pip install -q setuptools wheel packaging py-cpuinfo numpy
else
    PYB="$PY"
fi
(cd "$TMP" && tar xzf "deepspeed-$DS.tar.gz" && cd "deepspeed-$DS" &&
    DS_BUILD_OPS=0 DS_BUILD_STRING="" "$PYB" -m pip wheel -q --no-deps --no-build-isolation -w "$DIR" .)
# 2. what deepspeed imports and the host lacks; pydantic pins pydantic-core exactly, so the version is read from its metadata
dl hjson==3.1.0
dl pydantic==2.14.3
CORE=$(unzip -p "$DIR"/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core *(*== *\([0-9.a-z]*\).*/\1/p' | head -1)
CORE=${CORE:-$(unzip -p "$DIR"/pydantic-2*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic[-_]core==\([0-9.a-z]*\).*/\1/p' | head -1)}
dl "pydantic-core==$CORE"
dl annotated-types==0.8.0
dl typing-inspection==0.4.5
if [ "$SET" = fastgen ]; then
    # the newest deepspeed-kernels on the registry is this 2023 pre-release (the .so files hold sm_80/86/89/90 code and PTX)
    dl deepspeed-kernels==0.0.1.dev1698255861
    dl deepspeed-mii==0.3.3
    dl pyzmq
    dl ujson
fi
ls -l "$DIR"
du -sh "$DIR"
