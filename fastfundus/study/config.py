"""Configuration of a study, read from one TOML file.

    [study]
    folds = 5
    fractions = [0.1, 1.0]          # shares of the training patients' labels
    seeds = [0]

    [upstream.fundus]               # runs that other runs start from; trained once
    caches = ["upstream/"]
    config.task = "abnormality"
    config.model.backbone = "resnet50"

    [tasks.dr]
    caches = ["dr/"]
    config.model.backbone = "resnet50"

    [inits]                         # "scratch", "imagenet", a path, or "upstream:NAME"; the others are compared with
    scratch = "scratch"             # the first
    fundus = "upstream:fundus"

Paths are relative to the file. `config` has the keys of `train --config`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastfundus.config import TrainConfig, check_keys, override, read_toml
from fastfundus.errors import ConfigError, close_matches
from fastfundus.spec import fingerprint_of

__all__ = ["UPSTREAM", "Cell", "Part", "StudyConfig"]

UPSTREAM = "upstream:"
_SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+.")


@dataclass(frozen=True, slots=True)
class Part:
    """Caches and training configuration of an upstream run or a task."""

    caches: tuple[Path, ...]
    config: dict[str, Any]
    """A `TrainConfig` as plain data."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid."""

    task: str
    init: str
    fraction: float
    seed: int
    fold: int

    @property
    def folder(self) -> str:
        """Folder of the run, relative to the study."""
        return f"cells/{self.task}/{self.init}/{self.fraction:g}/seed{self.seed}/fold{self.fold}"


@dataclass(frozen=True, slots=True)
class StudyConfig:
    """A study, validated as far as possible without data."""

    folds: int
    fractions: tuple[float, ...]
    seeds: tuple[int, ...]
    upstream: dict[str, Part]
    tasks: dict[str, Part]
    inits: dict[str, str]
    fingerprint: str
    """Fingerprint of the whole file; a study can only be resumed with the same one."""

    @classmethod
    def from_toml(cls, path: Path) -> StudyConfig:
        """Read a study from a TOML file.

        Raises:
            ConfigError: the file cannot be read or has invalid values.
        """
        plain = read_toml(path)
        try:
            return cls._from(plain, path.parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def _from(cls, plain: dict[str, Any], base: Path) -> StudyConfig:
        check_keys(plain, ("study", "upstream", "tasks", "inits"), "")
        grid = plain.get("study", {})
        check_keys(grid, ("folds", "fractions", "seeds"), "study.")
        upstream = {name: _part(value, base, f"upstream.{name}") for name, value in plain.get("upstream", {}).items()}
        tasks = {name: _part(value, base, f"tasks.{name}") for name, value in plain.get("tasks", {}).items()}
        inits = plain.get("inits", {"scratch": "scratch"})
        if not tasks:
            raise ConfigError("no tasks are declared; add a table such as [tasks.dr]")
        for name, value in inits.items():
            if not isinstance(value, str):
                raise ConfigError(f"inits.{name} must be text, got {value!r}")
            if value.startswith(UPSTREAM) and value.removeprefix(UPSTREAM) not in upstream:
                raise ConfigError(
                    f"inits.{name}: unknown run {value!r}{close_matches(value, [UPSTREAM + n for n in upstream])}"
                )
        for name in (*upstream, *tasks, *inits):
            if not name or set(name) - _SAFE or name.startswith("."):
                raise ConfigError(f"{name!r} names a folder: use only letters, digits and _-+. and no leading dot")
        inits = {name: _where(value, base) for name, value in inits.items()}
        study = cls(
            int(grid.get("folds", 5)), tuple(sorted(map(float, grid.get("fractions", [1.0])))),
            tuple(map(int, grid.get("seeds", [0]))), upstream, tasks, inits, fingerprint_of(_first_spelling(plain)),
        )  # fmt: skip
        for cell in study.cells():
            study.settings(cell, "scratch")
        return study

    def cells(self) -> Iterator[Cell]:
        """Yield every cell in the order of execution."""
        for task, fraction, seed, init in itertools.product(self.tasks, self.fractions, self.seeds, self.inits):
            for fold in range(self.folds):
                yield Cell(task, init, fraction, seed, fold)

    def settings(self, cell: Cell, init: str) -> TrainConfig:
        """Return the training configuration of a cell.

        Raises:
            ConfigError: a value is out of range, or the task's config sets a value that the grid sets.
        """
        part = self.tasks[cell.task]
        own = {
            "data.split": "folds", "data.folds": self.folds, "data.fold": cell.fold,
            "data.label_fraction": cell.fraction, "loop.seed": cell.seed, "model.init": init,
        }  # fmt: skip
        for name in own:
            section, key = name.split(".")
            if key in part.config.get(section, {}):
                raise ConfigError(f"tasks.{cell.task}.config.{name} is set by the study; omit it")
        return TrainConfig.from_dict(override(part.config, own))


def _part(table: Any, base: Path, name: str) -> Part:
    check_keys(table, ("caches", "config"), f"{name}.")
    caches = table.get("caches", [])
    if not caches or not all(isinstance(cache, str) for cache in caches):
        raise ConfigError(f"{name}.caches must be a list of folders, got {caches!r}")
    config = table.get("config", {})
    TrainConfig.from_dict(config)
    return Part(tuple((base / cache).resolve() for cache in caches), config)


def _first_spelling(plain: Any) -> Any:
    """Return a study file as version 0.1 spelled it, so that studies begun with that version can be continued."""
    if not isinstance(plain, dict):
        return plain
    return {"optimiser" if key == "optimizer" else key: _first_spelling(value) for key, value in plain.items()}


def _where(init: str, base: Path) -> str:
    return init if init in ("scratch", "imagenet") or init.startswith(UPSTREAM) else str((base / init).resolve())
