"""A small OpenAI-compatible streaming server whose speed follows a given law; or that fails in a given way.

Law: at most `slots` requests run at once, in order of arrival. One request's first token comes
`ttft_s + prompt_s * prompt tokens` after it starts to run, each further one `tpot_s` later. Times are kept by absolute
deadlines, so errors do not add up. Run as a script it prints its port and serves until it is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

MODES = ("ok", "denied", "missing", "html", "json", "stall", "error", "cut", "empty", "broken", "busy", "other", "many")


class Server:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.slots = asyncio.Semaphore(options.slots)
        self.n_started = 0

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self.options.keep_alive_s)).decode()
        except TimeoutError:
            return False
        method, path, _ = head.split("\r\n", 1)[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head.split("\r\n")[1:])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        mode = self.options.mode
        key = self.options.key
        if mode == "denied" or (key and headers.get("authorization") != f"Bearer {key}"):
            return self.answer(writer, 401, {"error": "no key"})
        if mode == "html":
            return self.raw(writer, 200, "text/html", b"<html><script>alert(1)</script></html>")
        if mode == "missing":
            return self.answer(writer, 404, {"error": "not found"})
        if path == "/v1/models":
            names = ["a", "b"] if mode == "many" else ["other" if mode == "other" else "org/model"]
            entries = [{"id": name, "max_model_len": self.options.max_model_len} for name in names]
            return self.answer(writer, 200, {"object": "list", "data": entries})
        if path == "/version":
            return self.answer(writer, 200, {"version": "0.26.0"})
        if path == "/started":
            return self.raw(writer, 200, "text/plain", str(self.n_started).encode())
        if path == "/metrics" and self.options.n_kv_blocks:
            n = self.options.n_kv_blocks
            labels = f'block_size="16",enable_prefix_caching="True",num_gpu_blocks="{n}",gpu_memory_utilization="0.9"'
            page = "# HELP x\nvllm:cache_config_info{" + labels + "} 1.0\n"
            return self.raw(writer, 200, "text/plain; version=0.0.4", page.encode())
        if method != "POST" or path != "/v1/completions":
            return self.answer(writer, 404, {"error": "not found"})
        if mode in ("broken", "busy"):
            return self.answer(writer, 500 if mode == "broken" else 429, {"error": "sorry"})
        if mode == "json":
            return self.answer(writer, 200, {"choices": [{"text": "all at once"}]})
        self.n_started += 1
        await self.stream(writer, json.loads(body))
        return mode not in ("cut", "stall")

    def raw(self, writer: asyncio.StreamWriter, status: int, kind: str, body: bytes) -> bool:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        return True

    def answer(self, writer: asyncio.StreamWriter, status: int, document: dict[str, Any]) -> bool:
        return self.raw(writer, status, "application/json", json.dumps(document).encode())

    def event(self, writer: asyncio.StreamWriter, data: str) -> None:
        payload = f"data: {data}\n\n".encode()
        writer.write(f"{len(payload):x}\r\n".encode() + payload + b"\r\n")

    async def stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        options, loop = self.options, asyncio.get_running_loop()
        n_prompt, n_output = len(body["prompt"]), body["max_tokens"]
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        async with self.slots:
            first = loop.time() + options.ttft_s + options.prompt_s * n_prompt
            if options.mode == "stall":
                await asyncio.sleep(3600)
            if options.mode == "error":
                self.event(writer, json.dumps({"error": {"message": "out of memory"}}))
            for i in range(0 if options.mode in ("empty", "error") else n_output):
                await asyncio.sleep(max(0.0, first + i * options.tpot_s - loop.time()))
                # Half a character is a token without text.
                text = "" if i % 3 == 1 else f"token{i} "
                self.event(writer, json.dumps({"choices": [{"text": text, "finish_reason": None}]}))
                if options.mode == "cut" and i == 2:
                    return
        if options.closing_event:
            await asyncio.sleep(5 * options.tpot_s)
            self.event(writer, json.dumps({"choices": [{"text": "", "finish_reason": "length"}]}))
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_output}
        self.event(writer, json.dumps({"choices": [], "usage": usage}))
        self.event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ttft-s", type=float, default=0.03)
    parser.add_argument("--prompt-s", type=float, default=0.0)
    parser.add_argument("--tpot-s", type=float, default=0.008)
    parser.add_argument("--slots", type=int, default=1000)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--n-kv-blocks", type=int, default=0)
    parser.add_argument("--keep-alive-s", type=float, default=60.0)
    parser.add_argument("--key", default="")
    parser.add_argument("--closing-event", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, default="ok")
    server = Server(parser.parse_args())
    listening = await asyncio.start_server(server.connected, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], flush=True)
    async with listening:
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
