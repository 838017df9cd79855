"""Bundles from elsewhere: native code, files outside, signatures, and copies left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from onnx import TensorProto, helper, numpy_helper

from fastfundus.data.journal import locked
from fastfundus.engines import archive, trust
from fastfundus.engines.archive import pack
from fastfundus.engines.bundle import Bundle, write_bundle_json
from fastfundus.engines.onnx_scan import external_files
from fastfundus.errors import BundleError, ConfigError
from fastfundus.spec import PreprocessSpec, fingerprint_of
from tests.cli.test_cli import run
from tests.conftest import Trained


@pytest.fixture
def photos(trained: Trained) -> np.ndarray:
    size = trained.bundle.spec.size
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.bundle.path, tmp_path / "copy"))


def rewrite(bundle: Path, **changes: object) -> None:
    """Change the description and make its hashes and fingerprint valid again, as anyone can."""
    metadata = json.loads((bundle / "bundle.json").read_text()) | changes
    write_bundle_json(bundle, {key: value for key, value in metadata.items() if key not in ("files", "fingerprint")})


@pytest.mark.long
def test_native_code_from_elsewhere_does_not_run(
    built: Callable[[str], Path],
    photos: np.ndarray,
    broken_photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = Path(shutil.copytree(built("aoti"), tmp_path / "mail"))
    with Bundle.open(bundle).load() as engine:
        expected = engine.infer(photos[:2])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(BundleError, match=r"contains native code, .* was not built by this user .*--allow-native-code"):
        Bundle.open(bundle).load()
    result = run("screen", bundle, broken_photos, "--output", tmp_path / "out")
    assert "contains native code" in result.output
    with Bundle.open(bundle, allow_native_code=True).load() as engine:
        np.testing.assert_array_equal(engine.infer(photos[:2]), expected)
    Bundle.open(bundle).using("openvino").load().close()


@pytest.mark.long
def test_a_changed_native_bundle_is_not_the_one_that_was_built(built: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built("aoti"), tmp_path / "mail"))
    data = bytearray((bundle / "engine.pt2").read_bytes())
    (bundle / "engine.pt2").write_bytes(data + b"\0")
    rewrite(bundle)
    with pytest.raises(BundleError, match="contains native code"):
        Bundle.open(bundle).load()


def test_an_engine_with_another_number_of_outputs_is_refused(copied: Path, photos: np.ndarray) -> None:
    """Labels are added to the description, whose hashes and fingerprint are made valid again."""
    labels = json.loads((copied / "bundle.json").read_text())["labels"]
    rewrite(copied, labels={**labels, "glaucoma": next(iter(labels.values()))})
    with (
        Bundle.open(copied).load() as engine,
        pytest.raises(BundleError, match=r"the engine returned \d values per photo, but its bundle names \d; do not"),
    ):
        engine.infer(photos[:1])


def unlist(bundle: Path, *names: str) -> None:
    """Leave files out of the description, and make its fingerprint valid again."""
    metadata = json.loads((bundle / "bundle.json").read_text())
    for name in names:
        del metadata["files"][name]
    del metadata["fingerprint"]
    (bundle / "bundle.json").write_text(json.dumps(metadata | {"fingerprint": fingerprint_of(metadata)}))


def test_files_that_nobody_listed_are_refused_even_if_the_bundle_is_signed(
    copied: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    """OpenVINO reads the weights beside the file that it is given."""
    unlist(copied, "engine.bin")
    trust.sign(copied, json.loads((copied / "bundle.json").read_text())["fingerprint"], keys[0])
    with pytest.raises(BundleError, match=r"contains 'engine.bin', which bundle.json does not list; do not use it"):
        Bundle.open(copied, require_signature=keys[1])
    assert "does not list" in run("sign", copied, "--key", keys[0]).output


def test_hidden_files_of_the_system_do_no_harm(copied: Path) -> None:
    (copied / ".DS_Store").write_bytes(b"x")
    Bundle.open(copied).load().close()


@pytest.mark.parametrize("name", ["engine.ONNX", "engine.pb", "engine", "engine.onnx", "engine.xml"])
def test_engines_are_what_their_names_say(copied: Path, tmp_path: Path, name: str) -> None:
    """Runtimes guess the format by content: another name must not get round the check of files outside."""
    model = onnx.load(copied / "model.onnx")
    with_external(model, "initializer", str(tmp_path / "secret"))
    onnx.save(model, str(copied / "engine.tmp"))
    (copied / "engine.tmp").replace(copied / name)
    for rest in ("engine.bin", "engine.xml"):
        if rest != name:
            (copied / rest).unlink()
    rewrite(copied, engine=name)
    with pytest.raises(BundleError, match=r"do not use it|must end in"):
        Bundle.open(copied)


@pytest.mark.parametrize(
    "change",
    [{"backend": "\ud800"}, {"backend": ["openvino"]}, {"reference": {"scores": {"other": None}, "quality": None}},
     {"reference": {"scores": {}}}, {"reference": 3},
     {"reference": {"scores": {}, "quality": {"edges": [0.5], "shares": [1.0], "photos": 9}}},
     {"reference": {"scores": {}, "quality": {"edges": [0.5], "shares": [1, 0], "photos": 0}}}],
)  # fmt: skip
def test_what_the_report_reads_is_checked_before_anything_is_screened(copied: Path, change: dict[str, object]) -> None:
    rewrite(copied, **change)
    with pytest.raises(BundleError, match="is malformed"):
        Bundle.open(copied)


def test_a_size_that_is_not_that_of_the_graph_is_refused(copied: Path) -> None:
    metadata = json.loads((copied / "bundle.json").read_text())
    spec = PreprocessSpec.from_dict(metadata["spec"] | {"size": 128})
    rewrite(copied, spec=spec.to_dict(), spec_fingerprint=spec.fingerprint)
    for bundle in (Bundle.open(copied), Bundle.open(copied).using("onnxruntime")):
        with pytest.raises(BundleError, match=r"was made for photos of shape .*64, 64, 3.*, not of 128 pixels"):
            bundle.load()


def test_labels_without_a_target_make_a_report_all_the_same(copied: Path, broken_photos: Path, tmp_path: Path) -> None:
    labels = json.loads((copied / "bundle.json").read_text())["labels"]
    for entry in labels.values():
        entry.pop("target_sensitivity", None)
    rewrite(copied, labels=labels)
    assert run("screen", copied, broken_photos, "--output", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("place", ["bundle.json", "signature", "key"])
@pytest.mark.parametrize("kind", ["pipe", "endless"])
def test_pipes_and_devices_are_neither_waited_for_nor_read(
    copied: Path, tmp_path: Path, keys: tuple[Path, Path], place: str, kind: str
) -> None:
    trust.sign(copied, Bundle.open(copied).fingerprint, keys[0])
    file = {"bundle.json": copied / "bundle.json", "signature": copied.with_name("copy.sig"), "key": tmp_path / "k"}[
        place
    ]
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    began = time.monotonic()
    with pytest.raises((BundleError, ConfigError)):
        Bundle.open(copied, require_signature=file if place == "key" else keys[1])
    assert time.monotonic() - began < 5


def test_a_pipe_named_like_a_bundle_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "bundle.zip")
    with pytest.raises(BundleError, match="is not a regular file"):
        Bundle.open(tmp_path / "bundle.zip")


def test_two_builds_do_not_share_an_output(trained: Trained, tmp_path: Path) -> None:
    with locked(tmp_path / "bundle", tmp_path / "bundle.lock", "built"):
        result = run("build-engine", trained.run, "--output", tmp_path / "bundle")
    assert (result.exit_code, "is being built by another process; wait for it" in result.output) == (1, True)


def test_who_signed_a_bundle_is_in_the_log_and_kept_by_resume(
    copied: Path, broken_photos: Path, tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    trust.sign(copied, Bundle.open(copied).fingerprint, keys[0])
    arguments = ("screen", copied, broken_photos, "--output", tmp_path / "out")
    assert run(*arguments, "--require-signature", keys[1]).exit_code == 0
    start = json.loads((tmp_path / "out" / "audit.jsonl").read_text().splitlines()[0])
    assert start["signed_by"] == Bundle.open(copied, require_signature=keys[1]).signed_by
    again = run(*arguments, "--resume")
    assert (again.exit_code, "was started with another --require-signature" in again.output) == (1, True)
    assert run(*arguments, "--resume", "--require-signature", keys[1]).exit_code == 0


def test_a_signature_that_cannot_be_written_is_an_error_in_words(copied: Path, keys: tuple[Path, Path]) -> None:
    signature_file = copied.with_name(f"{copied.name}.sig")
    signature_file.mkdir()
    result = run("sign", copied, "--key", keys[0])
    assert result.exit_code == 1
    assert f"{signature_file}: the signature cannot be written (" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("fingerprint", ["../../../etc/passwd", "", "a/b", "a\0b"])
def test_fingerprints_are_no_paths(fingerprint: str) -> None:
    assert not trust.is_built_here(fingerprint)


def with_external(model: onnx.ModelProto, where: str, location: str) -> None:
    """Add a tensor that is kept in another file."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "stolen")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    if where == "initializer":
        model.graph.initializer.append(tensor)
    elif where == "sparse":
        sparse = model.graph.sparse_initializer.add()
        sparse.values.CopyFrom(tensor)
    else:
        branch = helper.make_graph([], "branch", [], [], [tensor])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        if where == "function":
            model.functions.append(helper.make_function("here", "f", [], [], [node], []))
        else:
            model.graph.node.append(node)


