"""Stands in for torch in tests: its version, and a machine without CUDA."""

from types import SimpleNamespace

__version__ = "2.11.0+fake"
cuda = SimpleNamespace(is_available=lambda: False)
distributed = SimpleNamespace(is_initialized=lambda: False)


def manual_seed(seed):
    return seed
