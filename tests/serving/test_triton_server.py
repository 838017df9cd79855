"""A model repository in a real Triton Inference Server: its answers are those of `screen`, also under load."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fastfundus import screen
from fastfundus.serving.triton_repository import export_repository
from tests.conftest import Trained
from tests.serving.real_triton import infer, running
from tests.tolerances import ENGINE_FP32


def check(client: httpx.Client, folder: Path, row: dict[str, Any]) -> str:
    """Compare the server's answer for one photo with its row, and return the status."""
    status, answer = infer(client, (folder / row["path"]).read_bytes())
    if row["status"] == "ok":
        assert status == 200, answer
        assert answer == pytest.approx([row["p_abnormal"]], abs=ENGINE_FP32)
    else:
        assert status >= 400
        assert f"{row['status']}: {row['reason']}" in answer
    return str(row["status"])


def statistics(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/v2/models/fundus_engine/stats").json()["model_stats"][0]
    return found


def test_a_real_server_answers_like_screen(
    trained: Trained, photo_folder: Path, broken_photos: Path, tmp_path: Path
) -> None:
    """Every photo and every fault, one after the other, then by sixteen clients at once: none is mixed up."""
    bundle = trained.bundle
    export_repository(bundle, tmp_path / "models", engine="python")
    with running(tmp_path / "models", tmp_path / "server.log") as client:
        photos = photo_folder / "images"
        rows = list(screen(photos, bundle.path))
        broken = list(screen(broken_photos, bundle.path))
        found = {check(client, photos, row) for row in rows} | {check(client, broken_photos, row) for row in broken}
        assert found >= {"ok", "unreadable", "unsupported", "ungradable"}
        repeated = rows * (1 + 160 // len(rows))

        def work(number: int) -> None:
            with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as own:
                for row in repeated[number::16]:
                    check(own, photos, row)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(16)))
        # Dynamic batching: several photos of different clients in one call of the engine.
        counted = statistics(client)
        assert counted["execution_count"] < 0.9 * counted["inference_count"]
    log = (tmp_path / "server.log").read_text(errors="replace")
    assert "Traceback" not in log


@pytest.mark.long
def test_sixty_four_clients_for_a_minute(trained: Trained, photo_folder: Path, tmp_path: Path) -> None:
    export_repository(trained.bundle, tmp_path / "models", engine="python")
    photos = photo_folder / "images"
    rows = [row for row in screen(photos, trained.bundle.path) if row["status"] == "ok"]
    with running(tmp_path / "models", tmp_path / "server.log") as client:
        end = time.monotonic() + 60

        def work(number: int) -> int:
            """Ask with connections of its own, as a client does, until the minute is over."""
            done = 0
            with httpx.Client(base_url=client.base_url, timeout=60, trust_env=False) as own:
                while time.monotonic() < end:
                    check(own, photos, rows[(number + done) % len(rows)])
                    done += 1
            return done

        with ThreadPoolExecutor(64) as pool:
            answers = list(pool.map(work, range(64)))
        assert min(answers) > 0
        counted = statistics(client)
        assert counted["inference_stats"]["fail"]["count"] == 0
        assert counted["execution_count"] < 0.5 * counted["inference_count"]
