"""Backbones (timm), heads and checkpoint import."""
