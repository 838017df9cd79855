"""The ``fastfundus cache`` commands, which inspect, verify, audit and split a photo cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from fastfundus.config import TASKS


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
    import polars as pl

    from fastfundus.data import PhotoCache
    from fastfundus.data.cache import MANIFEST_COLUMNS

    opened = PhotoCache.open(folder)
    table = opened.manifest
    used = table.filter(pl.col("pixels_crc32").is_not_null())
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    labels: dict[str, dict[str, Any]] = {}
    for name in table.columns[len(MANIFEST_COLUMNS) :]:
        known = table[name].drop_nulls()
        counts = known.value_counts(sort=True).rows()
        labels[name] = {
            "known": len(known),
            "values": {f"{value:g}" if isinstance(value, float) else value: n for value, n in counts[:8]},
            "distinct": len(counts),
        }
    overview: dict[str, Any] = {
        "cache": str(folder),
        "photos": len(table),
        "status": dict(table["status"].value_counts(sort=True).rows()),
        "patients": table["patient"].n_unique(),
        "patients_unknown": int((~table["patient_known"]).sum()),
        "patients_hashed": opened.salted is not None,
        "eyes": dict(table.filter(pl.col("eye").is_not_null())["eye"].value_counts(sort=True).rows()),
        "cameras": dict(table.filter(pl.col("camera").is_not_null())["camera"].value_counts(sort=True).rows()),
        "field_shapes": dict(used["field_shape"].fill_null("whole frame").value_counts(sort=True).rows()),
        "duplicate_pairs": len(opened.duplicates()),
        "labels": labels,
        "spec": opened.spec.to_pixels_dict(),
        "fingerprint": opened.spec.fingerprint,
        "source": str(opened.source),
        "bytes_on_disk": on_disk,
    }
    if as_json:
        click.echo(json.dumps(overview))
        return
    click.echo(f"{folder}: {overview['photos']} photos at {opened.spec.size} px, {on_disk / 1e6:.1f} MB on disk")
    for name in ("status", "eyes", "cameras", "field_shapes"):
        if overview[name]:
            click.echo(f"{name.replace('_', ' ')}: " + ", ".join(f"{n} {value}" for value, n in overview[name].items()))
    hashed = ", hashed" if overview["patients_hashed"] else ""
    click.echo(f"patients: {overview['patients']}{hashed}; {overview['patients_unknown']} photos of unknown patients")
    click.echo(f"pairs of duplicates or near duplicates across patients: {overview['duplicate_pairs']}")
    for name, entry in labels.items():
        values = ", ".join(f"{value}: {n}" for value, n in entry["values"].items())
        more = f", ... ({entry['distinct']} values)" if entry["distinct"] > 8 else ""
        click.echo(f"label {name}: known for {entry['known']} photos; {values}{more}")
    click.echo(f"prepared from {opened.source}; preprocessing {opened.spec.fingerprint[:12]}")


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
    from fastfundus.data import PhotoCache

    opened = PhotoCache.open(folder)
    with progress_bar() as progress:
        task = progress.add_task("checking", total=len(opened.manifest))
        faults = list(opened.verify(sources=sources, on_photo=lambda: progress.advance(task)))
    if as_json:
        click.echo(json.dumps({"cache": str(folder), "photos": len(opened.manifest), "faults": faults}))
    elif not faults:
        click.echo(f"{folder}: {len(opened.manifest)} photos match their checksums")
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
    from fastfundus.data import PhotoCache
    from fastfundus.data.leakage import check_leakage, overlap
    from fastfundus.data.split import read_split_file
    from fastfundus.errors import DataError, close_matches

    opened = PhotoCache.open(folder)
    for label in labels:
        if label not in opened.manifest.columns:
            raise DataError(f"there is no label {label!r}{close_matches(label, opened.manifest.columns)}", path=folder)
    names = None
    if splits is not None:
        splits = splits / "splits.parquet" if splits.is_dir() else splits
        names = read_split_file(splits, opened.manifest)
    found = check_leakage(opened, names, labels)
    leaks = found.leaks
    shared = {str(path): overlap(opened, PhotoCache.open(path)) for path in against}
    if output is not None:
        found.pairs.write_csv(output)
    if as_json:
        document = {
            "cache": str(folder),
            "photos": found.photos,
            "patients": found.patients,
            "photos_of_unknown_patients": found.unknown_patients,
            "pairs": found.pairs.to_dicts(),
            "leaks": leaks.to_dicts(),
            "shared": {path: table.to_dicts() for path, table in shared.items()},
        }
        click.echo(json.dumps(document))
    else:
        kinds = ", ".join(f"{n} {kind}" for kind, n in found.pairs["kind"].value_counts(sort=True).rows()) or "none"
        click.echo(f"{folder}: {found.photos} photos of {found.patients} patients; pairs across patients: {kinds}")
        for row in found.pairs.head(20).iter_rows(named=True):
            differ = ", labels differ" if row["labels_differ"] else ""
            sides = f" ({row['split_a']} / {row['split_b']})" if names is not None else ""
            click.echo(f"  {row['kind']} ({row['likeness']:.2f}{differ}): {row['path_a']} / {row['path_b']}{sides}")
        if len(found.pairs) > 20:
            click.echo(f"  and {len(found.pairs) - 20} more; write all of them with --output")
        if names is not None:
            click.echo(f"pairs on different sides of the split: {len(leaks)}")
        for path, table in shared.items():
            click.echo(f"photos shared with {path}: {len(table)}")
            for row in table.head(20).iter_rows(named=True):
                click.echo(f"  {row['kind']} ({row['likeness']:.2f}): {row['path_a']} / {row['path_b']}")
    if found.unknown_patients:
        remark(
            f"note: the patient of {found.unknown_patients} photos is unknown: a split may separate a patient's eyes"
        )
    if len(leaks) or any(len(table) for table in shared.values()):
        raise click.ClickException("photos leak, see above; data.duplicates=together keeps duplicates on one side")


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
    from fastfundus.config import DataConfig
    from fastfundus.data import PhotoCache
    from fastfundus.data.leakage import pair_positions
    from fastfundus.data.split import assign_splits, side_counts, write_split_file
    from fastfundus.errors import require
    from fastfundus.training.tasks.targets import read_targets, usable_rows

    require("sklearn", extra="train")
    if folds and holdout:
        raise click.UsageError("give --folds or --holdout, not both")
    opened = PhotoCache.open(folder)
    targets = read_targets(opened.manifest, task, labels)
    rows = usable_rows(opened.manifest, targets)
    shares = {"split": "holdout", "test_share": holdout[0], "val_share": holdout[1]} if holdout else {}
    config = DataConfig(
        folds=folds or 5,
        fold=fold,
        split_seed=seed,
        duplicates="ignore" if ignore_duplicates else "together",
        **shares,  # type: ignore[arg-type]
    )
    part = opened.manifest[rows]
    assigned = assign_splits(part, targets.strata[rows], config, pair_positions(opened, rows))
    for note in assigned.notes:
        remark(f"note: {note}")
    write_split_file(output, part, assigned.names)
    counts = ", ".join(f"{count} {side}" for side, count in side_counts(assigned.names).items())
    click.echo(
        f"{output}: {len(rows)} photos with a label ({targets.summary}) of {part['patient'].n_unique()} patients: "
        f"{counts}"
    )


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
    import cv2
    import numpy as np
    import polars as pl

    from fastfundus.config import TrainConfig
    from fastfundus.data import PhotoCache
    from fastfundus.errors import DataError, require

    require("torch", extra="train")
    # Imported late, because it imports torch.
    from fastfundus.training.augment import augmentation_sheet

    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise click.UsageError(f"--output must end in .png, .jpg or .jpeg, got {output.name}")
    opened = PhotoCache.open(folder)
    config = TrainConfig.from_toml(config_file) if config_file else TrainConfig()
    usable = opened.manifest.with_row_index("row").filter(pl.col("status") == "ok")["row"].to_numpy()
    if not len(usable):
        raise DataError("no photo has status ok", path=folder)
    rows = np.sort(np.random.default_rng(seed).permutation(usable)[:count]).astype(np.int64)
    sheet = augmentation_sheet(opened.photos, rows, opened.spec, config.augment, draws=draws, seed=seed)
    written, encoded = cv2.imencode(output.suffix, sheet[..., ::-1])
    assert written
    output.write_bytes(encoded.tobytes())
    click.echo(f"{output}: {len(rows)} photos, {draws} draws each, {sheet.shape[1]} x {sheet.shape[0]} pixels")
