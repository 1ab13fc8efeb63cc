"""TOML files of the catalogue, kept as JSON beside the bytecode: never stale, never in the way."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from advisor.catalog import files

LINES = "".join(f'[[release]]\nversion = "0.{n}"\nseqs = [{n}, 256]\nshare = 0.{n}5\nis_v1 = true\n' for n in range(60))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "__file__", str(tmp_path / "files.py"))
    monkeypatch.setattr(files, "data_root", lambda: tmp_path)
    monkeypatch.setattr(files.sys, "dont_write_bytecode", False)
    return tmp_path


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "__pycache__").glob("*"))


def refuse(_: str) -> Any:
    raise AssertionError("parsed again")


def test_a_long_file_is_parsed_once_and_read_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "vllm.toml"
    path.write_text(LINES)
    first = files.read_toml(path)
    assert first == tomllib.loads(LINES)
    assert [p.suffix for p in kept(folder)] == [".json"]
    monkeypatch.setattr(tomllib, "loads", refuse)
    assert files.read_toml(path) == first


def test_an_edited_file_is_read_anew_and_garbage_is_no_table(folder: Path) -> None:
    path = folder / "vllm.toml"
    path.write_text(LINES)
    files.read_toml(path)
    path.write_text(LINES.replace("256", "512"))
    assert files.read_toml(path)["release"][1]["seqs"] == [1, 512]
    for written in kept(folder):
        written.write_bytes(b"\xff not JSON")
    assert files.read_toml(path)["release"][1]["seqs"] == [1, 512]
    for written in kept(folder):
        written.write_text("[1]")
    assert files.read_toml(path)["release"][1]["seqs"] == [1, 512]


def test_what_json_does_not_know_is_not_kept(folder: Path) -> None:
    for value in ("2026-11-25", "nan"):
        path = folder / "odd.toml"
        path.write_text(LINES + f"[other]\nvalue = {value}\n")
        assert str(files.read_toml(path)["other"]["value"]) == value
        assert not kept(folder)


def test_nothing_is_written_where_python_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "vllm.toml"
    path.write_text(LINES)
    (folder / "__pycache__").write_text("a file where the folder should be")
    assert len(files.read_toml(path)["release"]) == 60
    (folder / "__pycache__").unlink()
    monkeypatch.setattr(files.sys, "dont_write_bytecode", True)
    assert len(files.read_toml(path)["release"]) == 60
    assert not kept(folder)


def test_a_users_file_is_not_kept(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("user") / "card.toml"
    path.write_text(LINES)
    assert len(files.read_toml(path)["release"]) == 60
    assert not kept(folder)
