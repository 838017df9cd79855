"""Memory of long screening runs, start-up time of the program, and the server under a load of 64 concurrent clients.

    python -m bench.suites.bench_serve [--output bench/results/serve_cpu_YYYYMM.json] [--only memory start serve]

Every answer of the server is compared with the result of a batch run for the same photo.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl

from bench import RESULTS
from bench.harness.machine import environment
from bench.suites.bench_screen import bundle_of
from fastfundus.data import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.openvino_backend import precisions
from fastfundus.records import SourcePhoto
from fastfundus.screening.audit import verify
from fastfundus.screening.pipeline import Timing, screen_photos
from fastfundus.synthetic import write_dataset

CLIENTS = 64
MANY = (1_000, 10_000, 50_000)


def serve_under_load(
    bundle: Bundle, files: list[Path], *, seconds: float, expected_of: list[Path] | None = None
) -> dict[str, Any]:
    """Put load on a server in its own process, and count lost or mixed-up answers.

    Args:
        bundle: bundle to serve.
        files: photos in one folder, from which the clients choose.
        seconds: duration of the load.
        expected_of: photos with the same names whose answers are taken as correct; None uses `files`.

    Returns:
        Answers, faults, photos/s and latency percentiles, and the photos/s of a batch run over the same photos.
    """
    timing = Timing()
    listing = list_photos(expected_of or files, adapter="folder").photos
    # The engine is loaded before, as that of the server is.
    with bundle.load() as engine:
        expected = expected_answers(listing * 10, bundle, timing, engine=engine)
    data = {path.name: path.read_bytes() for path in files}
    with tempfile.TemporaryFile("w+") as log, served(bundle, log) as (process, address):
        found = asyncio.run(_everybody(address, data, expected, seconds))
        metrics = httpx.get(f"{address}/metrics", trust_env=False).text
    calls, photos = (
        float(re.search(rf"fastfundus_batch_photos_{what} (\S+)", metrics)[1]) for what in ("count", "sum")
    )  # type: ignore[index]
    return found | {
        "clients": CLIENTS,
        "backbone": bundle.metadata["provenance"]["backbone"],
        "size": bundle.spec.size,
        "precision": bundle.precision,
        "photos_an_engine_call": photos / calls,
        "batch_images_per_s": timing.images_per_s,
        "exit_code": process.returncode,
    }


@contextlib.contextmanager
def served(bundle: Bundle, log: Any) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Run a server in its own process that logs to a file; yield the process and the address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fastfundus", "serve", bundle.path, "--port", "0"], stdout=log, stderr=log
    )
    try:
        yield process, _address(process, log)
    finally:
        process.terminate()
        process.wait()


def expected_answers(photos: list[SourcePhoto], bundle: Bundle, timing: Timing, **options: Any) -> dict[str, Any]:
    """Return status, probability and decision of each photo by its name, from a batch run."""
    return {
        row.source.path.name: (row.status.value, None if row.answer is None else float(row.answer[0]), row.decision)
        for row in screen_photos(photos, bundle, timing, **options)
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


class Connection:
    """A connection that sends requests that are encoded already, because this process shares the server's cores."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request and return the status, the headers and the body of the answer."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            await self.close()
        return int(head[0].split()[1]), headers, body

    async def close(self) -> None:
        """Close the connection, if it is open."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


def encoded(host: str, name: str, photo: bytes, *, headers: str = "") -> bytes:
    """Return a request with one photo in a form; `headers` are further lines, each with its line end."""
    part = f'Content-Disposition: form-data; name="photo"; filename="{name}"\r\nContent-Type: image/jpeg'
    body = f"--b\r\n{part}\r\n\r\n".encode() + photo + b"\r\n--b--\r\n"
    head = f"POST /v1/screen HTTP/1.1\r\nHost: {host}\r\nContent-Type: multipart/form-data; boundary=b"
    return f"{head}\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _everybody(address: str, data: dict[str, bytes], expected: dict[str, Any], seconds: float) -> dict[str, Any]:
    latencies: list[float] = []
    faults = refused = 0
    names, url = sorted(data), httpx.URL(address)
    requests = {name: encoded(url.host, name, data[name]) for name in names}

    async def client(number: int) -> None:
        nonlocal faults, refused
        generator, connection = random.Random(number), Connection(url.host, url.port or 80)
        while True:
            name, began = generator.choice(names), time.perf_counter()
            status, headers, body = await connection.post(requests[name])
            if status == 503:
                refused += 1
                await asyncio.sleep(float(headers["retry-after"]))
                continue
            latencies.append(time.perf_counter() - began)
            row = json.loads(body)["results"][0] if status == 200 else {}
            outcome = (row.get("status"), row.get("probabilities", {}).get("abnormal"), row.get("decision"))
            faults += row.get("file") != name or outcome != expected[name]
            # Checked only after an answer, so that each client gets at least one, however slow the machine is.
            if time.monotonic() >= until:
                break
        await connection.close()

    began, began_cpu = time.perf_counter(), time.process_time()
    until = time.monotonic() + seconds
    await asyncio.gather(*[client(number) for number in range(CLIENTS)])
    lasted, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    p50, p95, p99 = (float(np.percentile(latencies, share)) for share in (50, 95, 99))
    return {
        "answers": len(latencies), "lost_or_mixed_up": int(faults), "refused": refused,
        "images_per_s": len(latencies) / lasted, "p50_s": p50, "p95_s": p95, "p99_s": p99,
        "cores_of_clients": cpu / lasted,
    }  # fmt: skip


def run_command(*arguments: object) -> tuple[float, float, str]:
    """Run a fastfundus command; return its seconds, its peak memory in GiB, and its standard output."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        command = [sys.executable, "-m", "fastfundus", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.DEVNULL)
        highest = 0
        while process.poll() is None:
            # The figure that the system reports after exit would start from the memory of the parent process.
            with contextlib.suppress(OSError, TypeError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                highest = max(highest, int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]))  # type: ignore[index]
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"{arguments} failed")
        printed.seek(0)
        return seconds, highest / (1 << 20), printed.read()