@pytest.mark.parametrize("where", ["initializer", "sparse", "branch", "function"])
@pytest.mark.parametrize("location", ["/etc/passwd", "../secret", "weights.bin"])
def test_graphs_read_no_other_files(copied: Path, where: str, location: str) -> None:
    model = onnx.load(copied / "model.onnx")
    assert external_files((copied / "model.onnx").read_bytes()) == set()
    with_external(model, where, location)
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    rewrite(copied)
    with pytest.raises(BundleError, match=f"model.onnx reads {location!r}, which bundle.json does not list"):
        Bundle.open(copied)


def test_listed_external_files_are_allowed(copied: Path) -> None:
    model = onnx.load(copied / "model.onnx")
    with_external(model, "initializer", "weights.bin")
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    (copied / "weights.bin").write_bytes(bytes(16))
    rewrite(copied)
    Bundle.open(copied)


@pytest.mark.parametrize(
    "data", [b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 30, b"\x3a\x05abc", b"\x0f\x00", b"\x3a\x02\x0a"]
)
def test_damaged_graphs_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="not valid ONNX"):
        external_files(data)


def test_deep_graphs_end_in_words() -> None:
    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content) & 127 | 128, len(content) >> 7]) + content

    graph = b""
    for _ in range(100):
        graph = field(1, field(5, field(6, graph)))  # a graph in an attribute of a node
    with pytest.raises(BundleError, match="nested too deeply"):
        external_files(field(7, graph))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    private = Ed25519PrivateKey.generate()
    return write_keys(tmp_path, "key", private)


