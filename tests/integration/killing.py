"""Runs in forked children that are killed at random moments, until they are done.

A cycle costs about a tenth of a second; a fresh interpreter each time would cost 5.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from smolora.records.run_dir import RunDir
from tests.forked import start_fork


def end_under_kills(
    train: Callable[[RunDir], None],
    describe: Callable[[RunDir], dict[str, object]],
    folder: Path,
    *,
    kills: int,
    draw_share: Callable[[], float],
) -> dict[str, object]:
    """Return how often children were killed, and what a run that never stopped and the killed ones ended with.

    Args:
        train: Goes on with a run to its end.
        describe: Tells what a run that has ended left.
        folder: Where the runs' folders are made.
        kills: How often a child is killed.
        draw_share: Draws when a child is killed, as a share of what the run that never stopped took.
    """
    reference = RunDir(folder / "reference")
    started = time.perf_counter()
    assert os.waitpid(start_fork(train, reference), 0)[1] == 0
    whole = time.perf_counter() - started
    ends: list[dict[str, object]] = []
    killed = 0
    while killed < kills or not ends:
        run = RunDir(folder / f"run-{len(ends)}")
        status = -1
        while status != 0:
            child = start_fork(train, run)
            if killed < kills:
                time.sleep(draw_share() * whole)
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            assert status == 0 or os.WIFSIGNALED(status), f"a resumed run failed with status {status}"
            killed += os.WIFSIGNALED(status)
        ends.append(describe(run))
    return {"kills": killed, "reference": describe(reference), "ends": ends}
