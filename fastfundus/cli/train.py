"""The ``fastfundus train`` command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastfundus.config import TASKS
from fastfundus.recipes import RECIPES

if TYPE_CHECKING:
    from fastfundus.config import TrainConfig
    from fastfundus.data.cache import PhotoCache


@click.command()
@click.argument("caches", metavar="CACHE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Run folder to create  [required without --dry-run]")
@click.option("--task", type=click.Choice(TASKS), help="What to learn  [default: abnormality]")
@click.option("--label", "labels", multiple=True, help="Manifest column to learn; repeat it for multilabel.")
@click.option(
    "--auxiliary",
    multiple=True,
    metavar="COLUMN",
    help="Column of 0 and 1, or pattern such as 'eye_*', learned beside the labels, in training only; may be repeated.",
)
@click.option("--backbone", help="timm model name  [default: resnet50]")
@click.option(
    "--init",
    help="Initial weights: scratch, imagenet, a run folder, a weights file or hf_hub:OWNER/NAME  [default: imagenet if "
    "this machine has such weights]",
)
@click.option("--epochs", type=int, help="Passes over the training photos  [default: 30]")
@click.option("--batch-size", type=int, help="Photos per step, over all processes  [default: 32]")
@click.option("--learning-rate", type=float, help="Peak learning rate  [default: by the initial weights]")
@click.option("--fold", type=int, help="Fold to test on  [default: 0]")
@click.option("--folds", type=click.IntRange(3, 100), help="Cross-validate: train this many folds and pool them.")
@click.option("--label-fraction", type=float, help="Share of the training patients to learn from  [default: 1]")
@click.option(
    "--amp/--no-amp",
    default=None,
    help="Mixed precision where the device computes it natively, or float32 everywhere  [default: --amp]",
)
@click.option("--recipe", type=click.Choice(RECIPES), help="Start from settings that come with FastFundus.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with any setting; options take precedence.")
@click.option("--resume", is_flag=True, help="Continue an interrupted run with its own settings.")
@click.option("--dry-run", is_flag=True, help="Report what would be trained, its size and its duration; train nothing.")
@click.option(
    "--target-sensitivity",
    type=click.FloatRange(0.01, 1),
    default=0.90,
    show_default=True,
    help="Sensitivity on validation that each threshold is chosen for.",
)
@click.option("--target-specificity", type=click.FloatRange(0.01, 1), help="Choose thresholds for this instead.")
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
    current step and leaves a run that --resume continues.

    With --folds, OUTPUT contains one run per fold (fold0, fold1, ...), and predictions for every photo by the model
    that has not seen its patient. Under torchrun, processes share every batch; if one fails, all of them restart from
    the last checkpoint (torchrun --max-restarts).

    \b
    Example:
      fastfundus train cache/ --output run/ --task abnormality
      fastfundus train cache/ --output runs/ --recipe dr_grading --init upstream/ --folds 5
      torchrun --nproc-per-node 8 -m fastfundus train cache/ --output run/ --recipe upstream
    """
    from fastfundus.errors import ConfigError, require

    require("torch", extra="train")
    from fastfundus.data.joined_cache import open_caches
    from fastfundus.training.distributed import join_processes, was_restarted
    from fastfundus.workflow.train import ThresholdTargets, train_folds, train_run

    if folds is not None and flags["fold"] is not None:
        raise click.UsageError("give --fold or --folds, not both")
    if recipe and config:
        raise click.UsageError("give --recipe or --config, not both; a config may be an edited copy of a recipe")
    if dry_run:
        _dry_run(open_caches(*caches), _settings(flags, recipe, config, None), folds, as_json)
        return
    if output is None:
        raise click.UsageError("Missing option '--output'.")
    started = output / "fold0" if folds else output
    # Processes that torchrun restarts get the same options again; the run knows where to continue.
    resume_now = resume or (was_restarted() and (started / "last.ckpt").is_file())
    settings = _settings(flags, recipe, config, started if resume else None)
    if resume and folds and settings.data.folds != folds:
        raise ConfigError(f"{output} was started with --folds {settings.data.folds}; give the same number")
    cache, targets = open_caches(*caches), ThresholdTargets(target_sensitivity, target_specificity)
    again = f"fastfundus train {' '.join(map(str, caches))} --output {output}{f' --folds {folds}' if folds else ''}"
    with join_processes() as world:
        options: dict[str, Any] = {"resume": resume_now, "targets": targets, "world": world}
        # The bar ends before results are printed: on a terminal it would be drawn over them.
        with _progress(settings, f"{again} --resume") as observers:
            if folds is None:
                document = train_run(cache, output, settings, observer=observers(""), **options)
            else:
                document = train_folds(cache, output, settings, folds, observers=observers, **options)
        if world.leads:
            if folds is None:
                _print_run(output, settings, document, as_json)
            else:
                _print_folds(output, document, as_json)


