"""Runs cells against a live server that speaks the OpenAI completions API (standard library only).

Prompts are token ids, so no tokenizer is needed; answers are streamed and timed at this client.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import ssl
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from calibration import models
from calibration.cells import Ask, Cell
from calibration.client_processes import run_cell_apart
from calibration.errors import EngineMissing, JobError, OutFileBusy
from calibration.gpus import Gpus, PowerMeter
from calibration.jobs import Job, start_fields
from calibration.load import Outcome, Send, run_cell
from calibration.output import Output
from calibration.session import Run

CONNECT_LIMIT_S = 15.0
MAX_LINE_BYTES = 4_000_000


class Server:
    """An HTTP server with the OpenAI completions API.

    keeps : keep connections for later requests, as a gateway or a pool of connections does; else one a request
    """

    def __init__(self, endpoint: str, keeps: bool = False) -> None:
        parts = urlsplit(endpoint if "//" in endpoint else f"http://{endpoint}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JobError(f"endpoint '{endpoint[:80]}' is not a URL such as http://localhost:8000")
        self.host, self.scheme = parts.hostname, parts.scheme
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        path = parts.path.rstrip("/")
        self.base = path.removesuffix("/completions").removesuffix("/v1")
        self.url = f"{self.scheme}://{self.host}:{self.port}{self.base}"
        self.tls = ssl.create_default_context() if self.scheme == "https" else None
        self.keeps = keeps
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            return await asyncio.wait_for(
                asyncio.open_connection(self.host, self.port, ssl=self.tls, limit=MAX_LINE_BYTES), CONNECT_LIMIT_S
            )
        except (OSError, TimeoutError) as err:
            raise EngineMissing(f"no server answers at {self.url} ({err or 'time-out'})") from None

    async def _open(
        self, method: str, path: str, body: bytes = b""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int, dict[str, str]]:
        key = os.environ.get("OPENAI_API_KEY")
        head = [f"{method} {self.base}{path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        head += [] if self.keeps else ["Connection: close"]
        head += ["Content-Type: application/json", f"Content-Length: {len(body)}", "Accept: */*"]
        head += [f"Authorization: Bearer {key}"] if key else []
        line = b""
        while not line:
            is_kept = bool(self._idle)
            reader, writer = self._idle.pop() if is_kept else await self._connection()
            try:
                writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
                await writer.drain()
                line = await reader.readline()
            except ConnectionError:
                pass
            if not line:
                writer.close()
                if not is_kept:  # a kept one the server may have closed meanwhile
                    raise EngineMissing(f"{self.url} closed the connection without an answer")
        status = int(line.split()[1])
        headers = {}
        while (line := await reader.readline()) not in (b"\r\n", b"\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return reader, writer, status, headers

    @staticmethod
    async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            while piece := await reader.read(65536):
                yield piece
            return
        while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readline()

    async def get(self, path: str) -> tuple[int, str]:
        """Return status and text of a page."""
        reader, writer, status, headers = await self._open("GET", path)
        try:
            return status, b"".join([p async for p in self._pieces(reader, headers)]).decode(errors="replace")
        finally:
            writer.close()

    async def events(self, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield the server-sent events of a streamed completion."""
        reader, writer, status, headers = await self._open("POST", "/v1/completions", json.dumps(body).encode())
        is_kept = False
        try:
            rest = b""
            async for piece in self._pieces(reader, headers):
                rest += piece
                if status != 200:
                    continue
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    data = line.removeprefix(b"data:").strip()
                    if line.startswith(b"data:") and data != b"[DONE]":
                        yield json.loads(data)
            if status != 200:
                raise RuntimeError(f"HTTP {status}: {rest.decode(errors='replace')[:300]}")
            is_over = headers.get("transfer-encoding", "").lower() == "chunked"
            if is_kept := self.keeps and is_over and headers.get("connection", "").lower() != "close":
                self._idle.append((reader, writer))
        finally:
            if not is_kept:
                writer.close()


