"""The ``fastfundus demo`` command: the whole workflow on synthetic photographs, in minutes on a CPU."""

from __future__ import annotations

from pathlib import Path

import click

from fastfundus.workflow.demo import EPOCHS, PATIENTS


@click.command()
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Folder to create."
)
@click.option("--overwrite", is_flag=True, help="Replace the output of an earlier demo.")
@click.option(
    "--patients", type=click.IntRange(40, 5000), default=PATIENTS, show_default=True, help="Patients to train on."
)
@click.option("--epochs", type=click.IntRange(1, 1000), default=EPOCHS, show_default=True)
def demo(output: Path, overwrite: bool, patients: int, epochs: int) -> None:
    r"""Run the whole workflow on synthetic photos: prepare, train, build-engine, screen, report.

    \b
    Example:
      fastfundus demo
    """
    from fastfundus.errors import require

    require("torch", extra="train")
    from fastfundus.cli.console import remark
    from fastfundus.cli.training_progress import TrainingBar
    from fastfundus.records import interval_text
    from fastfundus.workflow.demo import run_demo

    done = run_demo(
        output,
        overwrite=overwrite,
        patients=patients,
        epochs=epochs,
        observe=lambda: TrainingBar(epochs),
        on_stage=lambda stage: remark(f"\n{stage}"),
    )
    click.echo("")
    rows = [(stage, f"{seconds:.1f} s") for stage, seconds in done.times]
    rows += [
        ("AUROC, held-out synthetic patients", interval_text(done.auroc)),
        ("engine and model, largest |dp|", f"{done.largest_difference:.1e}"),
        ("engine speed, relative to torch float32", f"{done.speedup:.1f} x"),
        ("clinic: inputs / rows", f"{done.inputs} / {done.rows}"),
        ("clinic: status", ", ".join(f"{count} {name}" for name, count in done.statuses.items())),
        ("screening speed", f"{done.images_per_s:.0f} photos/s end to end"),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}")
    if done.fault:
        raise click.ClickException(done.fault)
    click.echo(f"\nrun:    {done.run_page}\nreport: {done.report}")
