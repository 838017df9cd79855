"""The ``fastfundus convert`` command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click


@click.command()
@click.argument("weights", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The .safetensors file to write.")
@click.option(
    "--backbone",
    default="auto",
    show_default=True,
    help="timm model of the weights; auto recognises ResNets and plain ViTs.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a report on every tensor as JSON.")
def convert(weights: Path, output: Path, backbone: str, as_json: bool) -> None:
    r"""Convert third-party WEIGHTS to a file for train --init.

    WEIGHTS is a .safetensors file, a state dict, or a whole pickled ResNet, with or without a multi-GPU wrapper. No
    code in it is run. Every tensor is reported as used, resampled, or left out (such as heads).

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
    click.echo(f"{output}: {report.backbone}, from {report.what}: {len(report.used)} tensors used unchanged")
    for name in report.reshaped:
        click.echo(f"  resampled: {name}")
    for name in report.unused:
        click.echo(f"  left out: {name}")
