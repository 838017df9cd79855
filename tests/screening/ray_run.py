"""Screen a folder locally, then again half locally and half on a local Ray cluster. Own process, because Ray forks."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from fastfundus.data import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.screening import output as store
from fastfundus.screening import pipeline, run
from fastfundus.screening.pipeline import Timing
from fastfundus.screening.ray_runner import ray_blocks


class Stop(BaseException):
    pass


def stop(done: int, total: int, timing: Timing) -> None:
    if done == 20:
        raise Stop


def main(bundle: Path, source: Path, work: Path) -> None:
    for module in (pipeline, run, store):
        module.BLOCK = 8
    listing, opened = list_photos(source), Bundle.open(bundle)
    run.screen_to_folder(listing, opened, work / "here", sources=[source])
    with contextlib.suppress(Stop):
        run.screen_to_folder(listing, opened, work / "there", sources=[source], on_progress=stop)
    blocks = ray_blocks("local")
    done = run.screen_to_folder(listing, opened, work / "there", sources=[source], resume=True, make_blocks=blocks)
    print(done.resumed, done.timing.photos, done.timing.engines)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
