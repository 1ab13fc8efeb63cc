"""The catalogue's models: exact counts, and names as people write them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog import Catalog, load_catalog
from advisor.catalog.models import INDEX, build_index
from advisor.errors import AdvisorError, BadData, UnknownName
from advisor.predict.shapes import shapes_of

CATALOG = load_catalog()
NAMES = sorted(CATALOG.models())


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_is_exactly_the_published_one(name: str) -> None:
    model, notes = CATALOG.model(name)
    assert model.name == name
    assert notes == ()
    assert model.published_n_params > 0
    assert shapes_of(model).n_params == model.published_n_params


@pytest.mark.parametrize("name", NAMES)
def test_every_model_cites_its_configuration_and_its_count(name: str) -> None:
    cited = {s.field for s in CATALOG.model(name)[0].sources}
    assert {"config", "published_n_params"} <= cited


@pytest.mark.parametrize(
    ("name", "published"),
    [  # figures from model cards, hub pages and papers, not from this repository's files
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-70b", 68_976_648_192),
        ("qwen2.5-7b", 7_615_616_512),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("deepseek-v3", 671_026_419_200),
        ("gpt-oss-120b", 116_829_156_672),
        ("bloom-176b", 176_247_271_424),
        ("gemma-2-27b", 27_227_128_320),
    ],
)
def test_published_counts(name: str, published: int) -> None:
    assert shapes_of(CATALOG.model(name)[0]).n_params == published


@pytest.mark.parametrize(
    ("name", "active"), [("mixtral-8x7b", 12.9e9), ("qwen3-30b-a3b", 3.3e9), ("deepseek-v3", 37e9)]
)
def test_active_parameters_are_the_advertised_ones(name: str, active: float) -> None:
    shapes = shapes_of(CATALOG.model(name)[0])
    # the advertised figures count the input embedding, of which a token reads one row
    assert shapes.n_active_params + shapes.embedding_params == pytest.approx(active, rel=0.03)


def test_the_catalogue_covers_what_it_promises() -> None:
    assert len(NAMES) >= 40
    families = {CATALOG.model(n)[0].family for n in NAMES}
    assert {
        "llama",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "mistral",
        "mixtral",
        "gemma2",
        "gemma3_text",
        "deepseek_v3",
    } <= families
    assert {"gpt_oss", "phi3", "falcon", "bloom", "opt", "gpt2", "gptj", "gpt_neox"} <= families


def test_index_is_what_the_files_say() -> None:
    folder = CATALOG.root / "models"
    assert (folder / INDEX).read_text() == build_index(folder), (
        "write build_index(data/models) to data/models/index.json"
    )


def test_no_alias_means_two_models() -> None:
    seen: dict[str, str] = {}
    for entry in CATALOG.models().values():
        for spelling in {s.lower() for s in (entry.name, entry.hf_id, *entry.aliases) if s}:
            assert seen.setdefault(spelling, entry.name) == entry.name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("70b", "llama-3.3-70b"),
        ("8b", "llama-3.1-8b"),
        ("llama-3.1-8b", "llama-3.1-8b"),
        ("Llama 3.1 8B Instruct", "llama-3.1-8b"),
        ("meta-llama/Llama-2-70b-chat-hf", "llama-2-70b"),
        ("LLaMA-2-70B-chat", "llama-2-70b"),
        ("qwen3-32b", "qwen3-32b"),
        ("qwen 32b", "qwen3-32b"),
        ("mixtral", "mixtral-8x7b"),
        ("8x22b", "mixtral-8x22b"),
        ("deepseek-r1", "deepseek-r1"),
        ("deepseek", "deepseek-v3"),
        ("gpt3", "gpt-3-175b"),
        ("phi-4", "phi-4-14b"),
        ("3b", "llama-3.2-3b"),
    ],
)
def test_names_as_people_write_them(text: str, name: str) -> None:
    assert CATALOG.model(text)[0].name == name


@pytest.mark.parametrize(
    ("text", "hf_id"),
    [
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("Llama 2 70B chat", "meta-llama/Llama-2-70b-chat-hf"),
        ("deepseek-r1-distill-llama-70b", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B"),
        ("qwq-32b", "Qwen/QwQ-32B"),
        ("70b", "meta-llama/Llama-3.3-70B-Instruct"),
    ],
)
def test_a_launch_command_names_the_checkpoint_that_was_asked_for(text: str, hf_id: str) -> None:
    assert CATALOG.model(text)[0].hf_id == hf_id


def test_a_relative_says_whose_sizes_it_has() -> None:
    assert "qwen2.5-32b" in CATALOG.model("qwq-32b")[1][0].text
    assert not CATALOG.model("meta-llama/Llama-3.1-8B")[1]
    assert not CATALOG.model("llama-2-70b-chat")[1]


def test_an_ambiguous_name_says_what_else_it_could_be() -> None:
    _, notes = CATALOG.model("70b")
    assert "llama-2-70b" in notes[0].text
    assert "llama-3.1-70b" in notes[0].text


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(UnknownName) as error:
        CATALOG.model("llama-9-70b")
    assert "llama-3-70b" in error.value.nearest
    assert "\n" not in str(error.value)


def test_a_config_json_by_path_and_by_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    config = json.loads((CATALOG.root / "models" / "llama-3.1-8b.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps(config))
    for given_path in (folder, folder / "config.json"):
        model, _ = CATALOG.model(str(given_path))
        assert model.name == "my-model"
        assert model.folder == str(folder)
        assert shapes_of(model).n_params == 8_030_261_248


def test_only_a_folder_that_an_engine_can_load_is_kept_for_launch_lines(tmp_path: Path) -> None:
    text = json.dumps(json.loads((CATALOG.root / "models" / "llama-3.1-8b.json").read_text())["config"])
    named = tmp_path / "mine.json"
    named.write_text(text)
    assert (CATALOG.model(str(named))[0].name, CATALOG.model(str(named))[0].folder) == ("mine", "")
    # the hub's cache: the file is a link to a blob, the folder that it stands in is what an engine loads
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(named)
    assert CATALOG.model(str(snapshot))[0].folder == str(snapshot)
    bell = tmp_path / "a\x07b"
    bell.mkdir()
    (bell / "config.json").write_text(text)
    assert CATALOG.model(str(bell))[0].folder == ""
    assert CATALOG.model("llama-3.1-8b")[0].folder == ""


def test_a_relative_path_becomes_one_that_a_launch_line_can_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((CATALOG.root / "models" / "llama-3.1-8b.json").read_text())["config"]
    (tmp_path / "-m").mkdir()
    (tmp_path / "-m" / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path / "-m")
    assert CATALOG.model("./config.json")[0].folder == str(tmp_path / "-m")
    assert CATALOG.model(".")[0].folder == str(tmp_path / "-m")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "no JSON"),
        (b"[1]", "one JSON object"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"a": NaN}', "not a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (2**20 + 1), "larger than"),
        (b'{"hidden_size": 1' + b"0" * 5000 + b"}", "no JSON"),
        (b"{}", "hidden_size"),
    ],
)
def test_a_hostile_file_is_refused_in_one_sentence(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(BadData, match=why) as error:
        CATALOG.model(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no such file"):
        CATALOG.model(str(tmp_path / "no.json"))
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    with pytest.raises(BadData, match="regular file"):
        CATALOG.model(str(pipe))


def test_a_broken_catalogue_file_names_itself(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / INDEX).write_text('{"m": {"hf_id": "", "aliases": []}}')
    (tmp_path / "models" / "m.json").write_text('{"name": "m"}')
    with pytest.raises(BadData, match=r"m\.json"):
        Catalog(tmp_path).model("m")


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_a_model_or_one_sentence(text: str) -> None:
    message = ""
    try:
        CATALOG.model(text)
    except AdvisorError as error:
        message = str(error)
    assert "\n" not in message
