"""Clients that leave, hoard memory, crowd others out, or act for a page of another site."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from fastfundus.photo import isolation
from fastfundus.serving import body
from fastfundus.serving.app import Limits
from fastfundus.serving.server import _MAX_CONNECTIONS
from tests.serving.conftest import Start

JPEG = {"content-type": "image/jpeg"}


@pytest.fixture
def good(broken_photos: Path) -> bytes:
    return (broken_photos / "good.jpg").read_bytes()


@pytest.fixture(scope="module")
def slow() -> bytes:
    """A colour picture of 80 megapixels, which takes seconds to decode, in a small file."""
    picture = np.zeros((9000, 9000, 3), np.uint8)
    picture[::3] = (10, 200, 90)
    return bytes(cv2.imencode(".png", picture)[1])


def send(client: httpx.Client, body: bytes, length: int, header: str = "Accept: */*") -> socket.socket:
    """Send the beginning of a request and return its connection."""
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 80))
    head = f"POST /v1/screen HTTP/1.1\r\nHost: {client.base_url.host}\r\nContent-Type: image/png\r\n{header}\r\n"
    connection.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    return connection


def wait_until(client: httpx.Client, waiting: int) -> float:
    """Wait until that many photos are in progress; return the seconds it took."""
    began = time.monotonic()
    while client.get("/readyz").json()["photos_waiting"] != waiting:
        assert time.monotonic() - began < 20
        time.sleep(0.02)
    return time.monotonic() - began


def test_work_for_clients_that_leave_is_cancelled(start: Start, good: bytes, slow: bytes) -> None:
    client = start()
    connections = [send(client, slow, len(slow)) for _ in range(12)]
    wait_until(client, 12)
    for connection in connections:
        connection.close()
    assert wait_until(client, 0) < 5
    began = time.monotonic()
    assert client.post("/v1/screen", content=good, headers=JPEG).json()["results"][0]["status"] == "ok"
    # Otherwise the good photo would wait for twelve slow ones.
    assert time.monotonic() - began < 5


def test_clients_that_leave_in_mid_body_leave_no_trace(
    start: Start, good: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    client = start()
    for _ in range(3):
        send(client, good[:1000], len(good)).close()
    assert client.post("/v1/screen", content=good, headers=JPEG).status_code == 200
    assert "Traceback" not in capfd.readouterr().err


def test_bodies_in_memory_are_bounded_in_sum(start: Start, good: bytes) -> None:
    client = start(limits=Limits(max_bytes=100_000))
    connections = [send(client, bytes(90_000), 95_000) for _ in range(17)]
    time.sleep(0.5)
    refused = client.post("/v1/screen", content=bytes(95_000), headers=JPEG)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["detail"].startswith("720000 bytes of photos of this client are in progress, at most 800000")
    other = client.post("/v1/screen", content=bytes(95_000), headers=JPEG | {"x-forwarded-for": "10.1.2.3"})
    assert other.status_code != 503
    for connection in connections:
        connection.close()
    time.sleep(0.5)
    assert client.post("/v1/screen", content=good, headers=JPEG).json()["results"][0]["status"] == "ok"


def test_bodies_that_stall_give_way(start: Start, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_PATIENCE_S", 1.0)
    client = start(limits=Limits(max_bytes=100_000))
    connections = [send(client, bytes(99_000), 99_500) for _ in range(8)]
    time.sleep(0.3)
    photo = good.ljust(95_000, b"\0")
    assert client.post("/v1/screen", content=photo, headers=JPEG).status_code == 503
    time.sleep(1)
    assert client.post("/v1/screen", content=photo, headers=JPEG).json()["results"][0]["status"] == "ok"
    # Only the oldest had to go, and learns why.
    assert b"408" in connections[0].recv(1000)
    connections[1].sendall(bytes(500))
    assert b"200 OK" in connections[1].recv(1000)
    for connection in connections:
        connection.close()


def test_many_clients_that_stall_give_way(start: Start, good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "_PATIENCE_S", 1.0)
    client = start(limits=Limits(max_bytes=100_000))
    connections = [send(client, bytes(99_000), 99_500, f"X-Forwarded-For: 10.1.2.{n % 4}") for n in range(16)]
    time.sleep(1.3)
    photo = good.ljust(95_000, b"\0")
    assert client.post("/v1/screen", content=photo, headers=JPEG).json()["results"][0]["status"] == "ok"
    for connection in connections:
        connection.close()


def test_requests_that_can_never_be_answered_are_not_to_be_repeated(start: Start, good: bytes) -> None:
    client = start(limits=Limits(max_waiting=4))
    answer = client.post("/v1/screen", files=[("photos", ("a.jpg", good)) for _ in range(5)])
    assert (answer.status_code, answer.json()["detail"]) == (413, "5 photos in one request; send at most 4 at once")
    assert "retry-after" not in answer.headers
    answer = start().post("/v1/screen", files=[("photos", ("a.jpg", good)) for _ in range(33)])
    assert (answer.status_code, answer.json()["detail"].split(";")[0]) == (413, "more than 32 photos in one request")


def test_connections_that_stall_in_mid_body_keep_nobody_out(start: Start, good: bytes) -> None:
    client = start()
    connections = [send(client, b"x", 1000) for _ in range(_MAX_CONNECTIONS + 3)]
    with httpx.Client(base_url=client.base_url, timeout=10, trust_env=False) as other:
        for _ in range(3):
            assert other.get("/livez").status_code == 200
            assert other.post("/v1/screen", content=good, headers=JPEG).status_code == 200
    for connection in connections:
        connection.close()


def test_one_client_cannot_crowd_out_the_others(start: Start, good: bytes, slow: bytes) -> None:
    client = start(limits=Limits(max_waiting=64))
    connections = [send(client, slow, len(slow)) for _ in range(32)]
    wait_until(client, 32)
    refused = client.post("/v1/screen", content=good, headers=JPEG)
    assert refused.status_code == 503
    assert refused.json()["detail"] == "32 photos of this client are in progress, at most 32 allowed"
    # The server believes a proxy on its own machine about who asks.
    began = time.monotonic()
    other = client.post("/v1/screen", content=good, headers=JPEG | {"x-forwarded-for": "10.1.2.3"})
    assert other.json()["results"][0]["status"] == "ok"
    # Large photos leave a decoder to the others.
    assert time.monotonic() - began < 5
    for connection in connections:
        connection.close()


def test_pages_of_other_sites_cannot_post(start: Start, good: bytes) -> None:
    client = start()

    def status(**headers: str) -> int:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return client.post("/v1/screen", content=good, headers=JPEG | given).status_code

    own = f"http://{client.base_url.host}:{client.base_url.port}"
    assert status(origin="https://evil.example") == status(origin="null") == status(origin="http://[") == 403
    assert status(origin=own, sec_fetch_site="cross-site") == status(sec_fetch_site="same-site") == 403
    assert status() == status(origin=own) == status(origin=own, sec_fetch_site="same-origin") == 200
    # Behind a proxy the server's own name may differ from the one that the browser sees.
    assert status(origin="https://screening.example", sec_fetch_site="same-origin") == 200
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200


@pytest.mark.parametrize(
    "disposition",
    ["attachment; filename*=nonsense''%ff", "attachment; filename*=utf-8''%ff%fe", 'inline; filename="=?x?b?!?="',
     ";;;=", "attachment; filename*0*=x; filename*2*=y", "x" * 5000,
     "attachment; filename*=unicode_escape''%5Cud800.jpg", "attachment; filename*=utf-7''+2AA-.jpg"],
)  # fmt: skip
def test_crafted_file_names_are_no_error(start: Start, good: bytes, disposition: str) -> None:
    answer = start().post("/v1/screen", content=good, headers=JPEG | {"content-disposition": disposition})
    assert answer.json()["results"][0]["status"] == "ok"


def test_connections_that_say_nothing_keep_nobody_out(start: Start, good: bytes, slow: bytes) -> None:
    client = start()
    address = client.base_url.host, client.base_url.port or 80
    with ThreadPoolExecutor(1) as pool, ExitStack() as silent:
        # This one is older than all others, but not silent.
        working = pool.submit(client.post, "/v1/screen", content=slow, headers={"content-type": "image/png"})
        wait_until(client, 1)
        for number in range(_MAX_CONNECTIONS + 20):
            connection = silent.enter_context(socket.create_connection(address))
            if number % 2:
                # A complete request makes it a connection that is kept for the next one.
                connection.sendall(b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n")
        assert client.get("/livez").status_code == 200
        assert client.post("/v1/screen", content=good, headers=JPEG).json()["results"][0]["status"] == "ok"
        assert working.result().status_code == 200


def test_health_is_told_apart_from_load(start: Start, good: bytes, slow: bytes) -> None:
    client = start(limits=Limits(max_waiting=2))
    for path in ("/livez", "/readyz", "/healthz", "/"):
        assert client.get(path).status_code == client.head(path).status_code == 200
        assert client.head(path).content == b""
    connections = [send(client, slow, len(slow)) for _ in range(2)]
    wait_until(client, 2)
    assert (client.get("/readyz").status_code, client.get("/readyz").json()["status"]) == (503, "busy")
    assert client.get("/livez").status_code == 200
    for connection in connections:
        connection.close()


def test_good_photos_are_answered_among_hostile_ones(start: Start, good: bytes, slow: bytes) -> None:
    """A short form of `make abuse`: bombs, junk and vanishing clients beside clients that send photos."""
    client = start(limits=Limits(hang_s=1))

    def patient(number: int) -> float:
        began = time.monotonic()
        while (answer := client.post("/v1/screen", content=good, headers=JPEG)).status_code == 503:
            time.sleep(0.1)
        assert answer.json()["results"][0]["status"] == "ok"
        return time.monotonic() - began

    def hostile(number: int) -> None:
        if number % 3 == 0:
            send(client, slow, len(slow)).close()
        elif number % 3 == 1:
            client.post("/v1/screen", content=b"\x89PNG\r\n\x1a\n" + bytes(1000), headers=JPEG)
        else:
            send(client, good[:100], len(good)).close()

    with ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(hostile, number) for number in range(30)]
        times = list(pool.map(patient, range(40)))
        for future in bad:
            future.result()
    assert sorted(times)[-2] < 5
    assert len(isolation._idle) <= 16
