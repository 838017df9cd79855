"""Benchmarks on the CPU, one file per suite."""
