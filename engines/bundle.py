"""The bundle: an engine with everything that makes its answers mean something, in a folder or one file. No torch.

bundle.json    schema, backend, precision, spec and fingerprint, labels with thresholds and temperatures, parity
               report, where it came from, and the sha256 of every other file
model.onnx     the graph the engine was built from
engine.*       the backend's own files
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastfundus.engines.archive import Unpacked, is_archive
from fastfundus.engines.runtime import GRAPH, Engine, load_backend
from fastfundus.errors import BundleError, FastFundusError
from fastfundus.spec import PreprocessSpec, fingerprint_of

__all__ = ["GRAPH_BACKENDS", "SCHEMA", "Bundle", "hash_file", "write_bundle_json"]

SCHEMA = 3
"""Version of the bundle's files."""
GRAPH_BACKENDS = ("openvino", "onnxruntime")
"""Backends that run the graph of any bundle."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle whose files are as they were written."""

    path: Path
    spec: PreprocessSpec
    labels: tuple[str, ...]
    """Names of the engine's outputs."""
    thresholds: tuple[float, ...]
    """By label: reached at or above."""
    findings: tuple[str, ...]
    """Labels that make a photo positive when they reach their threshold."""
    backend: str
    """What runs it."""
    precision: str
    """What it computes in."""
    about: dict[str, Any]
    """All of `bundle.json`."""
    folder: Path
    """Where its files are: `path`, or where one file was unpacked to for as long as this object lives."""
    _unpacked: Unpacked | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open a bundle and check every file against its hash.

        Args:
            path: a folder, or a file that ends in ".zip".

        Raises:
            BundleError: it is no bundle, from a newer FastFundus, or a file is missing or was changed.
        """
        if is_archive(path):
            unpacked = Unpacked(path)
            return cls._read(path, unpacked.folder, unpacked)
        return cls._read(path, path, None)

    @classmethod
    def _read(cls, path: Path, folder: Path, unpacked: Unpacked | None) -> Bundle:
        try:
            about = json.loads((folder / "bundle.json").read_text())
        except FileNotFoundError:
            raise BundleError(
                f"{path}: is no engine bundle (no bundle.json); make one with fastfundus build-engine"
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{path / 'bundle.json'}: cannot be read ({error}); build the engine again") from None
        if about.get("schema") != SCHEMA:
            raise BundleError(
                f"{path}: has schema {about.get('schema')}, this FastFundus reads {SCHEMA}; upgrade FastFundus, or "
                "build it again from its run"
            )
        if fingerprint_of({key: value for key, value in about.items() if key != "fingerprint"}) != about["fingerprint"]:
            raise BundleError(f"{path / 'bundle.json'}: was changed after it was built; build the engine again")
        for name, sha in about["files"].items():
            # A bundle may come from anywhere: its names must stay inside it.
            if Path(name).name != name:
                raise BundleError(f"{path}: names a file outside the bundle ({name!r}); do not use it")
            if not (folder / name).is_file():
                raise BundleError(f"{path}: {name} is missing; copy the whole folder or build the engine again")
            if hash_file(folder / name) != sha:
                raise BundleError(f"{path}: {name} was changed after it was built; build the engine again")
        for name in (about["engine"], about.get("weights")):
            if name is not None and name not in about["files"]:
                raise BundleError(f"{path}: its engine {name!r} is none of its files; do not use it")
        try:
            spec = PreprocessSpec.from_dict(about["spec"])
        except FastFundusError as error:
            raise BundleError(f"{path}: {error}") from None
        if spec.fingerprint != about["spec_fingerprint"]:
            raise BundleError(
                f"{path}: its preprocessing has the fingerprint {about['spec_fingerprint'][:12]}, here the same "
                f"settings have {spec.fingerprint[:12]}: they mean something else; build the engine again"
            )
        labels = about["labels"]
        thresholds = tuple(float(entry["threshold"]) for entry in labels.values())
        findings = tuple(name for name, entry in labels.items() if entry["finding"])
        return cls(
            path,
            spec,
            tuple(labels),
            thresholds,
            findings,
            about["backend"],
            about["precision"],
            about,
            folder,
            unpacked,
        )

    def threshold_of(self, label: str) -> float:
        """Probability at or above which a label is reached."""
        return self.thresholds[self.labels.index(label)]

    @property
    def fingerprint(self) -> str:
        """64 hex digits that identify the engine, its preprocessing and its thresholds."""
        return str(self.about["fingerprint"])

    def using(self, backend: str) -> Bundle:
        """Return the same bundle, to run the graph inside it in float32 on a machine its engine was not built for.

        Args:
            backend: one of `GRAPH_BACKENDS`.

        Raises:
            BundleError: the graph does not run in this backend.
        """
        if backend not in GRAPH_BACKENDS:
            raise BundleError(
                f"{self.path}: the graph inside a bundle runs in {' or '.join(GRAPH_BACKENDS)}, not in {backend!r}"
            )
        return replace(self, backend=backend, precision="fp32")

    def load(self) -> Engine:
        """Load the engine.

        Raises:
            BundleError: this machine or installation cannot run it.
            MissingDependency: the backend's package is absent.
        """
        about = self.about
        if (self.backend, self.precision) != (about["backend"], about["precision"]):
            about = {**about, "backend": self.backend, "precision": self.precision, "engine": GRAPH, "needs": {}}
        engine = load_backend(self.backend, self.folder, about)
        # Where it was unpacked to tells users nothing.
        engine.name = str(self.path)
        return engine


def hash_file(path: Path) -> str:
    """sha256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bundle_json(folder: Path, about: dict[str, Any]) -> None:
    """Hash every file of a folder and write its `bundle.json`, which makes it a bundle."""
    files = {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name != "bundle.json"}
    complete = {"schema": SCHEMA, **about, "files": files}
    complete["fingerprint"] = fingerprint_of(complete)
    (folder / "bundle.json").write_text(json.dumps(complete, indent=1) + "\n")