def make_send(server: Server, served: str) -> Send:
    """Return the function that streams one request through the server."""

    async def send(request_id: str, prompt: list[int], n_tokens: int) -> AsyncIterator[tuple[int, int | None]]:
        body = {
            "model": served,
            "prompt": prompt,
            "max_tokens": n_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        seen = 0
        async for event in server.events(body):
            if "error" in event:
                raise RuntimeError(str(event["error"])[:300])
            usage, choices = event.get("usage"), event.get("choices") or []
            if choices:
                ids = choices[0].get("token_ids")
                new = len(ids) if ids is not None else 1
                seen += new
                yield new, None
            if usage and not choices:
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
                # a server that groups tokens without telling their ids is put right by its own count
                yield max(0, int(usage.get("completion_tokens") or 0) - seen), cached

    return send


def sender(endpoint: str, served: str, keeps: bool) -> Send:
    """Return `make_send` of a server of its own, as each client process needs one."""
    return make_send(Server(endpoint, keeps), served)


async def describe(server: Server) -> dict[str, Any]:
    """Return what the server says of itself: engine version, served model, length limit, KV cache."""
    status, text = await server.get("/v1/models")
    if status != 200:
        raise EngineMissing(f"{server.url}/v1/models answers HTTP {status}: {text[:120]}")
    try:
        model = json.loads(text)["data"][0]
    except (ValueError, LookupError, TypeError):
        raise EngineMissing(f"{server.url}/v1/models is no list of models") from None
    found: dict[str, Any] = {"served": model.get("id"), "max_model_len": model.get("max_model_len")}
    status, text = await server.get("/version")
    if status == 200 and text.startswith("{"):
        found["version"] = json.loads(text).get("version")
    status, text = await server.get("/metrics")
    if status == 200 and (line := re.search(r"^vllm:cache_config_info\{(.*)\}", text, re.M)):
        found["cache"] = dict(re.findall(r'(\w+)="([^"]*)"', line.group(1)))
    return found


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def common_fields(job: Job, server: Server, said: dict[str, Any], host: dict[str, Any]) -> dict[str, Any]:
    """Return what every record of this server shares; what neither the server nor the job says is left out."""
    version, cache = str(said.get("version") or job.options.get("engine_version") or "unknown"), said.get("cache") or {}
    engine = str(job.options.get("engine", "vllm"))
    startup: dict[str, Any] = {}
    for field, key in (("n_kv_blocks", "num_gpu_blocks"), ("kv_block_tokens", "block_size")):
        if str(cache.get(key, "")).isdigit():
            startup[field] = int(cache[key])
    if len(startup) == 2:
        startup["kv_cache_tokens"] = startup["n_kv_blocks"] * startup["kv_block_tokens"]
    found = {
        **start_fields(job, engine, version, host["gpu"]),
        "client": "http",
        "api_server_count": job.options.get("api_server_count", 1),
        "client_processes": job.options.get("client_processes", 1),
        "keep_alive": job.options.get("keep_alive", False),
        "interconnect": host.get("interconnect", "unknown"),
        "idle_power_w": host.get("idle_power_w"),
        "power_limit_w_per_gpu": host.get("power_limit_w_per_gpu"),
        "max_model_len": said.get("max_model_len") or job.max_model_len,
        "max_num_batched_tokens": job.max_num_batched_tokens,
        "max_num_seqs": job.max_num_seqs,
        "gpu_memory_utilization": _number(cache.get("gpu_memory_utilization")) or job.gpu_memory_utilization,
        "prefix_caching": {"True": True, "False": False}.get(
            cache.get("enable_prefix_caching", ""), job.prefix_caching
        ),
        "startup": startup or None,
        "host": {k: v for k, v in host.items() if k not in ("gpu", "interconnect")},
        "command": {"endpoint": server.url, "served": said.get("served")},
    }
    return {k: v for k, v in found.items() if v is not None}


def _host(job: Job) -> tuple[dict[str, Any], PowerMeter | None]:
    """Return the host's fields and a running power meter when the server's GPUs are this machine's."""
    named = job.options.get("gpu")
    if job.options.get("is_remote"):
        if not named:
            raise JobError("a remote server's job needs options.gpu, the catalogue name of its GPUs")
        return {"gpu": str(named)}, None
    try:
        gpus = Gpus(job.gpus_needed)
    except EngineMissing:
        if not named:
            raise
        return {"gpu": str(named)}, None
    host = gpus.describe()
    # the server is up already: its GPUs idle with its memory loaded, which is not the idle of a free GPU
    idle = PowerMeter.over(gpus)
    host["loaded_idle_power_w"] = idle and idle["mean"]
    meter = PowerMeter(gpus)
    meter.start()
    return host, meter


def run_job(
    job: Job,
    out: str,
    *,
    endpoint: str,
    rows: str | None = None,
    errors: str | None = None,
    known: list[str] | None = None,
) -> int:
    """Run a job's cells against `endpoint` and return the exit status, as vllm_runner.run_job does."""
    try:
        server = Server(endpoint)
        output = Output(out, rows, errors, os.devnull, shared=False)
    except (OutFileBusy, JobError) as err:
        print(f"error: {err}", flush=True)
        return err.status

    def work() -> int:
        run = Run(job, output, known or [], None)
        if not run.left:
            output.say(f"{job.run_id}: all {len(run.cells)} cells are already in '{out}'")
            return 0
        said = asyncio.run(describe(server))
        limit = said.get("max_model_len")
        if limit and limit < max(c.longest_tokens for c in run.cells):
            raise JobError(f"the server's max_model_len is {limit}, a cell needs more")
        host, meter = _host(job)
        try:
            common = common_fields(job, server, said, host)
            version = common["engine_version"]
            output.say(f"{common['run_id']}: {server.url} serves '{said['served']}', engine version {version}")
            vocab = models.resolve(job.model)[1]["vocab_size"]
            began = time.monotonic()
            send_of = partial(sender, endpoint, str(said["served"]), bool(job.options.get("keep_alive")))
            n_processes = job.options.get("client_processes", 1)

            async def apart(_: Send, tag: str, cell: Cell, asks: list[Ask], meter: PowerMeter | None) -> Outcome:
                return await run_cell_apart(send_of, tag, cell, asks, n_processes, meter)

            measure = apart if n_processes > 1 else run_cell
            asyncio.run(run.run(send_of(), server, common, vocab, meter, measure))
            output.say(f"{common['run_id']}: done in {time.monotonic() - began:.0f} s")
        finally:
            if meter:
                meter.stop()
        return 0

    return output.attempt(job.run_id, work)
