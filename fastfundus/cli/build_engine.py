"""``fastfundus build-engine``."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@click.command("build-engine")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="The bundle: a folder, or one file NAME.zip."
)
@click.option(
    "--backend",
    type=click.Choice(["openvino", "onnxruntime", "aoti", "tensorrt"]),
    default="openvino",
    show_default=True,
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16", "int8", "fp8"]),
    default="auto",
    show_default=True,
    help="auto: builds what this machine computes in, measures, keeps the fastest that passes.",
)
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Photos to prove the engine on  [default: the run's own]"
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Cache of photos that int8 and fp8 learn their ranges on  [default: those the run was trained on]",
)
@click.option("--max-batch", type=click.IntRange(min=1), help="tensorrt: photos it takes at once  [default: 64]")
@click.option("--portable", is_flag=True, help="tensorrt: for later GPUs and other versions too; slower.")
@click.option("--weightless", is_flag=True, help="tensorrt: leave the weights out; they are put in when it is loaded.")
@click.option("--json", "as_json", is_flag=True, help="Print the parity report as JSON.")
def build_engine(
    run: Path,
    output: Path,
    backend: str,
    precision: str,
    cache: Path | None,
    calibration: Path | None,
    max_batch: int | None,
    portable: bool,
    weightless: bool,
    as_json: bool,
) -> None:
    r"""Build an inference engine from RUN, and prove that it answers as the model does.

    The engine is compared with the model on held-out photos: largest difference of a probability, decisions that
    flip at the threshold, loss of AUROC. An engine that misses its gate is refused, and no bundle is written. int8
    and fp8 are kept only if at least 1.15 times as fast as the best of the others.

    openvino runs on any processor and is the fastest there; onnxruntime is the portable one; aoti is compiled for this
    very GPU or processor and needs torch to run; tensorrt is for this GPU and needs no torch to run.

    \b
    Example:
      fastfundus build-engine run/ --output bundle.zip
    """
    from fastfundus.errors import require

    if backend != "tensorrt" and (max_batch or portable or weightless):
        raise click.UsageError("--max-batch, --portable and --weightless are for --backend tensorrt")
    require("torch", extra="train")
    from fastfundus.cli.building import build_from_run
    from fastfundus.cli.console import progress_bar
    from fastfundus.train.run import Run

    options: dict[str, Any] = {}
    # Only one bar can be drawn at a time, and the quantiser of the other backends draws its own.
    with progress_bar() if backend == "tensorrt" else nullcontext() as shown:
        if shown is not None:
            options = {"portable": portable, "weightless": weightless, "progress": _shown_steps(shown)}
            if max_batch:
                options["batches"] = (*(batch for batch in (1, 8, 64) if batch < max_batch), max_batch)
        bundle, report = build_from_run(
            Run.open(run),
            output,
            cache=cache,
            calibration=calibration,
            backend=backend,
            precision=precision,
            options=options,
        )
    if as_json:
        click.echo(json.dumps({"bundle": str(output), "fingerprint": bundle.fingerprint, "parity": report.to_dict()}))
        return
    click.echo("precision  images/s  |dp| at the gate  flipped  AUROC loss  kept")
    for tried in bundle.about["tried"]:
        loss = "-" if tried["auroc_loss"] is None else f"{tried['auroc_loss']:.4f}"
        kept = (
            "yes"
            if tried["precision"] == report.precision
            else ""
            if tried["passed"]
            else "FAILED"
            if tried["error"]
            else "MISSES its gate"
        )
        click.echo(
            f"{tried['precision']:<9}  {tried['images_per_s']:8.1f}  {tried['gated_difference']:16.1e}  "
            f"{tried['flipped']:7}  {loss:>10}  {kept}"
        )
    click.echo(f"{output}: {backend} {report}")


def _shown_steps(shown: Progress) -> Callable[[str, int, int], None]:
    """Show each phase of a builder as a bar of its own, which goes when it is done."""
    phases: dict[str, TaskID] = {}

    def step(phase: str, done: int, steps: int) -> None:
        if phase not in phases:
            phases[phase] = shown.add_task(phase, total=steps)
        shown.update(phases[phase], completed=done)
        if done >= steps:
            shown.remove_task(phases.pop(phase))

    return step
