"""The code of decoder processes: each prepares photos that its parent sends, within limits of memory and CPU time.

One process, the launcher, imports what decoding needs, stays single-threaded and forks the decoders, so that a decoder
that was killed is replaced within milliseconds. Photos and results travel through shared memory; the sockets carry only
their sizes. Nothing that a decoder sends is unpickled or executed.
"""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import resource
import signal
import socket
import struct
from dataclasses import asdict, replace
from functools import lru_cache

import cv2
import numpy as np

from fastfundus.errors import PhotoError
from fastfundus.photo.file import unpacked
from fastfundus.photo.memory import keep_memory
from fastfundus.photo.prepare import PreparedPhoto, prepare_bytes
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec

__all__ = ["FORK", "JOB", "KEPT_BYTES", "MEMORY_BYTES", "RESULT", "main"]

MEMORY_BYTES = 4 << 30
"""Memory a decoder may use beyond what it starts with. The largest photo that is accepted needs less than half."""
JOB = struct.Struct("<QQd")
"""A job: bytes of the photo, bytes of the spec's JSON behind it, and the limit of CPU time in seconds. Without a spec,
it asks for shared memory of at least that many bytes."""
RESULT = struct.Struct("<QQ")
"""A result: bytes of the pixels, and bytes of the JSON behind them."""
KEPT_BYTES = 32 << 20
"""Shared memory that a decoder keeps from one photo to the next."""
FORK = b"fork"
"""Asks the launcher for a decoder; it answers with its process ID, or the negative number of an error. Another message
is the ID of a process that ends, and is answered with its wait status; one that is negative is not answered."""
_SPARE_BYTES = 512 << 20
_BYTES_PER_PIXEL = 12
"""More than a decoder needs at once: the picture in 16 bits with alpha, and the result in 8 bits."""


def main(control: int) -> None:
    """Fork decoders on request until the parent process is gone."""
    # The parent's standard error may be closed: nothing else may get its number.
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass
    channel = socket.socket(fileno=control)
    # Ctrl-C reaches every process of a terminal. The parent decides what it means, and closes its sockets.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A core dump would contain the photo of a patient.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Shared memory counts as a file. A limit on file sizes is meant for results, and it is soft as a rule.
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    keep_memory()
    cv2.setNumThreads(1)
    gc.freeze()
    decoders: set[int] = set()
    # Decoders of low priority may take long to end; nobody waits for them.
    ending: set[int] = set()
    while True:
        message, descriptors, *_ = socket.recv_fds(channel, 64, 3)
        if not message:
            # Idle decoders see that their own sockets are closed; busy and stopped ones do not.
            for decoder in decoders:
                os.kill(decoder, signal.SIGKILL)
            os._exit(0)
        if message != FORK:
            if (process := int(message)) > 0:
                channel.send(b"%d" % os.waitpid(process, 0)[1])
                decoders.discard(process)
            else:
                ending.add(-process)
            continue
        for process in [process for process in ending if os.waitpid(process, os.WNOHANG)[0]]:
            ending.discard(process)
            decoders.discard(process)
        try:
            os.ftruncate(descriptors[1], KEPT_BYTES)
            process = os.fork()
        except OSError as error:
            for descriptor in descriptors:
                os.close(descriptor)
            channel.send(b"-%d" % (error.errno or errno.EIO))
            continue
        if process == 0:
            channel.close()
            _serve(*descriptors)
        decoders.add(process)
        for descriptor in descriptors:
            os.close(descriptor)
        channel.send(b"%d" % process)


def _serve(jobs: int, source: int, target: int) -> None:
    """Prepare photos until the parent process is gone; never returns.

    Args:
        jobs: socket of jobs and results.
        source: shared memory with the photo and the spec.
        target: shared memory for the pixels and the JSON of the result.
    """
    # Libraries write remarks on damaged files to stderr; the result contains ours.
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    channel = socket.socket(fileno=jobs)
    ours = _limit_memory()
    while message := channel.recv(JOB.size):
        size, spec_size, seconds = JOB.unpack(message)
        if not spec_size:
            os.ftruncate(source, size)
            channel.send(RESULT.pack(0, 0))
            continue
        _limit_time(seconds)
        spec = _spec(os.pread(source, spec_size, size))
        pixels, answer = b"", {}
        try:
            prepared = _prepare(os.pread(source, size, 0), spec)
            answer = asdict(replace(prepared, image=None))
            if prepared.image is not None:
                pixels, answer["image"] = prepared.image.tobytes(), prepared.image.shape
        except MemoryError:
            answer = {"memory": "ours" if ours and _has_memory() else "theirs"}
        text = json.dumps(answer).encode()
        os.pwrite(target, pixels, 0)
        os.pwrite(target, text, len(pixels))
        channel.send(RESULT.pack(len(pixels), len(text)))
    os._exit(0)


def _prepare(data: bytes, spec: PreprocessSpec) -> PreparedPhoto:
    try:
        prepared = prepare_bytes(unpacked(data), spec)
    except PhotoError as error:
        return PreparedPhoto(error.status, error.reason)
    if prepared.status is Status.UNREADABLE:
        # Libraries report a lack of memory as if the file were damaged.
        np.empty(max(prepared.width_px * prepared.height_px * _BYTES_PER_PIXEL, _SPARE_BYTES), np.uint8)
    return prepared


def _has_memory() -> bool:
    """Return whether the system grants a quarter of what a decoder may use, now that the photo's share is free."""
    try:
        np.empty(MEMORY_BYTES // 4, np.uint8)
    except MemoryError:
        return False
    return True


@lru_cache(maxsize=8)
def _spec(text: bytes) -> PreprocessSpec:
    return PreprocessSpec.from_dict(json.loads(text))


def _limit_memory() -> bool:
    """Limit the address space; return False if a lower limit was inherited, which then decides what fits."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + MEMORY_BYTES
    if soft != resource.RLIM_INFINITY and soft < limit:
        return False
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    return True


def _limit_time(seconds: float) -> None:
    """Let the kernel end this process once it has used that much more CPU time, rounded up to whole seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    # A lower hard limit ends the process by SIGKILL, which is no verdict on the photo.
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
