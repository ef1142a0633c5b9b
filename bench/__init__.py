"""Benchmarks: every figure is measured beside its peer and its floor in the same run."""
