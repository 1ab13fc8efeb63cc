"""KV pools that vLLM itself reported on other people's machines, with real weights and engine defaults."""

import json

import numpy as np
import pytest

from advisor.catalog import load_catalog
from advisor.predict.footprint import footprint
from advisor.schema import Deployment, EngineFacts

CATALOG = load_catalog()
ROWS = json.loads((CATALOG.root / "golden" / "vllm_kv_startup.json").read_text())["rows"]


def error(row: dict) -> float:
    model, _ = CATALOG.model(row["model"])
    gpu = CATALOG.gpu(row["gpu"])
    facts = EngineFacts.from_table(CATALOG.engine("vllm"), row["engine_version"])
    deployment = Deployment(
        max_num_batched_tokens=facts.max_num_batched_tokens_default(gpu.device_memory_bytes, gpu.name),
        max_num_seqs=facts.max_num_seqs_default(gpu.device_memory_bytes, gpu.name),
        **{k: row[k] for k in row if k not in ("kv_cache_tokens", "source")},
    )
    return footprint(model, gpu, deployment, facts).kv_cache_tokens / row["kv_cache_tokens"] - 1


def test_half_of_the_pools_are_within_three_percent() -> None:
    assert np.median([abs(error(row)) for row in ROWS]) < 0.03


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda r: f"{r['model']}-{r['gpu']}-tp{r['tp']}-{r['weight_dtype']}-{r['kv_dtype']}"
)
def test_no_pool_is_promised_much_larger_than_it_was(row: dict) -> None:
    # too small is safe; the worst is -11 %, where a start with real weights needs no buffer of the LM head's size
    assert -0.12 < error(row) < 0.02
