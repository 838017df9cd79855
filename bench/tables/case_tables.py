"""Tables of harness results for preparation, sampling and loading."""

from __future__ import annotations

from typing import Any

from bench.harness.comparison import ratio

__all__ = ["by_us", "cases_of", "loader_table", "prepare_table", "ratio_text", "sample_table", "provenance"]


def provenance(result: dict[str, Any], command: str) -> str:
    """Return date, machine, commit and versions of a result, and the command that repeats it."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['date']}, {machine['cpu']}, {machine['cores']} cores, commit {result['commit']}; {versions}. "
        f"`{command}` repeats it."
    )


def cases_of(result: dict[str, Any], start: str) -> list[dict[str, Any]]:
    """Return the cases whose names begin with `start`."""
    return [found for found in result["cases"] if found["case"]["name"].startswith(start)]


def ratio_text(found: dict[str, Any], slow: str, fast: str, digits: int = 1) -> str:
    """Return how many times as fast `fast` is as `slow`, with the minimum and maximum over all rounds."""
    times = ratio(found, slow, fast)
    middle, least, most = (f"{times[key]:.{digits}f}" for key in ("median", "least", "most"))
    return f"{middle} x ({least} to {most})"


def by_us(name: str) -> bool:
    """Return whether a variant is ours rather than a peer's."""
    return name.startswith("FastFundus")


def reference_of(found: dict[str, Any]) -> str:
    """Return the name of the variant that the others are compared with."""
    return next(name for name, row in found["variants"].items() if row["reference"])


def _side_by_side(cases: list[dict[str, Any]], head: str, titles: list[str]) -> list[str]:
    """Return one row per variant, with photos/s and the ratio to the reference for each case."""
    lines = [f"| {head} | " + " | | ".join(titles) + " | |", "|---" * (2 * len(cases) + 1) + "|"]
    for name, row in cases[0]["variants"].items():
        cells = []
        for found in cases:
            summary = "" if row["reference"] else ratio_text(found, reference_of(found), name)
            cells += [f"{found['variants'][name]['photos_per_s']:.0f}", summary]
        mark = "**" if by_us(name) else ""
        settings = f": {row['settings']}" if row["settings"] else ""
        lines.append(f"| {mark}{name}{mark}{settings} | {' | '.join(cells)} |")
    return lines


def prepare_table(result: dict[str, Any]) -> str:
    """Return the table of preparing camera JPEGs, as Markdown."""
    cases = cases_of(result, "prepare")
    lines = _side_by_side(
        cases,
        "photos/s",
        [found["case"]["name"].removeprefix("prepare, ").replace("1", "one").replace("2", "two") for found in cases],
    )
    ours = [found["variants"]["FastFundus"] for found in cases]
    shares = " and ".join(f"{row['share_of_limit']:.0%}" for row in ours)
    return "\n".join(
        [
            *lines,
            "",
            f"{cases[0]['case']['what']}; in turns in one run, medians of {cases[0]['rounds']} rounds, ratios to the "
            f"peers' habit of the same round. FastFundus reaches {shares} of its decoder alone; two threads do "
            f"{ours[0]['ms'] / ours[1]['ms']:.2f} times what one does. Its crops differ from exact areas of a full "
            f"decode by {ours[0]['distance']:.2f} grey levels on average (worst photo). Each peer has a process of its "
            "own, as its users run it; in ours the C library keeps freed memory, which helps the peers, too. "
            + provenance(result, "make bench SUITES=prepare"),
        ]
    )


def sample_table(result: dict[str, Any]) -> str:
    """Return the table of sampling on one core, as Markdown."""
    lines = ["| one core | photos/s | | of copying as many bytes | GB/s |", "|---|---|---|---|---|"]
    cases = result["cases"]
    for found in cases:
        for name, row in found["variants"].items():
            summary = "" if row["reference"] else ratio_text(found, name, reference_of(found)) + " the time"
            mark = "**" if by_us(name) else ""
            lines.append(
                f"| {found['case']['name']}: {mark}{name}{mark} | {row['photos_per_s']:.0f} | {summary} | "
                f"{row['share_of_limit']:.0%} | {row['gb_per_s']:.2f} |"
            )
    settings = ((name, row["settings"]) for found in cases for name, row in found["variants"].items())
    # A peer may appear in several cases with the same settings.
    peers = "; ".join(dict.fromkeys(f"{name}: {what}" for name, what in settings if what))
    arithmetic = "; ".join(f"{found['case']['name']}: {found['case']['bytes_how']}" for found in cases)
    return "\n".join(
        [
            *lines,
            "",
            f"In turns in one run, medians of {cases[0]['rounds']} rounds; each result was compared with ours in every "
            f"round, and ours with the float64 reference. Bytes: {arithmetic}. Settings: {peers}. "
            + provenance(result, "make bench SUITES=sample"),
        ]
    )


def loader_table(result: dict[str, Any]) -> str:
    """Return the table of training loaders, as Markdown."""
    cases = cases_of(result, "loader")
    titles = [found["case"]["name"].removeprefix("loader, ") for found in cases]
    lines = _side_by_side(cases, "photos/s, all cores", titles)
    limits = " | ".join(f"{1000 * found['case']['units'] / found['case']['limit']['ms']:.0f} | " for found in cases)
    lines.append(f"| decoding the files alone: the limit of those who read them | {limits} |")
    return "\n".join(
        [
            *lines,
            "",
            "Augmented, normalised float32 batches of 16, an epoch of 256 photos from JPEG files twice as wide as the "
            f"input; in turns in one run, medians of {cases[0]['rounds']} rounds, ratios to torchvision's of the same "
            "round. Every loader draws its own changes; mean and spread of the channels agree within "
            f"{max(row['distance'] for found in cases for row in found['variants'].values()):.2f}. "
            + provenance(result, "make bench SUITES=loader"),
        ]
    )
