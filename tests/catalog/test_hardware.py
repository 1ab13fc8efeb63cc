"""GPUs, GPU specs, prices and presets: sourced numbers, and one sentence for what cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog import Catalog, load_catalog
from advisor.catalog.hardware import gpu_slug
from advisor.errors import AdvisorError, BadData, DomainError, UnknownName
from advisor.schema import Gpu
from advisor.units import GB, GIB, TERA

CATALOG = load_catalog()
GPUS = CATALOG.gpus()


def test_the_cards_that_are_promised() -> None:
    names = {g.name for g in GPUS}
    assert len(names) >= 18
    assert {
        "v100-sxm-32gb",
        "a10g",
        "a100-sxm-40gb",
        "a100-sxm-80gb",
        "a100-pcie-40gb",
        "a100-pcie-80gb",
        "l4",
    } <= names
    assert {"l40s", "h100-sxm-80gb", "h100-pcie-80gb", "h100-nvl-94gb", "h200-sxm-141gb", "b200-sxm-180gb"} <= names
    assert {"mi300x", "rtx-4090", "rtx-5090"} <= names


@pytest.mark.parametrize("gpu", GPUS, ids=[g.name for g in GPUS])
def test_every_card_is_sourced_and_plausible(gpu: Gpu) -> None:
    fields = {s.field for s in gpu.sources}
    assert {"*", "device_memory_bytes", "idle_power_w"} <= fields
    assert all(s.quote for s in gpu.sources)
    # GDDR and HBM vendors mean GiB by GB; the driver keeps up to a tenth for itself
    assert 0.9 < gpu.device_memory_bytes / (gpu.memory_bytes / GB * GIB) <= 1.0
    assert gpu.memory_bandwidth_bytes_per_s < 10 * TERA
    half = gpu.peak_flops_per_s.get("bf16", gpu.peak_flops_per_s.get("fp16", 0))
    for double in ("fp8", "int8"):
        if double in gpu.peak_flops_per_s:
            assert 1.9 <= gpu.peak_flops_per_s[double] / half <= 4.1  # type: ignore[index]
    # a dense fp16 peak is above the fp32 peak, below a sparse one; 100 to 700 FLOP a byte on every card
    assert 50 < half / gpu.memory_bandwidth_bytes_per_s < 450


def test_datasheet_figures() -> None:
    h100 = CATALOG.gpu("h100-sxm-80gb")
    assert h100.device_memory_bytes == 85_018_877_624
    assert h100.peak_flops_per_s["bf16"] == pytest.approx(989.4e12)  # 1,979 TF with sparsity
    assert h100.link_bytes_per_s == pytest.approx(450e9)
    assert CATALOG.gpu("mi300x").memory_bandwidth_bytes_per_s == pytest.approx(5.3e12)
    assert "bf16" not in CATALOG.gpu("v100").peak_flops_per_s


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h200", "h200-sxm-141gb"),
        ("h200-sxm", "h200-sxm-141gb"),
        ("h200-141gb", "h200-sxm-141gb"),
        ("NVIDIA H200", "h200-sxm-141gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("Tesla V100-SXM2-16GB", "v100-sxm-16gb"),
        ("rtx 4090", "rtx-4090"),
        ("A100 40 GB", "a100-sxm-40gb"),
    ],
)
def test_gpu_aliases(text: str, name: str) -> None:
    assert CATALOG.gpu(text).name == name


def test_no_alias_means_two_cards() -> None:
    seen: dict[str, str] = {}
    for gpu in GPUS:
        for alias in {gpu_slug(a) for a in (gpu.name, gpu.label, *gpu.aliases)}:
            assert seen.setdefault(alias, gpu.name) == gpu.name


@pytest.mark.parametrize(
    ("spec", "clusters"),
    [
        ("8xA100", [("a100-sxm-80gb", 1, 8)]),
        ("8xA100-80GB", [("a100-sxm-80gb", 1, 8)]),
        ("2x8xH100", [("h100-sxm-80gb", 2, 8)]),
        ("4xL40S", [("l40s", 1, 4)]),
        ("H100", [("h100-sxm-80gb", 1, 1)]),
        ("8 x h100", [("h100-sxm-80gb", 1, 8)]),
        ("16xH100", [("h100-sxm-80gb", 2, 8)]),
        ("8xH200, 4xL4", [("h200-sxm-141gb", 1, 8), ("l4", 1, 4)]),
        ("4x4090", [("rtx-4090", 1, 4)]),
    ],
)
def test_gpu_specs(spec: str, clusters: list[tuple[str, int, int]]) -> None:
    parsed = CATALOG.clusters(spec).clusters
    assert [(c.gpu.name, c.n_nodes, c.gpus_per_node) for c in parsed] == clusters


def test_notes_say_what_was_assumed() -> None:
    assert "a100-pcie-80gb" in CATALOG.clusters("8xA100").notes[0].text
    assert "2 nodes of 8" in CATALOG.clusters("16xh100-sxm-80gb").notes[0].text
    assert not CATALOG.clusters("8xh100-sxm-80gb").notes


@pytest.mark.parametrize(
    "spec", ["", ",", "0xH100", "0x8xH100", "-1xH100", "8x", "8", "12xH100", "2x16xH100", "1000000xH100", "8x8x8xH100"]
)
def test_impossible_specs_say_what_to_write(spec: str) -> None:
    with pytest.raises(DomainError) as error:
        CATALOG.clusters(spec)
    assert "\n" not in str(error.value)


def test_unknown_cards_offer_the_nearest() -> None:
    with pytest.raises(UnknownName, match="a100"):
        CATALOG.clusters("8xa1000")


@given(st.text(alphabet="0123456789xX hHaA10GB-,.*", max_size=30) | st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_any_spec_gives_clusters_or_one_sentence(spec: str) -> None:
    message, counts = "", [1]
    try:
        counts = [c.n_gpus for c in CATALOG.clusters(spec).clusters]
    except AdvisorError as error:
        message = str(error)
    assert "\n" not in message
    assert all(1 <= n <= 100_000 for n in counts)


CARD = """
name = "mycard"
label = "My card"
vendor = "other"
family = "own"
memory_bytes = 32e9
device_memory_bytes = 33e9
memory_bandwidth_bytes_per_s = 1e12
board_power_w = 300
idle_power_w = 30
link = "pcie"
link_bytes_per_s = 32e9
host_link_bytes_per_s = 32e9
[peak_flops_per_s]
bf16 = 1e14
[[sources]]
field = "*"
title = "own measurement"
"""


def test_a_custom_card_with_its_price(tmp_path: Path) -> None:
    path = tmp_path / "mycard.toml"
    path.write_text(CARD + "[price]\nusd_per_gpu_h = 0.75\n")
    parsed = CATALOG.clusters(f"2x{path}")
    assert parsed.clusters[0].gpu.name == "mycard"
    assert not parsed.clusters[0].has_nvlink
    assert (parsed.prices[0].usd_per_gpu_h, parsed.prices[0].kind) == (0.75, "own")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (("bf16 = 1e14", "bf16 = -1"), "bf16"),
        (("bf16 = 1e14", "int8 = 1e14"), "bf16 or fp16"),
        (('vendor = "other"', ""), "vendor"),
        (("board_power_w = 300", "board_power_w = nan"), "board_power_w"),
        (('name = "mycard"', "name = "), "no TOML"),
        (('name = "mycard"', 'nam = "mycard"'), "nam"),
    ],
)
def test_a_broken_card_is_refused_in_one_sentence(tmp_path: Path, change: tuple[str, str], why: str) -> None:
    path = tmp_path / "mycard.toml"
    path.write_text(CARD.replace(*change))
    with pytest.raises(BadData, match=why) as error:
        CATALOG.clusters(f"8x{path}")
    assert "\n" not in str(error.value)


def test_a_price_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "mycard.toml"
    path.write_text("price = 3\n" + CARD)
    with pytest.raises(BadData, match="price"):
        CATALOG.clusters(str(path))


def test_prices_are_of_known_cards_and_dated() -> None:
    names = {g.name for g in GPUS}
    for price in CATALOG.prices():
        assert price.gpu in names
        assert price.date[:2] == "20"
        assert 0.01 < price.usd_per_gpu_h < 20
    assert {"aws", "azure", "coreweave", "gcp", "lambda", "runpod"} <= {p.provider for p in CATALOG.prices()}


def test_the_median_provider_is_taken() -> None:
    choice = CATALOG.price_choice("h100-sxm-80gb")
    assert choice is not None
    all_prices = sorted([choice.price.usd_per_gpu_h, *(p.usd_per_gpu_h for p in choice.alternatives)])
    assert choice.price.usd_per_gpu_h == all_prices[(len(all_prices) - 1) // 2]
    assert len({p.provider for p in choice.alternatives} | {choice.price.provider}) == len(all_prices)


def test_a_named_provider_is_taken() -> None:
    price = CATALOG.price("h100-sxm-80gb", "aws", "spot")
    assert price is not None
    assert (price.provider, price.kind) == ("aws", "spot")
    assert CATALOG.price("rtx-3090", "aws") is None
    with pytest.raises(UnknownName, match="aws"):
        CATALOG.price("h100-sxm-80gb", "awss")


def test_a_broken_price_file_names_itself(tmp_path: Path) -> None:
    (tmp_path / "prices").mkdir()
    (tmp_path / "prices" / "x.toml").write_text('provider = "x"\n[[price]]\ngpu = "h100"\n')
    with pytest.raises(BadData, match=r"x\.toml"):
        Catalog(tmp_path).prices()


@pytest.mark.parametrize("name", ["chat", "rag", "summarise", "code", "agent", "batch"])
def test_presets(name: str) -> None:
    workload = CATALOG.workload(name)
    assert workload.name == name
    assert CATALOG.workload_source(name)


def test_preset_spellings_and_unknown_ones() -> None:
    assert CATALOG.workload("Summarize").name == "summarise"
    with pytest.raises(UnknownName, match="chat"):
        CATALOG.workload("chatt")


@pytest.mark.parametrize("text", ["[a]\nsigma = 1\n", "[a]\nx = 1\n", "[a]\nsigma=0\nprompt_tokens_mean=1.5\n", "a ="])
def test_a_broken_preset_names_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / "workloads").mkdir()
    (tmp_path / "workloads" / "presets.toml").write_text(text)
    with pytest.raises(BadData, match="presets"):
        Catalog(tmp_path).workload("a")


@pytest.mark.parametrize("name", ["../models/index", "", "nosuch", "a/b", "x\ny"])
def test_engine_and_coefficient_names_are_never_paths(name: str) -> None:
    with pytest.raises(UnknownName):
        CATALOG.engine(name)
    with pytest.raises(UnknownName):
        CATALOG.coefficients(name)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("memory_bandwidth_bytes_per_s = 1e30", "less than or equal to"),
        ("memory_bytes = 48", "greater than or equal to"),
        ("board_power_w = 1e9", "less than or equal to"),
        ("device_memory_bytes = 9e10", "cannot exceed memory_bytes"),
        ("", "'memory_bytes' field required"),
    ],
)
def test_a_wrong_power_of_ten_in_one_s_own_card_is_said(line: str, says: str, tmp_path: Path) -> None:
    own = (CATALOG.root / "hardware" / "l40s.toml").read_text()
    name = line.split(" ")[0] or "memory_bytes"
    path = tmp_path / "card.toml"
    path.write_text(re.sub(rf"^{name} = .*$", line, own, flags=re.MULTILINE))
    with pytest.raises(BadData) as caught:
        CATALOG.clusters(f"2x{path}")
    assert says in str(caught.value)
    assert len(str(caught.value)) < 250
