"""The verbs that look at what was made: report, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smolora.cli.terminal import open_terminal
from smolora.errors import ConfigError
from smolora.runtime.console import print_plainly

Out = Annotated[Path, Parameter(name=["--out", "-o"])]


def report(*runs: Path, out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None) -> None:
    """Draw runs and say in plain words what happened in them: PNG files, and one page, report.html.

    Args:
        runs: A run, or several to see side by side.
        out: Folder to write into. Left out, the run's own; needed for several.
    """
    terminal = open_terminal()
    if not runs:
        raise ConfigError("no run was named. Name the folder of one, such as smolora report my-run.")
    from smolora.analysis.run_table import describe_runs
    from smolora.analysis.summary import generate_summary_report
    from smolora.recipes.report import report as run_report

    page = run_report(runs, out)
    print(describe_runs(runs) if len(runs) > 1 else generate_summary_report(runs[0]), end="")
    print_plainly(terminal, f"report: {page}")


def compare(
    *words: str,
    out: Out,
    seeds: int = 5,
    workers: int = 1,
    ray: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
    quiet: bool = False,
) -> None:
    """Tune by several configurations on the same rows with the same seeds, and say whether any is better.

    The same command continues a comparison that was killed.

    Args:
        words: Two YAML files or more, the first to hold the others against, and settings for all as key.path=value.
        out: Folder of the comparison.
        seeds: Runs of each configuration.
        workers: Processes to spread the runs over.
        ray: Address of a Ray cluster to spread them over instead.
        as_json: Print comparison.json instead of the table.
        quiet: Show warnings only.
    """
    terminal = open_terminal(quiet=quiet)
    if ray is not None and workers != 1:
        raise ConfigError("--ray and --workers both say where runs go; give one.")
    from smolora.cli.run_config import read_configs, require_inputs

    configs = read_configs(words)
    for config in configs.values():
        require_inputs(config)
    from smolora.recipes.compare import compare as run_compare
    from smolora.recipes.compare import describe_comparison, to_json

    comparison = run_compare(configs, out, num_seeds=seeds, workers=workers, ray_address=ray)
    print(json.dumps(to_json(comparison)) if as_json else describe_comparison(comparison))
    print_plainly(terminal, f"comparison: {out}")
