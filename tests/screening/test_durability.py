"""Power failures and errors of the operating system while results are written: nothing is lost, nothing is invented."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from fastfundus.data import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.runtime import Engine
from fastfundus.errors import FastFundusError
from fastfundus.screening import output as store
from fastfundus.screening import pipeline
from fastfundus.screening.audit import verify
from fastfundus.screening.run import screen_to_folder
from tests.conftest import Trained, copy_photos
from tests.power import ERRORS, Disk, Faults
from tests.screening.test_faults import SAME, screen

EVERY = pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long), 13])
"""Every point where something is written, or every thirteenth."""


@pytest.fixture
def photos(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained) -> Path:
    """Copy 12 photos, which make three blocks; the engine is loaded only once."""
    for module in (pipeline, store):
        monkeypatch.setattr(module, "BLOCK", 4)
    engine = trained.bundle.load()
    monkeypatch.setattr(engine, "close", lambda: None)
    monkeypatch.setattr(Bundle, "load", lambda bundle: engine)
    assert isinstance(engine, Engine)
    return copy_photos(photo_folder, tmp_path / "photos", 12)


def same(whole: Path, output: Path) -> None:
    for name in SAME:
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert verify(output).faults == []


@EVERY
def test_a_power_failure_at_any_point_loses_nothing_that_counts(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole, disk = tmp_path / "whole", Disk(tmp_path / "whole")
    with monkeypatch.context() as patch:
        disk.watch(patch)
        screen(trained, photos, whole)
    assert len(disk.states) > 20
    finished = 0
    for state in range(len(disk.states) - 1, -1, -step):
        copy = tmp_path / f"copy{state}"
        disk.after_power_failure(state, copy)
        if (copy / "run.json").is_file() and json.loads((copy / "run.json").read_text())["finished"]:
            # What says that it is finished has all results already.
            finished += 1
            same(whole, copy)
            assert (copy / "report.html").read_text().rstrip().endswith("</html>")
        screen(trained, photos, copy, resume=True)
        same(whole, copy)
        shutil.rmtree(copy)
    assert finished


@EVERY
def test_an_error_at_any_call_stops_the_run_in_words(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole, count = tmp_path / "whole", Faults(-1, 0)
    with monkeypatch.context() as patch:
        count.inject(patch)
        screen(trained, photos, whole)
    assert count.calls > 40
    for at in range(0, count.calls, step):
        output, faults = tmp_path / f"out{at}", Faults(at, ERRORS[at % len(ERRORS)])
        with monkeypatch.context() as patch:
            faults.inject(patch)
            # Decoders try again; all other calls end the run with an error in words.
            with suppress(FastFundusError):
                screen(trained, photos, output)
                same(whole, output)
        screen(trained, photos, output, resume=True)
        same(whole, output)
        shutil.rmtree(output)


def test_damaged_progress_is_mended_or_named(trained: Trained, photos: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    screen(trained, photos, whole)
    listing = list_photos(photos)

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    def begin() -> None:
        shutil.rmtree(output, ignore_errors=True)
        with suppress(KeyboardInterrupt):
            screen_to_folder(
                listing, trained.bundle, output, sources=[photos],
                on_progress=lambda done, total, timing: stop() if done == 10 else None,
            )  # fmt: skip

    begin()
    (block, *_) = sorted((output / "progress" / "blocks").iterdir())
    block.write_bytes(block.read_bytes()[:-100])
    screen(trained, photos, output, resume=True)
    same(whole, output)
    for name in ("inputs.parquet", "listing.json"):
        begin()
        (output / "progress" / name).write_bytes(b"junk")
        with pytest.raises(FastFundusError, match=r"progress: is damaged \(.*\); start the run again with --overwrite"):
            screen(trained, photos, output, resume=True)
