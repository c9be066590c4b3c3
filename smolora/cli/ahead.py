"""The verbs that look at a run before it is started: plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from smolora.cli.flags import TrainFlags
from smolora.cli.make import OutIfAny
from smolora.cli.run_config import build_config, require_inputs, require_out
from smolora.cli.terminal import open_terminal
from smolora.runtime.console import print_plainly


def plan(
    *words: str,
    out: OutIfAny = None,
    resume: bool = False,
    preset: str | None = None,
    data_dir: Path | None = None,
    flags: TrainFlags | None = None,
    as_json: Annotated[bool, Parameter(name="--json")] = False,
) -> None:
    """Say what a run of train takes in memory and time, from a few real steps of it. Nothing is written.

    Args:
        words: A YAML file, and any setting as key.path=value.
        out: Folder of the run, only read, for --resume.
        resume: Plan what is left of the run in OUT.
        preset: Experiment to start from, such as e2e_attention, samsum_mlp or e2e_dynamic.
        data_dir: Folder with the files of the preset's benchmark, in place of --data.
        flags: What has a flag of its own.
        as_json: Print the plan on stdout as one JSON object.
    """
    flags = flags or TrainFlags()
    terminal = open_terminal(quiet=flags.quiet)
    from smolora.config import ExperimentConfig

    config = build_config(
        ExperimentConfig, words, flags, resumed=require_out(out) if resume else None, preset=preset, data_dir=data_dir
    )
    require_inputs(config)
    from smolora.recipes.plan import plan as run_plan

    made = run_plan(config, out, resume=resume)
    print_plainly(terminal, made.estimate.describe())
    if as_json:
        print(json.dumps(made.to_dict()))
    made.require_fit()
