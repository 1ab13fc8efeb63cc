"""Stands in for vLLM in tests: an asyncio engine with a known step law behind the names that the runner uses."""

import os

if os.environ.get("FAKE_VLLM") == "missing":
    raise ImportError("No module named 'vllm'")

from vllm.sampling_params import SamplingParams as SamplingParams

__version__ = "0.26.0"
