"""The bundle: an engine with everything that makes its answers mean something, in one folder. No torch.

bundle.json    schema, backend, precision, spec and fingerprint, labels with thresholds and temperatures, parity
               report, where it came from, and the sha256 of every other file
model.onnx     the graph the engine was built from
engine.*       the backend's own files
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfundus.engines.runtime import Engine, load_backend
from fastfundus.errors import BundleError, FastFundusError
from fastfundus.spec import PreprocessSpec, fingerprint_of

__all__ = ["SCHEMA", "Bundle", "hash_file", "write_bundle_json"]

SCHEMA = 2
"""Version of the bundle's files."""


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
    about: dict[str, Any]
    """All of `bundle.json`."""

    @classmethod
    def open(cls, path: Path) -> Bundle:
        """Open a bundle and check every file against its hash.

        Raises:
            BundleError: it is no bundle, from a newer FastFundus, or a file is missing or was changed.
        """
        try:
            about = json.loads((path / "bundle.json").read_text())
        except FileNotFoundError:
            raise BundleError(
                f"{path}: is no engine bundle (no bundle.json); make one with fastfundus build-engine"
            ) from None
        except (OSError, ValueError) as error:
            raise BundleError(f"{path / 'bundle.json'}: cannot be read ({error}); build the engine again") from None
        if about.get("schema") != SCHEMA:
            raise BundleError(
                f"{path}: has schema {about.get('schema')}, this FastFundus reads {SCHEMA}; upgrade it or build again"
            )
        if fingerprint_of({key: value for key, value in about.items() if key != "fingerprint"}) != about["fingerprint"]:
            raise BundleError(f"{path / 'bundle.json'}: was changed after it was built; build the engine again")
        for name, sha in about["files"].items():
            # A bundle may come from anywhere: its names must stay inside it.
            if Path(name).name != name:
                raise BundleError(f"{path}: names a file outside the bundle ({name!r}); do not use it")
            if not (path / name).is_file():
                raise BundleError(f"{path}: {name} is missing; copy the whole folder or build the engine again")
            if hash_file(path / name) != sha:
                raise BundleError(f"{path}: {name} was changed after it was built; build the engine again")
        try:
            spec = PreprocessSpec.from_dict(about["spec"])
        except FastFundusError as error:
            raise BundleError(f"{path}: {error}") from None
        labels = about["labels"]
        thresholds = tuple(float(entry["threshold"]) for entry in labels.values())
        findings = tuple(name for name, entry in labels.items() if entry["finding"])
        return cls(path, spec, tuple(labels), thresholds, findings, about)

    def threshold_of(self, label: str) -> float:
        """Probability at or above which a label is reached."""
        return self.thresholds[self.labels.index(label)]

    @property
    def fingerprint(self) -> str:
        """64 hex digits that identify the engine, its preprocessing and its thresholds."""
        return str(self.about["fingerprint"])

    def load(self) -> Engine:
        """Load the engine.

        Raises:
            BundleError: this machine or installation cannot run it.
        """
        return load_backend(self.about["backend"], self.path, self.about)


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
