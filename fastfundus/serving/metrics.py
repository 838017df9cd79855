"""Prometheus metrics. They contain nothing that could identify a patient."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastfundus import __version__
from fastfundus.engines.bundle import Bundle
from fastfundus.screening.pipeline import ScreenedPhoto
from fastfundus.serving.service import MAX_AT_ONCE, Service

__all__ = ["Metrics"]

_SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = tuple(size for size in (1, 2, 4, 8, 16, 32) if size <= MAX_AT_ONCE)


class Metrics:
    """Metrics of one server, in their own registry."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, bundle: Bundle) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("fastfundus_requests", "Screening requests.", ["code"], registry=registry)
        self._seconds = Histogram(
            "fastfundus_request_seconds", "Duration of screening requests.", buckets=_SECONDS, registry=registry
        )
        self._photos = Counter("fastfundus_photos", "Photos by status.", ["status"], registry=registry)
        self._decisions = Counter("fastfundus_decisions", "Photos by decision.", ["decision"], registry=registry)
        self._batches = Histogram(
            "fastfundus_batch_photos", "Photos per engine call.", buckets=_SIZES, registry=registry
        )
        self._under_way = Gauge("fastfundus_photos_under_way", "Photos in progress.", registry=registry)
        info = Gauge(
            "fastfundus_info", "Server version.", ["version", "bundle", "backend", "precision"], registry=registry
        )
        info.labels(__version__, bundle.fingerprint, bundle.backend, bundle.precision).set(1)

    def answered(self, code: int, seconds: float) -> None:
        """Count a request and its duration in seconds."""
        self._requests.labels(str(code)).inc()
        self._seconds.observe(seconds)

    def screened(self, photos: Iterable[ScreenedPhoto]) -> None:
        """Count photos by status and decision."""
        for photo in photos:
            self._photos.labels(photo.status.value).inc()
            if photo.decision is not None:
                self._decisions.labels(photo.decision).inc()

    def batch(self, photos: int) -> None:
        """Count an engine call and its number of photos."""
        self._batches.observe(photos)

    def text(self, service: Service) -> bytes:
        """Return all metrics in the Prometheus text format."""
        self._under_way.set(service.under_way)
        return generate_latest(self._registry)
