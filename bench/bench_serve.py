"""The server under load: 64 clients at once for a minute, each answer compared with what a batch says of the photo."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from fastfundus.data import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.screen.pipeline import Timing, screen_photos

CLIENTS = 64


def serve_under_load(
    bundle: Bundle, files: list[Path], *, seconds: float, expected_of: list[Path] | None = None
) -> dict[str, Any]:
    """Ask a server of its own process, and count what is lost or mixed up.

    Args:
        bundle: served.
        files: photos that clients choose from, in one folder.
        seconds: how long they ask.
        expected_of: photos of the same names whose answers count as right; None takes the same.

    Returns:
        Answers, faults, photos/s and percentiles of the time to an answer; and photos/s of a batch of the same photos.
    """
    timing = Timing()
    listing = list_photos(expected_of or files, adapter="folder").photos
    expected = {
        row.source.path.name: (row.status.value, None if row.answer is None else float(row.answer[0]), row.decision)
        for row in screen_photos(listing * 3, bundle, timing)
    }
    data = {path.name: path.read_bytes() for path in files}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastfundus", "serve", bundle.path, "--port", "0"], stdout=log, stderr=log
        )
        try:
            address = _address(process, log)
            found = asyncio.run(_everybody(address, data, expected, seconds))
            metrics = httpx.get(f"{address}/metrics", trust_env=False).text
        finally:
            process.terminate()
            process.wait()
    calls, photos = (
        float(re.search(rf"fastfundus_batch_photos_{what} (\S+)", metrics)[1]) for what in ("count", "sum")
    )  # type: ignore[index]
    return found | {
        "clients": CLIENTS,
        "backbone": bundle.about["provenance"]["backbone"],
        "size": bundle.spec.size,
        "precision": bundle.precision,
        "photos_an_engine_call": photos / calls,
        "batch_images_per_s": timing.images_per_s,
        "exit_code": process.returncode,
    }


def _address(process: subprocess.Popen[bytes], log: Any) -> str:
    for _ in range(600):
        log.seek(0)
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read())
        if found:
            return found[0]
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit("the server did not start")


async def _everybody(address: str, data: dict[str, bytes], expected: dict[str, Any], seconds: float) -> dict[str, Any]:
    latencies: list[float] = []
    faults = refused = 0
    until = time.monotonic() + seconds
    names = sorted(data)

    async def client(number: int) -> None:
        nonlocal faults, refused
        chance = random.Random(number)
        async with httpx.AsyncClient(base_url=address, timeout=120, trust_env=False) as http:
            while time.monotonic() < until:
                name, began = chance.choice(names), time.perf_counter()
                answer = await http.post("/v1/screen", files={"photo": (name, data[name])})
                if answer.status_code == 503:
                    refused += 1
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                    continue
                latencies.append(time.perf_counter() - began)
                row = answer.json()["results"][0] if answer.status_code == 200 else {}
                told = (row.get("status"), row.get("probabilities", {}).get("abnormal"), row.get("decision"))
                faults += row.get("file") != name or told != expected[name]

    began = time.perf_counter()
    await asyncio.gather(*[client(number) for number in range(CLIENTS)])
    lasted = time.perf_counter() - began
    p50, p95, p99 = (float(np.percentile(latencies, share)) for share in (50, 95, 99))
    return {
        "answers": len(latencies), "lost_or_mixed_up": int(faults), "refused": refused,
        "images_per_s": len(latencies) / lasted, "p50_s": p50, "p95_s": p95, "p99_s": p99,
    }  # fmt: skip
