"""What an audit log proves, and names that are no trouble."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from fastfundus.csv_cells import csv_text
from fastfundus.errors import ConfigError, DataError
from fastfundus.records import bytes_of_name, utf8_name
from fastfundus.screening import output as output_module
from fastfundus.screening import pipeline
from fastfundus.screening.audit import Verification, verify
from fastfundus.screening.audit_log import START, AuditLog, chain_link
from tests.cli.test_cli import run
from tests.conftest import Trained, copy_photos
from tests.screening.test_faults import screen


@pytest.fixture
def photos(photo_folder: Path, tmp_path: Path) -> Path:
    return copy_photos(photo_folder, tmp_path / "photos", 6)


def chain_again(output: Path, lines: list[dict[str, object]]) -> None:
    """Write a log with a valid chain, as anyone can."""
    head, texts = START, []
    for line in lines:
        facts = {key: value for key, value in line.items() if key != "chain"}
        head = chain_link(head, facts)
        texts.append(json.dumps({**facts, "chain": head}, ensure_ascii=False))
    (output / "audit.jsonl").write_text("\n".join(texts) + "\n")


def test_the_last_photo_dropped_everywhere_is_missed(trained: Trained, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    head = screen(trained, photos, output).head
    assert verify(output, head=head).faults == []
    lines = [json.loads(line) for line in (output / "audit.jsonl").read_text().splitlines()]
    results = pl.read_parquet(output / "results.parquet").head(5)
    results.write_parquet(output / "results.parquet")
    (output / "results.csv").write_text(csv_text(results))
    chain_again(output, [line for line in lines if line.get("path") != lines[-2]["path"]])
    faults = verify(output).faults
    assert "audit.jsonl: has 5 photos, but 6 inputs at the start" in faults
    assert "audit.jsonl: has 5 photos, but 6 rows at the end" in faults
    # If these are changed, too, the tables of patients still match; only the head does not.
    for line in lines:
        line.update({"inputs": 5} if line["event"] == "start" else {"rows": 5} if line["event"] == "end" else {})
    chain_again(output, [line for line in lines if line.get("path") != lines[-2]["path"]])
    assert any(f"not {head}" in fault for fault in verify(output, head=head).faults)


@pytest.mark.parametrize(
    ("name", "said"),
    [("report.html", "report.html is missing or was modified"), ("run.json", "does not say that the run has finished")],
)
def test_report_and_state_are_covered(trained: Trained, photos: Path, tmp_path: Path, name: str, said: str) -> None:
    screen(trained, photos, tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    assert any(said in fault for fault in verify(tmp_path / "out").faults)
    (tmp_path / "out" / name).unlink()
    assert any(said in fault for fault in verify(tmp_path / "out").faults)


def test_added_masks_are_found(trained: Trained, photos: Path, tmp_path: Path) -> None:
    screen(trained, photos, tmp_path / "out")
    (tmp_path / "out" / "masks").mkdir()
    (tmp_path / "out" / "masks" / "a.png").touch()
    assert verify(tmp_path / "out").faults == ["masks: some are missing, were added or modified"]


def test_the_head_is_printed_and_checked(trained: Trained, photos: Path, tmp_path: Path) -> None:
    result = run("screen", trained.bundle.path, photos, "--output", tmp_path / "out")
    head = verify(tmp_path / "out").head
    assert f"head of the audit log: {head}" in result.output
    assert run("audit", "verify", tmp_path / "out", "--head", head).exit_code == 0
    wrong = run("audit", "verify", tmp_path / "out", "--head", "f" * 64)
    assert (wrong.exit_code, f"its head is {head}, not ffff" in wrong.output) == (1, True)


def test_a_mirror_is_a_copy_and_catches_up(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, mirror = tmp_path / "out" / "audit.jsonl", tmp_path / "elsewhere" / "mirror.jsonl"
    mirror.parent.mkdir()
    screen(trained, photos, tmp_path / "out", audit_mirror=mirror)
    assert mirror.read_bytes() == log.read_bytes()
    # A crash between the two files.
    mirror.write_bytes(mirror.read_bytes()[:-500])
    AuditLog(log, mirror).close()
    assert mirror.read_bytes() == log.read_bytes()
    mirror.write_bytes(b"x" + mirror.read_bytes()[1:])
    with pytest.raises(DataError, match="is not a copy of"):
        AuditLog(log, mirror)
    with pytest.raises(DataError, match="is no second place"):
        AuditLog(log, tmp_path / "out" / ".." / "out" / "audit.jsonl")
    with pytest.raises(DataError, match=r"cannot be written to \(Is a directory\)"):
        AuditLog(log, tmp_path)


@pytest.mark.parametrize(
    "line", ["[]", "{", '{"event": 1}', '{"event": "photo", "chain": "x"}', "\udce9", "[" * 100_000]
)
def test_other_lines_end_in_words(trained: Trained, photos: Path, tmp_path: Path, line: str) -> None:
    screen(trained, photos, tmp_path / "out")
    log = tmp_path / "out" / "audit.jsonl"
    log.write_bytes(line.encode("utf-8", "surrogateescape") + b"\n" + log.read_bytes())
    with pytest.raises(DataError, match=r"line 1: .*the log was modified"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("change", [{"policy": 3}, {"policy": {}, "inputs": None}, {"thresholds": None}])
def test_wrong_values_end_in_words(trained: Trained, photos: Path, tmp_path: Path, change: dict[str, object]) -> None:
    screen(trained, photos, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "audit.jsonl").read_text().splitlines()]
    chain_again(tmp_path / "out", [lines[0] | change, *lines[1:]])
    try:
        assert verify(tmp_path / "out").faults
    except DataError as error:
        assert "the log was modified" in str(error)  # noqa: PT017


ODD = [
    b"caf\xe9.jpg",
    rb"caf\xe9.jpg",
    b"a\rb.jpg",
    b"a\nb.jpg",
    b"=cmd|x.jpg",
    b"-1.jpg",
    b"\xe2\x80\xa8.jpg",
    b"\x1b[2J.jpg",
]


def test_odd_names_are_verified_and_told_apart(trained: Trained, photos: Path, tmp_path: Path) -> None:
    good = next(photos.iterdir()).read_bytes()
    for number, name in enumerate(ODD):
        with open(os.path.join(os.fsencode(photos), name), "wb") as file:
            file.write(good + bytes(number))
    results = screen(trained, photos, tmp_path / "out").results
    assert (len(results), results["path"].n_unique(), results["patient"].n_unique() > len(ODD)) == (14, 14, True)
    found = verify(tmp_path / "out", files=True)
    assert (found.faults, found.files, found.absent) == ([], 14, 0)
    cells = (tmp_path / "out" / "results.csv").read_text()
    assert "'=cmd|x.jpg" in cells
    assert "\n=cmd" not in cells
    assert "'-1.jpg" in cells


def test_names_become_bytes_again() -> None:
    for name in [*ODD, b"\\\xe9", b"\\\\xe9", b"\\\\\xe9\\x\\xzz", "é\\x".encode(), b"a\\b"]:
        assert bytes_of_name(utf8_name(os.fsdecode(name))) == name


def test_a_file_that_is_no_mirror_is_not_touched(trained: Trained, photos: Path, tmp_path: Path) -> None:
    precious = tmp_path / "key.pem"
    precious.write_bytes(b"no line end, and nothing to lose")
    with pytest.raises(DataError, match="is not a copy of"):
        screen(trained, photos, tmp_path / "out", audit_mirror=precious)
    assert precious.read_bytes() == b"no line end, and nothing to lose"
    mirror = tmp_path / "mirror.jsonl"
    before = screen(trained, photos, tmp_path / "out", audit_mirror=mirror).results
    with pytest.raises(DataError, match="is not a copy of"):
        screen(trained, photos, tmp_path / "out", audit_mirror=mirror, overwrite=True)
    assert pl.read_parquet(tmp_path / "out" / "results.parquet").equals(before)
    # After a full disk the mirror may be ahead of the log.
    mirror.write_bytes(mirror.read_bytes() + b"{}\n")
    AuditLog(tmp_path / "out" / "audit.jsonl", mirror).close()
    assert mirror.read_bytes() == (tmp_path / "out" / "audit.jsonl").read_bytes()


@pytest.mark.parametrize(
    "name", ["results.csv", "report.html", ".lock", "progress/m.jsonl", "masks/m.jsonl", "run.json", "audit.jsonl"]
)
def test_a_mirror_among_the_results_is_refused(trained: Trained, photos: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="is no second place for the audit log"):
        screen(trained, photos, tmp_path / "out", audit_mirror=tmp_path / "out" / name)
    assert not (tmp_path / "out").exists()


def test_a_mirror_is_no_link_to_the_log_and_its_folder_exists(trained: Trained, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="its folder does not exist; is the storage mounted"):
        screen(trained, photos, tmp_path / "out", audit_mirror=tmp_path / "worm" / "m.jsonl")
    assert not (tmp_path / "worm").exists()
    screen(trained, photos, tmp_path / "out")
    (tmp_path / "m.jsonl").hardlink_to(tmp_path / "out" / "audit.jsonl")
    with pytest.raises(DataError, match="is no second place"):
        screen(trained, photos, tmp_path / "out", audit_mirror=tmp_path / "m.jsonl", resume=True)


def test_a_mirror_in_the_bundle_or_the_log_itself_is_refused(trained: Trained, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is in the bundle, which must not change"):
        screen(trained, photos, tmp_path / "out", audit_mirror=trained.bundle.path / "m.jsonl")
    screen(trained, photos, tmp_path / "out")
    log = tmp_path / "out" / "audit.jsonl"
    (tmp_path / "link").symlink_to(log)
    (tmp_path / "hard").hardlink_to(log)
    for mirror in (log, tmp_path / "link", tmp_path / "hard"):
        assert verify(tmp_path / "out", mirror=mirror).faults == [
            f"{mirror}: is audit.jsonl itself, and proves nothing"
        ]
    result = run("audit", "verify", tmp_path / "out", "--audit-mirror", tmp_path)
    assert f"{tmp_path}: is not a regular file" in result.output


def test_a_mirror_is_never_forgotten(trained: Trained, photos: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "out", tmp_path / "out" / "audit.jsonl"
    mirror, later = tmp_path / "m.jsonl", tmp_path / "later.jsonl"
    head = screen(trained, photos, output, audit_mirror=mirror).head
    with pytest.raises(ConfigError, match=r"its audit log is mirrored to .*m.jsonl; add --audit-mirror"):
        screen(trained, photos, output, resume=True)
    mirror.write_bytes(mirror.read_bytes()[:-700])
    assert verify(output, mirror=mirror).faults == [
        f"{mirror}: is not a copy of audit.jsonl ({mirror.stat().st_size} and {log.stat().st_size} bytes)"
    ]
    assert screen(trained, photos, output, resume=True, audit_mirror=mirror).head == head
    assert verify(output, mirror=mirror, head=head).faults == []
    # A finished run gets a mirror later.
    screen(trained, photos, output, resume=True, audit_mirror=later)
    assert later.read_bytes() == log.read_bytes()
    result = run(
        "audit", "verify", output, "--audit-mirror", photos / sorted(path.name for path in photos.iterdir())[0]
    )
    assert (result.exit_code, "is not a copy of audit.jsonl" in result.output) == (1, True)


@pytest.mark.parametrize(
    "change",
    [lambda state: {"identity": {}, "finished": "x"}, lambda state: state | {"identity": {}},
     lambda state: state | {"finished": "2001-01-01T00:00:00+00:00"}, lambda state: state | {"finished": None},
     lambda state: state["identity"].pop("bundle") and state, lambda state: [], lambda state: state | {"finished": 3}],
)  # fmt: skip
def test_a_changed_state_of_the_run_is_found(
    trained: Trained, photos: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    screen(trained, photos, tmp_path / "out")
    file = tmp_path / "out" / "run.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert [fault.split(":")[0] for fault in verify(tmp_path / "out").faults] == ["run.json"]


def rechained(log: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Rewrite a log with a new chain, as whoever can write to it could."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    change(lines)
    chain_again(log.parent, lines)


def objections(output: Path) -> list[str]:
    """Return what verification objects to, in a report or by an error."""
    try:
        return verify(output, files=True).faults
    except DataError as error:
        return [str(error)]


@pytest.mark.parametrize(
    "change",
    [lambda lines: lines[-1].pop("masks_sha256"), lambda lines: lines[0].pop("root"),
     lambda lines: lines[0].update(root=5), lambda lines: lines[0].update(policy={"x": 1}),
     lambda lines: lines[3].update(quality="good"), lambda lines: lines[-1].update(time=5)],
)  # fmt: skip
def test_logs_with_wrong_values_are_no_crash(
    trained: Trained, photos: Path, tmp_path: Path, change: Callable[[list[dict[str, Any]]], None]
) -> None:
    screen(trained, photos, tmp_path / "out")
    rechained(tmp_path / "out" / "audit.jsonl", change)
    assert objections(tmp_path / "out")


def test_what_follows_the_end_is_found(trained: Trained, photos: Path, tmp_path: Path) -> None:
    screen(trained, photos, tmp_path / "out")
    log = tmp_path / "out" / "audit.jsonl"
    rechained(log, lambda lines: lines.append(dict(lines[-1])))
    assert any("follows the end of the run" in fault for fault in verify(tmp_path / "out").faults)


@pytest.mark.parametrize("column", ["status", "decision", "path", "quality", "patient"])
def test_results_of_other_types_are_no_crash(trained: Trained, photos: Path, tmp_path: Path, column: str) -> None:
    screen(trained, photos, tmp_path / "out")
    file = tmp_path / "out" / "results.parquet"
    table = pl.read_parquet(file)
    for wrong in (pl.lit(3), pl.lit(None), pl.lit([1, 2])):
        table.with_columns(wrong.alias(column)).write_parquet(file)
        assert objections(tmp_path / "out")


def test_only_the_first_faults_are_listed_and_the_others_counted() -> None:
    found = Verification()
    for number in range(103):
        found.note(f"fault {number}")
    assert (len(found.faults), found.more_faults) == (100, 3)


def test_a_key_that_occurs_twice_is_found(trained: Trained, photos: Path, tmp_path: Path) -> None:
    screen(trained, photos, tmp_path / "out")
    log = tmp_path / "out" / "audit.jsonl"
    log.write_text(log.read_text().replace('{"event": "photo"', '{"decision": "negative", "event": "photo"', 1))
    with pytest.raises(DataError, match="the log was modified"):
        verify(tmp_path / "out")


def test_a_run_resumes_in_another_folder(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other folder has photos of the same names."""
    monkeypatch.setattr(pipeline, "BLOCK", 4)
    monkeypatch.setattr(output_module, "BLOCK", 4)
    other = tmp_path / "other"
    shutil.copytree(photos, other / photos.name)
    for path in (other / photos.name).iterdir():
        path.write_bytes(b"another photo")
    whole = screen(trained, photos, tmp_path / "whole").results

    def stop(done: int, total: int, timing: object) -> None:
        if done == 5:
            raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        screen(trained, Path(photos.name), tmp_path / "out", on_progress=stop)
    monkeypatch.chdir(other)
    assert screen(trained, photos, tmp_path / "out", resume=True).results.equals(whole)


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (lambda table: table.drop("reason"), "differs from results.parquet in reason"),
        (lambda table: table.with_columns(note=pl.lit("x")), "differs from results.parquet in note"),
    ],
)
def test_columns_are_compared(
    trained: Trained, photos: Path, tmp_path: Path, tamper: Callable[[pl.DataFrame], pl.DataFrame], said: str
) -> None:
    screen(trained, photos, tmp_path / "out")
    file = tmp_path / "out" / "results.parquet"
    tamper(pl.read_parquet(file)).write_parquet(file)
    assert any(said in fault for fault in verify(tmp_path / "out").faults)


def test_the_same_values_written_in_another_way_are_found(trained: Trained, photos: Path, tmp_path: Path) -> None:
    screen(trained, photos, tmp_path / "out")
    file = tmp_path / "out" / "audit.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0].replace(": ", ":", 1), *lines[1:]]))
    with pytest.raises(DataError, match="line 1: is not a valid audit log line; the log was modified"):
        verify(tmp_path / "out")


def test_the_state_is_that_of_the_run_in_the_log(trained: Trained, photos: Path, tmp_path: Path) -> None:
    screen(trained, photos, tmp_path / "out")
    file = tmp_path / "out" / "run.json"
    state = json.loads(file.read_text())
    state["identity"]["bundle"] = "f" * 64
    file.write_text(json.dumps(state))
    assert verify(tmp_path / "out").faults == ["run.json: differs from the start of the log in bundle"]
    (tmp_path / "out" / "results.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"results.parquet: cannot be read .*it was modified"):
        verify(tmp_path / "out")
