"""The ``fastfundus synthesize`` command."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for images/ and labels.csv.")
@click.option(
    "--patients",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Number of patients; two photos are drawn of each.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--masks", is_flag=True, help="Also write vessel, disc and cup masks.")
def synthesize(output: Path, patients: int, seed: int, masks: bool) -> None:
    r"""Draw synthetic, labelled fundus photographs for trials and tests.

    Equal --seed and --patients give equal photos.

    \b
    Example:
      fastfundus synthesize --output photos/ --patients 50
    """
    from fastfundus.synthetic import write_dataset

    plans = write_dataset(output, patients, seed=seed, masks=masks)
    click.echo(f"{output}: {len(plans)} photos of {patients} patients, {sum(bool(p.lesions) for p in plans)} abnormal")
