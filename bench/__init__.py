"""Measurements; never imported by the library."""
