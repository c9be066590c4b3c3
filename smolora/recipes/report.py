"""`smolora report`: plots as PNG files, and one page with the plots and what they say in plain words."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from smolora.analysis.run_record import RunRecord, open_runs
from smolora.errors import ConfigError, DataError, clause
from smolora.records.run_dir import RunDir
from smolora.records.staging import describe_os_error, write_bytes, write_text

logger = logging.getLogger(__name__)


def report(runs: Sequence[str | Path], out: Path | None = None) -> Path:
    """Write the plots and the page of one run, or of several side by side; return the page.

    Args:
        runs: Folders of runs.
        out: The folder to write into. Left out, the run's own.

    Raises:
        ConfigError: Several runs and no folder to write into, or it is the folder of a run that isn't the only one.
        DataError: A run is missing.
        FolderInUseError: It would be written into a run that is being trained.
    """
    records = open_runs(runs)
    if out is None and len(records) > 1:
        raise ConfigError("-o is missing: the folder for a report of several runs, such as -o comparison.")
    place = RunDir(out or records[0].run.path)
    is_own = len(records) == 1 and place.path.resolve() == records[0].run.path.resolve()
    if RunDir.is_run(place.path) and not is_own:
        raise ConfigError(
            f"{place.path} holds a run, whose own report would be replaced. Choose another folder for -o."
        )
    with place.locked() if RunDir.is_run(place.path) else nullcontext():
        return write_report(records, place)


def leave_report(run: RunDir) -> None:
    """Write the report of a run that ends, with its lock held.

    What keeps it from being written is a warning, as the run is whole without it.
    """
    try:
        write_report([RunRecord(run.path)], run)
    except (ImportError, OSError, DataError) as error:
        logger.warning("no report was written: %s. The run is whole; write it with smolora report.", clause(error))
    else:
        logger.info("report: %s", run.report)


def write_report(records: Sequence[RunRecord], place: RunDir) -> Path:
    """Draw the runs and write `plots/` and `report.html` into a folder; return the page."""
    from smolora.analysis.report import build_report  # Here, since matplotlib takes a second.
    from smolora.analysis.report_page import render_page

    built = build_report(records)
    try:
        place.plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise describe_os_error(error, place.plots) from error
    for picture in built.pictures:
        write_bytes(place.plots / f"{picture.name}.png", picture.png)
    write_text(place.report, render_page(built))
    return place.report
