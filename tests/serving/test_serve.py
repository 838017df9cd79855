"""The server: same results as batch screening under concurrent clients, and isolation of bad requests."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from fastfundus.data import list_photos
from fastfundus.engines.openvino_backend import OpenVinoEngine
from fastfundus.errors import ConfigError
from fastfundus.photo import isolation
from fastfundus.screening.pipeline import Timing, screen_photos
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.serving import server
from fastfundus.serving.app import Limits
from tests.browser import open_browser
from tests.conftest import Trained
from tests.serving.conftest import Start

_NO_FILE = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n--b--\r\n'
JPEG = {"content-type": "image/jpeg"}


def by_batch(trained: Trained, folder: Path) -> dict[str, tuple[str, str | None, dict[str, float], str | None]]:
    """Screen a folder and return status, reason, probabilities and decision of each file."""
    rows = screen_photos(list_photos(folder).photos, trained.bundle, Timing())
    return {
        row.source.path.name: (
            row.status.value,
            row.reason or None,
            {} if row.answer is None else {"abnormal": float(row.answer[0])},
            row.decision,
        )
        for row in rows
    }


def summary(result: dict[str, Any]) -> tuple[str, str | None, dict[str, float], str | None]:
    return result["status"], result["reason"], result["probabilities"], result["decision"]


def test_answers_equal_those_of_a_batch_run(trained: Trained, broken_photos: Path, start: Start) -> None:
    expected, client = by_batch(trained, broken_photos), start()
    files = sorted(broken_photos.iterdir())
    answer = client.post("/v1/screen", files=[("photo", (file.name, file.read_bytes())) for file in files])
    assert answer.status_code == 200
    assert [result["file"] for result in answer.json()["results"]] == [file.name for file in files]
    assert {result["file"]: summary(result) for result in answer.json()["results"]} == expected
    assert answer.json()["thresholds"] == {"abnormal": trained.bundle.thresholds[0]}
    name = {"content-disposition": 'attachment; filename="good.jpg"'}
    raw = client.post("/v1/screen", content=(broken_photos / "good.jpg").read_bytes(), headers=JPEG | name).json()
    assert raw["results"][0]["file"] == "good.jpg"
    assert summary(raw["results"][0]) == expected["good.jpg"]
    assert client.get("/healthz").json()["bundle"] == raw["bundle"] == trained.bundle.fingerprint


def test_64_concurrent_clients_get_their_own_answers(trained: Trained, photo_folder: Path, start: Start) -> None:
    expected = by_batch(trained, photo_folder)
    files = {path.name: path.read_bytes() for path in sorted((photo_folder / "images").iterdir())}
    address = start().base_url

    async def client(number: int) -> int:
        generator, wrong = random.Random(number), 0
        async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as http:
            for _ in range(4):
                chosen = generator.sample(sorted(files), generator.choice([1, 1, 2, 3]))
                sent = [("photo", (name, files[name])) for name in chosen]
                answer = await http.post("/v1/screen", files=sent)
                while answer.status_code == 503:
                    await asyncio.sleep(0.05)
                    answer = await http.post("/v1/screen", files=sent)
                results = answer.json()["results"]
                wrong += [result["file"] for result in results] != chosen
                wrong += [summary(result) for result in results] != [expected[name] for name in chosen]
        return wrong

    async def everybody() -> list[int]:
        return await asyncio.gather(*[client(number) for number in range(64)])

    assert asyncio.run(everybody()) == [0] * 64
    metrics = httpx.get(f"{address}/metrics", trust_env=False).text
    assert "fastfundus_photos_under_way 0.0" in metrics
    photos = float(re.search(r'fastfundus_photos_total\{status="ok"\} (\S+)', metrics)[1])  # type: ignore[index]
    calls = float(re.search(r"fastfundus_batch_photos_count (\S+)", metrics)[1])  # type: ignore[index]
    assert photos >= 256
    assert calls < photos, "waiting photos are scored in one batch"


def test_file_names_are_never_used_as_paths(broken_photos: Path, start: Start) -> None:
    client, data = start(), (broken_photos / "good.jpg").read_bytes()
    for name in ("../../etc/passwd", "/etc/shadow", "<img src=x onerror=alert(1)>.jpg", "a\\..\\b.jpg", "ü" * 300):
        answer = client.post("/v1/screen", files={"photo": (name, data)})
        assert answer.json()["results"][0]["status"] == "ok"
        assert answer.headers["content-type"] == "application/json"
    assert client.get("/../../etc/passwd").status_code == 404
    assert client.get("/%2e%2e/%2e%2e/etc/passwd").status_code == 404


def part(name: str, data: bytes) -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="photo"; filename="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n"


def test_a_form_that_was_cut_is_refused_as_a_whole(broken_photos: Path, start: Start) -> None:
    client, data = start(), (broken_photos / "good.jpg").read_bytes()
    form = {"content-type": "multipart/form-data; boundary=b"}
    whole = part("a.jpg", data) + part("b.jpg", data) + b"--b--\r\n"
    assert [row["file"] for row in client.post("/v1/screen", content=whole, headers=form).json()["results"]] == [
        "a.jpg",
        "b.jpg",
    ]
    for end in (len(whole) - len(data) // 2, len(whole) - 7, len(part("a.jpg", data))):
        answer = client.post("/v1/screen", content=whole[:end], headers=form)
        assert answer.status_code == 400
        assert "ends before its last part does" in answer.json()["detail"]


def test_an_empty_file_input_of_a_form_is_no_photo(broken_photos: Path, start: Start) -> None:
    client, data = start(), (broken_photos / "good.jpg").read_bytes()
    body = part("a.jpg", data) + part("", b"") + b"--b--\r\n"
    answer = client.post("/v1/screen", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert [row["file"] for row in answer.json()["results"]] == ["a.jpg"]
    named = part("a.jpg", data) + part("empty.jpg", b"") + b"--b--\r\n"
    answer = client.post("/v1/screen", content=named, headers={"content-type": "multipart/form-data; boundary=b"})
    assert [row["status"] for row in answer.json()["results"]] == ["ok", "unreadable"]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("filename*=UTF-8''10%5Fleft.jpg", "10_left.jpg"),
        ("filename*=utf-8''M%C3%BCller%22_left.jpg", "Müller'_left.jpg"),
        ("filename*=UTF-8''a%0d%0ab_left.jpg", "a__b_left.jpg"),
        ("filename=\"x_left.jpg\"; filename*=UTF-8''y_left.jpg", "x_left.jpg"),
        ("filename*=nonsense''%ff", "ÿ"),
    ],
)
def test_names_in_the_form_of_rfc_5987(broken_photos: Path, start: Start, written: str, name: str) -> None:
    data = (broken_photos / "good.jpg").read_bytes()
    head = f'--b\r\nContent-Disposition: form-data; name="photo"; {written}\r\n\r\n'.encode()
    form = {"content-type": "multipart/form-data; boundary=b"}
    answer = start().post("/v1/screen", content=head + data + b"\r\n--b--\r\n", headers=form)
    (row,) = answer.json()["results"]
    assert (row["file"], row["status"], row["eye"]) == (name, "ok", "L" if "left" in name else None)


def test_a_form_in_another_coding_says_so(broken_photos: Path, start: Start) -> None:
    body = gzip.compress(part("a.jpg", (broken_photos / "good.jpg").read_bytes()) + b"--b--\r\n")
    headers = {"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"}
    answer = start().post("/v1/screen", content=body, headers=headers)
    assert answer.status_code == 415
    assert "content encoding 'gzip' of a form; send it as it is" in answer.json()["detail"]


def test_gzipped_photos_and_eyes_in_names_are_understood_as_by_screen(broken_photos: Path, start: Start) -> None:
    client, data = start(), (broken_photos / "good.jpg").read_bytes()
    answer = client.post("/v1/screen", files={"photo": ("10_left.jpg.gz", gzip.compress(data))}).json()["results"][0]
    plain = client.post("/v1/screen", files={"photo": ("10_left.jpg", data)}).json()["results"][0]
    assert (answer["status"], answer["eye"]) == ("ok", "L")
    assert (plain["eye"], plain["probabilities"]) == ("L", answer["probabilities"])


@pytest.mark.parametrize(
    ("headers", "body", "code", "said"),
    [
        ({"content-type": "multipart/form-data"}, b"x", 400, "malformed multipart/form-data"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"no boundary here", 400, "malformed"),
        ({"content-type": "multipart/form-data; boundary=b"}, b"--b\r\nbroken", 400, ""),
        ({"content-type": "multipart/form-data; boundary=b"}, _NO_FILE, 400, "contains no file"),
        ({"content-type": "text/plain"}, b"hello", 415, "send multipart/form-data, or a photo"),
        ({}, b"hello", 415, ""),
        (JPEG, b"", 400, "the body is empty"),
    ],
)  # fmt: skip
def test_malformed_requests_are_refused_with_a_reason(
    start: Start, headers: dict[str, str], body: bytes, code: int, said: str
) -> None:
    client = start()
    answer = client.post("/v1/screen", content=body, headers=headers)
    assert (answer.status_code, said in answer.json()["detail"]) == (code, True)
    assert client.get("/healthz").status_code == 200


def test_requests_over_the_limits_are_refused(start: Start, broken_photos: Path) -> None:
    client = start(limits=Limits(max_bytes=100_000, max_waiting=2))
    assert client.post("/v1/screen", content=bytes(100_001), headers=JPEG).status_code == 413
    # A body without a declared length.
    pieces = (bytes(10_000) for _ in range(20))
    assert client.post("/v1/screen", content=pieces, headers=JPEG).status_code == 413
    good = (broken_photos / "good.jpg").read_bytes()
    assert client.post("/v1/screen", files=[("photo", (f"{n}.jpg", good)) for n in range(3)]).status_code == 413
    assert client.post("/v1/screen", files=[("photo", (f"{n}.jpg", b"x")) for n in range(33)]).status_code == 413
    assert client.post("/v1/screen", content=good, headers=JPEG).json()["results"][0]["status"] == "ok"


def test_token_is_required(start: Start, broken_photos: Path) -> None:
    client, good = start(token="correct horse battery"), (broken_photos / "good.jpg").read_bytes()
    for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic correct horse battery"}):
        refused = client.post("/v1/screen", content=good, headers=JPEG | wrong)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert client.get("/metrics", headers=wrong).status_code == 401
    right = {"authorization": "Bearer correct horse battery"}
    assert client.post("/v1/screen", content=good, headers=JPEG | right).status_code == 200
    assert client.get("/healthz").status_code == client.get("/").status_code == 200


def test_other_host_names_are_refused(start: Start) -> None:
    client = start(hosts=["127.0.0.1", "localhost"])
    assert client.get("/healthz").status_code == 200
    assert client.get("/healthz", headers={"host": "evil.example"}).status_code == 400


def test_slow_requests_time_out(start: Start) -> None:
    client = start(limits=Limits(max_s=0.5))

    def slowly() -> Any:
        yield b"\xff\xd8"
        time.sleep(1.5)
        yield b"\xff"

    answer = client.post("/v1/screen", content=slowly(), headers=JPEG)
    assert (answer.status_code, answer.json()["detail"]) == (504, "not done within 0.5 s")


def test_clients_that_never_finish_are_disconnected(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HEADERS_S", 1.5)
    client = start()
    port = client.base_url.port
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(20)]
        second = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        hang_up(client, slow, second)


def hang_up(client: httpx.Client, slow: list[socket.socket], second: socket.socket) -> None:
    second.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += second.recv(65536)
    assert b"200 OK" in answer
    second.sendall(b"GET /healthz HTT")  # the second request on its connection
    began = time.monotonic()
    for one in slow:
        one.sendall(b"POST /v1/screen HTTP/1.1\r\nX-")
    while time.monotonic() - began < 0.4:
        for one in slow:
            one.sendall(b"a")
        time.sleep(0.1)
    assert client.get("/healthz").status_code == 200
    for one in [*slow, second]:
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(100) == b""
    assert time.monotonic() - began < 5


def test_a_hanging_photo_affects_only_itself(
    start: Start, broken_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, seen = (broken_photos / "good.jpg").read_bytes(), []
    ask = isolation._Decoder._ask

    def hang(decoder: Any, *arguments: Any) -> bytes:
        if not seen:
            seen.append(os.kill(decoder.process, signal.SIGSTOP))
        return ask(decoder, *arguments)

    monkeypatch.setattr(isolation._Decoder, "_ask", hang)
    monkeypatch.setattr(isolation, "_STALLED", 1)
    client = start(limits=Limits(hang_s=0.3))
    answer = client.post("/v1/screen", files=[("photo", ("a", good)), ("photo", ("b", good))]).json()["results"]
    assert sorted(result["status"] for result in answer) == ["failed", "ok"]
    assert "made no progress" in " ".join(result["reason"] or "" for result in answer)


def test_engine_failures_are_reported(start: Start, broken_photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = (broken_photos / "good.jpg").read_bytes()

    def fail(self: OpenVinoEngine, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        raise RuntimeError("out of luck")

    client = start()
    monkeypatch.setattr(OpenVinoEngine, "_run", fail)
    first = client.post("/v1/screen", content=good, headers=JPEG).json()["results"][0]
    assert (first["status"], first["decision"], first["probabilities"]) == ("failed", None, {})
    assert first["reason"] == "the engine failed on this photo (out of luck); screen it again"
    for _ in range(20):
        client.post("/v1/screen", content=good, headers=JPEG)
    assert client.get("/healthz").status_code == 503
    last = client.post("/v1/screen", content=good, headers=JPEG)
    assert (last.status_code, "failed on 16 photos in a row" in last.json()["detail"]) == (500, True)


def test_sigterm_answers_accepted_requests(trained: Trained, photo_folder: Path, tmp_path: Path) -> None:
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "fastfundus", "serve", trained.bundle.path, "--port", "0"], stderr=log, stdout=log
    )
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", (tmp_path / "log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()  # noqa: PT018
            time.sleep(0.05)
        files = sorted((photo_folder / "images").iterdir())[:16]

        async def ask() -> list[int]:
            async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
                sent = [("photo", (file.name, file.read_bytes())) for file in files]
                tasks = [
                    asyncio.create_task(http.post(f"http://127.0.0.1:{found[1]}/v1/screen?pictures=true", files=sent))
                    for _ in range(4)
                ]
                # Stop the server while all photos are in progress: wait until all are accepted, even on a slow machine.
                taken = 0.0
                while taken < 64 and not any(task.done() for task in tasks):
                    metrics = (await http.get(f"http://127.0.0.1:{found[1]}/metrics")).text
                    taken = float(re.search(r"^fastfundus_photos_under_way (\S+)", metrics, re.MULTILINE)[1])  # type: ignore[index]
                    await asyncio.sleep(0.01)
                os.kill(process.pid, signal.SIGTERM)
                return [len(answer.json()["results"]) for answer in await asyncio.gather(*tasks)]

        assert asyncio.run(ask()) == [16] * 4
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        log.close()


def test_public_address_needs_a_token(trained: Trained) -> None:
    from click.testing import CliRunner

    from fastfundus.cli import main

    refused = CliRunner().invoke(main, ["serve", str(trained.bundle.path), "--host", "0.0.0.0"])
    assert refused.exit_code == 1
    assert "other machines can reach this address; add --token-file FILE" in refused.output
    short = CliRunner(env={"FASTFUNDUS_TOKEN": "short"}).invoke(main, ["serve", str(trained.bundle.path)])
    assert "a token of 5 characters is too easy to guess" in short.output


def test_segmentation_bundles_are_refused(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastfundus.serving.service import Service

    monkeypatch.setitem(trained.bundle.metadata, "output", "maps")

    async def make() -> None:
        Service(trained.bundle, ScreenPolicy(), max_waiting=1, hang_s=1)

    with pytest.raises(ConfigError, match="serve returns probabilities"):
        asyncio.run(make())


def test_the_page_uploads_photos_and_shows_results(
    start: Start, broken_photos: Path, trained: Trained, tmp_path: Path
) -> None:
    evil = tmp_path / "<img src=x onerror=document.title=1>.jpg"
    shutil.copy(broken_photos / "good.jpg", evil)
    client = start(token="correct horse battery", policy=ScreenPolicy(abstain=0.5))
    address = f"{client.base_url}/"
    with open_browser(tmp_path / "profile") as page:
        page.open(address)
        page.wait_for("document.getElementById('about').textContent.includes('engine openvino')")
        page.choose_files("#files", evil, broken_photos / "black.png", broken_photos / "text.jpg")
        page.wait_for("!document.getElementById('need').hidden")
        # The browser itself logs the refused request to its console.
        assert [text for text in page.complaints if "401" not in text] == []
        page.complaints.clear()
        page.run("document.getElementById('token').value = 'correct horse battery'")
        page.run("document.getElementById('form').requestSubmit()")
        page.wait_for("document.querySelectorAll('.photo').length === 3")
        page.wait_for("document.getElementById('status').textContent === '3 done'")
        names = page.run("[...document.querySelectorAll('.photo h2')].map(name => name.textContent)")
        assert names == ["text.jpg", "black.png", evil.name]
        decisions = page.run("[...document.querySelectorAll('.decision')].map(name => name.textContent)")
        assert decisions[:2] == ["not screened", "retake"]
        assert decisions[2] == "uncertain"
        page.wait_for("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
        assert page.run("[...document.images].filter(image => image.alt.startsWith('heatmap over')).length") == 1
        assert page.picture(tmp_path / "page.png").stat().st_size > 20_000
        assert {asked.split("?")[0].removeprefix(address) for asked in page.requests} == {
            "", "page.css", "page.js", "healthz", "v1/screen",
        }  # fmt: skip
        assert page.complaints == []
