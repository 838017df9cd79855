"""The ``fastfundus cache`` commands, which inspect, verify, audit and split a photo cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastfundus.config import TASKS

if TYPE_CHECKING:
    from fastfundus.workflow.cache import CacheAudit


@click.group()
def cache() -> None:
    r"""Inspect, verify, audit and split a photo cache.

    \b
    Example:
      fastfundus cache info cache/
    """


@cache.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def info(folder: Path, as_json: bool) -> None:
    r"""Summarise the content of a cache.

    \b
    Example:
      fastfundus cache info cache/
    """
    from fastfundus.workflow.cache import summarise_cache

    overview = summarise_cache(folder)
    if as_json:
        click.echo(json.dumps(overview))
        return
    size, on_disk = overview["spec"]["size"], overview["bytes_on_disk"]
    click.echo(f"{folder}: {overview['photos']} photos at {size} px, {on_disk / 1e6:.1f} MB on disk")
    for name in ("status", "cameras", "field_shapes"):
        if overview[name]:
            click.echo(f"{name.replace('_', ' ')}: " + _counts(overview[name]))
    click.echo(f"pairs of duplicates or near duplicates across patients: {overview['duplicate_pairs']}")
    for line in understood(overview):
        click.echo(line)
    click.echo(f"prepared from {overview['source']}; preprocessing {overview['fingerprint'][:12]}")


def understood(overview: dict[str, Any]) -> list[str]:
    """Return lines that say what was understood about patients, eyes, splits and labels, and from where."""
    from fastfundus.workflow.cache import MOST_VALUES

    origins = overview["origins"]

    def line(name: str, text: str, role: str) -> str:
        return f"{name}: {text}" + (f" (from {origins[role]})" if role in origins else "")

    hashed = ", hashed" if overview["patients_hashed"] else ""
    people = f"{overview['patients']} known{hashed}; {overview['patients_unknown']} photos of unknown patients"
    lines = [line("patients", people, "patient"), line("eyes", _counts(overview["eyes"]), "eye")]
    lines.append(line("splits", _counts(overview["splits"]) or "none given", "split"))
    for name, entry in overview["labels"].items():
        if entry["distinct"] > MOST_VALUES:
            values = f"{entry['distinct']} different values, such as " + ", ".join(map(str, list(entry["values"])[:3]))
        else:
            values = ", ".join(f"{value}: {n}" for value, n in entry["values"].items())
        lines.append(line(f"label {name}", f"known for {entry['known']} photos; {values}", "labels"))
    return lines if overview["labels"] else [*lines, "labels: none"]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {value}" for value, n in counts.items())


@cache.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sources", is_flag=True, help="Also compare the source files with their hashes.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(folder: Path, sources: bool, as_json: bool) -> None:
    r"""Compare every photo of a cache with its checksum.

    Exits with 1 if a photo does not match.

    \b
    Example:
      fastfundus cache verify cache/ --sources
    """
    from fastfundus.cli.console import progress_bar
    from fastfundus.workflow.cache import verify_cache

    with progress_bar() as bar:
        task = bar.add_task("checking", total=None)
        found = verify_cache(
            folder, sources=sources, on_photo=lambda done, total: bar.update(task, completed=done, total=total)
        )
    faults = found["faults"]
    if as_json:
        click.echo(json.dumps(found))
    elif not faults:
        click.echo(f"{folder}: {found['photos']} photos match their checksums")
    if faults:
        raise click.ClickException("\n".join([f"{len(faults)} faults:", *faults[:50]]))


@cache.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--splits", type=click.Path(path_type=Path), help="Split to check: a CSV or Parquet file, or a run folder."
)
@click.option(
    "--against",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Another cache that must not share photos with this one; may be repeated.",
)
@click.option("--label", "labels", multiple=True, help="Mark pairs that differ in this label; may be repeated.")
@click.option("--output", type=click.Path(path_type=Path), help="Write all pairs to this CSV file.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def audit(
    folder: Path,
    splits: Path | None,
    against: tuple[Path, ...],
    labels: tuple[str, ...],
    output: Path | None,
    as_json: bool,
) -> None:
    r"""Check a cache for leakage between patients, splits and caches.

    Lists duplicates and near duplicates of different patients, and photos shared with another cache. Exits with 1 if a
    photo is on two sides of --splits, or in an --against cache.

    \b
    Example:
      fastfundus cache audit cache/ --splits run/ --against pretraining_cache/
    """
    from fastfundus.cli.console import remark
    from fastfundus.workflow.cache import audit_cache

    found = audit_cache(folder, splits=splits, against=against, labels=labels, output=output)
    if as_json:
        click.echo(json.dumps({"cache": str(folder), **found.to_dict()}))
    else:
        _print_audit(folder, found, with_split=splits is not None)
    unknown = found.report.unknown_patients
    if unknown:
        remark(f"note: the patient of {unknown} photos is unknown: a split may separate a patient's eyes")
    if found.leaking:
        raise click.ClickException("photos leak, see above; data.duplicates=together keeps duplicates on one side")


def _print_audit(folder: Path, found: CacheAudit, *, with_split: bool) -> None:
    report = found.report
    kinds = ", ".join(f"{n} {kind}" for kind, n in report.pairs["kind"].value_counts(sort=True).rows()) or "none"
    click.echo(f"{folder}: {report.photos} photos of {report.patients} patients; pairs across patients: {kinds}")
    for row in report.pairs.head(20).iter_rows(named=True):
        differ = ", labels differ" if row["labels_differ"] else ""
        sides = f" ({row['split_a']} / {row['split_b']})" if with_split else ""
        click.echo(f"  {row['kind']} ({row['likeness']:.2f}{differ}): {row['path_a']} / {row['path_b']}{sides}")
    if len(report.pairs) > 20:
        click.echo(f"  and {len(report.pairs) - 20} more; write all of them with --output")
    if with_split:
        click.echo(f"pairs on different sides of the split: {len(report.leaks)}")
    for path, table in found.shared.items():
        click.echo(f"photos shared with {path}: {len(table)}")
        for row in table.head(20).iter_rows(named=True):
            click.echo(f"  {row['kind']} ({row['likeness']:.2f}): {row['path_a']} / {row['path_b']}")


@cache.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="CSV or .parquet file to write.")
@click.option("--task", type=click.Choice([task for task in TASKS if task != "vessels"]), default="abnormality")
@click.option("--label", "labels", multiple=True, help="Label to stratify by, as for train; may be repeated.")
@click.option("--folds", type=click.IntRange(3, 100), help="Number of folds  [default: 5]")
@click.option("--fold", type=int, default=0, show_default=True, help="Index of the test fold; the next one validates.")
@click.option("--holdout", nargs=2, type=float, help="Test and validation shares, such as 0.2 0.1, instead of folds.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the split.")
@click.option("--ignore-duplicates", is_flag=True, help="Split by patient alone, even if this separates duplicates.")
def split(
    folder: Path,
    output: Path,
    task: str,
    labels: tuple[str, ...],
    folds: int | None,
    fold: int,
    holdout: tuple[float, float] | None,
    seed: int,
    ignore_duplicates: bool,
) -> None:
    r"""Split a cache by patient and write the split to a file.

    --task (default: abnormality) and --label select the labelled photos to split and the classes to stratify by. To
    train on the split, set data.split_file in the configuration.

    \b
    Example:
      fastfundus cache split cache/ --holdout 0.2 0.1 --output split.csv
    """
    from fastfundus.cli.console import remark
    from fastfundus.errors import require
    from fastfundus.workflow.cache import split_cache

    require("sklearn", extra="train")
    if folds and holdout:
        raise click.UsageError("give --folds or --holdout, not both")
    done = split_cache(
        folder,
        output,
        task=task,
        labels=labels,
        folds=folds,
        fold=fold,
        holdout=holdout,
        seed=seed,
        ignore_duplicates=ignore_duplicates,
        say=lambda note: remark(f"note: {note}"),
    )
    counts = ", ".join(f"{count} {side}" for side, count in done.sides.items())
    click.echo(f"{output}: {done.photos} photos with a label ({done.targets}) of {done.patients} patients: {counts}")


@cache.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="PNG or JPEG file to write."
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file of a run  [default: no file, all defaults]",
)
@click.option("--photos", "count", type=click.IntRange(1, 64), default=6, show_default=True, help="Number of photos.")
@click.option("--draws", type=click.IntRange(1, 64), default=8, show_default=True, help="Augmentations per photo.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of photos and augmentations.")
def augment(folder: Path, output: Path, config_file: Path | None, count: int, draws: int, seed: int) -> None:
    r"""Draw a contact sheet of augmented photos, to check the settings before training.

    Each row shows one photo: the original, then random augmentations.

    \b
    Example:
      fastfundus cache augment cache/ --config run.toml --output sheet.png
    """
    from fastfundus.errors import require

    require("torch", extra="train")
    from fastfundus.workflow.cache import draw_augmentations

    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise click.UsageError(f"--output must end in .png, .jpg or .jpeg, got {output.name}")
    photos, width, height = draw_augmentations(folder, output, config=config_file, photos=count, draws=draws, seed=seed)
    click.echo(f"{output}: {photos} photos, {draws} draws each, {width} x {height} pixels")
