"""Tables of harness results for preparation, sampling and loading."""

from __future__ import annotations

from typing import Any

from bench.harness.comparison import ratio
from bench.tables.labels import label

__all__ = ["by_us", "cases_of", "loader_table", "prepare_table", "provenance", "ratio_text", "sample_table"]


def provenance(result: dict[str, Any], command: str) -> str:
    """Return date, machine, commit and versions of a result, and the command that repeats it."""
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"Measured {result['date']} on {machine['cpu']}, {machine['cores']} cores, commit {result['commit']}; "
        f"{versions}. Reproduce with `{command}`."
    )


def cases_of(result: dict[str, Any], start: str) -> list[dict[str, Any]]:
    """Return the cases whose names begin with `start`."""
    return [found for found in result["cases"] if found["case"]["name"].startswith(start)]


def ratio_text(found: dict[str, Any], slow: str, fast: str, digits: int = 1) -> str:
    """Return the speed-up of `fast` over `slow`: the median, and the minimum and maximum over all rounds."""
    times = ratio(found, slow, fast)
    middle, least, most = (f"{times[key]:.{digits}f}" for key in ("median", "least", "most"))
    return f"{middle}x ({least} to {most})"


def by_us(name: str) -> bool:
    """Return whether a variant is ours rather than a peer's."""
    return name.startswith("FastFundus")


def reference_of(found: dict[str, Any]) -> str:
    """Return the name of the variant that the others are compared with."""
    return next(name for name, row in found["variants"].items() if row["reference"])


def _side_by_side(cases: list[dict[str, Any]], head: str, titles: list[str]) -> list[str]:
    """Return one row per variant, with photos/s and the ratio to the reference for each case."""
    lines = [
        f"| {head} | " + " | ".join(f"{title} | speed-up" for title in titles) + " |",
        "|---" * (2 * len(cases) + 1) + "|",
    ]
    for name, row in cases[0]["variants"].items():
        cells = []
        for found in cases:
            speed_up = "1x" if row["reference"] else ratio_text(found, reference_of(found), name)
            cells += [f"{found['variants'][name]['photos_per_s']:.0f}", speed_up]
        mark = "**" if by_us(name) else ""
        settings = f": {label(row['settings'])}" if row["settings"] else ""
        lines.append(f"| {mark}{label(name)}{mark}{settings} | {' | '.join(cells)} |")
    return lines


def prepare_table(result: dict[str, Any]) -> str:
    """Return the table of preparing camera JPEGs, as Markdown."""
    cases = cases_of(result, "prepare")
    lines = _side_by_side(cases, "photos/s", [found["case"]["name"].removeprefix("prepare, ") for found in cases])
    ours = [found["variants"]["FastFundus"] for found in cases]
    shares = " and ".join(f"{row['share_of_limit']:.0%}" for row in ours)
    return "\n".join(
        [
            *lines,
            "",
            f"{cases[0]['case']['what']}; variants interleaved in one run, medians of {cases[0]['rounds']} rounds. "
            "Speed-ups are relative to the baseline in the same round, with minimum and maximum. FastFundus reaches "
            f"{shares} of the speed of its JPEG decoder alone; two cores give {ours[0]['ms'] / ours[1]['ms']:.2f} "
            "times the throughput of one. In the worst photo, its crop differs from exact area averages of a full "
            f"decode by {ours[0]['distance']:.2f} grey levels on average. Each peer runs in its own process, as its "
            "users run it, except the one with tuned malloc: FastFundus makes malloc keep freed memory, which also "
            "speeds up peers in the same process. " + provenance(result, "make bench SUITES=prepare"),
        ]
    )


def sample_table(result: dict[str, Any]) -> str:
    """Return the table of sampling on one core, as Markdown."""
    lines = [
        f"| one core | photos/s | time relative to FastFundus | share of {label('copying as many bytes')} | GB/s |",
        "|---|---|---|---|---|",
    ]
    cases = result["cases"]
    for found in cases:
        for name, row in found["variants"].items():
            times = "1x" if row["reference"] else ratio_text(found, name, reference_of(found))
            mark = "**" if by_us(name) else ""
            lines.append(
                f"| {label(found['case']['name'])}: {mark}{label(name)}{mark} | {row['photos_per_s']:.0f} | "
                f"{times} | {row['share_of_limit']:.0%} | {row['gb_per_s']:.2f} |"
            )
    # A peer may appear in several cases, with the same or other settings, and cases may move the same bytes.
    settings: dict[str, list[str]] = {}
    bytes_how: dict[str, list[str]] = {}
    for found in cases:
        bytes_how.setdefault(label(found["case"]["bytes_how"]), []).append(label(found["case"]["name"]))
        for name, row in found["variants"].items():
            if row["settings"] and row["settings"] not in settings.setdefault(name, []):
                settings[name].append(row["settings"])
    peers = ". ".join(f"{label(name)}: {'; '.join(map(label, given))}" for name, given in settings.items() if given)
    arithmetic = "; ".join(f"{how} ({'; '.join(names)})" for how, names in bytes_how.items())
    return "\n".join(
        [
            *lines,
            "",
            f"Variants interleaved in one run, medians of {cases[0]['rounds']} rounds. In every round, the results of "
            "peers were compared with those of FastFundus, and these with the float64 reference. Bytes counted: "
            f"{arithmetic}. Settings: {peers}. " + provenance(result, "make bench SUITES=sample"),
        ]
    )


def loader_table(result: dict[str, Any]) -> str:
    """Return the table of training loaders, as Markdown."""
    cases = cases_of(result, "loader")
    titles = [found["case"]["name"].removeprefix("loader, ") for found in cases]
    lines = _side_by_side(cases, "photos/s, all cores", titles)
    limits = " | ".join(f"{1000 * found['case']['units'] / found['case']['limit']['ms']:.0f} | " for found in cases)
    lines.append(f"| JPEG decoding alone: upper bound for loaders that read files | {limits} |")
    return "\n".join(
        [
            *lines,
            "",
            "Augmented, normalised float32 batches of 16, over one epoch of 256 photos from JPEG files twice as wide "
            f"as the input. Variants interleaved in one run, medians of {cases[0]['rounds']} rounds; speed-ups are "
            "relative to torchvision in the same round. Each loader draws its own augmentations; the means and "
            "standard deviations of the normalised channels agree within "
            f"{max(row['distance'] for found in cases for row in found['variants'].values()):.2f}. "
            + provenance(result, "make bench SUITES=loader"),
        ]
    )
