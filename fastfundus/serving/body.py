"""Parsing of request bodies, bounded in size and kept in memory: photos of patients are never written to disk."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from urllib.parse import unquote

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

__all__ = ["MAX_FILES", "Body", "HeldBodies", "read_photos"]

MAX_FILES = 32
"""Maximum number of photos per request."""
_RAW = ("image/", "application/dicom", "application/octet-stream", "application/gzip", "application/x-gzip")


_PATIENCE_S = 5.0
"""Time in seconds that a body may take to arrive while there is no memory for others."""


class Body:
    """The body of one request, as far as it has arrived.

    Args:
        client: address of the client.
        drop: ends the request.
    """

    def __init__(self, client: str, drop: Callable[[], None]) -> None:
        self.client, self.drop = client, drop
        self.began = time.monotonic()
        self.bytes = 0
        self.complete = self.dropped = False


class HeldBodies:
    """Counts the bytes of all request bodies in memory, and refuses more than a limit.

    A body that has been arriving for long gives way to others: whoever sends nearly all of it and then stalls keeps
    nobody out.

    Args:
        max_bytes: maximum of their sum.
        max_bytes_of_client: maximum of the sum of one client address.
    """

    def __init__(self, max_bytes: int, max_bytes_of_client: int) -> None:
        self.max_bytes, self.max_bytes_of_client = max_bytes, max_bytes_of_client
        self._bodies: list[Body] = []

    @property
    def bytes(self) -> int:
        """Number of bytes in memory."""
        return sum(body.bytes for body in self._bodies)

    @contextmanager
    def account(self, body: Body) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes of a body, which are given back at the end.

        Raises:
            HTTPException: 503, raised by the function if there is no room for the bytes.
        """
        self._bodies.append(body)
        try:
            yield functools.partial(self._add, body)
        finally:
            if not body.dropped:
                self._bodies.remove(body)

    def _add(self, body: Body, count: int) -> None:
        of_client = [other for other in self._bodies if other.client == body.client]
        self._make_room(body, count, of_client, self.max_bytes_of_client, "of this client ")
        self._make_room(body, count, list(self._bodies), self.max_bytes, "")
        body.bytes += count

    def _make_room(self, body: Body, count: int, bodies: list[Body], limit: int, whose: str) -> None:
        """Drop the oldest of some bodies until their sum leaves room."""
        while (held := sum(other.bytes for other in bodies)) + count > limit:
            arriving = [other for other in bodies if not other.complete]
            oldest = min(arriving, key=lambda other: other.began)
            if oldest is body or time.monotonic() - oldest.began < _PATIENCE_S:
                raise HTTPException(
                    503,
                    f"{held} bytes of photos {whose}are in progress, at most {limit} allowed; retry shortly",
                    headers={"Retry-After": "1", "Connection": "close"},
                )
            oldest.dropped = True
            for kept in (bodies, self._bodies):
                kept.remove(oldest)
            oldest.drop()


async def read_photos(request: Request, max_bytes: int, count: Callable[[int], None]) -> list[tuple[str, bytes]]:
    """Return the names and contents of the photos in a request.

    Args:
        request: multipart/form-data with files, or one photo as the body, named by the header `Content-Disposition`.
        max_bytes: maximum size of the whole body.
        count: called with the number of bytes of each part of the body before it is kept.

    Raises:
        HTTPException: 413 if the body is too large, 415 if its type is not accepted, 400 if it is malformed or empty.
    """
    try:
        return await _read(request, max_bytes, count)
    except ClientDisconnect:
        # Nobody will read the answer; raised as an error, it would end in the log with a traceback.
        raise HTTPException(400, "the client left before the end of the body") from None


async def _read(request: Request, max_bytes: int, count: Callable[[int], None]) -> list[tuple[str, bytes]]:
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind == "multipart/form-data":
        coding = request.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise HTTPException(415, f"content encoding {coding!r} of a form; send it as it is, photos may be gzipped")
        return await _parts(request, max_bytes, count)
    if not kind.startswith(_RAW):
        raise HTTPException(
            415, f"content type {kind!r}: send multipart/form-data, or a photo as image/* or application/dicom"
        )
    data = b"".join([chunk async for chunk in _bounded(request, max_bytes, count)])
    if not data:
        raise HTTPException(400, "the body is empty; send a photo")
    return [(_file_name(request.headers.get("content-disposition", "inline")), data)]


def _file_name(disposition: str) -> str:
    header = Message()
    try:
        header["content-disposition"] = disposition
        return _printable(unquote(header.get_filename() or "photo"))
    except (ValueError, TypeError, LookupError, IndexError):
        # Line breaks, unknown character sets, and parameters that the parser of the standard library stumbles over.
        return "photo"


def _printable(name: str) -> str:
    """Return a name that can be part of an answer: character sets may decode to halves of characters."""
    return name.encode("utf-8", "backslashreplace").decode()


_PLAIN_NAME = re.compile(rb";\s*filename\s*=", re.IGNORECASE)


async def _parts(request: Request, max_bytes: int, count: Callable[[int], None]) -> list[tuple[str, bytes]]:
    parser = _InMemory(request.headers, _bounded(request, max_bytes, count), max_files=MAX_FILES, max_fields=8)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        if error.message.startswith("Too many files"):
            raise HTTPException(
                413, f"more than {MAX_FILES} photos in one request; send the others in another"
            ) from None
        raise HTTPException(400, f"malformed multipart/form-data: {error.message}") from None
    except (KeyError, ValueError, AssertionError, UnicodeError) as error:
        # Errors of the parser for headers that no regular client sends.
        raise HTTPException(400, f"malformed multipart/form-data ({type(error).__name__})") from None
    if not parser.ended:
        # The part that was cut is not in the form yet.
        for file in parser._files_to_close_on_error:
            file.close()
        raise HTTPException(400, "the body ends before its last part does; send it again")
    photos = []
    for _, part in form.multi_items():
        if isinstance(part, UploadFile):
            data = await part.read()
            # Browsers send an empty part for a file input that was left empty.
            if part.filename or data:
                photos.append((_printable(part.filename or "photo"), data))
    await form.close()
    if not photos:
        raise HTTPException(400, "the form contains no file; send photos as files, under any field name")
    return photos


class _InMemory(MultiPartParser):
    # Never reached, because the body is already bounded.
    spool_max_size = 1 << 62
    ended = False
    """Whether the closing boundary was seen: the parser itself accepts a body that was cut."""

    def on_end(self) -> None:
        self.ended = True

    def on_headers_finished(self) -> None:
        # The parser does not know names in the form of RFC 5987, which some clients write for letters beyond ASCII.
        disposition = self._current_part.content_disposition or b""
        if b"filename*" in disposition and not _PLAIN_NAME.search(disposition):
            name = _file_name(disposition.decode("latin-1")).replace("\\", "/").replace('"', "'")
            name = "".join(letter if letter.isprintable() else "_" for letter in name)
            self._current_part.content_disposition = disposition + b'; filename="' + name.encode() + b'"'
        super().on_headers_finished()


async def _bounded(request: Request, max_bytes: int, count: Callable[[int], None]) -> AsyncGenerator[bytes, None]:
    """Yield the body in chunks and enforce its maximum size, because its declared length cannot be trusted."""
    total = 0
    async for chunk in request.stream():
        total += len(chunk)
        if total > max_bytes:
            raise _too_large(max_bytes)
        count(len(chunk))
        yield chunk


def _too_large(max_bytes: int) -> HTTPException:
    # The rest of the body is not read, so the connection cannot be reused.
    return HTTPException(413, f"the body is larger than {max_bytes} bytes", headers={"Connection": "close"})
