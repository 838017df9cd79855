"""Screening: photos and a bundle in, one trustworthy row per photo out. No torch."""