@contextmanager
def _progress(settings: TrainConfig, again: str) -> Iterator[Any]:
    """Yield a function that returns the progress bar of a run; if interrupted, report how to continue."""
    from fastfundus.cli.console import remark
    from fastfundus.cli.training_progress import TrainingBar
    from fastfundus.training.trainer import Interrupted

    with TrainingBar(settings.loop.epochs) as bar:

        def observer(name: str) -> TrainingBar:
            if name:
                remark(name)
            return bar

        try:
            yield observer
        except Interrupted as stopped:
            raise click.ClickException(f"{stopped}; continue with: {again}") from None


def _settings(flags: dict[str, Any], recipe: str | None, config: Path | None, resumed: Path | None) -> TrainConfig:
    """Return the configuration: that of the resumed run, or of a recipe or file with the options on top."""
    from fastfundus.config import TrainConfig, override
    from fastfundus.errors import ConfigError
    from fastfundus.workflow.train import read_recipe

    sections = {"backbone": "model", "init": "model", "epochs": "loop", "batch_size": "loop", "amp": "loop"}
    sections |= {
        "labels": "data",
        "auxiliary": "data",
        "fold": "data",
        "label_fraction": "data",
        "learning_rate": "optimizer",
    }
    given = {
        f"{sections[name]}.{name}" if name in sections else name: list(value) if isinstance(value, tuple) else value
        for name, value in flags.items()
        if value is not None and value != ()
    }
    if "loop.amp" in given:
        # --amp asks for the fastest precision of the device; loop.amp = true in a file forces autocast.
        given["loop.amp"] = "auto" if given["loop.amp"] else False
    if resumed is not None:
        fixed = [*given, *(["--config"] if config else []), *(["--recipe"] if recipe else [])]
        if fixed:
            raise ConfigError(f"{fixed[0]} cannot change when resuming; omit it, or start a new --output")
        return TrainConfig.from_run(resumed)
    if recipe is not None:
        return read_recipe(recipe, given)
    if config is not None:
        return TrainConfig.from_toml(config, given)
    return TrainConfig.from_dict(override({}, given))


def _print_run(output: Path, settings: TrainConfig, document: dict[str, Any], as_json: bool) -> None:
    from fastfundus.cli.console import remark
    from fastfundus.cli.training_progress import metrics_lines
    from fastfundus.training.run import Run

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


def _print_folds(output: Path, pooled: dict[str, Any], as_json: bool) -> None:
    from fastfundus.cli.training_progress import metrics_lines

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


def _dry_run(cache: PhotoCache, settings: TrainConfig, folds: int | None, as_json: bool) -> None:
    from fastfundus.cli.console import remark
    from fastfundus.config import to_toml
    from fastfundus.training.estimate import estimate_training

    estimate = estimate_training(cache, settings, say=remark, runs=folds or 1)
    if as_json:
        click.echo(json.dumps({"config": settings.to_dict(), **asdict(estimate)}))
        return
    click.echo(to_toml(settings.to_dict()))
    click.echo(str(estimate))
