"""Stands in for torch in tests: only its version is read."""

__version__ = "2.11.0+fake"
