"""Measurements and tests that need a GPU; `gpu_suite.sh` runs them."""
