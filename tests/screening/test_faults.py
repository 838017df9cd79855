"""Fault tolerance of screening: no result is lost or invented."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from fastfundus.data import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.engines.runtime import Engine
from fastfundus.errors import BundleError, ConfigError, DataError, FastFundusError, PhotoError, TransientError
from fastfundus.photo import file as photo_file
from fastfundus.photo import isolation
from fastfundus.records import Status
from fastfundus.screening import audit_log, decode_pool, pipeline
from fastfundus.screening import output as store
from fastfundus.screening.audit import verify
from fastfundus.screening.pipeline import Timing, screen_photos
from fastfundus.screening.policy import ScreenPolicy
from fastfundus.screening.run import ScreeningRun, screen_to_folder
from fastfundus.workflow.screen import screen_sources
from tests.conftest import Trained, copy_photos

SAME = ("results.parquet", "results.csv", "eyes.csv", "patients.csv")


def screen(trained: Trained, folder: Path, output: Path, **options: object) -> ScreeningRun:
    return screen_to_folder(list_photos(folder), trained.bundle, output, sources=[folder], **options)  # type: ignore[arg-type]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the block size, so that few photos make several blocks."""
    for module in (pipeline, store):
        monkeypatch.setattr(module, "BLOCK", 8)


@pytest.fixture
def photos(photo_folder: Path, tmp_path: Path) -> Path:
    """Copy 24 photos to a folder that a test may modify."""
    return copy_photos(photo_folder, tmp_path / "photos", 24)


class _Stop(BaseException):
    pass


