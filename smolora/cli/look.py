"""The verbs that look at what was made: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smolora.cli.terminal import open_terminal
from smolora.errors import ConfigError
from smolora.runtime.console import print_plainly


def report(*runs: Path, out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None) -> None:
    """Draw runs and say in plain words what happened in them: PNG files, and one page, report.html.

    Args:
        runs: A run, or several to see side by side.
        out: Folder to write into. Left out, the run's own; needed for several.
    """
    terminal = open_terminal()
    if not runs:
        raise ConfigError("no run was named. Name the folder of one, such as smolora report my-run.")
    from smolora.analysis.summary import generate_summary_report
    from smolora.recipes.report import report as run_report

    page = run_report(runs, out)
    print("\n".join(generate_summary_report(run) for run in runs), end="")
    print_plainly(terminal, f"report: {page}")
