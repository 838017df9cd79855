"""The HTTP interface: POST photos, health, metrics, and a page to drop photos on."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fastfundus import __version__
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.heatmap import Heatmapper
from fastfundus.errors import FastFundusError
from fastfundus.screen.pipeline import ScreenedPhoto
from fastfundus.screen.policy import ScreenPolicy
from fastfundus.serve.body import read_photos
from fastfundus.serve.metrics import Metrics
from fastfundus.serve.service import Busy, Service

__all__ = ["Limits", "create_app"]

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEADERS = {
    # The page needs nothing but itself, and nobody may frame it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one server takes."""

    most_bytes: int = 64 << 20
    """Of a request's body."""
    most_s: float = 60.0
    """From the first byte of a request to its answer."""
    most_waiting: int = 128
    """Photos under way at once."""
    hang_s: float = 20.0
    """A photo that takes longer to decode is given up."""


class PhotoResult(BaseModel):
    """What became of one photo: the columns of results.csv."""

    file: str
    sha256: str | None
    status: str
    reason: str | None
    eye: str | None
    camera: str | None
    quality: float | None
    probabilities: dict[str, float]
    decision: str | None
    crop: str | None = None
    heatmap: str | None = None


class ScreenResponse(BaseModel):
    """Answer to one request: a result a photo, in the order they were sent."""

    bundle: str
    thresholds: dict[str, float]
    findings: list[str]
    results: list[PhotoResult]


def create_app(
    bundle: Bundle,
    *,
    policy: ScreenPolicy | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: list[str] | None = None,
) -> FastAPI:
    """Make the application; its engine is loaded when the server starts.

    Args:
        bundle: what to screen with.
        policy: how to decide; None takes the plain one.
        limits: what it takes.
        token: what requests must bring as `Authorization: Bearer ...`; None asks for none.
        hosts: names it may be asked by; None takes any. Keeps web pages elsewhere from reaching a server on loopback
            through a name of theirs.
    """
    limits, metrics = limits or Limits(), Metrics(bundle)
    state: dict[str, Service] = {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = state["service"] = Service(
            bundle,
            policy or ScreenPolicy(),
            most_waiting=limits.most_waiting,
            hang_s=limits.hang_s,
            on_batch=metrics.batch,
        )
        try:
            yield
        finally:
            service.close()

    # The pages that explain the interface would be loaded from elsewhere.
    app = FastAPI(title="FastFundus", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.middleware("http")
    async def guard(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        open_to_all = request.url.path in (*_PAGE, "/healthz")
        if token is not None and not open_to_all and not _has_token(request, token):
            response: Response = JSONResponse(
                {"detail": "a token is needed: Authorization: Bearer ..."}, 401, {"WWW-Authenticate": "Bearer"}
            )
        else:
            response = await proceed(request)
        response.headers.update(_HEADERS)
        if request.url.path == "/v1/screen":
            metrics.answered(response.status_code, time.perf_counter() - began)
        return response

    @app.post("/v1/screen")
    async def screen(request: Request, pictures: bool = False) -> ScreenResponse:
        """Screen photos: multipart/form-data with up to 32 files, or one photo as the body.

        `pictures` adds the crop that was scored and a heatmap, as data URLs.
        """
        service = state["service"]
        try:
            async with asyncio.timeout(limits.most_s):
                photos = await read_photos(request, limits.most_bytes)
                # All or none: a request that is half refused would lose photos.
                if service.under_way + len(photos) > limits.most_waiting:
                    raise Busy(f"{service.under_way} photos are under way, at most {limits.most_waiting} are taken")
                screened = await asyncio.gather(*[service.screen(name, data) for name, data in photos])
                results = [await _result(service, photo, pictures) for photo in screened]
        except TimeoutError:
            raise HTTPException(504, f"not done in {limits.most_s:g} s", headers={"Connection": "close"}) from None
        except Busy as error:
            raise HTTPException(503, str(error), headers={"Retry-After": "1"}) from None
        except FastFundusError as error:
            raise HTTPException(500, str(error)) from None
        metrics.screened(screened)
        return ScreenResponse(
            bundle=bundle.fingerprint,
            thresholds=dict(zip(bundle.labels, bundle.thresholds, strict=True)),
            findings=list(bundle.findings),
            results=results,
        )

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Whether photos can be answered."""
        service = state["service"]
        told = {"status": service.fault or "ok", "version": __version__, "bundle": bundle.fingerprint}
        told |= {"backend": bundle.backend, "precision": bundle.precision}
        return JSONResponse(told, 503 if service.fault else 200)

    @app.get("/v1/about")
    async def about() -> dict[str, Any]:
        """What photos are screened with."""
        return {
            "version": __version__,
            "bundle": bundle.fingerprint,
            "findings": list(bundle.findings),
            "thresholds": dict(zip(bundle.labels, bundle.thresholds, strict=True)),
            "heatmaps": Heatmapper.available(bundle),
            "limits": {"bytes": limits.most_bytes, "seconds": limits.most_s, "photos_waiting": limits.most_waiting},
        }

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Counts and times, as Prometheus reads them."""
        return Response(metrics.text(state["service"]), media_type=metrics.media_type)

    for path, (name, kind) in _PAGE.items():
        content = resources.files("fastfundus.serve").joinpath(name).read_bytes()
        app.add_api_route(path, _constant(content, kind), include_in_schema=False)
    return app


def _has_token(request: Request, token: str) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # In constant time: how long it takes tells nothing of the token.
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _constant(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


async def _result(service: Service, photo: ScreenedPhoto, pictures: bool) -> PhotoResult:
    shown = await service.pictures(photo) if pictures else {}
    return PhotoResult(**service.row(photo) | shown)
