"""Slow experiments on real photographs whose results docs/evidence.md reports."""
