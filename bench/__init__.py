"""Benchmarks. The library never imports this package."""
