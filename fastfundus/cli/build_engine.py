"""``fastfundus build-engine``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("build-engine")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The bundle, a folder to be made.")
@click.option(
    "--backend", type=click.Choice(["openvino", "onnxruntime", "aoti"]), default="openvino", show_default=True
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="auto: builds what this machine computes in, measures, keeps the fastest that passes.",
)
@click.option(
    "--cache", type=click.Path(path_type=Path), help="Photos to prove the engine on  [default: the run's own]"
)
@click.option("--json", "as_json", is_flag=True, help="Print the parity report as JSON.")
def build_engine(run: Path, output: Path, backend: str, precision: str, cache: Path | None, as_json: bool) -> None:
    r"""Build an inference engine from RUN, and prove that it answers as the model does.

    The engine is compared with the model on held-out photos: largest difference of a probability, decisions that
    flip at the threshold, loss of AUROC. An engine that misses its gate is refused, and no bundle is written.

    openvino runs on any processor and is the fastest there; onnxruntime is the portable one; aoti is compiled for this
    very GPU or processor and needs torch to run.

    \b
    Example:
      fastfundus build-engine run/ --output bundle/
    """
    from fastfundus.errors import require

    require("torch", extra="train")
    from fastfundus.cli.building import build_from_run
    from fastfundus.train.run import Run

    bundle, report = build_from_run(Run.open(run), output, cache=cache, backend=backend, precision=precision)
    if as_json:
        click.echo(json.dumps({"bundle": str(output), "fingerprint": bundle.fingerprint, "parity": report.to_dict()}))
    else:
        for tried in bundle.about["tried"]:
            click.echo(f"{backend} {tried['precision']}: {tried['images_per_s']:.1f} images/s, largest |dp| "
                       f"{tried['largest_difference']:.1e}, {'passes' if tried['passed'] else 'MISSES'}")  # fmt: skip
        click.echo(f"{output}: {backend} {report}")
