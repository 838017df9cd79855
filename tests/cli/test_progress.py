"""Progress where nobody watches a terminal: a line now and then, with rate and time left."""

from __future__ import annotations

import pytest

from fastfundus.cli.console import ProgressLines, progress_bar


def test_lines_come_at_intervals_with_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = ProgressLines(clock=lambda: now[0])
    task = lines.add_task("preparing", total=1000, rate="")
    for _ in range(200):
        now[0] += 0.5
        lines.advance(task)
    written = capsys.readouterr().err.splitlines()
    assert written == [
        "preparing: 60 of 1000, 2/s, 0:07:50 left",
        "preparing: 120 of 1000, 2/s, 0:07:20 left",
        "preparing: 180 of 1000, 2/s, 0:06:50 left",
    ]
    # A new epoch has its own rate.
    lines.update(task, description="epoch 2/30", completed=1, total=10, rate="disk")
    now[0] += 40
    lines.update(task, description="epoch 2/30", completed=5, total=10, rate="disk")
    assert capsys.readouterr().err == "epoch 2/30: 5 of 10, 0.125/s, 0:00:40 left, disk\n"


def test_quick_work_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("rate") as progress:
        assert isinstance(progress, ProgressLines)
        task = progress.add_task("reading", total=3, rate="")
        progress.update(task, completed=3, rate="fast")
        progress.stop()
    assert capsys.readouterr().err == ""
