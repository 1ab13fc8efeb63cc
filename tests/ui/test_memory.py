"""What was drawn before is shown again as it was, to every session, and never for something else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import pytest
from streamlit import config
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.asyncio.client import connect

from advisor.schema import Breakdown, Part
from advisor.ui import charts, memory

DRAWN = ("plotly_chart", "arrow_data_frame")


async def drawn(address: str, page: str, query: dict[str, str]) -> dict[bytes, int]:
    """The charts and tables of one run of a page in a new session, as they are sent, with their heights [pixels]."""
    found = {}
    url = address.replace("http", "ws", 1) + "/_stcore/stream"
    async with connect(url, subprotocols=["streamlit"], max_size=None, origin=address) as ws:  # type: ignore[arg-type]
        message = BackMsg()
        message.rerun_script.query_string, message.rerun_script.page_name = urlencode(query), page
        await ws.send(message.SerializeToString())
        async for raw in ws:
            said = ForwardMsg()
            said.ParseFromString(raw if isinstance(raw, bytes) else raw.encode())
            if said.WhichOneof("type") == "script_finished":
                break
            element = said.delta.new_element
            if element.WhichOneof("type") in DRAWN:
                found[element.SerializeToString()] = element.height_config.pixel_height
    return found


@pytest.mark.parametrize("page", ["compare", "explore", "train", "trust"])
def test_what_one_session_drew_another_one_sees_as_it_was(address: str, page: str) -> None:
    query = {"model": "llama-3.1-8b", "gpus": "2xL40S", "load": "rate", "rate": "1.5", "sequence": "1536"}
    # in a thread of its own: a browser that other tests drive runs a loop in this one
    with ThreadPoolExecutor(1) as pool:
        first, second = (pool.submit(asyncio.run, drawn(address, page, query)).result() for _ in range(2))
    assert len(first) >= 2
    assert any(first.values())
    # what is worked out later is there only the second time
    assert first.items() <= second.items()


def a_breakdown(value: float) -> Breakdown:
    return Breakdown(name="memory", unit="bytes", total=value, parts=(Part(name="weights", value=value),))


def test_a_chart_has_the_key_of_its_content() -> None:
    keys = [memory.key_of(charts.stacked({"all": a_breakdown(value)})) for value in (1e9, 2e9, 1e9)]
    assert keys[0] == keys[2]
    assert keys[0] != keys[1]
    assert None not in keys
    assert memory.key_of(charts.laid_out(charts.go.Figure())) is None


def test_the_key_of_a_chart_that_is_no_longer_kept_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_CHARTS", 1)
    first = charts.stacked({"all": a_breakdown(3e9)})
    charts.stacked({"all": a_breakdown(4e9)})
    assert memory.key_of(first) is None
    assert set(memory._keys.values()) == set(memory._kept)


def test_formats_of_a_table_are_a_part_of_its_content() -> None:
    rows: list[dict[str, float]] = [{"share": 0.25}]
    forms: list[Callable[[float], str]] = ["{:.0%}".format, "{:.1%}".format]
    assert memory.content_key(rows, {"share": forms[0]}) != memory.content_key(rows, {"share": forms[1]})


def test_no_search_for_garbage_follows_every_run() -> None:
    assert config.get_option("runner.postScriptGC") is False
