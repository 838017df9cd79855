"""The HTTP application: screening by POST, health, metrics, and a web page for uploading photos."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fastfundus import __version__
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.heatmap import Heatmapper
from fastfundus.errors import FastFundusError
from fastfundus.screening.pipeline import ScreenedPhoto
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.serving.body import MAX_FILES, Body, HeldBodies, read_photos
from fastfundus.serving.metrics import Metrics
from fastfundus.serving.service import Busy, Service

__all__ = ["Limits", "create_app"]

_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_HEALTH = ("/livez", "/readyz", "/healthz")
_HEADERS = {
    # The page loads nothing from other hosts and must not be framed.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one server."""

    max_bytes: int = 64 << 20
    """Maximum size of a request body, in bytes."""
    max_s: float = 60.0
    """Timeout of a request in seconds, from its first byte to the response."""
    max_waiting: int = 128
    """Maximum number of photos in progress at once."""
    hang_s: float = 20.0
    """CPU time that decoding a photo may take, in seconds."""

    @property
    def max_held_bytes(self) -> int:
        """Maximum size of all request bodies in memory, in bytes."""
        return 16 * self.max_bytes

    @property
    def max_held_bytes_of_client(self) -> int:
        """Maximum size of the request bodies of one client address in memory, in bytes."""
        return max(self.max_bytes, self.max_held_bytes // 2)

    @property
    def max_waiting_of_client(self) -> int:
        """Maximum number of photos in progress of one client address: one client must not keep out the others."""
        return min(self.max_waiting, max(MAX_FILES, self.max_waiting // 2))


class PhotoResult(BaseModel):
    """Result of one photo, with the columns of results.csv."""

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
    """Response to a request: one result per photo, in the order they were sent."""

    bundle: str
    thresholds: dict[str, float]
    findings: list[str]
    results: list[PhotoResult]


_Screened = tuple[list[ScreenedPhoto], list[PhotoResult]]


def create_app(
    bundle: Bundle,
    *,
    policy: ScreenPolicy | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: list[str] | None = None,
) -> FastAPI:
    """Create the application. Its engine is loaded when the server starts.

    Args:
        bundle: the bundle to screen with.
        policy: the decision policy; None uses the default policy.
        limits: limits of the server; None uses the defaults.
        token: token that requests must send as `Authorization: Bearer ...`; None requires none.
        hosts: accepted names in the Host header; None accepts any. Prevents web pages of other origins from reaching a
            server on loopback through a host name of their own (DNS rebinding).
    """
    limits, metrics = limits or Limits(), Metrics(bundle)
    state: dict[str, Service] = {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = state["service"] = Service(
            bundle,
            policy or ScreenPolicy(),
            max_waiting=limits.max_waiting,
            hang_s=limits.hang_s,
            on_batch=metrics.batch,
        )
        try:
            yield
        finally:
            service.close()

    # The generated API documentation pages would load scripts from other hosts.
    app = FastAPI(title="FastFundus", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    if hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    _add_guard(app, token, metrics)
    _add_screening(app, bundle, limits, metrics, state)
    _add_status(app, bundle, limits, metrics, state)
    for path, (name, kind) in _PAGE.items():
        content = resources.files("fastfundus.serving").joinpath(name).read_bytes()
        app.add_api_route(path, _constant(content, kind), methods=["GET", "HEAD"], include_in_schema=False)
    return app


def _add_guard(app: FastAPI, token: str | None, metrics: Metrics) -> None:
    """Check tokens, set security headers, and record the outcome of every request."""

    @app.middleware("http")
    async def guard(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        open_to_all = request.url.path in (*_PAGE, *_HEALTH)
        if _is_cross_site(request):
            response: Response = JSONResponse({"detail": "requests from pages of other sites are refused"}, 403)
        elif token is not None and not open_to_all and not _has_token(request, token):
            response = JSONResponse(
                {"detail": "a token is required: Authorization: Bearer ..."}, 401, {"WWW-Authenticate": "Bearer"}
            )
        else:
            response = await proceed(request)
        response.headers.update(_HEADERS)
        if request.url.path == "/v1/screen":
            metrics.answered(response.status_code, time.perf_counter() - began)
        return response


def _add_screening(app: FastAPI, bundle: Bundle, limits: Limits, metrics: Metrics, state: dict[str, Service]) -> None:
    """Add the route that screens photos."""
    held = HeldBodies(limits.max_held_bytes, limits.max_held_bytes_of_client)
    photos_of = Counter[str]()

    async def screened_of(request: Request, service: Service, pictures: bool, body: Body) -> _Screened:
        client = body.client
        with held.account(body) as count:
            photos = await read_photos(request, limits.max_bytes, count)
            body.complete = True
            if len(photos) > limits.max_waiting_of_client:
                raise HTTPException(
                    413, f"{len(photos)} photos in one request; send at most {limits.max_waiting_of_client} at once"
                )
            # Accept all photos of a request or none: a partial refusal would lose photos.
            if service.under_way + len(photos) > limits.max_waiting:
                raise Busy(f"{service.under_way} photos are in progress, at most {limits.max_waiting} allowed")
            if photos_of[client] + len(photos) > limits.max_waiting_of_client:
                raise Busy(
                    f"{photos_of[client]} photos of this client are in progress, at most "
                    f"{limits.max_waiting_of_client} allowed"
                )
            photos_of[client] += len(photos)
            try:
                return await _while_connected(request, _screen_all(service, photos, pictures))
            finally:
                photos_of[client] -= len(photos)
                if not photos_of[client]:
                    del photos_of[client]

    @app.post("/v1/screen")
    async def screen(request: Request, pictures: bool = False) -> ScreenResponse:
        """Screen photos sent as multipart/form-data with up to 32 files, or one photo sent as the body.

        With `pictures`, results include the scored crop and a heatmap as data URLs.
        """
        service = state["service"]
        try:
            async with asyncio.timeout(limits.max_s) as limit:
                body = Body(
                    request.client.host if request.client else "",
                    drop=lambda: limit.reschedule(asyncio.get_running_loop().time()),
                )
                screened, results = await screened_of(request, service, pictures, body)
        except TimeoutError:
            if body.dropped:
                raise HTTPException(
                    408, "the photos arrived too slowly while others waited; send them again",
                    headers={"Connection": "close"},
                ) from None  # fmt: skip
            raise HTTPException(504, f"not done within {limits.max_s:g} s", headers={"Connection": "close"}) from None
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


def _add_status(app: FastAPI, bundle: Bundle, limits: Limits, metrics: Metrics, state: dict[str, Service]) -> None:
    """Add the routes that describe the server."""

    async def livez() -> JSONResponse:
        """Return whether the server works: if not, restart it."""
        service = state["service"]
        health = {"status": service.fault or "ok", "version": __version__, "bundle": bundle.fingerprint}
        health |= {"backend": bundle.backend, "precision": bundle.precision}
        return JSONResponse(health, 503 if service.fault else 200)

    async def readyz() -> JSONResponse:
        """Return whether the server takes photos now: if not, send them to another one."""
        service = state["service"]
        busy = "busy" if service.under_way >= limits.max_waiting else ""
        return JSONResponse(
            {"status": service.fault or busy or "ok", "photos_waiting": service.under_way},
            503 if service.fault or busy else 200,
        )

    for path, answer in (("/livez", livez), ("/healthz", livez), ("/readyz", readyz)):
        app.add_api_route(path, answer, methods=["GET", "HEAD"], operation_id=path[1:])

    @app.get("/v1/about")
    async def about() -> dict[str, Any]:
        """Return the bundle that screens photos, its thresholds, and the limits."""
        return {
            "version": __version__,
            "bundle": bundle.fingerprint,
            "findings": list(bundle.findings),
            "thresholds": dict(zip(bundle.labels, bundle.thresholds, strict=True)),
            "heatmaps": Heatmapper.available(bundle),
            "limits": {
                "bytes": limits.max_bytes,
                "bytes_in_memory": limits.max_held_bytes,
                "bytes_in_memory_of_client": limits.max_held_bytes_of_client,
                "seconds": limits.max_s,
                "photos_waiting": limits.max_waiting,
                "photos_waiting_of_client": limits.max_waiting_of_client,
            },
        }

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Return metrics in the Prometheus text format."""
        return Response(metrics.text(state["service"]), media_type=metrics.media_type)


def _is_cross_site(request: Request) -> bool:
    """Return whether a browser sends a POST for a page of another site, which does harm even if it cannot be read."""
    if request.method in ("GET", "HEAD"):
        return False
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("none", "same-origin")
    origin = request.headers.get("origin")
    try:
        return origin is not None and urlsplit(origin).netloc != request.headers.get("host", "")
    except ValueError:
        return True


async def _while_connected(request: Request, work: Coroutine[Any, Any, _Screened]) -> _Screened:
    """Return the result of some work, and cancel it if the client leaves.

    Raises:
        HTTPException: 400 if the client has left, which only metrics see.
    """
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise HTTPException(400, "the client left before the answer")
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _screen_all(service: Service, photos: list[tuple[str, bytes]], pictures: bool) -> _Screened:
    screened = await asyncio.gather(*[service.screen(name, data) for name, data in photos])
    return screened, [await _result(service, photo, pictures) for photo in screened]


def _has_token(request: Request, token: str) -> bool:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Compare in constant time, so that the duration reveals nothing about the token.
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _constant(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=kind)

    return answer


async def _result(service: Service, photo: ScreenedPhoto, pictures: bool) -> PhotoResult:
    shown = await service.pictures(photo) if pictures else {}
    return PhotoResult(**service.row(photo) | shown)
