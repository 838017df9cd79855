"""The ``fastfundus serve`` command."""

from __future__ import annotations

import os
from pathlib import Path

import click

from fastfundus.cli.trust_options import trust_options


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8321,
    show_default=True,
    help="Port to listen on; 0 selects a free one.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File with the token that clients must send; alternatively, set FASTFUNDUS_TOKEN.",
)
@click.option("--without-token", is_flag=True, help="Allow other machines to connect without a token.")
@click.option(
    "--abstain",
    type=float,
    default=0.0,
    metavar="WIDTH",
    help="Mark photos closer than this to a threshold as uncertain, for human review  [default: 0]",
)
@click.option(
    "--backend",
    type=click.Choice(["openvino", "onnxruntime"]),
    help="Run the bundle's graph in float32 on this runtime, instead of the verified engine.",
)
@click.option(
    "--max-megabytes",
    "--most-megabytes",
    "max_megabytes",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Largest request in megabytes.",
)
@click.option(
    "--max-seconds",
    "--most-seconds",
    "max_seconds",
    type=click.FloatRange(1.0),
    default=60.0,
    show_default=True,
    help="Timeout of a request in seconds.",
)
@click.option(
    "--max-waiting",
    "--most-waiting",
    "max_waiting",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Maximum number of photos in progress.",
)
@trust_options
def serve(
    bundle: Path,
    host: str,
    port: int,
    token_file: Path | None,
    without_token: bool,
    abstain: float,
    backend: str | None,
    max_megabytes: int,
    max_seconds: float,
    max_waiting: int,
    allow_native_code: bool,
    require_signature: Path | None,
) -> None:
    r"""Serve BUNDLE over HTTP, with a web page for uploading photos.

    POST /v1/screen takes multipart/form-data, or one photo as the body. GET /livez, /readyz, /metrics and /v1/about
    describe the server. On Ctrl-C or SIGTERM, it finishes accepted requests before it exits. It does not support TLS:
    put a proxy in front of it on networks that you do not control. For research use only.

    \b
    Example:
      fastfundus serve bundle/
      curl -F photo=@eye.jpg http://127.0.0.1:8321/v1/screen
    """
    from fastfundus.cli.console import quiet_decoders
    from fastfundus.engines.bundle import Bundle
    from fastfundus.errors import ConfigError, require
    from fastfundus.screening.policy import ScreenPolicy

    for module in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        require(module, extra="serve")
    from fastfundus.serving.app import Limits, create_app
    from fastfundus.serving.server import LOOPBACK
    from fastfundus.serving.server import serve as run

    quiet_decoders()
    token = _token(token_file)
    if host not in LOOPBACK and token is None and not without_token:
        raise ConfigError(
            f"--host {host}: other machines can reach this address; add --token-file FILE, or --without-token on a "
            "closed network"
        )
    opened = Bundle.open(bundle, allow_native_code=allow_native_code, require_signature=require_signature)
    if backend:
        opened = opened.using(backend)
    limits = Limits(max_bytes=max_megabytes << 20, max_s=max_seconds, max_waiting=max_waiting)
    hosts = [*LOOPBACK[:2], "[::1]"] if host in LOOPBACK else None
    app = create_app(opened, policy=ScreenPolicy(abstain=abstain), limits=limits, token=token, hosts=hosts)
    run(app, limits, host=host, port=port)


def _token(file: Path | None) -> str | None:
    from fastfundus.errors import ConfigError

    if file is None:
        token = os.environ.get("FASTFUNDUS_TOKEN")
        if token is None:
            return None
        where = "FASTFUNDUS_TOKEN"
    else:
        where = f"--token-file {file}"
        try:
            token = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where}: cannot be read ({error})") from None
    token = token.strip()
    if len(token) < 16:
        raise ConfigError(
            f"{where}: a token of {len(token)} characters is too easy to guess; at least 16 are needed, such as the "
            "output of: openssl rand -hex 32"
        )
    return token
