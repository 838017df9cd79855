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

    from fastfundus.engines.bundle import Bundle
    from fastfundus.engines.parity import ParityReport


@click.command("build-engine")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="The bundle: a folder, or one file NAME.zip."
)
@click.option(
    "--backend",
    type=click.Choice(["openvino", "onnxruntime", "aoti", "tensorrt", "tensorrt-rtx"]),
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
@click.option("--max-batch", type=click.IntRange(min=1), help="tensorrt, tensorrt-rtx: largest batch  [default: 64]")
@click.option(
    "--targets",
    metavar="SM,SM,...",
    help="tensorrt-rtx: GPUs to build for, by compute capability: sm75, sm80, sm86, sm89, sm120, sm121  [default: sm80,"
    "sm86,sm89,sm120]",
)
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
    targets: str | None,
    portable: bool,
    weightless: bool,
    as_json: bool,
) -> None:
    r"""Build an inference engine from RUN, and verify that it gives the same answers as the model.

    The engine is compared with the model on held-out photos: largest difference in probability, decisions that flip
    at the threshold, loss of AUROC. If no engine passes its gate, no bundle is written. int8 and fp8 are kept only if
    they are at least 1.15 times as fast as the best of the others.

    openvino runs on any processor, and is the fastest there; onnxruntime is portable; aoti is compiled for this GPU or
    processor and needs torch at runtime; tensorrt is built for this GPU and needs no torch at runtime; tensorrt-rtx is
    for GPUs of workstations, and is built on any machine: where it cannot run, its graph is verified, and the engine
    itself when it is first loaded.

    \b
    Example:
      fastfundus build-engine run/ --output bundle.zip
    """
    from fastfundus.errors import require

    if backend != "tensorrt" and (portable or weightless):
        raise click.UsageError("--portable and --weightless are for --backend tensorrt")
    if max_batch and not backend.startswith("tensorrt"):
        raise click.UsageError("--max-batch is for --backend tensorrt and tensorrt-rtx")
    if targets and backend != "tensorrt-rtx":
        raise click.UsageError("--targets is for --backend tensorrt-rtx")
    require("torch", extra="train")
    from fastfundus.cli.console import progress_bar, remark
    from fastfundus.workflow.build_engine import build_engine as build

    if (output / "bundle.json").is_file() or output.is_file():
        remark(f"{output}: holds a bundle, which the new one replaces once it has passed the gate")

    options: dict[str, Any] = {"portable": portable, "weightless": weightless} if backend == "tensorrt" else {}
    if targets:
        options["targets"] = tuple(target.strip().lower() for target in targets.split(","))
    if max_batch:
        options["batches"] = (*(batch for batch in (1, 8, 64) if batch < max_batch), max_batch)
    # Only one bar can be drawn at a time, and the quantisers of the other backends draw their own.
    with progress_bar() if backend.startswith("tensorrt") else nullcontext() as shown:
        if shown is not None:
            options["progress"] = _shown_steps(shown)
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
    else:
        _print_reports(output, bundle, report)


def _print_reports(output: Path, bundle: Bundle, report: ParityReport) -> None:
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
            f"{tried['precision']:<9}  {_rate(tried):>8}  {tried['gated_difference']:16.1e}  "
            f"{tried['flipped']:7}  {loss:>10}  {kept}"
        )
    click.echo(f"{output}: {bundle.backend} {report}")
    if bundle.metadata.get("not_run"):
        targets = ", ".join(bundle.metadata["targets"])
        click.echo(
            f"its graph was verified on this processor, which cannot run the engine (for {targets}); "
            "it is verified itself when it is first loaded on such a GPU"
        )


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


def _rate(report: dict[str, Any]) -> str:
    return f"{report['images_per_s']:.1f}" if report["images_per_s"] else "-"
