"""Shared fixtures: real photographs if available, one tiny trained run, and guards against silent skips."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if "PYTEST_XDIST_WORKER" in os.environ:
    # Set before torch is imported: workers that each used all cores would slow one another down.
    _workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))
    # Threads of the tests that need all cores must not spin while they wait.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Bundles with native code are noted there as built by this user; workers inherit the folder.
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="fastfundus-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

import cv2
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides at import: without a GPU its kernels are interpreted with NumPy.
    os.environ["TRITON_INTERPRET"] = "1"

# Fixtures import the rest themselves, because kernel tests run where only torch, Triton and OpenCV are installed.
if TYPE_CHECKING:
    from fastfundus.data import PhotoCache
    from fastfundus.engines.bundle import Bundle

_REQUIRE_GPU = os.environ.get("FASTFUNDUS_REQUIRE_GPU") == "1"
_REQUIRE_KERNELS = _REQUIRE_GPU or os.environ.get("FASTFUNDUS_REQUIRE_KERNELS") == "1"
_skipped_kernels: list[str] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: FASTFUNDUS_REQUIRE_GPU=1 makes its absence a failure")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Reports cover every test, including those run in a worker; their keywords include the markers.
    # Without a GPU, the interpreter and the host's build are used instead, and tests that need a GPU may be skipped.
    excused = "gpu" in report.keywords and not _REQUIRE_GPU
    if report.skipped and "kernel" in report.keywords and not excused:
        _skipped_kernels.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A passing run whose kernel tests were skipped would prove nothing about the kernels.
    if _REQUIRE_KERNELS and _skipped_kernels:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _REQUIRE_KERNELS and _skipped_kernels:
        terminalreporter.write_line(f"FAILED: kernel tests were skipped: {', '.join(_skipped_kernels)}", red=True)


@pytest.fixture(autouse=True)
def _fence_random_state() -> Iterator[None]:
    """Restore NumPy's random state, so that no test depends on random numbers drawn by another."""
    state = np.random.get_state()  # noqa: NPY002
    yield
    np.random.set_state(state)  # noqa: NPY002


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder of real photographs; tests that need it are skipped if it is missing."""
    folder = Path(os.environ.get("FASTFUNDUS_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "odir" / "labels.csv").is_file():
        pytest.skip(f"no real photographs at {folder}: set FASTFUNDUS_DATA to the folder that contains them")
    return folder


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that is filled once for all workers of a run: the first to need it does the work."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / f"shared_{name}"
    with (shared / f"shared_{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            folder.mkdir()
            make(folder)
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of 24 synthetic patients with labels, in small frames."""
    from fastfundus.synthetic import write_dataset

    def make(folder: Path) -> None:
        write_dataset(folder / "photos", 24, seed=5, poor_share=0.0, long_sides=(320,), workers=1)

    return made_once(tmp_path_factory, "photos", make) / "photos"


