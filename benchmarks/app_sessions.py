"""How quick the web app stays with many sessions at once: P50 and P95 of a page's whole script, cold and warm.

Starts the app on a free port and speaks its WebSocket protocol, one connection a session, as a browser does (without
drawing). Cold: every session asks another question at the same moment. Warm: all ask one that was asked before. Beside
the cold ones one more session reruns a warm page again and again: what somebody who clicks feels. Prints; no asserts.

    python -m benchmarks.app_sessions [--sessions 20] [--workers N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from urllib.parse import urlencode

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.asyncio.client import connect

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("llama-3.1-8b", "qwen3-32b", "mixtral", "llama-3.1-70b", "qwen2.5-14b")
GPUS = ("8xA100", "4xH100", "8xH200", "4xL40S")
QUESTIONS = [{"model": m, "gpus": g, "load": "rate", "rate": "3"} for m, g in product(MODELS, GPUS)]
WARM = {"model": "llama-3.1-8b", "gpus": "2xH100"}


async def one(
    url: str, page: str, query: dict[str, str], n_runs: int = 1, until: asyncio.Event | None = None
) -> list[float]:
    """Open a session, run a page `n_runs` times (or until an event); return the seconds of each run."""
    took = []
    async with connect(url, subprotocols=["streamlit"], max_size=None, origin=url.replace("ws", "http", 1)) as ws:  # type: ignore[arg-type]
        while len(took) < n_runs or (until is not None and not until.is_set()):
            message = BackMsg()
            message.rerun_script.query_string = urlencode(query)
            message.rerun_script.page_name = page
            begin = time.perf_counter()
            await ws.send(message.SerializeToString())
            async for raw in ws:
                found = ForwardMsg()
                found.ParseFromString(raw if isinstance(raw, bytes) else raw.encode())
                if found.WhichOneof("type") == "script_finished":
                    break
            took.append(time.perf_counter() - begin)
            if until is not None:
                await asyncio.sleep(0.2)
    return took


async def measure(url: str, n: int) -> None:
    """Print the table."""
    stream = url.replace("http", "ws", 1) + "/_stcore/stream"
    print(f"first visitor of a fresh server: {(await one(stream, '', WARM))[0]:.2f} s")
    await asyncio.sleep(15)  # the workers load, the first views are worked out
    done = asyncio.Event()
    clicks = asyncio.create_task(one(stream, "", WARM, until=done))
    await asyncio.sleep(1)
    cold = await asyncio.gather(*(one(stream, "", QUESTIONS[i % len(QUESTIONS)]) for i in range(n)))
    done.set()
    beside = (await clicks)[1:]
    show(f"recommend, {n} cold sessions at once, all different", [t for r in cold for t in r])
    show("recommend, a warm session that clicks meanwhile", beside)
    warm = await asyncio.gather(*(one(stream, "", WARM) for _ in range(n)))
    show(f"recommend, {n} warm sessions at once", [t for r in warm for t in r])
    for page in ("compare", "explore", "train", "capacity", "trust", "audit"):
        await one(stream, page, WARM)
        warm = await asyncio.gather(*(one(stream, page, WARM) for _ in range(n)))
        show(f"{page}, {n} warm sessions at once", [t for r in warm for t in r])


def show(what: str, seconds: Sequence[float]) -> None:
    """Print percentiles of some durations."""
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    print(f"{what:58} P50 {statistics.median(ordered):6.2f} s   P95 {p95:6.2f} s   n {len(ordered)}", flush=True)


@contextmanager
def served(more: Mapping[str, str]) -> Iterator[str]:
    """Serve the app on a free port of this machine, with these environment variables; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.address", "127.0.0.1"]
    command += ["--server.port", str(port), "--server.fileWatcherType", "none"]
    server = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | more, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.25)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


def main() -> None:
    """Start the app, measure, stop it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--workers", type=int, help="worker processes of the app; 0 = none (default: one a core)")
    options = parser.parse_args()
    with served({} if options.workers is None else {"ADVISOR_APP_WORKERS": str(options.workers)}) as url:
        print(
            f"{options.sessions} sessions, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the start"
        )
        asyncio.run(measure(url, options.sessions))


if __name__ == "__main__":
    main()
