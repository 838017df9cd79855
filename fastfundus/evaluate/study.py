"""A study: upstream runs, then a grid of tasks x inits x label fractions x seeds x folds, each cell a run of its own.

study.toml     what was asked for
upstream/      runs that others start from
cells/         a run a cell, with its exact split; `error.txt` where it could not be done
cells.csv      a row a cell and output; table.csv, table.md, table.tex, study.html: see `study_tables`
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import polars as pl

from fastfundus.config import TrainConfig
from fastfundus.data.cache import PhotoCache
from fastfundus.data.journal import locked
from fastfundus.errors import ConfigError, DataError, FastFundusError
from fastfundus.evaluate.operating_point import fit_operating_point
from fastfundus.evaluate.study_config import UPSTREAM, Cell, StudyConfig
from fastfundus.train.interrupt import Interrupted
from fastfundus.train.loop import train
from fastfundus.train.run import Run

__all__ = ["CellResult", "run_study"]


@dataclass(frozen=True, slots=True)
class CellResult:
    """What became of a cell."""

    cell: Cell
    path: Path
    error: str = ""
    """Why it could not be done; empty when it was."""


def run_study(
    file: Path, output: Path, *, say: Callable[[str], None] = lambda text: None
) -> tuple[StudyConfig, list[CellResult]]:
    """Do what is not done yet.

    Cells that fail are noted and left out; the rest is done. Killed anywhere, the same call goes on, and ends with the
    same weights on a CPU.

    Args:
        file: the TOML file.
        output: the study's folder; made if absent.
        say: hears of progress, a line a run.

    Returns:
        The study, and what became of every cell.

    Raises:
        ConfigError: the file is wrong, or `output` was begun with another.
        DataError: an upstream run has seen photos of a task that starts from it, or another process is at work.
        Interrupted: SIGINT or SIGTERM came.
    """
    study = StudyConfig.from_toml(file)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, output / ".lock", "studied"):
        _require_same(study, file, output)
        caches = {name: PhotoCache.open(*part.caches) for name, part in study.tasks.items()}
        upstream = {
            name: _done(output / "upstream" / name, PhotoCache.open(*part.caches), study, name, say)
            for name, part in study.upstream.items()
        }
        _require_disjoint(study, upstream, caches)
        cells, results = list(study.cells()), []
        began, trained = time.monotonic(), 0
        for number, cell in enumerate(cells):
            folder = output / cell.folder
            todo = not (folder / "operating_point.json").is_file()
            if todo:
                each = (time.monotonic() - began) / max(1, trained)
                left = f", about {timedelta(seconds=round(each * (len(cells) - number)))} left" if trained else ""
                say(f"{number + 1} of {len(cells)}{left}: {cell.folder.removeprefix('cells/')}")
            results.append(_cell(study, cell, folder, caches[cell.task], upstream))
            if todo:
                trained += 1
                if results[-1].error:
                    say(f"  could not be done: {results[-1].error}")
    return study, results


def _require_same(study: StudyConfig, file: Path, output: Path) -> None:
    kept, told = output / "study.toml", output / "study.fingerprint"
    if not told.exists():
        shutil.copyfile(file, kept)
        told.write_text(study.fingerprint + "\n")
    elif told.read_text().strip() != study.fingerprint:
        raise ConfigError(f"{output}: was begun with another file, which is kept as {kept}; choose another --output")


def _done(folder: Path, cache: PhotoCache, study: StudyConfig, name: str, say: Callable[[str], None]) -> Run:
    """An upstream run, trained unless it is there."""
    if not (folder / "operating_point.json").is_file():
        say(f"upstream {name}")
        config = TrainConfig.from_dict(study.upstream[name].config)
        train(cache, folder, config, resume=(folder / "last.ckpt").is_file())
        fit_operating_point(Run.open(folder), cache)
    return Run.open(folder)


def _require_disjoint(study: StudyConfig, upstream: dict[str, Run], caches: dict[str, PhotoCache]) -> None:
    """No photo that a task is tested on may have been learned from upstream."""
    used = {value.removeprefix(UPSTREAM) for value in study.inits.values() if value.startswith(UPSTREAM)}
    for name in sorted(used):
        splits = pl.read_parquet(upstream[name].path / "splits.parquet")
        seen = set(splits["sha256"])
        for task, cache in caches.items():
            shared = cache.manifest.filter(pl.col("sha256").is_in(list(seen)))
            if len(shared):
                raise DataError(
                    f"{len(shared)} photos of the task {task} took part in the upstream run {name}, such as "
                    f"{shared['path'][0]}: its results would be too good; keep patients apart (cache split --holdout)"
                )


def _cell(study: StudyConfig, cell: Cell, folder: Path, cache: PhotoCache, upstream: dict[str, Run]) -> CellResult:
    if (folder / "operating_point.json").is_file():
        return CellResult(cell, folder)
    init = study.inits[cell.init]
    if init.startswith(UPSTREAM):
        init = str(upstream[init.removeprefix(UPSTREAM)].path)
    try:
        train(cache, folder, study.settings(cell, init), resume=(folder / "last.ckpt").is_file())
        fit_operating_point(Run.open(folder), cache)
    except Interrupted:
        raise
    except Exception as error:
        # One cell must not cost the others; what is no fault of the data is kept whole.
        folder.mkdir(parents=True, exist_ok=True)
        known = isinstance(error, FastFundusError)
        (folder / "error.txt").write_text(f"{error}\n" if known else traceback.format_exc(), encoding="utf-8")
        return CellResult(cell, folder, str(error) if known else f"{type(error).__name__}: {error}")
    (folder / "error.txt").unlink(missing_ok=True)
    return CellResult(cell, folder)