def memory(folder: Path) -> dict[str, Any]:
    """Measure the peak memory of screening more and more photos, most of them copies of one another."""
    bundle, _ = bundle_of("resnet18", 64, "fp32", folder / "small")
    write_dataset(folder / "drawn", 100, seed=3, long_sides=(320,))
    originals = sorted((folder / "drawn" / "images").iterdir())
    found: dict[str, Any] = {"originals": len(originals), "runs": []}
    for count in MANY:
        photos = folder / f"{count}"
        for number in range(count):
            place = photos / f"{number // 1000:03d}" / f"{number:06d}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(originals[number % len(originals)], place)
        output = folder / f"out{count}"
        seconds, gib, printed = run_command("screen", bundle.path, photos, "--output", output, "--json")
        results = pl.read_parquet(output / "results.parquet")
        # Each copy of a photo is an input of its own; the results of copies differ only in the file name.
        same = results.group_by("sha256").agg(pl.col("p_abnormal").n_unique(), pl.col("status").n_unique())
        if len(results) != count or same["p_abnormal"].max() != 1 or same["status"].max() != 1:
            raise SystemExit(f"{count} inputs gave {len(results)} rows, or copies of a photo have different results")
        faults = verify(output).faults
        summary = json.loads(printed)
        row = {"inputs": count, "seconds": seconds, "images_per_s": summary["images_per_s"], "peak_gib": gib}
        size = sum((output / name).stat().st_size for name in ("results.parquet", "results.csv", "audit.jsonl"))
        row["bytes_a_row"] = size / count
        found["runs"].append(row | {"audit_faults": len(faults), "row_groups": -(-count // 512)})
        print(found["runs"][-1], flush=True)
    return found


_FIRST_ROW = """
import sys, time
from pathlib import Path
from fastfundus.workflow.screen import screen_sources
seen = []
note = lambda *progress: seen.append(time.time())
screen_sources([Path(sys.argv[2])], sys.argv[1], sys.argv[3], overwrite=True, on_progress=note)
print(seen[0] - float(sys.argv[4]))
"""


def start(folder: Path) -> dict[str, Any]:
    """Measure the time from command to the first row and to the report for one photo, with the start of the program."""
    precision = precisions()[0]
    bundle, _ = bundle_of("resnet50", 512, precision, folder / "bundle")
    write_dataset(folder / "drawn", 1, seed=3, long_sides=(1024,))
    photo = next((folder / "drawn" / "images").iterdir())
    output = folder / "one"
    times = [run_command("screen", bundle.path, photo, "--output", output, "--overwrite")[0] for _ in range(7)]
    rows = []
    for _ in range(7):
        command = [sys.executable, "-c", _FIRST_ROW, bundle.path, photo, output, time.time()]
        rows.append(float(subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout))
    first = {"first_row_s": statistics.median(rows), "most_first_row_s": max(rows)}
    return {"precision": precision, "seconds": statistics.median(times), "most": max(times), **first}


def serve(folder: Path) -> dict[str, Any]:
    """Measure the server under load."""
    bundle, _ = bundle_of("resnet18", 224, "fp32", folder / "served")
    write_dataset(folder / "asked", 60, seed=4, long_sides=(1024,), poor_share=0.1)
    return serve_under_load(bundle, sorted((folder / "asked" / "images").iterdir()), seconds=60)


def main() -> None:
    """Run the selected measurements and write the results as JSON."""
    parser = argparse.ArgumentParser()
    default = RESULTS / f"serve_cpu_{date.today():%Y%m}.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--only", nargs="+", default=["memory", "start", "serve"])
    options = parser.parse_args()
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    document = kept | environment(("torch", "openvino", "simplejpeg", "numpy", "fastapi", "uvicorn"))
    for part, job in {"memory": memory, "start": start, "serve": serve}.items():
        if part in options.only:
            with tempfile.TemporaryDirectory() as name:
                document[part] = job(Path(name))
            options.output.write_text(json.dumps(document, indent=1) + "\n")
            print(part, document[part], flush=True)


if __name__ == "__main__":
    main()
