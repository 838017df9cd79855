"""Whom a bundle comes from: hashes in a bundle prove that it is complete, not who wrote it.

Bundles with native code run only on the machine that built them, or with the user's consent. Any bundle can be signed
(Ed25519, RFC 8032, by the package cryptography) and then refused without a valid signature.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Any

from fastfundus.errors import BundleError, ConfigError, require
from fastfundus.files import atomic_write, read_small

__all__ = ["check_signature", "is_built_here", "note_built_here", "sign", "signature_file"]

_MESSAGE = b"fastfundus bundle 1\n"
"""Put before the fingerprint, so that a signature for another purpose is not one for a bundle."""


def _built(fingerprint: str) -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "fastfundus" / "built" / fingerprint


def note_built_here(fingerprint: str) -> bool:
    """Remember that this user built a bundle on this machine; return False if that cannot be written."""
    try:
        _built(fingerprint).parent.mkdir(parents=True, exist_ok=True)
        _built(fingerprint).touch()
    except OSError:
        return False
    return True


def is_built_here(fingerprint: str) -> bool:
    """Return whether this user built a bundle on this machine."""
    # The fingerprint comes from a file that is not trusted, and becomes part of a path.
    return fingerprint.isalnum() and _built(fingerprint).is_file()


def signature_file(bundle: Path) -> Path:
    """Return the file of a bundle's signature, which lies beside it."""
    bundle = Path(os.path.abspath(bundle))
    return bundle.with_name(f"{bundle.name}.sig")


def sign(bundle: Path, fingerprint: str, key: Path) -> Path:
    """Sign a bundle and return the file of the signature.

    Args:
        bundle: path of the bundle.
        fingerprint: its fingerprint, after its files were checked.
        key: PEM file with an Ed25519 private key, such as from `openssl genpkey -algorithm ed25519`.

    Raises:
        ConfigError: the file has no such key, or the signature cannot be written.
        MissingDependency: the package cryptography is not installed.
    """
    serialization = _serialization()
    private = _load(serialization.load_pem_private_key, key, "Ed25519PrivateKey", password=None)
    file = signature_file(bundle)
    try:
        with atomic_write(file) as partial:
            partial.write_bytes(base64.b64encode(private.sign(_MESSAGE + fingerprint.encode())) + b"\n")
    except OSError as error:
        raise ConfigError(f"{file}: the signature cannot be written ({error.strerror or error})") from None
    return file


def check_signature(bundle: Path, fingerprint: str, key: Path) -> str:
    """Check the signature of a bundle, and return the first 16 hex digits of the SHA-256 of the public key.

    Args:
        bundle: path of the bundle.
        fingerprint: its fingerprint, after its files were checked.
        key: PEM file with an Ed25519 public key.

    Raises:
        BundleError: there is no signature, or it is not valid for this bundle and key.
        ConfigError: the file has no such key.
        MissingDependency: the package cryptography is not installed.
    """
    serialization = _serialization()
    public = _load(serialization.load_pem_public_key, key, "Ed25519PublicKey")
    exceptions: Any = require("cryptography.exceptions", extra="sign")
    file = signature_file(bundle)
    try:
        signature = base64.b64decode(read_small(file, 4096).strip(), validate=True)
        public.verify(signature, _MESSAGE + fingerprint.encode())
    except FileNotFoundError:
        raise BundleError(f"{bundle}: is not signed ({file.name} is missing); sign it with fastfundus sign") from None
    except (OSError, binascii.Error, exceptions.InvalidSignature):
        raise BundleError(
            f"{bundle}: the signature in {file.name} was not made for this bundle with the key of {key}; do not use "
            "it; if you have rebuilt it since, sign it again"
        ) from None
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def _serialization() -> Any:
    return require("cryptography.hazmat.primitives.serialization", extra="sign")


_ADVICE = {
    "Ed25519PrivateKey": "make one with openssl genpkey -algorithm ed25519 -out key.pem",
    "Ed25519PublicKey": "make it from the private key with openssl pkey -in key.pem -pubout -out key.pub",
}


def _load(load: Any, key: Path, kind: str, **options: Any) -> Any:
    try:
        loaded = load(read_small(key, 65536), **options)
    except OSError as error:
        raise ConfigError(f"{key}: cannot be read ({error.strerror or error}); give a key file in PEM format") from None
    except (ValueError, TypeError) as error:
        advice = _ADVICE[kind]
        raise ConfigError(f"{key}: has no {kind} in PEM format ({str(error).splitlines()[0]}); {advice}") from None
    if not isinstance(
        loaded, getattr(require("cryptography.hazmat.primitives.asymmetric.ed25519", extra="sign"), kind)
    ):
        raise ConfigError(f"{key}: contains another kind of key ({type(loaded).__name__}, not {kind}); {_ADVICE[kind]}")
    return loaded
