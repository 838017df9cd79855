"""Preparation of photos in other processes, which may run out of time or memory, or crash, without harm.

A verdict on a photo is only returned if the photo is the cause. Whatever else goes wrong is tried again, and then
raised as a `TransientError`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import functools
import json
import math
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fastfundus.errors import TransientError
from fastfundus.machine import available_memory
from fastfundus.photo.decoder_process import FORK, JOB, KEPT_BYTES, MEMORY_BYTES, RESULT
from fastfundus.photo.prepare import PreparedPhoto, known_of
from fastfundus.records import FieldCircle, PhotoFacts, Status
from fastfundus.spec import PreprocessSpec

__all__ = ["LIMIT_S", "decoders_cpu_s", "prepare_isolated", "start_decoders"]

LIMIT_S = 60.0
"""CPU time in seconds that decoding a photo may take. The slowest intact photos take two seconds."""
_POLL_S = 0.25
_PAUSE_S = 1.0
_LAUNCHER_S = 60.0
"""Time in seconds within which the launcher must answer."""
_STALLED = 10
"""A decoder that has not answered after this many times its limit of CPU time is blocked, even on a busy machine."""
_CODE = "import sys; sys.path[:] = {path!r}; from fastfundus.photo.decoder_process import main; main({control})"
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT}
"""Signals that a decoder raises itself. Others come from outside: from a user, a batch system, or the kernel when
memory is short."""


def prepare_isolated(
    data: bytes,
    spec: PreprocessSpec,
    *,
    limit_s: float = LIMIT_S,
    cancelled: Callable[[], bool] = lambda: False,
    background: bool = False,
) -> PreparedPhoto:
    """Prepare a photo in another process; see `prepare_bytes`. Each calling thread uses a process of its own.

    Args:
        data: the bytes of the file, decompressed if it was gzipped.
        spec: the preprocessing to apply.
        limit_s: CPU time that decoding may take, in seconds; rounded up to whole seconds.
        cancelled: asked now and then; the process is killed once it returns True.
        background: decode only with the processor time that other processes leave.

    Raises:
        TransientError: memory is short, the process was killed from outside, none can be started, or the work was
            cancelled.
    """
    fault = _Fault("")
    for attempt in range(2):
        if attempt:
            time.sleep(_PAUSE_S)
        outcome = _attempt(data, spec, limit_s, cancelled, background)
        if isinstance(outcome, PreparedPhoto):
            return outcome
        fault = outcome
        if fault.final:
            break
    if fault.verdict is None:
        raise TransientError(fault.reason)
    return replace(known_of(data), status=fault.verdict, reason=fault.reason)


def start_decoders() -> None:
    """Start the process from which decoders are forked, if it does not run yet, so that it is ready when needed."""
    with _lock, contextlib.suppress(OSError):
        _running()


def decoders_cpu_s() -> float:
    """Return the CPU time in seconds that the processes have used which decode for this one, those that ended included.

    Decoders that are busy right now do not count.
    """
    with _lock:
        processes = [decoder.process for decoder in _idle]
        if _launcher is not None:
            processes.append(_launcher._process.pid)
    ticks = 0
    for process in processes:
        with contextlib.suppress(OSError), open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            # User and system time of the process, and of those that it has waited for; the name may contain spaces.
            ticks += sum(map(int, file.read().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class _Fault:
    """What kept a decoder from answering."""

    reason: str
    verdict: Status | None = None
    """Status of the photo if it is the cause."""
    final: bool = False
    """Whether another attempt would end in the same way."""


def _attempt(
    data: bytes, spec: PreprocessSpec, limit_s: float, cancelled: Callable[[], bool], background: bool
) -> PreparedPhoto | _Fault:
    try:
        decoder = _take()
    except OSError as error:
        return _Fault(f"no decoder process can be started ({error.strerror or error})")
    try:
        if background:
            decoder.yield_processor()
        answer = decoder.run(data, spec, limit_s, cancelled)
    except OSError as error:
        decoder.end()
        return _Fault(f"its decoder cannot be reached ({error.strerror or error})")
    except BaseException:
        decoder.give_up("interrupted")
        raise
    if answer is None:
        if decoder.given_up:
            return decoder.given_up
        return _fault_of(decoder.end(), decoder.waited_s, limit_s, decoder.memory_is_short())
    if background:
        # Only a privileged process could raise the priority again.
        decoder.leave()
    else:
        with _lock:
            _idle.append(decoder)
    if "memory" in answer:
        if answer["memory"] == "ours":
            return _Fault(f"decoding it needs more than {MEMORY_BYTES >> 30} GiB of memory", Status.UNSUPPORTED, True)
        return _Fault("there is not enough memory to decode it")
    return _prepared(answer)


def _fault_of(status: int | None, waited_s: float, limit_s: float, memory_is_short: bool) -> _Fault:
    """Return what a decoder ended of, from its wait status."""
    if status is None:
        return _Fault("its decoder was killed together with the process that starts decoders")
    if not os.WIFSIGNALED(status):
        return _Fault(f"its decoder ended with exit code {os.waitstatus_to_exitcode(status)}")
    number = os.WTERMSIG(status)
    # Without having run for that long, it met another limit, such as one of a batch system.
    if number == signal.SIGXCPU and waited_s >= 0.8 * limit_s:
        reason = f"decoding takes more than {limit_s:g} s of CPU time; open it in another program and save it again"
        return _Fault(reason, Status.UNREADABLE, True)
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number not in _CRASHES:
        return _Fault(f"its decoder was killed ({name}), perhaps because memory is short")
    if memory_is_short:
        # Libraries that do not check whether they got memory crash.
        return _Fault(f"its decoder crashed ({name}) while memory was short")
    return _Fault(f"it crashes the decoder ({name})", Status.UNREADABLE)


def _prepared(answer: dict[str, Any]) -> PreparedPhoto:
    field, window = answer["field"], answer["window"]
    return PreparedPhoto(
        **answer
        | {
            "status": Status(answer["status"]),
            "field": field and FieldCircle(**field),
            "window": window and tuple(window),
            "facts": PhotoFacts(**answer["facts"]),
        }
    )


class _Decoder:
    """A decoder process."""

    def __init__(self, launcher: _Launcher) -> None:
        self._launcher = launcher
        self.given_up: _Fault | None = None
        """Why the process was killed from here."""
        self.source = self.target = -1
        self.waited_s = 0.0
        """Seconds for which the last photo was waited for, without the time of a suspended machine."""
        self.channel, theirs = _connection()
        try:
            self.source, self.target = _shared_memory("photo"), _shared_memory("pixels")
            self.process = launcher.fork([theirs.fileno(), self.source, self.target])
            self._memory = mmap.mmap(self.source, KEPT_BYTES)
        except BaseException:
            self._close()
            raise
        finally:
            theirs.close()

    def run(
        self, data: bytes, spec: PreprocessSpec, limit_s: float, cancelled: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Return the answer, with pixels as an array under "image"; None if the process ended or was killed."""
        text = _spec_json(spec)
        used = len(data) + len(text)
        if used > KEPT_BYTES and not self._ask(JOB.pack(used, 0, 0.0), limit_s, cancelled):
            return None
        # A mapping, because writing to the file would be subject to this process's limit on file sizes.
        memory = self._memory if used <= KEPT_BYTES else mmap.mmap(self.source, used)
        memory[: len(data)] = data
        memory[len(data) : used] = text
        result = self._ask(JOB.pack(len(data), len(text), limit_s), limit_s, cancelled)
        if not result:
            return None
        pixels, size = RESULT.unpack(result)
        answer: dict[str, Any] = json.loads(os.pread(self.target, size, pixels))
        if pixels:
            answer["image"] = np.empty(answer["image"], np.uint8)
            os.preadv(self.target, [answer["image"]], 0)
        if used > KEPT_BYTES:
            memory.close()
            os.ftruncate(self.source, KEPT_BYTES)
        if pixels + size > KEPT_BYTES:
            os.ftruncate(self.target, 0)
        return answer

    def _ask(self, message: bytes, limit_s: float, cancelled: Callable[[], bool]) -> bytes:
        """Send a message and return the answer, empty if the process ended or was killed."""
        try:
            self.channel.send(message)
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return self._wait(limit_s, cancelled)

    def _wait(self, limit_s: float, cancelled: Callable[[], bool]) -> bytes:
        ready = select.poll()
        ready.register(self.channel, select.POLLIN)
        self.waited_s, before = 0.0, time.monotonic()
        while not ready.poll(_POLL_S * 1000):
            # A machine that was suspended, or a process that was stopped, has not waited all that time.
            now = time.monotonic()
            self.waited_s, before = self.waited_s + min(now - before, 2 * _POLL_S), now
            if cancelled():
                self.give_up("cancelled")
                return b""
            if self.waited_s > _STALLED * math.ceil(limit_s):
                self.give_up(f"decoding it made no progress for {_STALLED * math.ceil(limit_s)} s")
                return b""
        try:
            return self.channel.recv(RESULT.size)
        except ConnectionResetError:
            return b""

    def yield_processor(self) -> None:
        """Give the process the lowest priority."""
        os.setpriority(os.PRIO_PROCESS, self.process, 19)

    def give_up(self, reason: str) -> None:
        """Kill the process."""
        self.given_up = _Fault(reason, final=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        self.end()

    def end(self) -> int | None:
        """Close the connection, which ends the process, and return its wait status; None if nobody knows it."""
        self._close()
        try:
            return self._launcher.status(self.process)
        except OSError:
            return None

    def memory_is_short(self) -> bool:
        """Return whether the system, or a limit that decoders inherit, leaves less memory than a decoder may use."""
        return self._launcher.memory_is_short()

    def leave(self) -> None:
        """Close the connection, which ends the process, and do not wait for its end."""
        self._close()
        with contextlib.suppress(OSError):
            self._launcher.forget(self.process)

    def _close(self) -> None:
        self.channel.close()
        for file in (self.source, self.target):
            if file >= 0:
                os.close(file)


class _Launcher:
    """The process from which decoders are forked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.channel, theirs = _connection()
        self.channel.settimeout(_LAUNCHER_S)
        one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            code = _CODE.format(path=[os.path.abspath(entry) for entry in sys.path], control=theirs.fileno())
            # A session of its own keeps Ctrl-C and Ctrl-Z of the terminal away.
            self._process = subprocess.Popen(
                [sys.executable, "-c", code], pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ | one_thread,
            )  # fmt: skip

    def memory_is_short(self) -> bool:
        """See `_Decoder.memory_is_short`."""
        free = available_memory()
        with contextlib.suppress(OSError):
            soft, _ = resource.prlimit(self._process.pid, resource.RLIMIT_AS)
            if soft != resource.RLIM_INFINITY and soft < 2 * MEMORY_BYTES:
                return True
        return free is not None and free < MEMORY_BYTES // 4

    def fork(self, descriptors: list[int]) -> int:
        """Fork a decoder that owns copies of the descriptors, and return its process ID."""
        with self._lock:
            socket.send_fds(self.channel, [FORK], descriptors)
            return self._answer()

    def status(self, process: int) -> int:
        """Return the wait status of a decoder that ended."""
        with self._lock:
            self.channel.send(b"%d" % process)
            return self._answer()

    def forget(self, process: int) -> None:
        """Let the launcher clean up after a decoder that ends."""
        with self._lock:
            self.channel.send(b"%d" % -process)

    def _answer(self) -> int:
        try:
            answer = self.channel.recv(64)
        except TimeoutError:
            # Its answer might come later, and be taken for that to another question.
            self._process.kill()
            # Otherwise the next attempt might still find it there.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            raise TimeoutError("the process that starts decoders does not answer; was it stopped?") from None
        if not answer:
            raise ConnectionResetError("the process that starts decoders has ended")
        if (number := int(answer)) < 0:
            advice = "; raise the limit on file sizes (ulimit -f)" if -number == errno.EFBIG else ""
            raise OSError(-number, os.strerror(-number) + advice)
        return number

    def ended(self) -> bool:
        """Return whether the process has ended."""
        return self._process.poll() is not None

    def close(self, wait: bool = True) -> None:
        """Let the process and its decoders end."""
        self.channel.close()
        if wait:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)


def _connection() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that are none of the standard streams, even if those of this process are closed."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return socket.socket(fileno=_above_streams(here.detach())), socket.socket(fileno=_above_streams(there.detach()))


def _shared_memory(name: str) -> int:
    return _above_streams(os.memfd_create(name))


def _above_streams(descriptor: int) -> int:
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


_lock = threading.Lock()
_launcher: _Launcher | None = None
_idle: list[_Decoder] = []


def _running() -> _Launcher:
    """Return the launcher, started if need be; `_lock` must be held."""
    global _launcher
    if _launcher is not None and _launcher.ended():
        _forget()
    if _launcher is None:
        _launcher = _Launcher()
    return _launcher


def _take() -> _Decoder:
    with _lock:
        launcher = _running()
        if _idle:
            return _idle.pop()
    return _Decoder(launcher)


def _forget(wait: bool = True) -> None:
    """Close the sockets, which ends the launcher and the idle decoders unless another process has copies of them."""
    global _launcher
    for decoder in _idle:
        decoder._close()
    _idle.clear()
    if _launcher is not None:
        _launcher.close(wait)
        _launcher = None


def _forget_parents() -> None:
    global _lock
    _lock = threading.Lock()
    _forget(wait=False)


atexit.register(_forget)
os.register_at_fork(after_in_child=_forget_parents)


@functools.lru_cache(maxsize=8)
def _spec_json(spec: PreprocessSpec) -> bytes:
    return json.dumps(spec.to_dict()).encode()
