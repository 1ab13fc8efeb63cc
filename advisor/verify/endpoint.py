"""A live OpenAI-compatible endpoint: its address, what it serves, and each way to fail, as one sentence."""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from advisor.errors import AdvisorError, DomainError, UnknownName, printable

MAX_BODY_BYTES = 1 << 20
KEY_VARIABLE = "OPENAI_API_KEY"


class EndpointError(AdvisorError):
    """The endpoint cannot be measured; the text says what happened and what to check."""


@dataclass(frozen=True)
class CacheConfig:
    """What vLLM's own metrics say of its KV cache: blocks of one engine, tokens a block, settings as text."""

    n_kv_blocks: int
    kv_block_tokens: int
    gpu_memory_utilization: float | None = None
    prefix_caching: bool | None = None


@dataclass(frozen=True)
class Endpoint:
    """An endpoint that answered: base URL, model to ask for, longest context and release as far as it tells them."""

    base_url: str
    model: str
    max_model_len: int | None = None
    engine_version: str = ""
    cache: CacheConfig | None = None


def base_url(text: str) -> str:
    """Return the base URL of an endpoint, without '/v1' and without a trailing slash.

    Raises:
        DomainError: the text is no http or https address, or carries a user, a query or a fragment.
    """
    shown = printable(text)
    try:
        url = urlsplit(text.strip())
        port = url.port
    except ValueError:
        raise DomainError(f"endpoint '{shown}' is not an address; give one such as http://localhost:8000") from None
    if url.scheme not in ("http", "https") or not url.hostname or not text.strip().isprintable():
        raise DomainError(f"endpoint '{shown}' is not an http or https address; give one such as http://localhost:8000")
    if url.username or url.password or url.query or url.fragment:
        raise DomainError(
            f"endpoint '{url.hostname}' must carry no user, query or fragment; pass keys in {KEY_VARIABLE}"
        )
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    path = url.path.rstrip("/").removesuffix("/v1")
    return f"{url.scheme}://{host}{f':{port}' if port else ''}{path}"


def failure_sentence(kind: str, text: str, where: str) -> str:
    """Return what a failed request means, from the load script's kind of failure."""
    text = printable(text, 160)
    sentences = {
        "refused": f"nobody listens at {where}; start the server or correct the address",
        "dns": f"the host name of {where} is unknown; correct the address",
        "stall": f"{where} stalled: {text}; the server hangs or is overloaded beyond the time limit",
        "not_sse": f"{where} does not stream server-sent events ({text}); it must be an OpenAI-compatible server",
        "empty": f"{where} ended its answer without a token; look at the server's log",
        "cut": f"{where} broke off in the middle of an answer; look at the server's log",
        "server": f"{where} reported an error while it generated: {text}",
        "connection": f"the connection to {where} failed: {text}",
    }
    if kind == "status":
        return status_sentence(int(text.split(" ", 1)[0]), text, where)
    return sentences.get(kind, f"{where} failed: {text}")


def status_sentence(status: int, text: str, where: str) -> str:
    """Return what an HTTP status other than 200 means here."""
    if status in (401, 403):
        return f"{where} wants a valid key (HTTP {status}); put it in the environment variable {KEY_VARIABLE}"
    if status == 404:
        return f"{where} has no OpenAI-compatible API (HTTP 404); give the base address, such as http://host:8000"
    if status == 429:
        return f"{where} limits the rate (HTTP 429); a load test needs an endpoint without a limit"
    if status >= 500:
        return f"{where} failed itself (HTTP {status}); look at the server's log"
    return f"{where} refused the request: {printable(text, 160)}"


def _get(url: str, path: str, key: str, timeout_s: float) -> tuple[int, str, bytes]:
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.netloc, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    try:
        connection.request("GET", parts.path + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", ""), response.read(MAX_BODY_BYTES)
    except ConnectionRefusedError:
        raise EndpointError(failure_sentence("refused", "", url)) from None
    except socket.gaierror:
        raise EndpointError(failure_sentence("dns", "", url)) from None
    except TimeoutError:
        raise EndpointError(failure_sentence("stall", f"no answer within {timeout_s:g} s", url)) from None
    except ssl.SSLError as error:
        raise EndpointError(f"{url} has no valid TLS certificate: {printable(error.reason)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise EndpointError(failure_sentence("connection", f"{type(error).__name__} {error}", url)) from None
    finally:
        connection.close()


def _json(url: str, status: int, kind: str, body: bytes) -> dict[str, Any]:
    if status != 200:
        raise EndpointError(status_sentence(status, f"HTTP {status} {body[:100]!r}", url))
    if "json" not in kind:
        what = "HTML, a web page" if "html" in kind else printable(kind or "no content type")
        raise EndpointError(f"{url}/v1/models answers {what}, not JSON; give the base address of the API server")
    try:
        document = json.loads(body)
    except ValueError:
        raise EndpointError(f"{url}/v1/models answers text that is not JSON") from None
    if not isinstance(document, dict) or not isinstance(document.get("data"), list):
        raise EndpointError(f"{url}/v1/models answers JSON without a list of models; it is not OpenAI-compatible")
    return document


_CACHE_INFO = re.compile(r"^vllm:cache_config_info\{(?P<labels>[^}]*)\}", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def cache_config(metrics: str) -> CacheConfig | None:
    """Return the cache of the first engine in vLLM's metrics page, None when the page does not tell it."""
    line = _CACHE_INFO.search(metrics)
    labels = dict(_LABEL.findall(line["labels"])) if line else {}
    try:
        n_blocks, block_tokens = int(labels["num_gpu_blocks"]), int(labels["block_size"])
    except (KeyError, ValueError):
        return None
    if not (0 < n_blocks < 10**12 and 0 < block_tokens < 10**6):
        return None
    try:
        share: float | None = float(labels.get("gpu_memory_utilization", ""))
    except ValueError:
        share = None
    caching = {"True": True, "False": False}.get(labels.get("enable_prefix_caching", ""))
    return CacheConfig(n_blocks, block_tokens, share, caching)


def probe(endpoint: str, *, wanted_model: str = "", key: str = "", timeout_s: float = 20) -> Endpoint:
    """Return what the endpoint serves; asks /v1/models and, for vLLM, /version and /metrics.

    With no `wanted_model` the only served model is taken.

    Raises:
        DomainError: the address is not one.
        EndpointError: nobody answers, or not as an OpenAI-compatible API.
        UnknownName: the wanted model is not served there.
    """
    url = base_url(endpoint)
    entries = _json(url, *_get(url, "/v1/models", key, timeout_s))["data"]
    served = {str(e["id"]): e for e in entries if isinstance(e, dict) and isinstance(e.get("id"), str)}
    if not served:
        raise EndpointError(f"{url} serves no model")
    if wanted_model and wanted_model not in served:
        raise UnknownName("served model", wanted_model, served, f"{url} serves {printable(', '.join(served), 120)}.")
    if not wanted_model and len(served) > 1:
        raise DomainError(f"{url} serves {len(served)} models: {printable(', '.join(served), 120)}; name one")
    name = wanted_model or next(iter(served))
    length = served[name].get("max_model_len")
    version = ""
    status, kind, body = _get(url, "/version", key, timeout_s)
    if status == 200 and "json" in kind:
        try:
            version = printable(json.loads(body).get("version", ""), 40)
        except (ValueError, AttributeError):
            version = ""
    status, kind, body = _get(url, "/metrics", key, timeout_s)
    cache = cache_config(body.decode("utf-8", "replace")) if status == 200 and "text/plain" in kind else None
    return Endpoint(url, name, length if isinstance(length, int) and length > 0 else None, version, cache)
