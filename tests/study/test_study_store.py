"""Result files: torn lines, foreign files, two writers."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.errors import BadData, DomainError
from advisor.study.store import Store

BASIS = "0123456789ab"


def row(number: int) -> dict[str, object]:
    return {"id": f"{number:016x}", "basis": BASIS, "model": "é\n", "status": "ok", "reason": ""}


def test_what_is_appended_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    with Store(path, BASIS) as store:
        store.append([row(1), row(2**64 - 1)])
    with Store(path, BASIS) as store:
        assert len(store.done) == 2
        assert f"{1:016x}" in store.done
        assert f"{2**64 - 1:016x}" in store.done
        assert f"{2:016x}" not in store.done
        store.append([row(2)])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(1), row(2**64 - 1), row(2)]


@given(n_rows=st.integers(1, 5), cut=st.floats(0, 1))
@settings(max_examples=60)
def test_a_file_cut_anywhere_keeps_its_whole_lines(n_rows: int, cut: float) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "r.jsonl"
        with Store(path, BASIS) as store:
            store.append([row(i) for i in range(n_rows)])
        whole = path.read_bytes()
        kept = whole[: int(cut * len(whole))]
        path.write_bytes(kept)
        with Store(path, BASIS) as store:
            assert len(store.done) == kept.count(b"\n")
            store.append([row(99)])
        lines = path.read_bytes().splitlines()
        assert [json.loads(line)["id"] for line in lines] == [row(i)["id"] for i in range(kept.count(b"\n"))] + [
            row(99)["id"]
        ]


@pytest.mark.parametrize("text", ["hello\n", '{"id": "xyz"}\n', "\n", '{"basis": "0123456789ab"}\n'])
def test_a_file_of_something_else_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(BadData, match="line 1 is no result"):
        Store(path, BASIS)
    assert path.read_text() == text


def test_results_of_another_fit_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Store(path, BASIS) as store:
        store.append([row(1)])
    with pytest.raises(BadData, match="rests on other data"):
        Store(path, "f" * 12)


def test_a_worker_with_other_data_is_refused(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl", BASIS) as store, pytest.raises(BadData, match="a worker has other data"):
        store.append([row(1), row(2) | {"basis": "f" * 12}])
    assert (tmp_path / "r.jsonl").read_text() == ""


def test_two_writers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="this system has no file locks")
    path = tmp_path / "r.jsonl"
    with Store(path, BASIS), pytest.raises(DomainError, match="being written by another run"):
        Store(path, BASIS)
    Store(path, BASIS).close()


def test_no_resume_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with Store(path, BASIS, is_resumed=False) as store:
        store.append([row(1)])
    with pytest.raises(DomainError, match="holds 1 results"):
        Store(path, BASIS, is_resumed=False)
    assert path.read_text()


def test_a_number_that_json_lacks_is_not_written(tmp_path: Path) -> None:
    with Store(tmp_path / "r.jsonl", BASIS) as store, pytest.raises(ValueError, match="JSON"):
        store.append([row(1), row(2) | {"score": float("inf")}])
    assert (tmp_path / "r.jsonl").read_text() == ""
