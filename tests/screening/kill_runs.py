"""Screen a folder under repeated kills: fork a child, kill it after a random time, resume, and repeat.

Runs in its own process, because a process that has loaded an engine cannot be forked.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from fastfundus.data import list_photos
from fastfundus.engines.bundle import Bundle
from fastfundus.screening import output as store
from fastfundus.screening import pipeline, run

SAME = ("results.parquet", "results.csv", "eyes.csv", "patients.csv")


def screen(bundle: Path, source: Path, output: Path) -> None:
    listing = list_photos(source)
    run.screen_to_folder(listing, Bundle.open(bundle), output, sources=[source], resume=True)


def child(*arguments: Path) -> int:
    pid = os.fork()
    if pid == 0:
        screen(*arguments)
        os._exit(0)
    return pid


def main(bundle: Path, source: Path, work: Path, kills: int, seed: int) -> None:
    for module in (pipeline, store):
        module.BLOCK = 4
    began = time.monotonic()
    assert os.waitpid(child(bundle, source, work / "whole"), 0)[1] == 0
    seconds = time.monotonic() - began
    whole = {name: (work / "whole" / name).read_bytes() for name in SAME}
    generator = random.Random(seed)
    killed = finished = 0
    while killed < kills:
        pid = child(bundle, source, work / "torn")
        time.sleep(generator.uniform(0.1, 0.9) * seconds)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed += os.WIFSIGNALED(status)
        if status == 0:
            finished += 1
            assert {name: (work / "torn" / name).read_bytes() for name in SAME} == whole
            shutil.rmtree(work / "torn")
    assert os.waitpid(child(bundle, source, work / "torn"), 0)[1] == 0
    assert {name: (work / "torn" / name).read_bytes() for name in SAME} == whole
    print(killed, finished)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:6]))
