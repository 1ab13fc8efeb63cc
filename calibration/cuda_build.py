"""An environment in which torch can build CUDA ops with a toolkit that has little more than nvcc."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from calibration.errors import EngineMissing

HEADERS = {"cublas_v2.h", "cusparse.h", "cusolverDn.h", "curand_kernel.h"}
LIBRARIES = ("cublas", "cublasLt", "curand", "cusparse", "cusolver", "cudart")
# DeepSpeed's transformer_inference includes this header and uses nothing of it
PROFILER_STUB = """#pragma once
#include <cuda_runtime_api.h>
extern "C" { cudaError_t cudaProfilerStart(void); cudaError_t cudaProfilerStop(void); }
"""


def _toolkit() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", "/usr/local/cuda-13.0"]
    return next((Path(h) for h in homes if h and Path(h, "bin", "nvcc").exists()), None)


def _link(target: Path, name: Path) -> None:
    with contextlib.suppress(FileExistsError):
        name.symlink_to(target)


def build_env() -> dict[str, str]:
    """Return the variables that a build needs beyond the present environment; none without a toolkit.

    Missing headers and libraries of the toolkit are linked from the NVIDIA wheels beside torch.
    """
    home = _toolkit()
    if home is None:
        return {}
    add = {
        "CUDA_HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    roots = {Path(p) for p in (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"], *sys.path) if p}
    includes = [d for r in roots for d in r.glob("nvidia/*/include")]
    libraries = [d for r in roots for d in r.glob("nvidia/*/lib")]
    have = {f.name for d in ("include", "targets/x86_64-linux/include") for f in (home / d).glob("*")}
    made = Path(tempfile.gettempdir()) / f"calibration-cuda-{os.getuid()}"
    for part in ("include", "lib"):
        (made / part).mkdir(parents=True, exist_ok=True)
    if not have >= HEADERS:
        for file in (f for d in includes for f in d.iterdir() if f.name not in have):
            _link(file, made / "include" / file.name)
    if "cuda_profiler_api.h" not in have and not (made / "include" / "cuda_profiler_api.h").exists():
        (made / "include" / "cuda_profiler_api.h").write_text(PROFILER_STUB)
    for name in LIBRARIES:
        found = sorted(f for d in libraries for f in d.glob(f"lib{name}.so.*"))
        if found and not (home / "lib64" / f"lib{name}.so").exists():
            _link(found[0], made / "lib" / f"lib{name}.so")
    paths = {"CPATH": [made / "include"], "LIBRARY_PATH": [made / "lib"], "LD_LIBRARY_PATH": [made / "lib", *libraries]}
    for name, folders in paths.items():
        old = [os.environ[name]] if os.environ.get(name) else []
        add[name] = os.pathsep.join([*map(str, folders), *old])
    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        add["TORCH_CUDA_ARCH_LIST"] = plain_architectures(asked)
    return add


def plain_architectures(names: str) -> str:
    """Return a list of CUDA architectures without suffixes: DeepSpeed's builder reads '9.0a' as a number and fails.

    >>> plain_architectures("8.0;9.0a 10.0+PTX")
    '8.0;9.0;10.0+PTX'
    """
    return ";".join(re.sub(r"^(\d+\.\d+)[af]", r"\1", name) for name in re.split(r"[;\s]+", names.strip()))


def extensions_folder() -> str:
    """Return where ops are built and looked for: TORCH_EXTENSIONS_DIR, else a folder of our own."""
    own = Path(tempfile.gettempdir()) / "calibration-torch-extensions"
    return os.environ.get("TORCH_EXTENSIONS_DIR") or str(own)


@contextlib.contextmanager
def _builder_of(folder: str, *, wait: bool) -> Iterator[bool]:
    """Be the only one that builds in `folder`; gives False where another does and `wait` is not set."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".calibration-build", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def drop_stale_locks(folder: str) -> None:
    """Remove the lock files of killed builds, for which torch waits for ever without a word.

    Those of a build that `build_ops` has under way stay.
    """
    with _builder_of(folder, wait=False) as is_alone:
        for lock in Path(folder).glob("**/lock") if is_alone else ():
            lock.unlink(missing_ok=True)


def build_ops(builders: Sequence[str], env: Mapping[str, str], limit_s: float | None = None) -> None:
    """Build DeepSpeed ops into env["TORCH_EXTENSIONS_DIR"] unless they are there, one caller at a time.

    builders : classes of deepspeed.ops.op_builder, such as "QuantizerBuilder"
    env      : the environment of the build, `build_env` included
    limit_s  : of each op [s]; None = as long as it takes

    Raises EngineMissing with the builder's last line where an op cannot be built.
    """
    folder = env["TORCH_EXTENSIONS_DIR"]
    with _builder_of(folder, wait=True):
        for lock in Path(folder).glob("**/lock"):
            lock.unlink(missing_ok=True)
        for name in builders:
            code = f"from deepspeed.ops.op_builder import {name}; {name}().load()"
            command = [sys.executable, "-c", code]
            try:
                done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False, timeout=limit_s)
            except subprocess.TimeoutExpired:
                raise EngineMissing(f"DeepSpeed's {name} was not built in {limit_s:.0f} s") from None
            sys.stderr.write(done.stderr)
            if done.returncode:
                last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
                raise EngineMissing(f"DeepSpeed's {name} cannot build its op here: {last}")
