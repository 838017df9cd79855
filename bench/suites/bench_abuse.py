"""The server among hostile clients: 64 clients send photos, bombs and junk, or vanish; good photos must not suffer.

    python -m bench.suites.bench_abuse [--seconds 300] [--output bench/results/abuse_cpu_YYYYMM.json]

Every fourth client is hostile, with an address of its own as a proxy would report it: pictures of 150 megapixels that
take seconds to decode, files that expand a thousandfold, junk, cut bodies, requests that are left before the answer.
Every answer to a good client is compared with the result of a batch run. Memory is that of the server and all its
decoders, shared pages counted once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import random
import re
import tempfile
import threading
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np

from bench import RESULTS
from bench.harness.machine import environment
from bench.suites.bench_screen import bundle_of
from bench.suites.bench_serve import CLIENTS, Connection, encoded, expected_answers, served
from fastfundus.data import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.screening.pipeline import Timing
from fastfundus.synthetic import write_dataset

HOSTILE = CLIENTS // 4


def attacks(good: bytes) -> dict[str, bytes]:
    """Return the bodies that hostile clients send, by name."""
    noise = np.random.default_rng(0).integers(0, 256, (5000, 6000, 3), np.uint8)
    return {
        "png of 150 megapixels": cv2.imencode(".png", np.full((12000, 12500, 3), (20, 60, 180), np.uint8))[1].tobytes(),
        "png of noise": cv2.imencode(".png", noise, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()[: 60 << 20],
        "progressive jpeg": cv2.imencode(".jpg", noise, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes(),
        "gzip bomb": gzip.compress(bytes(512 << 20), 9),
        "junk behind a png signature": b"\x89PNG\r\n\x1a\n" + noise.tobytes()[:100_000],
        "cut photo": good[: len(good) // 2],
    }


class Memory(threading.Thread):
    """Follows the memory of a process and all its descendants.

    Args:
        process: ID of the process.
    """

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0
        self._process, self._ended = process, threading.Event()

    def run(self) -> None:
        """Read the memory twice a second."""
        while not self._ended.wait(0.5):
            self.peak_bytes = max(self.peak_bytes, sum(_pss_bytes(process) for process in _family(self._process)))

    def end(self) -> int:
        """Stop, and return the highest sum in bytes."""
        self._ended.set()
        self.join()
        return self.peak_bytes


def _family(process: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += map(int, task.read_text().split())
    return [process, *(member for child in children for member in _family(child))]


def _pss_bytes(process: int) -> int:
    with contextlib.suppress(OSError, TypeError):
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
        return int(found[1]) << 10 if found else 0
    return 0


async def _good_client(
    number: int, url: httpx.URL, data: dict[str, bytes], expected: dict[str, Any], until: float, seen: Any
) -> None:
    generator, connection = random.Random(number), Connection(url.host, url.port or 80)
    while time.monotonic() < until:
        name, began = generator.choice(sorted(data)), time.perf_counter()
        request = encoded(url.host, name, data[name], headers=f"X-Forwarded-For: 10.0.0.{number}\r\n")
        status, headers, body = await connection.post(request)
        if status == 503:
            seen.counts["refused, came again"] += 1
            await asyncio.sleep(float(headers["retry-after"]))
            continue
        seen.latencies.append(time.perf_counter() - began)
        row = json.loads(body)["results"][0] if status == 200 else {}
        outcome = (row.get("status"), row.get("probabilities", {}).get("abnormal"), row.get("decision"))
        seen.counts["lost or mixed up"] += row.get("file") != name or outcome != expected[name]
    await connection.close()


async def _hostile_client(
    number: int, http: httpx.AsyncClient, bodies: dict[str, bytes], until: float, seen: Any
) -> None:
    generator = random.Random(number)
    while time.monotonic() < until:
        name = generator.choice(sorted(bodies))
        seen.attacks[name] += 1
        # Half of them do not wait for the answer.
        patience = generator.choice([0.2, 30.0])
        with contextlib.suppress(httpx.HTTPError, asyncio.TimeoutError):
            await asyncio.wait_for(
                http.post(
                    "/v1/screen",
                    content=bodies[name],
                    headers={"content-type": "image/png", "x-forwarded-for": f"10.0.1.{number}"},
                ),
                patience,
            )
        await asyncio.sleep(generator.random())


class _Seen:
    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.counts: Counter[str] = Counter({"refused, came again": 0, "lost or mixed up": 0})
        self.attacks: Counter[str] = Counter()


async def _everybody(
    address: str, data: dict[str, bytes], expected: dict[str, Any], seconds: float, hostile: int
) -> _Seen:
    seen, bodies = _Seen(), attacks(next(iter(data.values())))
    unlimited = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=120, trust_env=False, limits=unlimited) as http:
        until = time.monotonic() + seconds
        await asyncio.gather(
            *[
                _good_client(number, httpx.URL(address), data, expected, until, seen)
                for number in range(CLIENTS - hostile)
            ],
            *[_hostile_client(number, http, bodies, until, seen) for number in range(hostile)],
        )
    return seen


def measure(bundle: Bundle, files: list[Path], *, seconds: float, hostile: int = HOSTILE) -> dict[str, Any]:
    """Return what good clients saw beside hostile ones, and the peak memory."""
    listing = list_photos(files, adapter="folder").photos
    expected = expected_answers(listing, bundle, Timing())
    data = {path.name: path.read_bytes() for path in files}
    with tempfile.TemporaryFile("w+") as log:
        with served(bundle, log) as (process, address):
            memory = Memory(process.pid)
            memory.start()
            seen = asyncio.run(_everybody(address, data, expected, seconds, hostile))
            peak = memory.end()
            ready = httpx.get(f"{address}/readyz", trust_env=False).json()
        log.seek(0)
        tracebacks = log.read().count("Traceback")
    p50, p95, p99 = (float(np.percentile(seen.latencies, share)) for share in (50, 95, 99))
    return {
        "seconds": seconds, "good_clients": CLIENTS - hostile, "hostile_clients": hostile,
        "good_answers": len(seen.latencies), **seen.counts, "p50_s": p50, "p95_s": p95, "p99_s": p99,
        "slowest_s": max(seen.latencies), "attacks": dict(seen.attacks), "peak_gib": peak / (1 << 30),
        "left_in_progress": ready["photos_waiting"], "tracebacks": tracebacks, "exit_code": process.returncode,
    }  # fmt: skip


def main() -> None:
    """Measure, and write the results as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=RESULTS / f"abuse_cpu_{date.today():%Y%m}.json")
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle, _ = bundle_of("resnet18", 224, "fp32", folder / "served")
        write_dataset(folder / "asked", 60, seed=4, long_sides=(1024,), poor_share=0.1)
        found = measure(bundle, sorted((folder / "asked" / "images").iterdir()), seconds=options.seconds)
    document = environment(("openvino", "simplejpeg", "numpy", "fastapi", "uvicorn")) | {"abuse": found}
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
