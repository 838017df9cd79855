"""Studies: upstream runs, then a grid of tasks x inits x label fractions x seeds x folds with one run per cell.

study.toml         configuration of the study
environment.json   versions and machine; each run also has its own
upstream/          runs that other runs start from
cells/             one run per cell, with its exact split; `error.txt` if it failed
cells.csv          one row per cell and output; table.csv, table.md, table.tex, study.html: see `tables`
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
from fastfundus.data.joined_cache import open_caches
from fastfundus.data.journal import locked
from fastfundus.errors import ConfigError, DataError
from fastfundus.evaluation.locked_run import is_locked
from fastfundus.study.config import UPSTREAM, Cell, StudyConfig
from fastfundus.study.workers import Job, Runner, local_runner
from fastfundus.training.run import Run, describe_environment, read_table

__all__ = ["CellResult", "run_study"]


@dataclass(frozen=True, slots=True)
class CellResult:
    """The outcome of a cell."""

    cell: Cell
    path: Path
    error: str = ""
    """Why the cell failed; empty on success."""


def run_study(
    file: Path,
    output: Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    runner: AbstractContextManager[Runner] | None = None,
) -> tuple[StudyConfig, list[CellResult]]:
    """Run a study, or resume it.

    Failed cells are recorded and retried by the next call; all other cells still run. After a crash at any point, the
    same call resumes the study; on a CPU it ends with the same weights.

    Args:
        file: the TOML file.
        output: folder of the study; created if absent.
        say: receives progress messages, one line per run.
        runner: context manager that yields a runner, entered and exited here; None runs one job at a time on this
            machine.

    Returns:
        The study, and the outcome of every cell.

    Raises:
        ConfigError: the file is invalid, or `output` contains another study.
        DataError: an upstream run failed, an upstream run has seen photos of a task that starts from it, or another
            process is working on the study.
        Interrupted: SIGINT or SIGTERM was received.
    """
    study = StudyConfig.from_toml(file)
    output = output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, output / ".lock", "studied"), runner or local_runner(1) as run:
        _require_same(study, file, output)
        caches = {name: open_caches(*part.caches) for name, part in study.tasks.items()}
        first = {
            Job(output / "upstream" / name, part.caches, part.config): f"upstream {name}"
            for name, part in study.upstream.items()
        }
        for job, error in _do(first, run, say).items():
            if error:
                raise DataError(f"{first[job]} failed: {error}")
        upstream = {name: Run.open(output / "upstream" / name) for name in study.upstream}
        _require_disjoint(study, upstream, caches)
        cells = {_job(study, cell, output, upstream): cell for cell in study.cells()}
        errors = _do({job: cell.folder.removeprefix("cells/") for job, cell in cells.items()}, run, say)
        return study, [CellResult(cell, job.folder, errors[job]) for job, cell in cells.items()]


def _do(jobs: dict[Job, str], runner: Runner, say: Callable[[str], None]) -> dict[Job, str]:
    """Run the jobs (mapped to their names) that are not done yet; return an error per job, empty on success."""
    todo = [job for job in jobs if not is_locked(job.folder)]
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
            say(f"  failed: {jobs[job]}: {error}")
    return errors


def _require_same(study: StudyConfig, file: Path, output: Path) -> None:
    kept, fingerprint_file = output / "study.toml", output / "study.fingerprint"
    if not fingerprint_file.exists():
        shutil.copyfile(file, kept)
        fingerprint_file.write_text(study.fingerprint + "\n")
        environment = describe_environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        (output / "environment.json").write_text(json.dumps(environment, indent=1) + "\n")
    elif fingerprint_file.read_text().strip() != study.fingerprint:
        raise ConfigError(f"{output} already contains another study, kept as {kept}; choose another --output")


def _require_disjoint(study: StudyConfig, upstream: dict[str, Run], caches: dict[str, PhotoCache]) -> None:
    """Raise DataError if an upstream run that inits start from has seen photos of any task."""
    used = {value.removeprefix(UPSTREAM) for value in study.inits.values() if value.startswith(UPSTREAM)}
    for name in sorted(used):
        splits = read_table(upstream[name].path, "splits.parquet")
        seen = set(splits["sha256"])
        for task, cache in caches.items():
            shared = cache.manifest.filter(pl.col("sha256").is_in(list(seen)))
            if len(shared):
                raise DataError(
                    f"{len(shared)} photos of the task {task} were used in the upstream run {name}, such as "
                    f"{shared['path'][0]}; this overestimates performance; separate patients: cache split --holdout"
                )


def _job(study: StudyConfig, cell: Cell, output: Path, upstream: dict[str, Run]) -> Job:
    init = study.inits[cell.init]
    if init.startswith(UPSTREAM):
        init = str(upstream[init.removeprefix(UPSTREAM)].path)
    return Job(output / cell.folder, study.tasks[cell.task].caches, study.settings(cell, init).to_dict())
