"""A real Triton Inference Server, from the wheel of nvidia-pytriton: its own binary, with the Python backend only.

The wheel is unpacked, not installed, because it asks for NumPy 1. The server finds this environment by `python3` on its
path.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

_WHEEL = "nvidia-pytriton==0.7.0"
_START_S = 120


def server_folder() -> Path:
    """Return the unpacked wheel, kept beside the environment; skip if it cannot be had here."""
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not (3, 8) <= sys.version_info[:2] <= (3, 13):
        pytest.skip("Triton Inference Server: its wheel is for Linux on x86_64 and Python 3.8 to 3.13")
    folder = Path(sys.prefix) / "triton-server"
    if not folder.exists():
        partial = folder.with_name(f"triton-server.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(partial), _WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"Triton Inference Server: the wheel {_WHEEL} cannot be downloaded")
        (wheel,) = partial.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        wheel.unlink()
        root = partial / "pytriton" / "tritonserver"
        stubs = root / "python_backend_stubs" / f"3.{sys.version_info.minor}"
        shutil.copytree(stubs, root / "backends" / "python", dirs_exist_ok=True)
        for file in (root / "bin" / "tritonserver", root / "backends" / "python" / "triton_python_backend_stub"):
            file.chmod(0o755)
        partial.rename(folder)
    return folder


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(repository: Path, log: Path) -> Iterator[httpx.Client]:
    """Run the server on a model repository, and yield a client for it."""
    folder = server_folder()
    root, port = folder / "pytriton" / "tritonserver", _free_port()
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{folder / 'nvidia_pytriton.libs'}:{Path(sys.base_prefix) / 'lib'}",
        "PATH": f"{Path(sys.prefix) / 'bin'}:{os.environ.get('PATH', '')}",
    }
    command = [
        str(root / "bin" / "tritonserver"), f"--model-repository={repository}",
        f"--backend-directory={root / 'backends'}", "--http-address=127.0.0.1", f"--http-port={port}",
        "--allow-grpc=false", "--allow-metrics=false",
        f"--backend-config=python,shm-region-prefix-name=test{uuid.uuid4().hex[:12]}",
    ]  # fmt: skip
    with log.open("wb") as out:
        # A session of its own, so that the processes of the Python backend end with it.
        server = subprocess.Popen(
            command, env=environment, cwd="/", stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                _wait(server, client, log)
                yield client
        finally:
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait(server: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text(errors="replace")[-4000:]
        try:
            if client.get("/v2/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError(f"the server was not ready after {_START_S} s: {log.read_text(errors='replace')[-4000:]}")


def infer(client: httpx.Client, data: bytes, name: str = "fundus") -> tuple[int, Any]:
    """Send one file, and return the HTTP status, and the numbers or the error of the answer."""
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "picture", "shape": [1, len(data)], "datatype": "UINT8",
                    "parameters": {"binary_data_size": len(data)},
                }
            ],
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": False}}],
        }
    ).encode()  # fmt: skip
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = client.post(f"/v2/models/{name}/infer", content=head + data, headers=headers)
    body = answer.json()
    return answer.status_code, body["outputs"][0]["data"] if answer.status_code == 200 else body["error"]
