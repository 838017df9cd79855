"""Decoder processes: the same results as in this process, and a verdict only if the photo is the cause."""

from __future__ import annotations

import gzip
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from fastfundus.errors import TransientError
from fastfundus.photo import isolation
from fastfundus.photo.cost import estimate_decode_s
from fastfundus.photo.isolation import prepare_isolated, start_decoders
from fastfundus.photo.prepare import PreparedPhoto, prepare_bytes
from fastfundus.records import Status
from fastfundus.spec import PreprocessSpec

SPEC = PreprocessSpec(size=64)


@pytest.fixture
def good(broken_photos: Path) -> bytes:
    return (broken_photos / "good.jpg").read_bytes()


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A colour picture that takes more than a second to decode."""
    noise = np.random.default_rng(0).integers(0, 256, (6000, 9000, 3), np.uint8)
    noise[..., 0] = 0
    return bytes(cv2.imencode(".png", noise, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_PAUSE_S", 0.0)


def signal_each(monkeypatch: pytest.MonkeyPatch, number: int, times: int = 100) -> list[int]:
    """Send a signal to the first decoders that begin a photo; return the list of their process IDs."""
    struck: list[int] = []
    ask = isolation._Decoder._ask

    # Before the photo is sent, because it may be answered within a millisecond.
    def strike(decoder: isolation._Decoder, *arguments: object) -> bytes:
        if len(struck) < times:
            struck.append(decoder.process)
            os.kill(decoder.process, number)
        return ask(decoder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(isolation._Decoder, "_ask", strike)
    return struck


def same(one: PreparedPhoto, other: PreparedPhoto) -> None:
    assert replace(one, image=None) == replace(other, image=None)
    assert (one.image is None) == (other.image is None)
    if one.image is not None:
        np.testing.assert_array_equal(one.image, other.image)


def test_results_are_those_of_this_process(broken_photos: Path) -> None:
    for path in sorted(broken_photos.iterdir()):
        for spec in (SPEC, PreprocessSpec(size=512, field="frame")):
            same(prepare_isolated(path.read_bytes(), spec), prepare_bytes(path.read_bytes(), spec))
    same(prepare_isolated(b"", SPEC), prepare_bytes(b"", SPEC))


def test_shared_memory_does_not_grow(good: bytes) -> None:
    big = good + bytes(40 << 20)
    prepare_isolated(big, SPEC)
    assert [os.fstat(decoder.source).st_size <= 32 << 20 for decoder in isolation._idle] == [True] * len(
        isolation._idle
    )
    same(prepare_isolated(good, SPEC), prepare_bytes(good, SPEC))


def test_cpu_time_is_limited(good: bytes, slow: bytes) -> None:
    began = time.monotonic()
    result = prepare_isolated(slow, SPEC, limit_s=0.1)
    assert time.monotonic() - began < 10  # the kernel counts whole seconds
    assert (result.status, result.bytes) == (Status.UNREADABLE, len(slow))
    assert result.reason.startswith("decoding takes more than 0.1 s of CPU time")
    same(prepare_isolated(good, SPEC, limit_s=0.1), prepare_bytes(good, SPEC))


def test_work_in_the_background_leaves_the_processor_to_others(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    ask = isolation._Decoder._ask

    def look(decoder: isolation._Decoder, *arguments: object) -> bytes:
        seen.append(os.getpriority(os.PRIO_PROCESS, decoder.process))
        return ask(decoder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(isolation._Decoder, "_ask", look)
    for background in (False, True, False):
        same(prepare_isolated(good, SPEC, background=background), prepare_bytes(good, SPEC))
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert seen == [ours, 19, ours]


def test_a_crash_while_memory_is_short_is_no_verdict(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_PAUSE_S", 0.0)
    signal_each(monkeypatch, signal.SIGSEGV)
    assert prepare_isolated(good, SPEC).status is Status.UNREADABLE
    monkeypatch.setattr(isolation, "available_memory", lambda: 100 << 20)
    with pytest.raises(TransientError, match=r"its decoder crashed \(SIGSEGV\) while memory was short"):
        prepare_isolated(good, SPEC)
    # A lower limit of the address space, which decoders inherit.
    monkeypatch.setattr(isolation, "available_memory", lambda: None)
    launcher = isolation._running()._process.pid
    limits = resource.prlimit(launcher, resource.RLIMIT_AS)
    resource.prlimit(launcher, resource.RLIMIT_AS, (6 << 30, limits[1]))
    try:
        with pytest.raises(TransientError, match="while memory was short"):
            prepare_isolated(good, SPEC)
    finally:
        resource.prlimit(launcher, resource.RLIMIT_AS, limits)


def test_a_launcher_that_was_stopped_is_replaced(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    isolation._forget()
    monkeypatch.setattr(isolation, "_LAUNCHER_S", 5.0)
    monkeypatch.setattr(isolation, "_PAUSE_S", 0.0)
    same(prepare_isolated(good, SPEC), prepare_bytes(good, SPEC))
    first = isolation._running()._process
    for decoder in isolation._idle:
        os.kill(decoder.process, signal.SIGKILL)
    os.kill(first.pid, signal.SIGSTOP)
    same(prepare_isolated(good, SPEC), prepare_bytes(good, SPEC))
    assert first.poll() is not None
    isolation._forget()


def test_a_limit_on_file_sizes_is_named(broken_photos: Path) -> None:
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from pathlib import Path
from fastfundus.errors import TransientError
from fastfundus.photo.isolation import prepare_isolated
from fastfundus.spec import PreprocessSpec
try:
    prepare_isolated(Path({str(broken_photos / "good.jpg")!r}).read_bytes(), PreprocessSpec(size=64))
except TransientError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        "no decoder process can be started (File too large; raise the limit on file sizes (ulimit -f))" in done.stdout
    )
    assert not done.stderr


def test_nobody_waits_for_the_end_of_a_decoder_in_the_background(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    slow: list[int] = []
    leave = isolation._Decoder.leave

    def stop(decoder: isolation._Decoder) -> None:
        os.kill(decoder.process, signal.SIGSTOP)
        slow.append(decoder.process)
        leave(decoder)

    monkeypatch.setattr(isolation._Decoder, "leave", stop)
    same(prepare_isolated(good, SPEC, background=True), prepare_bytes(good, SPEC))
    for _ in range(2):
        isolation._Decoder(isolation._running()).end()
    os.kill(slow[0], signal.SIGCONT)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{slow[0]}").exists():
        # The launcher cleans up when it forks the next decoder.
        isolation._Decoder(isolation._running()).end()
        assert time.monotonic() < deadline


def test_a_decoder_that_was_stopped_costs_nothing(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    struck = signal_each(monkeypatch, signal.SIGSTOP, times=1)
    waker = threading.Timer(1.2, lambda: os.kill(struck[0], signal.SIGCONT))
    waker.start()
    same(prepare_isolated(good, SPEC, limit_s=0.5), prepare_bytes(good, SPEC))
    waker.join()


def test_a_decoder_that_never_answers_is_given_up(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_each(monkeypatch, signal.SIGSTOP)
    monkeypatch.setattr(isolation, "_STALLED", 1)
    with pytest.raises(TransientError, match="made no progress for 1 s"):
        prepare_isolated(good, SPEC, limit_s=0.1)


def test_a_killed_decoder_is_replaced(good: bytes, monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    struck = signal_each(monkeypatch, signal.SIGKILL, times=1)
    same(prepare_isolated(good, SPEC), prepare_bytes(good, SPEC))
    with pytest.raises(ProcessLookupError):
        os.kill(struck[0], 0)  # reaped, so no zombies pile up


def test_no_verdict_if_decoders_are_killed_from_outside(
    good: bytes, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    struck = signal_each(monkeypatch, signal.SIGKILL)
    with pytest.raises(TransientError, match=r"its decoder was killed \(SIGKILL\), perhaps because memory is short"):
        prepare_isolated(good, SPEC)
    assert len(struck) == 2


def test_a_photo_that_crashes_two_decoders_is_unreadable(
    good: bytes, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    struck = signal_each(monkeypatch, signal.SIGSEGV)
    result = prepare_isolated(good, SPEC)
    assert (result.status, result.reason) == (Status.UNREADABLE, "it crashes the decoder (SIGSEGV)")
    assert (len(struck), result.bytes) == (2, len(good))


def test_cancelled_work_ends(slow: bytes) -> None:
    with pytest.raises(TransientError, match="cancelled"):
        prepare_isolated(slow, SPEC, cancelled=lambda: True)


def test_the_launcher_is_replaced(good: bytes) -> None:
    start_decoders()
    assert isolation._launcher is not None
    isolation._launcher._process.kill()
    isolation._launcher._process.wait()
    same(prepare_isolated(good, SPEC), prepare_bytes(good, SPEC))


def test_a_forked_process_has_decoders_of_its_own(good: bytes) -> None:
    prepare_isolated(good, SPEC)
    code = "\n".join(
        [
            "import os, sys; from pathlib import Path",
            "from fastfundus.photo.isolation import prepare_isolated; from fastfundus.spec import PreprocessSpec",
            "data, spec = Path(sys.argv[1]).read_bytes(), PreprocessSpec(size=64)",
            "assert prepare_isolated(data, spec).status == 'ok'",
            "if (child := os.fork()) == 0: os._exit(prepare_isolated(data, spec).status != 'ok')",
            "assert os.waitpid(child, 0)[1] == 0",
            "assert prepare_isolated(data, spec).status == 'ok'",
        ]
    )
    run_python(code, good)


def run_python(code: str, data: bytes) -> str:
    with open(os.memfd_create("data"), "wb") as file:
        file.write(data)
        file.flush()
        result = subprocess.run(
            [sys.executable, "-c", code, f"/proc/{os.getpid()}/fd/{file.fileno()}"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_short_memory_is_not_the_photos_fault(slow: bytes) -> None:
    """With a limit of the address space, as batch systems set it, a sound picture was called damaged."""
    code = "\n".join(
        [
            "import resource, sys; from pathlib import Path",
            "from fastfundus.photo import isolation; from fastfundus.spec import PreprocessSpec",
            "from fastfundus.errors import TransientError",
            "isolation._PAUSE_S = 0",
            "data = Path(sys.argv[1]).read_bytes()",
            "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()",
            "resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)",
            "try: print(isolation.prepare_isolated(data, PreprocessSpec(size=64)))",
            "except TransientError as error: print(error)",
        ]
    )
    # Depending on where memory ends first, this process or the decoder says so.
    assert run_python(code, slow) in (
        "there is not enough memory to decode it\n",
        "its decoder cannot be reached (Cannot allocate memory)\n",
    )


def test_closed_standard_streams_are_no_trouble(broken_photos: Path, tmp_path: Path) -> None:
    """A service may start without them: then the next descriptors that are opened get their numbers."""
    code = (
        "import sys; from pathlib import Path; from fastfundus.photo.isolation import prepare_isolated; "
        "from fastfundus.spec import PreprocessSpec; "
        "result = prepare_isolated(Path(sys.argv[1]).read_bytes(), PreprocessSpec(size=64)); "
        "Path(sys.argv[2]).write_text(result.status.value)"
    )
    for streams in ("<&-", "<&- >&-", "<&- >&- 2>&-"):
        command = f'"{sys.executable}" -c "{code}" "{broken_photos / "good.jpg"}" "{tmp_path / "out"}" {streams}'
        subprocess.run(command, shell=True, check=True, timeout=60)
        assert (tmp_path / "out").read_text() == "ok"


@pytest.mark.parametrize("number", [signal.SIGXCPU, signal.SIGUSR1, signal.SIGALRM, signal.SIGRTMIN + 3])
def test_signals_from_outside_are_no_verdict(
    good: bytes, monkeypatch: pytest.MonkeyPatch, at_once: None, number: int
) -> None:
    """Batch systems send them, and SIGXCPU follows from their limits as well as from ours."""
    signal_each(monkeypatch, number)
    with pytest.raises(TransientError, match="its decoder was killed"):
        prepare_isolated(good, SPEC)


def test_busy_decoders_end_with_their_parent(slow: bytes, tmp_path: Path) -> None:
    (tmp_path / "slow.png").write_bytes(slow)
    code = (
        "import os, sys, threading, time; from pathlib import Path; from fastfundus.photo import isolation; "
        "from fastfundus.spec import PreprocessSpec; data = Path(sys.argv[1]).read_bytes(); "
        "work = lambda: isolation.prepare_isolated(data, PreprocessSpec(size=64)); "
        "isolation._Decoder._wait = lambda decoder, *rest: (print(decoder.process, flush=True), time.sleep(60)); "
        "threading.Thread(target=work, daemon=True).start(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "slow.png")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    decoder = int(process.stdout.readline())
    os.kill(decoder, signal.SIGSTOP)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{decoder}").exists() and "\nState:\tZ" not in Path(f"/proc/{decoder}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_gzipped_photo_is_unpacked_by_the_decoder(good: bytes) -> None:
    same(prepare_isolated(gzip.compress(good), SPEC), prepare_bytes(good, SPEC))
    assert prepare_isolated(gzip.compress(bytes(256 << 20)), SPEC).status is Status.UNSUPPORTED


def test_costs_of_odd_files_are_found_at_once(good: bytes) -> None:
    """Fill bytes and zeros behind the start of a JPEG were searched byte by byte, and thought to cost nothing."""
    fill = good[:2] + b"\xff" * (60 << 20)
    began = time.monotonic()
    assert min(estimate_decode_s(data) for data in (fill, b"\xff\xd8\xff\xe0" + bytes(60 << 20))) > 0.5
    assert estimate_decode_s(gzip.compress(good)) > 0.5
    assert time.monotonic() - began < 1
    assert estimate_decode_s(good) < 0.5
