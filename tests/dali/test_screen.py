"""Tests of screening with DALI on one device: the rows match those of the CPU path within the decoder's tolerance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastfundus.dali.decode import DaliDecoder
from fastfundus.dali.prepare import DaliPreparer
from fastfundus.dali.screen import dali_blocks
from fastfundus.data import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.errors import ConfigError
from fastfundus.screening import output as store
from fastfundus.screening import pipeline
from fastfundus.screening.audit import verify
from fastfundus.screening.run import screen_to_folder
from tests.conftest import Trained


@pytest.fixture(scope="module")
def compiled(built: Callable[[str], Path]) -> Bundle:
    """The trained run as an AOTInductor engine, which accepts tensors on the device."""
    return Bundle.open(built("aoti"))


def test_what_stays_on_the_device_is_what_the_host_sees(photo_folder: Path, trained: Trained) -> None:
    for spec in (
        trained.bundle.spec,
        replace(trained.bundle.spec, field="frame"),
        replace(trained.bundle.spec, size=320),
    ):
        paths = sorted((photo_folder / "images").iterdir())[:8]
        photos, on_device = DaliPreparer(spec, DaliDecoder(batch_size=8, threads=2), threads=2).prepare(paths)
        assert sorted(on_device) == list(range(8))
        for number, photo in enumerate(photos):
            assert photo.image is not None
            np.testing.assert_array_equal(on_device[number].cpu().numpy(), photo.image)


@pytest.mark.long
def test_rows_are_those_of_the_host(
    compiled: Bundle, photo_folder: Path, broken_photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline, store):
        monkeypatch.setattr(module, "BLOCK", 20)
    sources = [photo_folder / "images", broken_photos]
    listing = list_photos(sources, adapter="folder")
    here = screen_to_folder(listing, compiled, tmp_path / "here", sources=sources).results
    blocks = dali_blocks(None)
    there = screen_to_folder(
        listing, compiled, tmp_path / "there", sources=sources, make_blocks=blocks, decode="dali"
    ).results
    same = ["path", "sha256", "status", "reason", "patient", "eye", "bundle"]
    assert there.select(same).equals(here.select(same))
    # The tolerance covers half a grey level of a scaled decode, seen by a barely trained network.
    np.testing.assert_allclose(there["p_abnormal"].drop_nulls(), here["p_abnormal"].drop_nulls(), atol=0.02)
    assert verify(tmp_path / "there", files=True).faults == []
    with pytest.raises(ConfigError, match="was started with another decode"):
        screen_to_folder(listing, compiled, tmp_path / "there", sources=sources, resume=True)


def test_engines_of_the_host_are_refused(trained: Trained, photo_folder: Path, tmp_path: Path) -> None:
    listing = list_photos(photo_folder / "images")
    with pytest.raises(ConfigError, match="only from the host; build it with --backend tensorrt, tensorrt-rtx or aoti"):
        screen_to_folder(
            listing,
            trained.bundle,
            tmp_path / "out",
            sources=[photo_folder],
            make_blocks=dali_blocks(None),
            decode="dali",
        )