@pytest.fixture(scope="session")
def cache(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PhotoCache:
    """The photos of `photo_folder` at 64 px."""
    from fastfundus.data import PhotoCache, build_cache, list_photos
    from fastfundus.spec import PreprocessSpec

    def make(folder: Path) -> None:
        listing = list_photos(photo_folder, labels=photo_folder / "labels.csv")
        build_cache(listing.photos, folder / "cache", PreprocessSpec(size=64), source=listing.root)

    return PhotoCache.open(made_once(tmp_path_factory, "cache", make) / "cache")


@pytest.fixture(scope="session")
def vessel_cache(tmp_path_factory: pytest.TempPathFactory) -> PhotoCache:
    """Prepare nine synthetic photos in DRIVE's layout at their own resolution."""
    from PIL import Image

    from fastfundus.data import build_cache, list_photos
    from fastfundus.spec import PreprocessSpec
    from fastfundus.synthetic import draw_photo

    folder = tmp_path_factory.mktemp("drive") / "training"
    for name in ("images", "1st_manual", "mask"):
        (folder / name).mkdir(parents=True)
    for number in range(21, 30):
        photo = draw_photo(number, long_side=220)
        assert cv2.imwrite(str(folder / "images" / f"{number}_training.tif"), photo.image[..., ::-1])
        Image.fromarray(photo.vessel_mask.astype(np.uint8) * 255).save(folder / "1st_manual" / f"{number}_manual1.gif")
        field, (height, width) = photo.field, photo.image.shape[:2]
        y, x = np.ogrid[:height, :width]
        inside = np.hypot(x + 0.5 - field.x_px, y + 0.5 - field.y_px) <= field.radius_px
        Image.fromarray(inside.astype(np.uint8) * 255).save(folder / "mask" / f"{number}_training_mask.gif")
    listing = list_photos(folder.parent, adapter="drive")
    return build_cache(listing.photos, folder.parent / "cache", PreprocessSpec(size=216), source=listing.root)


@dataclass(frozen=True)
class Trained:
    """A run and the bundle built from it."""

    run: Path
    bundle: Bundle


@pytest.fixture(scope="session")
def trained(cache: PhotoCache, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Train a model for two epochs: it has learned nothing useful, but all files of the run are real."""
    from fastfundus.config import TrainConfig
    from fastfundus.engines.bundle import Bundle
    from fastfundus.evaluation.operating_point import fit_operating_point
    from fastfundus.training.run import Run
    from fastfundus.training.trainer import Trainer
    from fastfundus.workflow.build_engine import build_engine

    settings = {
        "model": {"backbone": "test_resnet"},
        "data": {"folds": 3},
        "loop": {"epochs": 2, "batch_size": 8},
    }

    def make(folder: Path) -> None:
        Trainer(cache, folder / "run", TrainConfig.from_dict(settings)).fit()
        fit_operating_point(Run.open(folder / "run"), cache)
        build_engine(folder / "run", folder / "bundle", precision="fp32")

    folder = made_once(tmp_path_factory, "trained", make)
    return Trained(folder / "run", Bundle.open(folder / "bundle"))


@pytest.fixture(scope="session")
def built(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that builds the bundle of a backend, once for all tests because compilation is slow."""
    from fastfundus.workflow.build_engine import build_engine

    def build(backend: str) -> Path:
        def make(folder: Path) -> None:
            bundle, report = build_engine(trained.run, folder / "bundle", backend=backend, precision="fp32")
            assert report.passed
            assert bundle.metadata["tried"] == [report.to_dict()]

        return made_once(tmp_path_factory, backend, make) / "bundle"

    return build


def copy_photos(photo_folder: Path, folder: Path, count: int) -> Path:
    """Copy the first photos to a new folder, which a test may modify; return it."""
    folder.mkdir()
    for path in sorted((photo_folder / "images").iterdir())[:count]:
        shutil.copy(path, folder)
    return folder


def write_rgb(path: Path, rgb: np.ndarray, *options: int) -> Path:
    """Write RGB pixels in the format given by the file name."""
    assert cv2.imwrite(str(path), rgb[..., ::-1], list(options))
    return path


@pytest.fixture
def broken_photos(tmp_path: Path, photo_folder: Path) -> Path:
    """Write a folder of one good photo and files that are each faulty in a different way."""
    from PIL import Image

    folder = tmp_path / "broken"
    folder.mkdir()
    good = sorted((photo_folder / "images").glob("*.jpg"))[0]
    data = good.read_bytes()
    (folder / "good.jpg").write_bytes(data)
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("this is not a photograph")
    (folder / "truncated.jpg").write_bytes(data[: len(data) * 2 // 3])
    Image.new("RGB", (1, 1), (200, 80, 30)).save(folder / "one_pixel.png")
    with Image.open(good) as image:
        image.convert("CMYK").save(folder / "cmyk.jpg")
        image.convert("L").save(folder / "grey.png")
        rgb = np.array(image)
    Image.fromarray(np.repeat(rgb[..., 1:2], 3, axis=2)).save(folder / "grey_as_rgb.png")
    cv2.imwrite(str(folder / "deep.png"), rgb[..., ::-1].astype(np.uint16) * 257)
    Image.new("RGB", (400, 300)).save(folder / "black.png")
    return folder


@pytest.fixture
def shut_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make folders named "shut" unsearchable.

    The superuser may search every folder, so the refusal of the operating system is simulated.
    """
    real = os.scandir

    def scandir(path):  # type: ignore[no-untyped-def]
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
