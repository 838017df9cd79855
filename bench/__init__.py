"""Benchmarks and evidence; never imported by the library."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The checkout."""
RESULTS = ROOT / "bench" / "results"
"""Committed measurements, one JSON file per suite, device and month."""
