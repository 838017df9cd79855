"""The ``fastfundus build-engine`` command."""

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
    help="Precision; auto builds every one that this machine computes natively and keeps the fastest that passes.",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Cache of photos to verify the engine on  [default: that of the run]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Cache of photos for the ranges of int8 and fp8  [default: the training photos of the run]",
)
@click.option("--max-batch", type=click.IntRange(min=1), help="tensorrt: largest batch  [default: 64]")
@click.option("--portable", is_flag=True, help="tensorrt: also run on later GPUs and in other versions; slower.")
@click.option(
    "--weightless", is_flag=True, help="tensorrt: store no weights in the engine; they are refitted when it is loaded."
)
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
    r"""Build an inference engine from RUN, and verify that it gives the same answers as the model.

    The engine is compared with the model on held-out photos: largest difference in probability, decisions that flip
    at the threshold, loss of AUROC. If no engine passes its gate, no bundle is written. int8 and fp8 are kept only if
    they are at least 1.15 times as fast as the best of the others.

    openvino runs on any processor, and is the fastest there; onnxruntime is portable; aoti is compiled for this GPU or
    processor and needs torch at runtime; tensorrt is built for this GPU and needs no torch at runtime.

    \b
    Example:
      fastfundus build-engine run/ --output bundle.zip
    """
    from fastfundus.errors import require

    if backend != "tensorrt" and (max_batch or portable or weightless):
        raise click.UsageError("--max-batch, --portable and --weightless are for --backend tensorrt")
    require("torch", extra="train")
    from fastfundus.cli.console import progress_bar, remark
    from fastfundus.workflow.build_engine import build_engine as build

    if (output / "bundle.json").is_file() or output.is_file():
        remark(f"{output}: holds a bundle, which the new one replaces once it has passed the gate")

    options: dict[str, Any] = {}
    # Only one bar can be drawn at a time, and the quantisers of the other backends draw their own.
    with progress_bar() if backend == "tensorrt" else nullcontext() as shown:
        if shown is not None:
            options = {"portable": portable, "weightless": weightless, "progress": _shown_steps(shown)}
            if max_batch:
                options["batches"] = (*(batch for batch in (1, 8, 64) if batch < max_batch), max_batch)
        bundle, report = build(
            run,
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
    for tried in bundle.metadata["tried"]:
        loss = "-" if tried["auroc_loss"] is None else f"{tried['auroc_loss']:.4f}"
        kept = (
            "yes"
            if tried["precision"] == report.precision
            else ""
            if tried["passed"]
            else "failed"
            if tried["error"]
            else "misses the gate"
        )
        click.echo(
            f"{tried['precision']:<9}  {tried['images_per_s']:8.1f}  {tried['gated_difference']:16.1e}  "
            f"{tried['flipped']:7}  {loss:>10}  {kept}"
        )
    click.echo(f"{output}: {backend} {report}")


def _shown_steps(shown: Progress) -> Callable[[str, int, int], None]:
    """Return a callback that shows each phase of a builder as a bar, removed when the phase is done."""
    phases: dict[str, TaskID] = {}

    def step(phase: str, done: int, steps: int) -> None:
        if phase not in phases:
            phases[phase] = shown.add_task(phase, total=steps)
        shown.update(phases[phase], completed=done)
        if done >= steps:
            shown.remove_task(phases.pop(phase))

    return step
