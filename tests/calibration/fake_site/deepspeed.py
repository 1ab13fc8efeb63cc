"""Stands in for DeepSpeed in tests: only found, never used."""