def write_keys(folder: Path, name: str, private: object) -> tuple[Path, Path]:
    secret, public = folder / f"{name}.pem", folder / f"{name}.pub"
    secret.write_bytes(
        private.private_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        private.public_key().public_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return secret, public


@pytest.mark.parametrize("zipped", [False, True])
def test_a_signature_proves_the_origin(copied: Path, tmp_path: Path, keys: tuple[Path, Path], zipped: bool) -> None:
    secret, public = keys
    bundle = copied
    if zipped:
        bundle = tmp_path / "bundle.zip"
        pack(copied, bundle)
    with pytest.raises(BundleError, match=r"is not signed \(.*\.sig is missing\)"):
        Bundle.open(bundle, require_signature=public)
    assert run("sign", bundle, "--key", secret).output.strip() == f"{bundle}.sig"
    Bundle.open(bundle, require_signature=public)
    _, other = write_keys(tmp_path, "other", Ed25519PrivateKey.generate())
    with pytest.raises(BundleError, match="was not made for this bundle with the key of"):
        Bundle.open(bundle, require_signature=other)
    result = run("screen", bundle, copied, "--output", tmp_path / "out", "--require-signature", other)
    assert (result.exit_code, "was not made for this bundle" in result.output) == (1, True)


def test_a_signature_is_for_one_bundle(copied: Path, keys: tuple[Path, Path]) -> None:
    secret, public = keys
    run("sign", copied, "--key", secret)
    labels = json.loads((copied / "bundle.json").read_text())["labels"]
    labels["abnormal"]["threshold"] = 0.99
    rewrite(copied, labels=labels)
    Bundle.open(copied)  # whoever can write can make the hashes match
    with pytest.raises(BundleError, match="was not made for this bundle"):
        Bundle.open(copied, require_signature=public)
    trust.signature_file(copied).write_text("no base64!")
    with pytest.raises(BundleError, match="was not made for this bundle"):
        Bundle.open(copied, require_signature=public)


def test_other_keys_are_named(copied: Path, tmp_path: Path, keys: tuple[Path, Path]) -> None:
    secret, public = write_keys(tmp_path, "ec", generate_private_key(SECP256R1()))
    for key, message in (
        (secret, r"another kind of key \(ECPrivateKey, not Ed25519PrivateKey\); make one with openssl genpkey"),
        (keys[1], "has no Ed25519PrivateKey in PEM format"),
        (tmp_path / "none", "cannot be read .No such file or directory.; give a key file"),
    ):
        with pytest.raises(ConfigError, match=message):
            trust.sign(copied, "f", key)
    with pytest.raises(ConfigError, match=r"another kind of key \(ECPublicKey, not Ed25519PublicKey\)"):
        trust.check_signature(copied, "f", public)


def test_copies_of_killed_processes_are_removed(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(copied, tmp_path / "bundle.zip")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    code = (
        "import sys; from fastfundus.engines.bundle import Bundle; "
        "bundle = Bundle.open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "bundle.zip")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"open\n"
    (left,) = temporary.iterdir()
    monkeypatch.setattr(archive.tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(archive, "_ORPHAN_S", -1)
    bundle = Bundle.open(tmp_path / "bundle.zip")
    assert {left, bundle.folder} == set(temporary.iterdir())  # in use
    process.send_signal(signal.SIGKILL)
    process.communicate()
    again = Bundle.open(tmp_path / "bundle.zip")
    assert {bundle.folder, again.folder} == set(temporary.iterdir())
    # Folders that are not ours stay.
    os.mkdir(temporary / "fastfundus-bundle-link")
    descriptor = os.open(temporary / "fastfundus-bundle-link", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    archive._remove_orphans()
    assert (temporary / "fastfundus-bundle-link").exists()
    os.close(descriptor)


def test_sigterm_leaves_no_copy(copied: Path, broken_photos: Path, tmp_path: Path) -> None:
    pack(copied, tmp_path / "bundle.zip")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    for number in range(300):
        shutil.copy(broken_photos / "good.jpg", broken_photos / f"{number}.jpg")
    command = ["-m", "fastfundus", "screen", tmp_path / "bundle.zip", broken_photos, "--output", tmp_path / "out"]
    process = subprocess.Popen([sys.executable, *map(str, command)], env=os.environ | {"TMPDIR": str(temporary)})
    deadline = time.monotonic() + 30
    while not (tmp_path / "out" / "audit.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    assert list(temporary.iterdir()) == []
