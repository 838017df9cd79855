"""A study: upstream runs, then a grid of tasks x inits x label fractions x seeds x folds, each cell a run of its own.

study.toml         what was asked for
environment.json   versions and machine; each run has its own, too
upstream/          runs that others start from
cells/             a run a cell, with its exact split; `error.txt` where it could not be done
cells.csv          a row a cell and output; table.csv, table.md, table.tex, study.html: see `study_tables`
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import polars as pl
import torch

from fastfundus.data.cache import PhotoCache
from fastfundus.data.journal import locked
from fastfundus.errors import ConfigError, DataError
from fastfundus.evaluate.measured import is_measured
from fastfundus.evaluate.study_config import UPSTREAM, Cell, StudyConfig
from fastfundus.evaluate.study_workers import Job, Runner, local_runner
from fastfundus.train.run import Run, describe_environment

__all__ = ["CellResult", "run_study"]


@dataclass(frozen=True, slots=True)
class CellResult:
    """What became of a cell."""

    cell: Cell
    path: Path
    error: str = ""
    """Why it could not be done; empty when it was."""


def run_study(
    file: Path,
    output: Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    runner: AbstractContextManager[Runner] | None = None,
) -> tuple[StudyConfig, list[CellResult]]:
    """Do what is not done yet.

    Cells that fail are noted and left out, and tried again by the next call; the rest is done. Killed anywhere, the
    same call goes on, and ends with the same weights on a CPU.

    Args:
        file: the TOML file.
        output: the study's folder; made if absent.
        say: hears of progress, a line a run.
        runner: does the runs, is entered and left here; None is this machine, one at a time.

    Returns:
        The study, and what became of every cell.

    Raises:
        ConfigError: the file is wrong, or `output` was begun with another.
        DataError: an upstream run failed, or has seen photos of a task that starts from it, or another process is at
            work.
        Interrupted: SIGINT or SIGTERM came.
    """
    study = StudyConfig.from_toml(file)
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, output / ".lock", "studied"), runner or local_runner(1) as run:
        _require_same(study, file, output)
        caches = {name: PhotoCache.open(*part.caches) for name, part in study.tasks.items()}
        first = {
            Job(output / "upstream" / name, part.caches, part.config): f"upstream {name}"
            for name, part in study.upstream.items()
        }
        for job, error in _do(first, run, say).items():
            if error:
                raise DataError(f"{first[job]} could not be done: {error}")
        upstream = {name: Run.open(output / "upstream" / name) for name in study.upstream}
        _require_disjoint(study, upstream, caches)
        cells = {_job(study, cell, output, upstream): cell for cell in study.cells()}
        errors = _do({job: cell.folder.removeprefix("cells/") for job, cell in cells.items()}, run, say)
        return study, [CellResult(cell, job.folder, errors[job]) for job, cell in cells.items()]


def _do(jobs: dict[Job, str], runner: Runner, say: Callable[[str], None]) -> dict[Job, str]:
    """Do what is not done of jobs and their names; errors of all, empty where there is none."""
    todo = [job for job in jobs if not is_measured(job.folder)]
    began, ended = time.monotonic(), 0
    skipped, begun = len(jobs) - len(todo), 0

    def begins(job: Job) -> None:
        nonlocal begun
        begun += 1
        each = (time.monotonic() - began) / max(1, ended)
        left = f", about {timedelta(seconds=round(each * (len(todo) - ended)))} left" if ended else ""
        say(f"{skipped + begun} of {len(jobs)}{left}: {jobs[job]}")

    errors = dict.fromkeys(jobs, "")
    for job, error in runner(todo, begins) if todo else ():
        ended += 1
        errors[job] = error
        if error:
            say(f"  could not be done: {jobs[job]}: {error}")
    return errors


def _require_same(study: StudyConfig, file: Path, output: Path) -> None:
    kept, told = output / "study.toml", output / "study.fingerprint"
    if not told.exists():
        shutil.copyfile(file, kept)
        told.write_text(study.fingerprint + "\n")
        about = describe_environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        (output / "environment.json").write_text(json.dumps(about, indent=1) + "\n")
    elif told.read_text().strip() != study.fingerprint:
        raise ConfigError(f"{output}: was begun with another file, which is kept as {kept}; choose another --output")


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


def _job(study: StudyConfig, cell: Cell, output: Path, upstream: dict[str, Run]) -> Job:
    init = study.inits[cell.init]
    if init.startswith(UPSTREAM):
        init = str(upstream[init.removeprefix(UPSTREAM)].path)
    return Job(output / cell.folder, study.tasks[cell.task].caches, study.settings(cell, init).to_dict())
