"""``fastfundus train``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastfundus.config import TASKS

if TYPE_CHECKING:
    from fastfundus.config import TrainConfig
    from fastfundus.data import PhotoCache

RECIPES = ["upstream", "finetune", "linear_probe", "dr_grading", "vessels"]


@click.command()
@click.argument("caches", metavar="CACHE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="The run folder  [required but for --dry-run]")
@click.option("--task", type=click.Choice(TASKS), help="What to learn  [default: abnormality]")
@click.option("--label", "labels", multiple=True, help="Manifest column to learn; for multilabel, once for each.")
@click.option("--backbone", help="timm model name  [default: resnet50]")
@click.option("--init", help="scratch, imagenet, or a run folder or weights file  [default: scratch]")
@click.option("--epochs", type=int, help="Passes over the photos  [default: 30]")
@click.option("--batch-size", type=int, help="Photos a step, over all processes  [default: 32]")
@click.option("--learning-rate", type=float, help="Peak learning rate  [default: 0.001]")
@click.option("--fold", type=int, help="Which of the folds tests  [default: 0]")
@click.option("--folds", type=click.IntRange(3, 100), help="Train so many folds, one after the other, and pool them.")
@click.option("--label-fraction", type=float, help="Share of the training patients to learn from  [default: 1]")
@click.option(
    "--amp/--no-amp",
    default=None,
    help="Mixed precision where the device computes it natively, or float32  [default: --amp]",
)
@click.option("--recipe", type=click.Choice(RECIPES), help="Start from settings that come with FastFundus.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with any setting; flags win over it.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped; its settings are taken from it.")
@click.option("--dry-run", is_flag=True, help="Say what would be trained, how large it is and how long it takes.")
@click.option(
    "--target-sensitivity",
    type=click.FloatRange(0.01, 1),
    default=0.90,
    show_default=True,
    help="Each threshold is chosen on validation to reach it.",
)
@click.option("--target-specificity", type=click.FloatRange(0.01, 1), help="Choose thresholds to reach this instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def train(
    caches: tuple[Path, ...],
    output: Path | None,
    folds: int | None,
    recipe: str | None,
    config: Path | None,
    resume: bool,
    dry_run: bool,
    target_sensitivity: float,
    target_specificity: float | None,
    as_json: bool,
    **flags: Any,
) -> None:
    r"""Train a model on one cache, or on several together.

    Patients are split into training, validation and test. The best epoch on validation is kept, temperatures and
    thresholds are fitted on validation, and the test patients are measured once, at the end. Ctrl-C stops after the
    step and leaves a run that --resume continues.

    With --folds, OUTPUT holds a run a fold (fold0, fold1, ...), and the predictions of every photo by the model that
    has not seen its patient. Under torchrun, processes share every batch; one that fails starts all of them again from
    the last checkpoint (torchrun --max-restarts).

    \b
    Example:
      fastfundus train cache/ --output run/ --task abnormality --amp
      fastfundus train cache/ --output runs/ --recipe dr_grading --init upstream/ --folds 5
      torchrun --nproc-per-node 8 -m fastfundus train cache/ --output run/ --recipe upstream
    """
    from fastfundus.errors import ConfigError, require

    require("torch", extra="train")
    from fastfundus.photo.memory import keep_memory

    # Every batch asks for megabytes of fresh memory; page faults would cost as much as filling it.
    keep_memory()
    from fastfundus.data import PhotoCache
    from fastfundus.data.split import SIDES
    from fastfundus.train.distributed import joined, restarted

    if folds is not None and flags["fold"] is not None:
        raise click.UsageError("give --fold or --folds, not both")
    if recipe and config:
        raise click.UsageError("give --recipe or --config, not both; a config may be a changed copy of a recipe")
    if dry_run:
        _dry_run(PhotoCache.open(*caches), _settings(flags, recipe, config, None), folds, as_json)
        return
    if output is None:
        raise click.UsageError("Missing option '--output'.")
    started = output / "fold0" if folds else output
    # Processes that torchrun starts again were given the same flags: the run decides where they go on.
    again = restarted() and (started / "last.ckpt").is_file()
    settings = _settings(flags, recipe, config, started if resume else None)
    if resume and folds and settings.data.folds != folds:
        raise ConfigError(f"{output} was started with --folds {settings.data.folds}; give the same")
    photos = PhotoCache.open(*caches)
    if folds and (settings.data.split_file or set(SIDES) & set(photos.manifest["split"].to_list())):
        raise ConfigError("--folds deals patients, but the label file or data.split_file fixes a split; leave one away")
    named = " ".join(map(str, caches))
    how = f"fastfundus train {named} --output {output}{f' --folds {folds}' if folds else ''} --resume"
    with joined() as world:
        job = _Job(photos, world, how, target_sensitivity, target_specificity)
        if folds is None:
            document = job.one(output, settings, resume or again)
            if world.leads:
                _say_run(output, settings, document, as_json)
            return
        for number in range(folds):
            part = replace(settings, data=replace(settings.data, split="folds", folds=folds, fold=number))
            job.fold(output / f"fold{number}", part, resume or again, f"fold {number} of {folds}")
        if world.leads:
            _say_folds(output, folds, photos, as_json)


def _settings(flags: dict[str, Any], recipe: str | None, config: Path | None, resumed: Path | None) -> TrainConfig:
    """The configuration: of the run that is resumed, or of a recipe or file and the flags."""
    from importlib import resources

    from fastfundus.config import TrainConfig, override
    from fastfundus.errors import ConfigError

    sections = {"backbone": "model", "init": "model", "epochs": "loop", "batch_size": "loop", "amp": "loop"}
    sections |= {"labels": "data", "fold": "data", "label_fraction": "data", "learning_rate": "optimiser"}
    given = {
        f"{sections[name]}.{name}" if name in sections else name: list(value) if isinstance(value, tuple) else value
        for name, value in flags.items()
        if value is not None and value != ()
    }
    if "loop.amp" in given:
        # --amp asks for the fastest precision that the device has; loop.amp = true in a file forces autocast.
        given["loop.amp"] = "auto" if given["loop.amp"] else False
    if resumed is not None:
        told = [*given, *(["--config"] if config else []), *(["--recipe"] if recipe else [])]
        if told:
            raise ConfigError(f"{told[0]} cannot change when resuming; leave it away, or start a new --output")
        return TrainConfig.from_toml(resumed / "config.toml")
    if recipe is not None:
        with resources.as_file(resources.files("fastfundus.recipes") / f"{recipe}.toml") as file:
            return TrainConfig.from_toml(file, given)
    if config is not None:
        return TrainConfig.from_toml(config, given)
    return TrainConfig.from_dict(override({}, given))


class _Job:
    """Trains, fits and measures runs."""

    def __init__(
        self, photos: PhotoCache, world: Any, how: str, target_sensitivity: float, target_specificity: float | None
    ) -> None:
        self.photos, self.world, self.how = photos, world, how
        self.targets = {"target_sensitivity": target_sensitivity, "target_specificity": target_specificity}

    def one(self, folder: Path, settings: TrainConfig, resume: bool) -> dict[str, Any]:
        """A run; the content of its operating_point.json, for the process that leads."""
        from fastfundus.cli.training import TrainingBar
        from fastfundus.evaluate.operating_point import fit_operating_point
        from fastfundus.evaluate.page import write_run_page
        from fastfundus.train.loop import Interrupted
        from fastfundus.train.loop import train as run_training
        from fastfundus.train.run import Run

        with TrainingBar(settings.loop.epochs) as bar:
            try:
                run_training(self.photos, folder, settings, resume=resume, observer=bar, world=self.world)
            except Interrupted as stopped:
                raise click.ClickException(f"{stopped}; go on with: {self.how}") from None
        if not self.world.leads:
            return {}
        run = Run.open(folder)
        document = fit_operating_point(run, self.photos, **self.targets)  # type: ignore[arg-type]
        write_run_page(run, self.photos)
        return document

    def fold(self, folder: Path, settings: TrainConfig, resume: bool, name: str) -> None:
        """A run of a cross-validation, unless it is done."""
        from fastfundus.cli.console import remark
        from fastfundus.evaluate.measured import is_measured

        done = resume and is_measured(folder)
        # One process decides for all: it is the one that writes the file.
        if self.world.gather(done)[0]:
            return
        if self.world.leads:
            remark(name)
        self.one(folder, settings, resume and (folder / "last.ckpt").is_file())


def _say_run(output: Path, settings: TrainConfig, document: dict[str, Any], as_json: bool) -> None:
    from fastfundus.cli.console import remark
    from fastfundus.cli.training import metrics_lines
    from fastfundus.train.run import Run

    run = Run.open(output)
    if as_json:
        click.echo(json.dumps({"run": str(output), "best_epoch": run.epoch, **document}))
        return
    click.echo(f"{output}: best epoch {run.epoch} of {settings.loop.epochs}")
    for name, point in document["labels"].items():
        click.echo(f"{name}: threshold {point['threshold']:.4f}, temperature {point['temperature']:.3f}")
        if point.get("note"):
            remark(f"note: {name}: {point['note']}")
    for split in ("validation", "test"):
        parts = {name: point[split] for name, point in document["labels"].items()}
        for line in metrics_lines(parts, document["overall"][split]):
            click.echo(f"  {split}: {line}")
    remark(f"page: {output / 'run.html'}")


def _say_folds(output: Path, folds: int, photos: PhotoCache, as_json: bool) -> None:
    from fastfundus.cli.training import metrics_lines
    from fastfundus.evaluate.folds import pool_folds
    from fastfundus.train.run import Run

    pooled = pool_folds(output, [Run.open(output / f"fold{number}") for number in range(folds)], photos)
    if as_json:
        click.echo(json.dumps({"run": str(output), **pooled}))
        return
    for number, measured in enumerate(pooled["folds"]):
        for line in metrics_lines(measured["labels"], measured["overall"]):
            click.echo(f"fold {number}, test: {line}")
    for name, spread in pooled["mean_and_sd"].items():
        for metric in ("auroc", "dice", "qwk"):
            if metric in spread and not (name == "overall" and len(pooled["mean_and_sd"]) == 2):
                text = f"mean {spread[metric]['mean']:.3f}, standard deviation {spread[metric]['sd']:.3f}"
                click.echo(f"{name}, {metric} over the folds: {text}")
    for line in metrics_lines(pooled["out_of_fold"]["labels"], pooled["out_of_fold"]["overall"]):
        click.echo(f"every photo once: {line}")


def _dry_run(photos: PhotoCache, settings: TrainConfig, folds: int | None, as_json: bool) -> None:
    from dataclasses import asdict

    from fastfundus.cli.console import remark
    from fastfundus.config import to_toml
    from fastfundus.train.plan import plan_training

    plan = plan_training(photos, settings, say=remark, runs=folds or 1)
    if as_json:
        click.echo(json.dumps({"config": settings.to_dict(), **asdict(plan)}))
        return
    click.echo(to_toml(settings.to_dict()))
    click.echo(str(plan))
