"""Rank side of a job in tests: each cell says what should happen to it."""

import os
import time


def work(case, cells, out):
    for cell in cells:
        what = cell.get("do", "ok")
        if what == "die" and os.environ["RANK"] == "1":
            raise RuntimeError("NCCL error: peer went away")
        if what == "die":
            time.sleep(600)  # as in a collective that the other rank never joins
        if what == "kill":
            os.kill(os.getpid(), 9)
        if what == "hang":
            time.sleep(600)
        if what == "oom":
            out.failed(cell["index"], RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"))
            continue
        begin = time.perf_counter()
        time.sleep(0.3)
        measured = {"step_s": 0.1, "echo": cell["zero_stage"], "world": int(os.environ["WORLD_SIZE"])}
        fields = {"deepspeed": "0.19.8", "torch_version": "2.11.0", "case_option": case.get("option")}
        out.cell(cell["index"], (begin, time.perf_counter()), fields, measured)
        if what == "die-after":
            raise RuntimeError("died after its answer")