def stop_after(rows: int) -> object:
    def progress(done: int, total: int, timing: Timing) -> None:
        if done == rows:
            raise _Stop

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.long)])
def test_resume_after_kills_gives_the_same_bytes(trained: Trained, photos: Path, tmp_path: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.screening.kill_runs", trained.bundle.path, photos, tmp_path, str(kills), "7"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, _ = map(int, done.stdout.split())
    assert killed == kills
    found = verify(tmp_path / "torn", files=True)
    assert (found.faults, found.rows, found.files) == ([], 24, 24)


@pytest.mark.usefixtures("small_blocks")
def test_a_stopped_run_resumes_only_with_the_same_settings(trained: Trained, photos: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    screen(trained, photos, whole)
    with pytest.raises(_Stop):
        screen(trained, photos, torn, on_progress=stop_after(19))
    with pytest.raises(ConfigError, match="contains an unfinished run; add --resume to continue it"):
        screen(trained, photos, torn)
    with pytest.raises(ConfigError, match="was started with another policy"):
        screen(trained, photos, torn, resume=True, policy=ScreenPolicy(abstain=0.1))
    with pytest.raises(ConfigError, match="was started with another backend"):
        screen_to_folder(list_photos(photos), trained.bundle.using("onnxruntime"), torn, sources=[photos], resume=True)
    with pytest.raises(ConfigError, match="was started with another sources"):
        screen_to_folder(list_photos(photos), trained.bundle, torn, sources=[photos.parent], resume=True)
    gone_on = screen(trained, photos, torn, resume=True)
    assert (gone_on.resumed, gone_on.timing.photos) == (16, 8)
    for name in SAME:
        assert (torn / name).read_bytes() == (whole / name).read_bytes()
    assert not (torn / "progress").exists()
    assert [json.loads(line)["event"] for line in (torn / "audit.jsonl").read_text().splitlines()] == [
        "start", *["photo"] * 16, "resume", *["photo"] * 8, "end",
    ]  # fmt: skip
    assert verify(torn).faults == []
    # A finished run has nothing left to do.
    again = screen(trained, photos, torn, resume=True)
    assert (again.resumed, again.timing.photos) == (24, 0)
    assert pl.read_parquet(torn / "results.parquet").equals(again.results)


@pytest.mark.usefixtures("small_blocks")
def test_resume_with_a_changed_bundle_is_refused(trained: Trained, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(_Stop):
        screen(trained, photos, tmp_path / "out", on_progress=stop_after(10))
    copy = tmp_path / "bundle"
    shutil.copytree(trained.bundle.path, copy)
    metadata = json.loads((copy / "bundle.json").read_text())
    metadata["labels"]["abnormal"]["threshold"] = 0.123
    for derived in ("fingerprint", "files", "schema"):
        del metadata[derived]
    from fastfundus.engines.bundle import write_bundle_json

    write_bundle_json(copy, metadata)
    with pytest.raises(ConfigError, match="was started with another bundle"):
        screen_to_folder(list_photos(photos), Bundle.open(copy), tmp_path / "out", sources=[photos], resume=True)


@pytest.mark.usefixtures("small_blocks")
def test_files_that_appear_vanish_or_change_are_reported(trained: Trained, photos: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in photos.iterdir())

    def meddle(done: int, total: int, timing: Timing) -> None:
        if done == 1:
            (photos / names[-1]).unlink(missing_ok=True)
            shutil.copy(photos / names[1], photos / names[0])
            shutil.copy(photos / names[1], photos / "new.jpg")

    # Few photos are in flight at once, so the last one has not been read yet.
    done = screen(trained, photos, tmp_path / "out", on_progress=meddle, accept_failed=True)
    assert done.results["path"].to_list() == names
    assert [note.split(" (")[1].rstrip(")") for note in done.notes] == [names[-1], names[0], "new.jpg"]
    assert [note.split()[2] for note in done.notes] == ["vanished", "changed", "appeared"]
    report = done.report.read_text()
    assert all(note in report for note in done.notes)
    assert verify(tmp_path / "out", files=True).faults == [f"{names[0]}: was modified after it was screened"]


@pytest.mark.usefixtures("small_blocks")
def test_a_full_disk_keeps_finished_rows(trained: Trained, photos: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    screen(trained, photos, whole)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Limit the file size such that the log exceeds it in its third block.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((whole / "audit.jsonl").stat().st_size * 3 // 4, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written to \(File too large\); finished rows are kept"):
            screen(trained, photos, torn)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert screen(trained, photos, torn, resume=True).resumed == 24
    for name in SAME:
        assert (torn / name).read_bytes() == (whole / name).read_bytes()
    assert verify(torn).faults == []


def test_corrupt_inputs_affect_only_themselves(trained: Trained, photos: Path, tmp_path: Path) -> None:
    sound = screen(trained, photos, tmp_path / "sound").results
    names = sorted(path.name for path in photos.iterdir())
    # Corrupt two of 24: truncate one, overwrite the middle of the other.
    data = (photos / names[4]).read_bytes()
    (photos / names[4]).write_bytes(data[: len(data) // 2])
    data = (photos / names[13]).read_bytes()
    (photos / names[13]).write_bytes(data[: len(data) // 2] + bytes(4000) + data[len(data) // 2 + 4000 :])
    torn = screen(trained, photos, tmp_path / "torn").results
    assert torn["status"].to_list() == ["unreadable" if n in (4, 13) else "ok" for n in range(24)]
    others = ~pl.col("path").is_in([names[4], names[13]])
    assert torn.filter(others).equals(sound.filter(others))


def test_an_output_that_cannot_be_written_is_refused_at_once(trained: Trained, photos: Path) -> None:
    # No user can create folders in /proc.
    with pytest.raises(DataError, match="cannot be written to"):
        screen(trained, photos, Path("/proc/fastfundus"))


def test_two_processes_do_not_share_a_folder(trained: Trained, photos: Path, tmp_path: Path) -> None:
    def second(done: int, total: int, timing: Timing) -> None:
        if done == 1:
            with pytest.raises(DataError, match="is being screened into by another process"):
                screen(trained, photos, tmp_path / "out", resume=True)

    assert len(screen(trained, photos, tmp_path / "out", on_progress=second).results) == 24


class _Flaky(Engine):
    """An engine that fails on the batches selected by a predicate."""

    def __init__(self, inner: Engine, fails: object) -> None:
        super().__init__(inner._size, "flaky")
        self.inner, self.fails, self.calls = inner, fails, 0

    def _run(self, photos: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.calls += 1
        if self.fails(photos, self.calls):  # type: ignore[operator]
            raise RuntimeError("device lost")
        return self.inner._run(photos)

    def _free(self) -> None:
        self.inner.close()


@pytest.fixture
def engine(trained: Trained) -> Iterator[Engine]:
    with trained.bundle.load() as loaded:
        yield loaded


def test_a_single_engine_failure_is_retried(trained: Trained, photos: Path, engine: Engine) -> None:
    listing = list_photos(photos).photos
    plain = list(screen_photos(listing, trained.bundle, Timing(), engine=engine))
    flaky = _Flaky(engine, lambda batch, calls: calls == 1 and len(batch) > 1)
    again = list(screen_photos(listing, trained.bundle, Timing(), engine=flaky))
    for one, other in zip(plain, again, strict=True):
        assert one.decision == other.decision
        assert one.answer is not None
        np.testing.assert_array_equal(one.answer, other.answer)


def test_a_photo_the_engine_rejects_is_marked_failed(trained: Trained, photos: Path, engine: Engine) -> None:
    listing = list_photos(photos).photos
    plain = list(screen_photos(listing, trained.bundle, Timing(), engine=engine))
    cursed = plain[5].prepared.image
    assert cursed is not None
    flaky = _Flaky(engine, lambda batch, calls: any((photo == cursed).all() for photo in batch))
    rows = list(screen_photos(listing, trained.bundle, Timing(), engine=flaky))
    assert [row.status for row in rows if row.status != "ok"] == ["failed"]
    assert rows[5].reason == "the engine failed on this photo (device lost); screen it again"
    assert (rows[5].decision, rows[5].answer) == (None, None)
    assert [row.decision for row in rows[:5] + rows[6:]] == [row.decision for row in plain[:5] + plain[6:]]


def test_an_engine_that_fails_on_everything_ends_the_run(trained: Trained, photos: Path, engine: Engine) -> None:
    flaky = _Flaky(engine, lambda batch, calls: True)
    with pytest.raises(BundleError, match=r"the engine failed on 16 photos in a row \(device lost\)"):
        list(screen_photos(list_photos(photos).photos, trained.bundle, Timing(), engine=flaky))


def test_a_hanging_photo_is_abandoned(
    trained: Trained, photos: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    listing = list_photos(photos).photos
    cursed, start = listing[3].path.read_bytes(), isolation._Decoder.run

    def run(decoder: isolation._Decoder, data: bytes, *arguments: object) -> object:
        if data == cursed:
            os.kill(decoder.process, signal.SIGXCPU)  # what the kernel does once the time is used up
        answer = start(decoder, data, *arguments)  # type: ignore[arg-type]
        decoder.waited_s = 5.0 if data == cursed else decoder.waited_s
        return answer

    monkeypatch.setattr(isolation._Decoder, "run", run)
    rows = list(screen_photos(listing, trained.bundle, Timing(), engine=engine, hang_s=5))
    assert [row.source for row in rows] == listing
    assert [row.status.value for row in rows if row.status != "ok"] == ["unreadable"]
    assert rows[3].reason.startswith("decoding takes more than 5 s of CPU time")


def _read_with(monkeypatch: pytest.MonkeyPatch, before: Callable[[Path, int], None]) -> None:
    """Call `before` with the path and the number of earlier reads before each file is read."""
    count, lock, real = iter(range(10**6)), threading.Lock(), photo_file.read_photo

    def read(path: Path, *, listed: bool = False) -> bytes:
        with lock:
            before(path, next(count))
        return real(path, listed=listed)

    monkeypatch.setattr(photo_file, "read_photo", read)
    monkeypatch.setattr(decode_pool, "PAUSES_S", (0.01,))


def test_a_source_that_vanishes_gets_no_verdicts(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    screen(trained, photos, whole)
    monkeypatch.setattr(decode_pool, "PAUSES_S", (0.01,))
    with monkeypatch.context() as patch:
        # An unmounted share leaves its empty mount point behind.
        def unmount(path: Path, reads: int) -> None:
            if reads == 12:
                photos.rename(tmp_path / "away")
                photos.mkdir()

        _read_with(patch, unmount)
        with pytest.raises(
            FastFundusError, match=r"(?s)not finished, because \d+ inputs failed, .*still mounted"
        ) as error:
            screen(trained, photos, torn)
    assert "add --resume" in str(error.value)
    assert json.loads((torn / "run.json").read_text())["finished"] is None
    listing = list_photos(tmp_path / "away")
    with pytest.raises(FastFundusError, match="not finished"):
        screen_to_folder(listing, trained.bundle, torn, sources=[photos], resume=True)
    photos.rmdir()
    (tmp_path / "away").rename(photos)
    assert screen(trained, photos, torn, resume=True).resumed == 8
    for name in SAME:
        assert (torn / name).read_bytes() == (whole / name).read_bytes()
    assert verify(torn).faults == []


@pytest.mark.parametrize("fault", ["unmounted", "loop", "file"])
def test_a_source_that_vanishes_behind_other_files_gets_no_verdicts(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None, fault: str
) -> None:
    """What lies under a mount point, such as NOT_MOUNTED.txt, is no proof that it is mounted."""
    away, output = tmp_path / "away", tmp_path / "out"

    def unmount(path: Path, reads: int) -> None:
        if reads == 9:
            photos.rename(away)
            if fault == "unmounted":
                photos.mkdir()
                (photos / "NOT_MOUNTED.txt").write_text("mount the share here")
            elif fault == "loop":
                photos.symlink_to(photos)
            else:
                photos.write_text("")

    with monkeypatch.context() as patch:
        _read_with(patch, unmount)
        with pytest.raises(FastFundusError, match=r"(?s)not finished, because \d+ inputs failed, .*still mounted"):
            screen(trained, photos, output)
    if fault == "unmounted":
        (photos / "NOT_MOUNTED.txt").unlink()
        photos.rmdir()
    else:
        photos.unlink()
    away.rename(photos)
    done = screen(trained, photos, output, resume=True)
    assert set(done.results["status"]) == {"ok"}
    assert done.notes == []


def test_a_storage_error_leaves_its_photo_open(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    whole, torn, accepted = tmp_path / "whole", tmp_path / "torn", tmp_path / "accepted"
    screen(trained, photos, whole)
    name = sorted(path.name for path in photos.iterdir())[10]

    def fail(path: Path, reads: int) -> None:
        if path.name == name:
            raise TransientError("the storage failed (Input/output error)")

    with monkeypatch.context() as patch:
        _read_with(patch, fail)
        with pytest.raises(FastFundusError, match=rf"1 inputs failed, .*\n{name}: the storage failed"):
            screen(trained, photos, torn)
        rows = screen(trained, photos, accepted, accept_failed=True).results
        with pytest.raises(FastFundusError, match="1 inputs failed"):
            screen(trained, photos, torn, resume=True)
    assert rows["status"].to_list() == ["failed" if path == name else "ok" for path in rows["path"]]
    assert verify(accepted).faults == []
    assert screen(trained, photos, torn, resume=True).resumed == 16
    for file in SAME:
        assert (torn / file).read_bytes() == (whole / file).read_bytes()
    assert verify(torn).faults == []
    failures = [json.loads(line) for line in (torn / "audit.jsonl").read_text().splitlines() if '"failed"' in line]
    assert [(event["accepted"], event["inputs"]) for event in failures] == [(False, [name])] * 2


def test_real_errors_of_storage_are_told_from_faults_of_the_path(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(photos.iterdir())
    for number, expected in ((5, Status.FAILED), (12, Status.FAILED), (116, Status.FAILED), (40, Status.UNREADABLE)):
        # EIO, ENOMEM, ESTALE, ELOOP

        def fail(*arguments: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", fail)
            with pytest.raises(PhotoError) as error:
                photo_file.read_photo(path)
        assert error.value.status is expected
    with pytest.raises(PhotoError, match="file not found"):
        photo_file.read_photo(photos / "none.jpg")
    with pytest.raises(TransientError, match="its folder is gone or empty"):
        photo_file.read_photo(tmp_path / "none" / "none.jpg")


def test_folders_that_could_not_be_listed_are_screened_by_resume(
    trained: Trained, photos: Path, tmp_path: Path, small_blocks: None
) -> None:
    output, more = tmp_path / "out", photos / "more"
    more.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:11]:
        path.rename(more / path.name)
    listing = list_photos(photos)
    open_only = replace(
        listing,
        photos=[photo for photo in listing.photos if "more" not in photo.name],
        lost=["more: cannot be searched"],
    )
    with pytest.raises(FastFundusError, match="1 folders could not be listed"):
        screen_to_folder(open_only, trained.bundle, output, sources=[photos])
    assert len(pl.read_parquet(output / "results.parquet")) == 13
    with pytest.raises(FastFundusError, match="more: cannot be searched"):
        screen_to_folder(open_only, trained.bundle, output, sources=[photos], resume=True)
    done = screen(trained, photos, output, resume=True)
    assert (done.resumed, len(done.results)) == (13, 24)
    whole = screen(trained, photos, tmp_path / "whole").results
    assert done.results.sort("path").drop("bundle").equals(whole.sort("path").drop("bundle"))
    assert verify(output).faults == []
    assert screen(trained, photos, output, resume=True).resumed == 24


def test_a_source_of_which_only_folders_are_left_gets_no_verdicts(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder of the results lies among the photos, and keeps the source from looking empty."""
    monkeypatch.setattr(decode_pool, "PAUSES_S", ())
    listing = list_photos(photos)
    for photo in listing.photos:
        photo.path.unlink()
    output = photos / "results"
    with pytest.raises(FastFundusError, match=r"24 inputs failed.*\n.*its folder is gone or empty"):
        screen_to_folder(listing, trained.bundle, output, sources=[photos])


def test_a_table_that_names_an_unmounted_share_leaves_rows_open(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_pool, "PAUSES_S", ())
    share = tmp_path / "share"
    share.mkdir()
    here = sorted(photos.iterdir())[:2]
    table = tmp_path / "photos.csv"
    names = [*here, photos / "never_there.jpg", share / "2024" / "001.jpg"]
    table.write_text("file\n" + "\n".join(map(str, names)) + "\n")
    output = tmp_path / "out"
    with pytest.raises(FastFundusError, match=r"1 inputs failed.*\n.*001.jpg: its folder is gone or empty"):
        screen(trained, table, output)
    # Once it is mounted, the same command goes on; what is missing in a folder with photos is missing.
    (share / "2024").mkdir()
    shutil.copy(here[0], share / "2024" / "001.jpg")
    statuses = dict(screen(trained, table, output, resume=True).results.select("path", "status").iter_rows())
    assert [statuses[name] for name in sorted(statuses) if "photos/" not in name] == ["ok"]
    assert sorted(statuses.values()) == ["ok", "ok", "ok", "unreadable"]


def test_a_run_whose_source_is_gone_for_good_can_be_finished(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_blocks: None
) -> None:
    monkeypatch.setattr(decode_pool, "PAUSES_S", ())
    output = tmp_path / "out"
    with pytest.raises(_Stop):
        screen(trained, photos, output, on_progress=stop_after(9))
    assert len(list((output / "progress" / "blocks").iterdir())) == 1
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="does not exist"):
        screen_sources([photos], trained.bundle, tmp_path / "new", resume=True)
    with pytest.raises(FastFundusError, match=r"1 folders could not be listed.*(\n.*)*photos: does not exist"):
        screen_sources([photos], trained.bundle, output, resume=True)
    run, listing = screen_sources([photos], trained.bundle, output, resume=True, accept_failed=True)
    assert listing.lost == [f"{photos}: does not exist; give a folder, a photo or a table"]
    assert run.results["status"].to_list() == ["ok"] * 8 + ["failed"] * 16
    assert verify(output).faults == []


def test_hanging_storage_ends_the_run(
    trained: Trained, photos: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    release = threading.Event()

    def read(path: Path, **options: object) -> bytes:
        release.wait(60)
        return b""

    monkeypatch.setattr(decode_pool, "read_patiently", read)
    with pytest.raises(FastFundusError, match="check that the storage responds, then resume"):
        list(screen_photos(list_photos(photos).photos, trained.bundle, Timing(), engine=engine, hang_s=0.2))
    release.set()


def test_a_clock_that_jumps_changes_no_result(
    trained: Trained, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen(trained, photos, tmp_path / "plain")
    moments = iter([datetime(2031, 1, 1, tzinfo=UTC), datetime(1999, 1, 1, tzinfo=UTC)] * 20)

    class Jumping:
        @staticmethod
        def now(zone: object) -> datetime:
            return next(moments)

    monkeypatch.setattr(audit_log, "datetime", Jumping)
    screen(trained, photos, tmp_path / "jumped")
    for name in SAME:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "jumped" / name).read_bytes()
    assert verify(tmp_path / "jumped").faults == []


def _edit_log(output: Path, edit: object) -> None:
    lines = (output / "audit.jsonl").read_text().splitlines()
    (output / "audit.jsonl").write_text("\n".join(edit(lines)) + "\n")  # type: ignore[operator]


def _lower(lines: list[str]) -> list[str]:
    line = json.loads(lines[3])
    line["p_abnormal"] = 1 - line["p_abnormal"]
    return [*lines[:3], json.dumps(line), *lines[4:]]


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (lambda out: _edit_log(out, _lower), "the chain breaks"),
        (lambda out: _edit_log(out, _lower), "differs from results.parquet in p_abnormal"),
        (lambda out: _edit_log(out, lambda lines: lines[:5] + lines[6:]), "the chain breaks"),
        (lambda out: _edit_log(out, lambda lines: lines[:-1]), "has no end event"),
        (lambda out: (out / "patients.csv").write_text("patient\n"), "patients.csv: does not match results.parquet"),
        (lambda out: (out / "eyes.csv").unlink(), "eyes.csv is missing"),
        (
            lambda out: pl.read_parquet(out / "results.parquet").head(20).write_parquet(out / "results.parquet"),
            "results.parquet has 20 rows, audit.jsonl 24",
        ),
        (
            lambda out: (
                pl.read_parquet(out / "results.parquet")
                .with_columns(decision=pl.lit("negative"))
                .write_parquet(out / "results.parquet")
            ),
            "differs from results.parquet in decision",
        ),
    ],
)
def test_tampering_is_found(trained: Trained, photos: Path, tmp_path: Path, tamper: object, said: str) -> None:
    output = tmp_path / "out"
    screen(trained, photos, output)
    assert verify(output, files=True).faults == []
    tamper(output)  # type: ignore[operator]
    assert any(said in fault for fault in verify(output).faults)


def test_verify_refuses_other_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is this the folder of a finished screening"):
        verify(tmp_path)


def test_masks_stay_in_their_folder() -> None:
    from fastfundus.screening.masks import mask_name

    assert mask_name("left/a.jpg", "vessel") == "masks/vessel/left/a.jpg.png"
    for name in ("../a.jpg", "/etc/a.jpg", "b/../../a.jpg", "a\\b.jpg", "a\0.jpg", "x" * 300):
        inside = mask_name(name, "vessel")
        assert os.path.normpath(inside) == inside
        assert inside.startswith("masks/vessel/")
        assert len(inside) == len("masks/vessel/") + 64 + 4


@pytest.mark.slow
@pytest.mark.long
def test_ray_resumes_a_local_run_with_the_same_bytes(trained: Trained, photos: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.screening.ray_run", trained.bundle.path, photos, tmp_path],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    resumed, photos_there, engines = map(int, done.stdout.split())
    assert (resumed, photos_there, engines >= 1) == (16, 8, True)
    for name in SAME:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert verify(tmp_path / "there").faults == []
