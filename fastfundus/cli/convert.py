"""``fastfundus convert``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click


@click.command()
@click.argument("weights", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="A .safetensors file.")
@click.option(
    "--backbone",
    default="auto",
    show_default=True,
    help="The timm model that the weights are of; auto knows ResNets and plain ViTs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what became of every tensor as JSON.")
def convert(weights: Path, output: Path, backbone: str, as_json: bool) -> None:
    r"""Bring weights from elsewhere into a file that train --init takes.

    WEIGHTS is a .safetensors file, a state dict, or a whole pickled ResNet, also wrapped for several GPUs. No code in
    it is run. Every tensor is accounted for: taken over, resampled, or left aside, such as heads.

    \b
    Example:
      fastfundus convert resnet50_512_Fundus.pth --output fundus.safetensors
    """
    from fastfundus.errors import require

    require("torch", extra="train")
    from fastfundus.models.convert import convert_weights

    report = convert_weights(weights, output, backbone=backbone)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
        return
    click.echo(f"{output}: {report.backbone}, from {report.what}: {len(report.used)} tensors as they are")
    for name in report.reshaped:
        click.echo(f"  resampled: {name}")
    for name in report.unused:
        click.echo(f"  left aside: {name}")
