"""Timings and comparisons: they print, and assert nothing."""
