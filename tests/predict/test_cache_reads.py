"""What decodes pay for their cache, by head size, card and format."""

from pathlib import Path

import pytest

from advisor.catalog import load_catalog
from advisor.fit.objective import predicted, run_cell
from advisor.fit.records import cells_of, read_records
from advisor.laws.decode_attention import MOST_APART, NEVER
from advisor.predict.cache_reads import CacheReads, cache_reads
from advisor.predict.shapes import shapes_of
from advisor.predict.transfer import transferred
from advisor.schema import Deployment

CATALOG = load_catalog()
RUNS = Path(__file__).parents[2] / "data" / "runs"


def reads(model: str, gpu: str = "h100-sxm-80gb", **more: object) -> CacheReads:
    card = CATALOG.gpu(gpu)
    shapes = shapes_of(CATALOG.model(model)[0])
    deployment = Deployment.model_validate({"backend": "vllm", "model": model, "gpu": gpu, **more})
    values = transferred(CATALOG.coefficients("vllm"), card)
    return cache_reads(shapes, card, deployment, values, shapes.n_layers, float(card.n_sms or 132))


def test_oracle_wide_heads_stream_at_a_share_of_the_bandwidth() -> None:
    values = CATALOG.coefficients("vllm").coefficients
    found = reads("llama-3.1-8b")
    assert found.bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert found.bytes_per_s == pytest.approx(3.35e12 * values["kv_eff"].value)
    assert found.seq_s == 0


def test_oracle_small_heads_of_one_query_head_each_compute_empty_rows() -> None:
    share = CATALOG.coefficients("vllm").coefficients["decode_tile_eff"].value
    found = reads("phi-3-mini-3.8b")
    key_s = 32 * 4 * 192 * 96 * 32 / (989.4e12 * share)
    assert found.bytes_per_token / found.bytes_per_s == pytest.approx(key_s, rel=0.01)
    assert found.seq_s == pytest.approx(64 * key_s, rel=0.01)


def test_oracle_an_fp8_cache_is_read_at_the_slower_of_rows_and_memory() -> None:
    share = CATALOG.coefficients("vllm").coefficients["decode_fp8_eff"].value
    streamed = CATALOG.coefficients("vllm").coefficients["kv_eff"].value
    key_s = 32 * 4 * 128 * 128 * 8 / (1978.9e12 * share)
    for gpu, bandwidth in (("h100-sxm-80gb", 3.35e12), ("h200-sxm-141gb", 4.8e12)):
        found = reads("llama-3.1-8b", gpu, kv_dtype="fp8")
        assert found.bytes_per_token == 32 * 2 * 8 * 128
        slower_s = max(key_s, found.bytes_per_token / (bandwidth * streamed))
        assert found.bytes_per_token / found.bytes_per_s == pytest.approx(slower_s, rel=0.01)


def test_oracle_tiles_cost_a_wave_more() -> None:
    wave_s = CATALOG.coefficients("vllm").coefficients["decode_wave_s"].value
    for model, tp, n_layers, n_heads in (
        ("llama-3.1-8b", 1, 32, 8),
        ("llama-3.1-8b", 4, 32, 2),
        ("deepseek-v2-lite", 1, 27, 1),
    ):
        found = reads(model, tp=tp)
        assert found.wave_s == pytest.approx(n_layers * wave_s)
        assert found.seq_waves == pytest.approx(n_heads / 132)
        assert found.most_waves == MOST_APART
    assert reads("phi-3-mini-3.8b").most_waves == NEVER, "its rows are padding and do not overlap"


def test_invariant_no_format_or_card_reads_faster_than_its_memory() -> None:
    for model in ("phi-3-mini-3.8b", "llama-3.2-1b", "llama-3.1-8b", "gemma-3-4b", "falcon-7b"):
        for gpu in ("h100-sxm-80gb", "h200-sxm-141gb", "a100-sxm-80gb", "l4"):
            for kv in ("auto", "fp8"):
                card = CATALOG.gpu(gpu)
                rate = reads(model, gpu, kv_dtype="bf16" if kv == "auto" else kv).bytes_per_s
                assert 0 < rate <= card.memory_bandwidth_bytes_per_s


def test_edge_the_padding_is_hoppers_and_small_heads_or_fp8() -> None:
    assert reads("phi-3-mini-3.8b", "a100-sxm-80gb").seq_s == 0
    assert reads("llama-3.1-8b", "a100-sxm-80gb", kv_dtype="fp8").seq_s == 0
    assert reads("llama-3.1-8b", "h200-sxm-141gb").seq_s == 0
    assert reads("llama-3.2-1b").seq_s == 0
    assert reads("deepseek-v2-lite").seq_s == 0


def test_measured_phi_3_minis_many_short_decodes() -> None:
    """Two starts on two cards; without the padded rows the law said a third to a half less."""
    for name in ("h100-13", "h200-3"):
        records = [r for r in read_records(RUNS / f"vllm-0.26.0_{name}.jsonl") if r.model == "phi-3-mini-3.8b"]
        cell = next(c for c in cells_of(records, CATALOG) if getattr(c.workload.load, "concurrency", 0) == 256)
        found = predicted(run_cell(cell, transferred(CATALOG.coefficients("vllm"), cell.gpu)))
        measured = cell.record.measured.tpot_s
        assert measured is not None
        assert found["tpot_s.p50"] == pytest.approx(measured.p50, rel=0.15)
