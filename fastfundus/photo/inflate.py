"""The length of compressed data, without keeping what it expands to. Standard library only."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

__all__ = ["inflated_length"]

_PIECE = 1 << 20


def inflated_length(
    parts: Iterable[bytes], *, wbits: int = zlib.MAX_WBITS, limit: int | None = None
) -> tuple[int, bool]:
    """Inflate a stream in pieces, so that a small file cannot demand a large buffer, and count its bytes.

    Args:
        parts: the consecutive parts of one zlib or deflate stream.
        wbits: format and window of the stream, see `zlib.decompressobj`.
        limit: stop once more bytes than this were counted; None counts all.

    Returns:
        The number of bytes, and whether the stream is complete; its checksum is then right.

    Raises:
        zlib.error: the stream is damaged.
    """
    inflate, length = zlib.decompressobj(wbits), 0
    for part in parts:
        pending = part
        while pending and not inflate.eof and (limit is None or length <= limit):
            length += len(inflate.decompress(pending, _PIECE))
            pending = inflate.unconsumed_tail
    return length, inflate.eof
