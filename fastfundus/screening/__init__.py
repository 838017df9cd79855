"""Screening: photos and a bundle in, one row per photo out. No torch."""
