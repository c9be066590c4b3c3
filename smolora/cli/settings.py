"""The verbs about configurations: init writes one for the data at hand, config shows, describes and imports them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

from smolora.cli.flags import TrainFlags
from smolora.cli.run_config import build_config, require_inputs, split_words
from smolora.cli.terminal import open_terminal
from smolora.errors import ConfigError
from smolora.runtime.console import print_plainly


def init(
    *words: str,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("run.yaml"),
    preset: str | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
    flags: TrainFlags | None = None,
) -> None:
    """Look at data and model, and write a commented configuration for them, which train takes.

    Args:
        words: Any setting as key.path=value, and a YAML file to start from, as for train.
        out: The file to write; one that exists is left as it is.
        preset: Experiment to start from.
        dataset: Benchmark to learn from, in place of --data.
        data_dir: Folder with the files of the benchmark, of --dataset or of the preset.
        flags: What has a flag of its own; it stays as given.
    """
    flags = flags or TrainFlags()
    terminal = open_terminal(quiet=flags.quiet)
    from smolora.config import ExperimentConfig

    config = build_config(ExperimentConfig, words, flags, preset=preset, data_dir=data_dir, dataset=dataset)
    require_inputs(config)
    from smolora.recipes.init import init as run_init

    run_init(config, out)
    print_plainly(terminal, f"configuration: {out}\nnext: smolora train {out} -o RUN, or first smolora plan {out}")


def config(
    *words: str,
    preset: str | None = None,
    kind: Annotated[Literal["train", "pretrain", "prepare"], Parameter(name="--for")] = "train",
    schema: bool = False,
    imported: Annotated[Path | None, Parameter(name="--import")] = None,
) -> None:
    """Print a configuration with everything that it leaves open, as YAML, or say what is wrong with it.

    Args:
        words: A YAML file, and any setting as key.path=value.
        preset: Experiment to start from.
        kind: The verb that it is for.
        schema: Print the JSON Schema of such files instead, for editors.
        imported: A file of LLaMA-Factory or axolotl, to print as one of ours; what has no counterpart is listed.
    """
    terminal = open_terminal()
    from smolora.config import ExperimentConfig, PrepareConfig, PretrainConfig, dump_config, resolve_config
    from smolora.config.presets import read_preset
    from smolora.config.schema import describe_schema

    kinds: dict[str, Any] = {"train": ExperimentConfig, "pretrain": PretrainConfig, "prepare": PrepareConfig}
    if schema:
        print(json.dumps(describe_schema(kinds[kind]), indent=2))
        return
    if imported is not None:
        if words or preset or kind != "train":
            raise ConfigError("--import reads one file and nothing else. Give settings to train, after the new file.")
        _print_imported(imported, terminal)
        return
    if preset is not None and kind != "train":
        raise ConfigError(f"--preset is an experiment of train, and --for {kind} asks for another verb's settings.")
    file, assignments = split_words(words)
    start = read_preset(preset) if preset else None
    print(dump_config(resolve_config(kinds[kind], preset=start, file=file, assignments=assignments)), end="")


def _print_imported(file: Path, terminal: Console) -> None:
    from smolora.config.annotated import annotate_config
    from smolora.config.imported import import_config
    from smolora.config.yaml_text import read_yaml

    made = import_config(read_yaml(file), Path())
    reasons = dict.fromkeys(made.filled, f"{made.tool}'s default.")
    print(annotate_config(made.build(), head=[f"From {file}, a file of {made.tool}."], reasons=reasons), end="")
    lines = [f"  {key}: {' '.join(reason.split())}" for key, reason in made.left_out.items()]
    print_plainly(
        terminal, "\n".join([f"{len(lines)} keys of {file} aren't in it:", *lines]) if lines else "all is in it"
    )
