"""The HTTP client runner against a small server that streams tokens at a known pace."""

import asyncio
import json
import threading

import pytest

from advisor.schema.run_record import RunRecord
from calibration.errors import JobError
from calibration.http_runner import Server
from calibration.jobs import parse_job

STEP_S = 0.01
JOB = {
    "run_id": "t",
    "kind": "vllm",
    "model": "llama-3.1-8b",
    "cells": ["c,50,10,3,6"],
    "warmup": False,
    "max_model_len": 256,
}
CACHE = 'block_size="16",enable_prefix_caching="True",gpu_memory_utilization="0.92",num_gpu_blocks="1000"'
METRICS = f"vllm:cache_config_info{{{CACHE}}} 1.0\n"


class Tokens:
    """An OpenAI-style server on a thread; `mode` says how it misbehaves."""

    def __init__(self, mode="ids"):
        self.mode, self.bodies, self.ready = mode, [], threading.Event()
        self.n_connections = 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, daemon=True).start()
        self.ready.wait(5)

    def _run(self):
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._answer, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        self.loop.run_forever()

    async def _answer(self, reader, writer):
        self.n_connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def _one(self, reader, writer):
        """Answer a request; return whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        size = int(next(line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")))
        body = json.loads(await reader.readexactly(size) or b"{}")
        pages = {
            "/v1/models": json.dumps({"data": [{"id": "served-name", "max_model_len": 256}]}),
            "/version": '{"version": "0.26.0"}',
            "/metrics": METRICS,
        }
        if path in pages:
            text = pages[path].encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        elif self.mode == "refuse":
            text = b'{"error": {"message": "prompt too long"}}'
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(text) + text)
        else:
            self.bodies.append(body)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await self._stream(writer, body)
        await writer.drain()
        return "connection: close" not in head.lower() and self.mode != "hangs up"

    async def _stream(self, writer, body):
        def send(event):
            text = b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"
            half = len(text) // 2  # an event split over two chunks
            writer.write(b"".join(b"%x\r\n" % len(t) + t + b"\r\n" for t in (text[:half], text[half:])))

        n, group = body["max_tokens"], 1 if self.mode in ("ids", "hangs up") else 2
        for _ in range(0, n, group):
            await asyncio.sleep(STEP_S)
            choice = {"text": "", "token_ids": [5] * group} if group == 1 else {"text": "ab"}
            send({"choices": [choice]})
        if self.mode == "error":
            send({"error": {"message": "engine is dead"}})
        send({"choices": [], "usage": {"completion_tokens": n, "prompt_tokens_details": {"cached_tokens": 32}}})
        send(b"[DONE]")
        writer.write(b"0\r\n\r\n")


def test_cells_on_a_live_server(run, write, lines, tmp_path):
    server = Tokens()
    url = f"http://127.0.0.1:{server.port}/v1"
    status, text = run("run-endpoint", "--endpoint", url, "--job", write(JOB), "--out", tmp_path / "r.jsonl")
    assert status == 0, text
    (record,) = lines(tmp_path / "r.jsonl")
    RunRecord.model_validate(record)
    assert record["run_id"] == "vllm-0.26.0__h100-sxm-80gb__t"
    assert (record["client"], record["prefix_caching"], record["max_model_len"]) == ("http", True, 256)
    assert record["startup"] == {"n_kv_blocks": 1000, "kv_block_tokens": 16, "kv_cache_tokens": 16000}
    assert record["gpu_memory_utilization"] == 0.92, "the server's, not the job's"
    m = record["measured"]
    assert m["n_requests"] == 6
    assert m["tpot_s"]["p50"] == pytest.approx(STEP_S, rel=0.25)
    assert m["output_tokens_per_s"] == pytest.approx(10 * m["requests_per_s"])
    assert m["cached_prompt_frac"] == pytest.approx(32 / 50)
    assert m["board_power_w"]["mean"] == pytest.approx(412)
    body = server.bodies[0]
    assert (body["model"], body["ignore_eos"], len(body["prompt"]), body["max_tokens"]) == ("served-name", True, 50, 10)
    assert "idle_power_w" not in record  # the GPUs were never free of the server


def test_requests_from_several_processes_are_one_cell(run, write, lines, tmp_path):
    server = Tokens()
    job = JOB | {"cells": ["c,50,10,5,12", "p,50,10,0.8,1,0.1"], "options": {"client_processes": 3}}
    url = f"http://127.0.0.1:{server.port}"
    status, text = run("run-endpoint", "--endpoint", url, "--job", write(job), "--out", tmp_path / "r.jsonl")
    assert status == 0, text
    closed, poisson = lines(tmp_path / "r.jsonl")
    assert (closed["client_processes"], closed["keep_alive"]) == (3, False)
    m = closed["measured"]
    assert (m["n_requests"], len(server.bodies)) == (12, 12 + poisson["measured"]["n_requests"])
    # three requests of two clients, two of three, one after the other; one client would take 1.2 s
    assert 3 * 10 * STEP_S <= m["duration_s"] < 8 * 10 * STEP_S
    sent = [tuple(body["prompt"]) for body in server.bodies]
    assert len(set(sent)) == len(sent), "each prompt once"


def test_an_error_in_one_process_is_the_cells(run, write, lines, tmp_path):
    url = f"http://127.0.0.1:{Tokens('refuse').port}"
    job = JOB | {"options": {"client_processes": 2}}
    errors = tmp_path / "e.jsonl"
    arguments = ("--job", write(job), "--out", tmp_path / "r.jsonl", "--errors", errors)
    run("run-endpoint", "--endpoint", url, *arguments)
    (error,) = lines(errors)
    assert "prompt too long" in error["error"]


@pytest.mark.parametrize(("mode", "keeps", "wanted"), [("ids", True, 3), ("ids", False, 6), ("hangs up", True, 6)])
def test_connections_are_kept_where_both_sides_keep_them(run, write, lines, tmp_path, mode, keeps, wanted):
    """Six requests of three clients; one connection more for each page that describes the server."""
    server = Tokens(mode)
    url = f"http://127.0.0.1:{server.port}"
    job = JOB | {"options": {"keep_alive": keeps}}
    status, text = run("run-endpoint", "--endpoint", url, "--job", write(job), "--out", tmp_path / "r.jsonl")
    assert status == 0, text
    (record,) = lines(tmp_path / "r.jsonl")
    assert record["measured"]["n_requests"] == 6
    assert server.n_connections == wanted + 3


@pytest.mark.parametrize(
    ("options", "rule"), [({"client_processes": 0}, "client_processes"), ({"keep_alive": "yes"}, "keep_alive")]
)
def test_a_bad_option_is_told(options, rule):
    with pytest.raises(JobError, match=rule):
        parse_job(JOB | {"options": options})


def test_a_server_that_groups_tokens_is_put_right_by_its_own_count(run, write, lines, tmp_path):
    url = f"http://127.0.0.1:{Tokens('grouped').port}"
    status, text = run("run-endpoint", "--endpoint", url, "--job", write(JOB), "--out", tmp_path / "r.jsonl")
    assert status == 0, text
    m = lines(tmp_path / "r.jsonl")[0]["measured"]
    assert m["output_tokens_per_s"] == pytest.approx(10 * m["requests_per_s"])
    assert "n_short_answers" not in m


@pytest.mark.parametrize(("mode", "says"), [("refuse", "HTTP 400"), ("error", "engine is dead")])
def test_a_refused_request_is_the_cells_error(run, write, lines, tmp_path, mode, says):
    url = f"127.0.0.1:{Tokens(mode).port}"
    status, text = run("run-endpoint", "--endpoint", url, "--job", write(JOB), "--out", tmp_path / "r.jsonl")
    assert status == 0
    assert says in text
    assert lines(tmp_path / "r.jsonl") == []
    assert says in lines(tmp_path / "r.jsonl.errors")[0]["error"]


def test_no_server_too_long_a_cell_and_a_remote_without_gpu_are_one_line(run, write, tmp_path):
    out = tmp_path / "r.jsonl"
    status, text = run("run-endpoint", "--endpoint", "http://127.0.0.1:9", "--job", write(JOB), "--out", out)
    assert status == 5
    assert "no server answers at http://127.0.0.1:9" in text
    url = f"127.0.0.1:{Tokens().port}"
    long = JOB | {"cells": ["c,500,10,1,1"], "max_model_len": 4096}
    status, text = run("run-endpoint", "--endpoint", url, "--job", write(long), "--out", out)
    assert status == 2
    assert "max_model_len is 256" in text
    status, text = run(
        "run-endpoint", "--endpoint", url, "--job", write(JOB | {"options": {"is_remote": True}}), "--out", out
    )
    assert status == 2
    assert "needs options.gpu" in text


def test_endpoints_are_read_as_people_write_them():
    for text in (
        "localhost:8000",
        "http://localhost:8000",
        "http://localhost:8000/v1/",
        "http://localhost:8000/v1/completions",
    ):
        assert Server(text).url == "http://localhost:8000"
    assert Server("https://host/api/v1").url == "https://host:443/api"
    with pytest.raises(JobError, match="is not a URL"):
        Server("ftp://x")
