"""Data handling: listing of sources, labels, the uint8 photo cache and its manifest, patient-grouped splits."""

from fastfundus.data.build import build_cache
from fastfundus.data.cache import PhotoCache
from fastfundus.data.source import SourceList, list_photos

__all__ = ["PhotoCache", "SourceList", "build_cache", "list_photos"]
