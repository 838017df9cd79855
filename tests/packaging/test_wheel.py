"""The wheel, built from the sdist as for a release, contains every file and works without torch."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "fastfundus"
    # A clean export: ignored files must not reach the wheel, and the build must not litter the checkout.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(output), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = output.glob("*.whl")
    return built


def test_every_file_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastfundus"}
    expected = set()
    for path in (ROOT / "fastfundus").rglob("*"):
        if path.suffix in (".py", ".html") or path.name == "py.typed":
            expected.add(path.relative_to(ROOT).as_posix())
    for folder in ("kernels", "engines", "csrc"):
        for path in (ROOT / folder).iterdir():
            if path.is_file():
                expected.add(f"fastfundus/{path.relative_to(ROOT).as_posix()}")
    assert expected <= names, sorted(expected - names)


def test_the_wheel_runs_by_itself(wheel: Path, tmp_path: Path) -> None:
    """Unpack the wheel elsewhere and block imports of torch: the screening runtime must work without it."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import fastfundus, fastfundus.screening.run, fastfundus.synthetic as s\n"
        f"assert fastfundus.__file__.startswith({str(site)!r})\n"
        "assert s.draw_photo(1, long_side=128).image.shape == (128, 128, 3)\n"
        "from fastfundus.cli import main; main(['doctor'], standalone_mode=False)"
    )
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "screening" in done.stdout
