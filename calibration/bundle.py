"""Builds what a GPU host without a package registry needs: a slim vLLM, DeepSpeed's wheels, and this package."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from calibration.errors import CalibrationError, JobError

SCRIPTS = Path(__file__).with_name("bundle_scripts")
PARTS = ("vllm", "deepspeed", "fastgen")
HOW = """
On the GPU host (x86-64, Python 3.12, torch 2.11 for CUDA 13, nvcc for DeepSpeed's ops):
  mkdir calibration-host && tar xf {out}/calibration.tar -C calibration-host && cd calibration-host
  bash unpack.sh {out}                                   # vLLM into /tmp/site
  python3 -m pip install --no-index --no-deps --target /tmp/site {out}/wheels/*.whl     # DeepSpeed, if bundled
  . ./env.sh
  python3 -m calibration run-many --jobs jobs.json --out-dir results --deadline-s 540
""".strip()


def pack_code(out: Path) -> Path:
    """Write this package, the unpack script and the environment into one tar file: all of ours that a host needs."""
    target = out / "calibration.tar"
    with tarfile.open(target, "w") as tar:
        for file in sorted(Path(__file__).parent.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                tar.add(file, Path("calibration") / file.relative_to(Path(__file__).parent), recursive=False)
        for name in ("unpack.sh", "env.sh"):
            data = (SCRIPTS / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o755
            tar.addfile(info, io.BytesIO(data))
    return target


def build(out_dir: str, parts: list[str]) -> str:
    """Build the parts in `out_dir` and return how to use them. Raises JobError or CalibrationError."""
    if unknown := [p for p in parts if p not in PARTS]:
        raise JobError(f"there is no part '{unknown[0]}'; parts: {', '.join(PARTS)}")
    out = Path(out_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    tools = {"bash", *(("uv", "xz") if "vllm" in parts else ()), *(("unzip",) if parts and parts != ["vllm"] else ())}
    if missing := sorted(t for t in tools if shutil.which(t) is None):
        raise CalibrationError(f"building the bundle needs {', '.join(missing)} on the PATH")
    pack_code(out)
    if "vllm" in parts:
        _script("make_vllm_bundle.sh", str(out))
    if "deepspeed" in parts or "fastgen" in parts:
        _script("fetch_deepspeed_wheels.sh", str(out / "wheels"), *(["fastgen"] if "fastgen" in parts else []))
    return HOW.format(out=out)


def _script(name: str, *args: str) -> None:
    done = subprocess.run(["bash", str(SCRIPTS / name), *args], check=False)
    if done.returncode:
        raise CalibrationError(f"{name} ended with status {done.returncode}; what it printed above says why")
