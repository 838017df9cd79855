"""``fastfundus train``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The run folder.")
@click.option("--task", type=click.Choice(["abnormality"]), help="What to learn  [default: abnormality]")
@click.option("--label", help="Manifest column to learn  [default: 'abnormal', or else 'normal' inverted]")
@click.option("--backbone", help="timm model name  [default: resnet50]")
@click.option("--init", help="scratch, imagenet, or a run folder or weights file  [default: scratch]")
@click.option("--epochs", type=int, help="Passes over the photos  [default: 30]")
@click.option("--batch-size", type=int, help="Photos a step  [default: 32]")
@click.option("--learning-rate", type=float, help="Peak learning rate  [default: 0.001]")
@click.option("--fold", type=int, help="Which of the folds tests  [default: 0]")
@click.option("--folds", type=click.IntRange(3, 100), help="Train so many folds, one after the other, and pool them.")
@click.option("--label-fraction", type=float, help="Share of the training patients to learn from  [default: 1]")
@click.option("--amp/--no-amp", default=None, help="bfloat16 autocast  [default: on]")
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with any setting; flags win over it.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped; its settings are taken from it.")
@click.option(
    "--target-sensitivity",
    type=click.FloatRange(0.01, 1),
    default=0.90,
    show_default=True,
    help="The threshold is chosen on validation to reach it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def train(
    cache: Path,
    output: Path,
    task: str | None,
    label: str | None,
    backbone: str | None,
    init: str | None,
    epochs: int | None,
    batch_size: int | None,
    learning_rate: float | None,
    fold: int | None,
    folds: int | None,
    label_fraction: float | None,
    amp: bool | None,
    config: Path | None,
    resume: bool,
    target_sensitivity: float,
    as_json: bool,
) -> None:
    r"""Train a model on CACHE.

    Patients are split into training, validation and test. The best epoch by AUROC on validation is kept, temperature
    and threshold are fitted on validation, and the test patients are measured once, at the end. Ctrl-C stops after the
    step and leaves a run that --resume continues.

    With --folds, OUTPUT holds a run a fold (fold0, fold1, ...), and the predictions of every photo by the model that
    has not seen its patient.

    \b
    Example:
      fastfundus train cache/ --output run/ --task abnormality --amp
      fastfundus train cache/ --output runs/ --folds 5
    """
    from fastfundus.errors import ConfigError, require

    require("torch", extra="train")
    from fastfundus.photo.memory import keep_memory

    # Every batch asks for megabytes of fresh memory; page faults would cost as much as filling it.
    keep_memory()
    from fastfundus.cli.console import remark
    from fastfundus.cli.training import TrainingBar
    from fastfundus.config import TrainConfig, override
    from fastfundus.data import PhotoCache
    from fastfundus.data.split import SIDES
    from fastfundus.evaluate.folds import pool_folds
    from fastfundus.evaluate.operating_point import fit_operating_point
    from fastfundus.train.loop import Interrupted
    from fastfundus.train.loop import train as run_training
    from fastfundus.train.run import Run

    flags: dict[str, Any] = {
        "task": task,
        "data.label": label,
        "data.fold": fold,
        "data.label_fraction": label_fraction,
        "model.backbone": backbone,
        "model.init": init,
        "loop.epochs": epochs,
        "loop.batch_size": batch_size,
        "loop.amp": amp,
        "optimiser.learning_rate": learning_rate,
    }
    if folds is not None and fold is not None:
        raise click.UsageError("give --fold or --folds, not both")
    if resume:
        given = [name for name, value in {**flags, "--config": config}.items() if value is not None]
        if given:
            raise ConfigError(f"{given[0]} cannot change when resuming; leave it away, or start a new --output")
        started = output / "fold0" if folds else output
        settings = TrainConfig.from_toml(started / "config.toml")
    elif config is not None:
        settings = TrainConfig.from_toml(config, flags)
    else:
        settings = TrainConfig.from_dict(override({}, flags))
    if resume and folds and settings.data.folds != folds:
        raise ConfigError(f"{output} was started with --folds {settings.data.folds}; give the same")
    photos = PhotoCache.open(cache)
    if folds and (settings.data.split_file or set(SIDES) & set(photos.manifest["split"].to_list())):
        raise ConfigError("--folds deals patients, but the label file or data.split_file fixes a split; leave one away")
    again = f"fastfundus train {cache} --output {output}{f' --folds {folds}' if folds else ''} --resume"

    def one(folder: Path, settings: TrainConfig, resume: bool) -> dict[str, Any]:
        with TrainingBar(settings.loop.epochs) as bar:
            try:
                run_training(photos, folder, settings, resume=resume, observer=bar)
            except Interrupted as stopped:
                raise click.ClickException(f"{stopped}; go on with: {again}") from None
        return fit_operating_point(Run.open(folder), photos, target_sensitivity=target_sensitivity)

    if folds is None:
        document = one(output, settings, resume)
        run = Run.open(output)
        if as_json:
            click.echo(json.dumps({"run": str(output), "best_epoch": run.epoch, **document["labels"]}))
            return
        click.echo(f"{output}: best epoch {run.epoch} of {settings.loop.epochs}")
        for name, point in document["labels"].items():
            click.echo(f"{name}: threshold {point['threshold']:.4f}, temperature {point['temperature']:.3f}")
            for split in ("validation", "test"):
                click.echo(f"  {split}: {metrics_line(point[split])}")
        return
    for number in range(folds):
        folder = output / f"fold{number}"
        if resume and (folder / "operating_point.json").is_file():
            continue
        remark(f"fold {number} of {folds}")
        part = replace(settings, data=replace(settings.data, split="folds", folds=folds, fold=number))
        one(folder, part, resume and (folder / "last.ckpt").is_file())
    pooled = pool_folds(output, [Run.open(output / f"fold{number}") for number in range(folds)], photos)
    if as_json:
        click.echo(json.dumps({"run": str(output), **pooled}))
        return
    for number, metrics in enumerate(pooled["folds"]):
        click.echo(f"fold {number}, test: {metrics_line(metrics)}")
    spread = pooled["mean_and_sd"]["auroc"]
    click.echo(f"AUROC over the folds: {spread['mean']:.3f}, standard deviation {spread['sd']:.3f}")
    click.echo(f"all together: {metrics_line(pooled['out_of_fold'])}")


def metrics_line(metrics: dict[str, Any]) -> str:
    """Metrics of one split in one line."""
    from fastfundus.cli.console import interval_text

    auroc, sensitivity, specificity = (interval_text(metrics[name]) for name in ("auroc", "sensitivity", "specificity"))
    return (
        f"AUROC {auroc}, sensitivity {sensitivity}, specificity {specificity}; "
        f"{metrics['photos']} photos of {metrics['patients']} patients"
    )
