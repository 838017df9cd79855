"""The ``fastfundus screen`` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastfundus.cli.trust_options import trust_options

if TYPE_CHECKING:
    from fastfundus.data.source import SourceList
    from fastfundus.screening.run import ScreeningRun


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Folder for the results.")
@click.option(
    "--resume", is_flag=True, help="Continue an interrupted run; the results equal those of an uninterrupted one."
)
@click.option("--overwrite", is_flag=True, help="Replace existing results.")
@click.option(
    "--accept-failed", is_flag=True,
    help="Finish although photos failed because of storage, memory or the engine, or folders could not be listed.",
)  # fmt: skip
@click.option(
    "--backend",
    type=click.Choice(["openvino", "onnxruntime"]),
    help="Run the bundle's graph in float32 on this runtime, instead of the verified engine.",
)
@click.option(
    "--abstain", type=float, default=0.0, metavar="WIDTH",
    help="Mark photos closer than this to a threshold as uncertain, for human review  [default: 0]",
)  # fmt: skip
@click.option(
    "--min-images",
    "--least-images",
    "least_images",
    type=int,
    default=1,
    show_default=True,
    help="Scored photos that an eye needs to be negative.",
)
@click.option(
    "--unusable", type=click.Choice(["block", "ignore"]), default="block", show_default=True,
    help="With block, an eye with an ungradable or unreadable photo is never negative; ignore disregards such photos.",
)  # fmt: skip
@click.option("--both-eyes", is_flag=True, help="Never call a patient negative without photos of both eyes.")
@click.option(
    "--decode", type=click.Choice(["cpu", "dali"]), default="cpu", show_default=True,
    help="Decoder; dali decodes on the GPU for TensorRT and AOTInductor engines.",
)  # fmt: skip
@click.option(
    "--ray", metavar="ADDRESS", help='Run on a Ray cluster: "host:6379", "auto" or "local"; needs the extra "fleet".'
)
@click.option(
    "--audit-mirror", type=click.Path(path_type=Path), metavar="FILE", help="Also write the audit log to this file."
)
@trust_options
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def screen(
    bundle: Path,
    sources: tuple[Path, ...],
    output: Path,
    resume: bool,
    overwrite: bool,
    accept_failed: bool,
    backend: str | None,
    abstain: float,
    least_images: int,
    unusable: str,
    both_eyes: bool,
    decode: str,
    ray: str | None,
    audit_mirror: Path | None,
    allow_native_code: bool,
    require_signature: Path | None,
    as_json: bool,
) -> None:
    r"""Screen photos with BUNDLE; write exactly one row per input, and a report.

    SOURCES are folders, photos, lists or tables that name photos. An input that cannot be screened gets a row with the
    reason. After an interruption or a crash, repeat the command with --resume. Likewise if storage, memory or the
    engine failed: such photos get no verdict, and the run is not finished before they are screened or accepted as
    failed. For research use only.

    \b
    Example:
      fastfundus screen bundle/ photos/ --output results/
      fastfundus screen bundle/ photos/ --output results/ --resume
      fastfundus screen bundle/ photos/ --output results/ --abstain 0.05 --min-images 2 --both-eyes
    """
    from fastfundus.cli.console import quiet_decoders, remark, remarks, screening_progress
    from fastfundus.engines.bundle import Bundle
    from fastfundus.screening.policy import ScreenPolicy
    from fastfundus.workflow.screen import screen_sources

    quiet_decoders()
    opened = Bundle.open(bundle, allow_native_code=allow_native_code, require_signature=require_signature)
    policy = ScreenPolicy(abstain=abstain, least_images=least_images, unusable=unusable, both_eyes=both_eyes)  # type: ignore[arg-type]
    with screening_progress() as progress:
        try:
            run, listing = screen_sources(
                sources,
                opened,
                output,
                policy=policy,
                resume=resume,
                overwrite=overwrite,
                accept_failed=accept_failed,
                backend=backend,
                decode=decode,  # type: ignore[arg-type]
                ray=ray,
                audit_mirror=audit_mirror,
                on_listed=lambda listing: remarks(listing.notes),
                on_progress=progress,
            )
        except KeyboardInterrupt:
            raise click.ClickException(
                f"interrupted; {output} has the results so far; repeat the command with --resume to continue"
            ) from None
    remarks(run.notes)
    _summarise(run, listing, as_json)
    failed = int((run.results["status"] == "failed").sum())
    if failed or listing.lost:
        remark(f"accepted: {failed} photos failed and have no decision, {len(listing.lost)} could not be listed")


def _summarise(run: ScreeningRun, listing: SourceList, as_json: bool) -> None:
    statuses = dict(run.results["status"].value_counts(sort=True).iter_rows())
    decisions = {key: count for key, count in run.results["decision"].value_counts(sort=True).iter_rows() if key}
    timing = run.timing
    if as_json:
        summary = {"inputs": len(run.results), "status": statuses, "decision": decisions, "lost": listing.lost}
        speed = {"images_per_s": timing.images_per_s, "cores_busy": timing.cores_busy, "busy": timing.busy}
        click.echo(
            json.dumps(
                {
                    **summary,
                    **speed,
                    "resumed": run.resumed,
                    "notes": run.notes,
                    "report": str(run.report),
                    "audit_head": run.head,
                }
            )
        )
        return
    click.echo(f"{len(run.results)} inputs: " + ", ".join(f"{count} {name}" for name, count in statuses.items()))
    click.echo(", ".join(f"{count} {name}" for name, count in decisions.items()) or "no decisions")
    if timing.photos:
        click.echo(
            f"{timing.images_per_s:.1f} photos/s, {timing.cores_busy:.1f} of {timing.workers} cores busy; "
            f"bottleneck: {timing.limit}"
        )
    elif run.resumed:
        click.echo("the run was already complete; nothing to do")
    if run.head:
        click.echo(f"head of the audit log: {run.head}")
    click.echo(f"report: {run.report}")
