"""Instructions, cores and memory that this process may use; containers may allow less than the host has."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory", "cpu_computes_bfloat16", "cpu_features", "cpu_quota", "usable_cores"]

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
_BF16_LIMITS = ("DEFAULT", "ALL", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10_")
"""Prefixes of ONEDNN_MAX_CPU_ISA values that leave bfloat16 enabled."""
_UNLIMITED = 1 << 60
"""Version 1 of cgroups spells "no limit" as a number of bytes above this one."""


@functools.cache
def usable_cores() -> int:
    """Return the number of cores that this process may keep busy, at least 1.

    This is the smallest of the processors it may be scheduled on (affinity, cpusets) and the CPU quota of its control
    group, rounded to the nearest whole core: more threads than the quota allows are throttled, all at once.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return affinity if quota is None else max(1, min(affinity, round(quota)))


def cpu_features(proc: Path = _PROC) -> frozenset[str]:
    """Return the processor's features as Linux names them, such as "avx2" or "amx_bf16"; empty where it does not say.

    Args:
        proc: where the proc file system is mounted.
    """
    try:
        lines = (proc / "cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    # "flags" on x86, "Features" on Arm.
    named = (line.split(":", 1)[1] for line in lines if line.partition(":")[0].strip() in ("flags", "Features"))
    return frozenset(next(named, "").split())


def cpu_computes_bfloat16(proc: Path = _PROC) -> bool:
    """Return whether the processor multiplies bfloat16 natively: AVX-512 BF16, AMX, or Arm's BF16.

    Others emulate it, several times slower than float32. A limit that ONEDNN_MAX_CPU_ISA sets is respected: torch's
    convolutions run in oneDNN.

    Args:
        proc: where the proc file system is mounted.
    """
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper().startswith(_BF16_LIMITS)
    return allowed and bool(cpu_features(proc) & _BF16_FEATURES)


def cpu_quota(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> float | None:
    """Return the CPU quota in cores, the smallest of this process's control group and its ancestors; None if unlimited.

    Args:
        proc: where the proc file system is mounted.
        cgroups: where control groups are mounted.
    """
    quotas = []
    for folder in _groups(proc, cgroups, "cpu"):
        v2 = _words(folder / "cpu.max")
        quota, period = v2 or (*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us")) or ("", "")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int | None:
    """Return the bytes of memory that can still be allocated without swapping; None where the system does not say.

    Args:
        proc: where the proc file system is mounted.
        cgroups: where control groups are mounted.
    """
    free = []
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return None
    free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder in _groups(proc, cgroups, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            values = [*_words(folder / limit), *_words(folder / used)]
            if len(values) == 2 and all(value.isdigit() for value in values) and int(values[0]) < _UNLIMITED:
                # Cached file pages count as used here although the kernel would drop them.
                free.append(int(values[0]) - int(values[1]) + _reclaimable(folder))
    return max(0, min(free)) if free else None


def _groups(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of its ancestors, for versions 1 and 2."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        root = cgroups / names if names else cgroups
        if names and not root.is_dir():
            root = cgroups / controller
        own = root / path.lstrip("/")
        # A container may see its own group at the root of the mount, under whatever path the host gave it.
        yield from (folder for folder in (own, *own.parents) if folder == root or root in folder.parents)


def _words(file: Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text().split())
    except OSError:
        return ()


def _reclaimable(folder: Path) -> int:
    words = _words(folder / "memory.stat")
    values = dict(zip(words[::2], words[1::2], strict=False))
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))
