"""The ``fastfundus sign`` command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path), help="PEM file with an Ed25519 private key.")
def sign(bundle: Path, key: Path) -> None:
    r"""Sign BUNDLE, so that `screen` and `serve` can insist on your signature.

    The signature is written beside the bundle, as NAME.sig: copy both. It covers every file of the bundle. Make a pair
    of keys with openssl genpkey -algorithm ed25519 -out key.pem, and openssl pkey -in key.pem -pubout -out key.pub.

    \b
    Example:
      fastfundus sign bundle/ --key key.pem
      fastfundus screen bundle/ photos/ --output results/ --require-signature key.pub
    """
    from fastfundus.engines import trust
    from fastfundus.engines.bundle import Bundle

    click.echo(str(trust.sign(bundle, Bundle.open(bundle).fingerprint, key)))
