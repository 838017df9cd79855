"""Bundles: an engine with everything needed to interpret its outputs, in a folder or a single file.

Does not need torch.

bundle.json    schema, backend, precision, spec and fingerprint, labels with thresholds and temperatures, parity
               report, provenance, and the sha256 of every other file
model.onnx     the graph that the engine was built from
engine.*       files of the backend
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastfundus.engines.archive import MAX_DESCRIPTION_BYTES, Unpacked, is_archive
from fastfundus.engines.onnx_scan import external_files
from fastfundus.engines.runtime import GRAPH, Engine, load_backend
from fastfundus.engines.trust import check_signature, is_built_here
from fastfundus.errors import BundleError, FastFundusError
from fastfundus.files import hash_file, open_regular, read_small
from fastfundus.spec import PreprocessSpec, fingerprint_of

__all__ = ["GRAPH_BACKENDS", "SCHEMA", "Bundle", "write_bundle_json"]

SCHEMA = 3
"""Version of the bundle format."""
GRAPH_BACKENDS = ("openvino", "onnxruntime")
"""Backends that can run the graph of any bundle."""


@dataclass(frozen=True, slots=True, repr=False)
class Bundle:
    """Opened bundle whose files match their recorded hashes."""

    path: Path
    spec: PreprocessSpec
    labels: tuple[str, ...]
    """Names of the engine's outputs."""
    thresholds: tuple[float, ...]
    """Threshold of each label; a probability at or above it is positive."""
    findings: tuple[str, ...]
    """Labels that make a photo positive when their probability reaches the threshold."""
    backend: str
    """Backend that runs the engine."""
    precision: str
    """Precision that the engine computes in."""
    metadata: dict[str, Any]
    """Complete content of `bundle.json`."""
    folder: Path
    """Folder of its files: `path`, or the temporary folder of a single-file bundle, deleted with this object."""
    signed_by: str | None = None
    """Start of the hash of the public key for which a signature was required; None if none was."""
    _unpacked: Unpacked | None = field(default=None, repr=False, compare=False)
    _allow_native_code: bool = field(default=False, repr=False, compare=False)

    def __repr__(self) -> str:
        how = f"{self.backend} {self.precision}, {self.spec.size} px"
        return f"Bundle({str(self.path)!r}, {', '.join(self.labels)}, {how})"

    @classmethod
    def open(
        cls, path: str | Path, *, allow_native_code: bool = False, require_signature: str | Path | None = None
    ) -> Bundle:
        """Open a bundle and check every file against its hash.

        Args:
            path: a folder, or a file whose name ends in ".zip".
            allow_native_code: run native code of a bundle that another machine built; see `has_native_code`.
            require_signature: PEM file of an Ed25519 public key; the bundle must have a valid signature for it.

        Raises:
            BundleError: if it is not a bundle, its schema is not supported, a file is missing or modified, or a
                signature is required and missing or not valid.
        """
        path = Path(path)
        unpacked = Unpacked(path) if is_archive(path) else None
        bundle = cls._read(path, unpacked.folder if unpacked else path, unpacked)
        signed_by = None
        if require_signature is not None:
            signed_by = check_signature(path, bundle.fingerprint, Path(require_signature))
        return replace(bundle, signed_by=signed_by, _allow_native_code=allow_native_code)

    @classmethod
    def _read(cls, path: Path, folder: Path, unpacked: Unpacked | None) -> Bundle:
        try:
            metadata = json.loads(read_small(folder / "bundle.json", MAX_DESCRIPTION_BYTES))
        except FileNotFoundError:
            if not path.exists():
                raise BundleError(f"{path}: does not exist; give a bundle created by fastfundus build-engine") from None
            raise BundleError(
                f"{path}: not an engine bundle (no bundle.json); create one with fastfundus build-engine"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise BundleError(f"{path / 'bundle.json'}: cannot be read ({error}); rebuild the engine") from None
        try:
            return cls._checked(path, folder, unpacked, metadata)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            # Whoever can write the file can make its fingerprint match: nothing in it has to have the right type.
            raise BundleError(
                f"{path / 'bundle.json'}: is malformed ({type(error).__name__}: {error}); rebuild the engine"
            ) from None

    @classmethod
    def _checked(cls, path: Path, folder: Path, unpacked: Unpacked | None, metadata: dict[str, Any]) -> Bundle:
        if metadata.get("schema") != SCHEMA:
            raise BundleError(
                f"{path}: bundle has schema {metadata.get('schema')}, but this FastFundus reads schema {SCHEMA}; "
                "upgrade FastFundus, or rebuild the bundle from its run"
            )
        if (
            fingerprint_of({key: value for key, value in metadata.items() if key != "fingerprint"})
            != metadata["fingerprint"]
        ):
            raise BundleError(f"{path / 'bundle.json'}: modified after the bundle was built; rebuild it")
        if not isinstance(metadata["fingerprint"], str):
            raise TypeError("the fingerprint is not text")
        # The report reads them, when everything has been screened.
        if missing := {"heatmap", "output", "parity", "provenance"} - metadata.keys():
            raise KeyError(min(missing))
        guard = metadata.get("guard")
        if guard is not None and not isinstance(guard["limit"], int | float):
            raise TypeError(f"the limit of the guard is {guard['limit']!r}")
        for name, sha in metadata["files"].items():
            # Bundles are not trusted: file names must stay inside the folder.
            if Path(name).name != name:
                raise BundleError(f"{path}: names a file outside the bundle ({name!r}); do not use it")
            if not (folder / name).is_file():
                raise BundleError(f"{path}: {name} is missing; copy the whole folder or rebuild the engine")
            if hash_file(folder / name) != sha:
                raise BundleError(f"{path}: {name} was modified after the bundle was built; rebuild it")
        # Runtimes open files beside the one that they are given.
        for file in folder.iterdir():
            if file.name not in metadata["files"] and file.name != "bundle.json" and not file.name.startswith("."):
                raise BundleError(
                    f"{path}: contains {file.name!r}, which bundle.json does not list; do not use it, or remove that "
                    "file if it is your own"
                )
        for name in (metadata["engine"], metadata.get("weights")):
            if name is not None and name not in metadata["files"]:
                raise BundleError(f"{path}: its engine file {name!r} is not listed in bundle.json; do not use it")
        _check_kind(path, folder, metadata)
        for name in metadata["files"]:
            if name.lower().endswith(".onnx"):
                _check_graph(path, folder / name, metadata["files"])
        try:
            spec = PreprocessSpec.from_dict(metadata["spec"])
        except FastFundusError as error:
            raise BundleError(f"{path}: {error}") from None
        if spec.fingerprint != metadata["spec_fingerprint"]:
            raise BundleError(
                f"{path}: preprocessing has fingerprint {metadata['spec_fingerprint'][:12]}, but in this FastFundus "
                f"the same settings have {spec.fingerprint[:12]}, so their meaning changed; rebuild the engine"
            )
        labels = metadata["labels"]
        if not labels:
            raise BundleError(f"{path}: has no labels; rebuild the engine")
        for name, entry in labels.items():
            _check_label(path, name, entry)
        _check_reference(labels, metadata.get("reference"))
        thresholds = tuple(float(entry["threshold"]) for entry in labels.values())
        findings = tuple(name for name, entry in labels.items() if entry["finding"])
        return cls(
            path,
            spec,
            tuple(labels),
            thresholds,
            findings,
            metadata["backend"],
            metadata["precision"],
            metadata,
            folder,
            _unpacked=unpacked,
        )

    @property
    def guarded(self) -> bool:
        """True if the engine also says how unfamiliar a photo is; bundles of version 0.1 have no guard."""
        return self.metadata.get("guard") is not None

    @property
    def has_native_code(self) -> bool:
        """True if the engine contains native code, which runs with the rights of the user as soon as it is loaded."""
        return self.backend == "aoti" or (self.backend == "tensorrt" and bool(self.metadata.get("portable")))

    def threshold_of(self, label: str) -> float:
        """Return the probability at or above which a label is positive."""
        return self.thresholds[self.labels.index(label)]

    @property
    def fingerprint(self) -> str:
        """Identifier of the engine, its preprocessing and its thresholds, 64 hex digits."""
        return str(self.metadata["fingerprint"])

    def using(self, backend: str) -> Bundle:
        """Return a copy that runs the float32 graph in the bundle, for machines that cannot run its engine.

        Args:
            backend: one of `GRAPH_BACKENDS`.

        Raises:
            BundleError: if this backend cannot run the graph.
        """
        if backend not in GRAPH_BACKENDS:
            raise BundleError(
                f"{self.path}: the graph of a bundle runs in {' or '.join(GRAPH_BACKENDS)}, not in {backend!r}"
            )
        return replace(self, backend=backend, precision="fp32")

    def load(self) -> Engine:
        """Load the engine.

        Raises:
            BundleError: if this machine or installation cannot run the engine.
            MissingDependency: if the backend's package is not installed.
        """
        metadata = self.metadata
        if (self.backend, self.precision) != (metadata["backend"], metadata["precision"]):
            metadata = {**metadata, "backend": self.backend, "precision": self.precision, "engine": GRAPH, "needs": {}}
        if self.has_native_code and not self._allow_native_code and not is_built_here(self.fingerprint):
            raise BundleError(
                f"{self.path}: contains native code, which could do anything, and was not built by this user on this "
                "machine; if you trust its source, add --allow-native-code, otherwise --backend openvino"
            )
        engine = load_backend(self.backend, self.folder, metadata)
        # Messages name the bundle, not the temporary folder.
        engine.name = str(self.path)
        return engine


_KINDS = {
    "openvino": (".xml", ".onnx"), "onnxruntime": (".onnx",), "aoti": (".pt2",), "tensorrt": (".plan",),
    "tensorrt-rtx": (".plan",),
}  # fmt: skip
"""Endings of engine files by backend. Others are refused: runtimes guess formats by content."""


def _check_kind(path: Path, folder: Path, metadata: dict[str, Any]) -> None:
    """Raise if an engine is not the kind of file that its name says."""
    name, backend = metadata["engine"], metadata["backend"]
    if not isinstance(backend, str) or not backend.isprintable() or not backend.isascii():
        raise TypeError(f"the backend is {backend!r}")
    kinds = _KINDS.get(backend)
    if kinds is None:
        # Refused when it is loaded, with what else runs the bundle.
        return
    if not name.endswith(kinds):
        raise BundleError(f"{path}: its engine file {name!r} must end in {' or '.join(kinds)}; do not use it")
    if name.endswith(".xml"):
        with open_regular(folder / name) as file:
            if not file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
                raise BundleError(f"{path}: its engine file {name!r} is not XML; do not use it")


def _check_reference(labels: dict[str, Any], reference: Any) -> None:
    """Raise unless the distributions with which the report compares are complete."""
    if reference is None:
        return
    if strangers := set(reference["scores"]) - set(labels):
        raise ValueError(f"the reference has scores of {min(strangers)!r}, which is no label")
    for known in (*reference["scores"].values(), reference["quality"]):
        if known is not None and not (
            len(known["edges"]) == len(known["shares"]) - 1
            and all(isinstance(value, int | float) for value in (*known["edges"], *known["shares"], known["photos"]))
            and known["photos"] > 0
        ):
            raise ValueError("the reference is incomplete")


def _check_label(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Raise unless the settings of a label can be used: they decide, and nobody would notice a wrong one."""
    for name_of, value in (("threshold", entry["threshold"]), ("temperature", entry["temperature"])):
        if isinstance(value, bool | str):
            raise TypeError(f"the {name_of} of {name!r} is {value!r}, not a number")
    threshold, temperature = float(entry["threshold"]), float(entry["temperature"])
    if not 0 <= threshold <= 1:
        raise BundleError(
            f"{path}: the threshold of {name!r} is {threshold}, but a probability is 0 to 1; rebuild the engine"
        )
    if not 0 < temperature < float("inf"):
        raise BundleError(f"{path}: the temperature of {name!r} is {temperature}, not above 0; rebuild the engine")
    for optional in ("target_sensitivity", "target_specificity"):
        if not isinstance(entry.get(optional), int | float | None):
            raise TypeError(f"the {optional} of {name!r} is {entry[optional]!r}")
    if not isinstance(entry["finding"], bool):
        raise TypeError(f"whether {name!r} is a finding is {entry['finding']!r}")
    if not name or not name.isprintable():
        raise ValueError(f"the label {name!r} cannot be printed")


def _check_graph(path: Path, file: Path, listed: Collection[str]) -> None:
    """Raise if a graph reads files that the bundle does not list."""
    try:
        strangers = external_files(file.read_bytes()) - set(listed)
    except BundleError as error:
        raise BundleError(f"{path}: {file.name}: {error}") from None
    if strangers:
        raise BundleError(
            f"{path}: {file.name} reads {min(strangers)!r}, which bundle.json does not list; do not use it"
        )


def write_bundle_json(folder: Path, metadata: dict[str, Any]) -> None:
    """Hash every file in a folder and write its `bundle.json`, which turns the folder into a bundle."""
    files = {path.name: hash_file(path) for path in sorted(folder.iterdir()) if path.name != "bundle.json"}
    complete = {"schema": SCHEMA, **metadata, "files": files}
    complete["fingerprint"] = fingerprint_of(complete)
    (folder / "bundle.json").write_text(json.dumps(complete, indent=1) + "\n")
