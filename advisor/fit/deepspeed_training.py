"""Coefficients of DeepSpeed training from our H100 records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from advisor.schema import Coefficient


def training_coefficients(raw: Sequence[dict[str, Any]]) -> dict[str, Coefficient]:
    return {}
