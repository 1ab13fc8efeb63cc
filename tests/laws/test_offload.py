"""Weight streaming against measured passes and its limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advisor.laws.offload import gathered_params, nvme_bytes_per_s_per_gpu, overlapped_s, weight_stream_s

TIMES = st.floats(0, 1e4)


@given(TIMES, TIMES, TIMES)
def test_overlap_is_between_the_maximum_and_the_sum(a: float, b: float, c: float) -> None:
    got = float(overlapped_s(a, b, c))
    assert max(a, b, c) * (1 - 1e-12) <= got <= (a + b + c) * (1 + 1e-12)


def test_published_scaling_of_opt_30b_over_v100s() -> None:
    # DeepSpeed's post of 2022-09-10, table 4: 43, 77 and 120 tokens/s a GPU at batch 256 on 1, 2 and 4 GPUs
    for n, per_gpu in ((1, 43), (2, 77), (4, 120)):
        ours = 256 / float(weight_stream_s(60e9, n, 10.2e9, 100e9))
        assert ours == pytest.approx(per_gpu, rel=0.12)


@given(n=st.integers(1, 64))
def test_more_ranks_never_take_longer_when_links_are_faster_than_the_host(n: int) -> None:
    one, more = (float(weight_stream_s(140e9, k, 25e9, 300e9)) for k in (n, n + 1))
    assert more <= one


def test_drives_are_shared_by_the_node() -> None:
    assert float(nvme_bytes_per_s_per_gpu(24e9, 8, 25e9, 0.0)) == 3e9
    assert float(nvme_bytes_per_s_per_gpu(24e9, 1, 10e9, 0.0)) == 10e9
    # one after the other: rates add as resistances
    assert float(nvme_bytes_per_s_per_gpu(10e9, 1, 10e9, 1.0)) == 5e9


@given(st.floats(1e9, 1e11), st.integers(1, 16), st.floats(1e9, 1e11), st.floats(0.0, 1.0))
def test_a_gpu_is_never_fed_faster_than_drives_or_link_and_never_slower_than_both_in_turn(
    nvme: float, n: int, host: float, serial: float
) -> None:
    rate = float(nvme_bytes_per_s_per_gpu(nvme, n, host, serial))
    assert rate <= min(nvme / n, host) * (1 + 1e-9)
    assert rate >= 1 / (n / nvme + 1 / host) * (1 - 1e-9)


def test_published_passes_from_drives_follow_both_rates() -> None:
    # OPT-175B on a DGX-2, fp16, 350 GB, batch 64 a GPU: 1.6, 2.4 and 3.3 tokens/s a GPU from drives, 2.0 from the host
    copy = 350e9 / (64 / 2.0)
    for n, tokens_per_s in ((1, 1.6), (2, 2.4), (4, 3.3)):
        gather = 350e9 * (n - 1) / n / 85e9
        rate = 350e9 / n / (64 / tokens_per_s - gather)
        assert float(nvme_bytes_per_s_per_gpu(25.6e9, n, copy, 0.59)) == pytest.approx(rate, rel=0.12)


def test_small_models_are_gathered_whole() -> None:
    assert float(gathered_params(5e8, 1e8)) == 5e8
    assert float(gathered_params(70e9, 262e6)) == pytest.approx(1.312e9)
