"""Draw heatmaps of the image regions that a run relies on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from fastfundus.data.cache import PhotoCache
from fastfundus.data.source import list_photos
from fastfundus.errors import ConfigError, DataError, close_matches
from fastfundus.evaluation.explain import Explainer
from fastfundus.evaluation.heatmap_pages import explain_cache, explain_photos
from fastfundus.training.run import Run
from fastfundus.training.tasks.targets import finding_outputs
from fastfundus.workflow.inputs import open_any_run

__all__ = ["explain"]


def explain(
    run: str | Path | Run,
    sources: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    label: str | None = None,
    method: Literal["gradcam", "occlusion"] = "gradcam",
    max_photos: int = 12,
    on_photo: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Draw heatmaps of photos, or of the test patients of a cache by outcome.

    Args:
        run: the run, or its folder.
        sources: photos, folders or CSV files, one or several; or one cache.
        output: folder for the heatmaps and explain.html.
        label: output to explain; None explains the first finding.
        method: "occlusion" works with every network but is over 100 times slower.
        max_photos: maximum number of photos per outcome of a cache.
        on_photo: called with the number of photos explained and their total.
        say: receives notes about inputs that could not be listed.

    Returns:
        The page.

    Raises:
        ConfigError: the run outputs maps, or has no output `label`.
        DataError: a source does not exist or contains nothing.
    """
    opened = open_any_run(run)
    if opened.config.task == "vessels":
        raise ConfigError(
            "runs that map vessels need no heatmap, because their output is a map; screen photos with their bundle"
        )
    name = label or _first_finding(opened)
    if name not in opened.labels:
        raise ConfigError(f"--label {name!r} is not an output of the run{close_matches(name, opened.labels)}")
    paths, folder = [Path(path) for path in ([sources] if isinstance(sources, str | Path) else sources)], Path(output)
    explainer = Explainer(opened, method)
    if len(paths) == 1 and (paths[0] / "manifest.parquet").is_file():
        return explain_cache(opened, explainer, PhotoCache.open(paths[0]), folder, name, max_photos)
    listing = list_photos(paths, adapter="folder")
    if not listing.photos:
        raise DataError("; ".join(["no photo could be listed", *listing.lost]))
    for note in [*listing.notes, *listing.lost]:
        say(note)
    return explain_photos(opened, explainer, listing.photos, folder, name, on_photo)


def _first_finding(run: Run) -> str:
    found = finding_outputs(run.labels, run.config.data.findings)
    return next(name for name in run.labels if name in found or not found)
