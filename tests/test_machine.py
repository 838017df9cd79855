"""What a container may use of a machine, from files as the kernel writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastfundus import machine


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


V1_PATH = "3:cpuset:/\n2:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n"
CPU_CASES = {
    "v2-in-a-container": ({"proc/self/cgroup": "0::/\n", "cg/cpu.max": "150000 100000\n"}, 1.5),
    "v2-parent-is-tighter": (
        {"proc/self/cgroup": "0::/a/b\n", "cg/a/b/cpu.max": "400000 100000\n", "cg/a/cpu.max": "200000 100000\n"},
        2.0,
    ),
    "v2-no-limit": ({"proc/self/cgroup": "0::/\n", "cg/cpu.max": "max 100000\n"}, None),
    "v1": (
        {
            "proc/self/cgroup": V1_PATH,
            "cg/cpu,cpuacct/docker/ab/cpu.cfs_quota_us": "50000\n",
            "cg/cpu,cpuacct/docker/ab/cpu.cfs_period_us": "100000\n",
        },
        0.5,
    ),
    "v1-mounted-by-one-name": (
        {
            "proc/self/cgroup": V1_PATH,
            "cg/cpu/cpu.cfs_quota_us": "300000\n",
            "cg/cpu/cpu.cfs_period_us": "100000\n",
        },
        3.0,
    ),
    "v1-no-limit": (
        {"proc/self/cgroup": V1_PATH, "cg/cpu/cpu.cfs_quota_us": "-1\n", "cg/cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "not-linux": ({}, None),
}


@pytest.mark.parametrize(("files", "quota"), CPU_CASES.values(), ids=CPU_CASES)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    write(tmp_path, files)
    assert machine.cpu_quota(tmp_path / "proc", tmp_path / "cg") == quota


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (2.0, 2), (1.6, 2), (0.3, 1), (64.0, 8)])
def test_usable_cores(monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: int) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert machine.usable_cores.__wrapped__() == cores


def test_available_memory_respects_the_container_limit(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cg"
    assert machine.available_memory(proc, groups) is None
    write(proc, {"meminfo": "MemTotal: 9 kB\nMemAvailable:   4096 kB\n", "self/cgroup": "0::/\n"})
    assert machine.available_memory(proc, groups) == 4096 << 10
    write(groups, {"memory.max": "3000000\n", "memory.current": "2500000\n", "memory.stat": "inactive_file 100000\n"})
    assert machine.available_memory(proc, groups) == 600_000
    write(groups, {"memory.max": "max\n"})
    assert machine.available_memory(proc, groups) == 4096 << 10


PROCESSORS = {
    "haswell": ("flags : fpu avx avx2 fma", False),
    "skylake-x": ("flags : avx2 avx512f avx512bw avx512vl", False),
    "zen4": ("flags : avx2 avx512f avx512_bf16 avx512_vnni", True),
    "sapphire-rapids": ("flags : avx2 avx512f avx512_bf16 amx_bf16 amx_tile", True),
    "graviton3": ("Features : fp asimd bf16 svebf16", True),
}


@pytest.mark.parametrize(("line", "native"), PROCESSORS.values(), ids=PROCESSORS)
def test_bfloat16_by_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, native: bool) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    write(tmp_path, {"cpuinfo": f"processor : 0\nvmx flags : bf16\n{line}\n"})
    assert machine.cpu_computes_bfloat16(tmp_path) is native
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core_bf16")
    assert machine.cpu_computes_bfloat16(tmp_path) is native
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert machine.cpu_computes_bfloat16(tmp_path) is False
