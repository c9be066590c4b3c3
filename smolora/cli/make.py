"""The verbs that make something: prepare, pretrain, train, merge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from smolora.cli.flags import PrepareFlags, PretrainFlags, TrainFlags, collect_settings
from smolora.cli.run_config import build_config, require_assignments, require_inputs, require_out, require_start
from smolora.cli.terminal import open_terminal
from smolora.runtime.console import print_plainly

if TYPE_CHECKING:
    from smolora.records.run_dir import RunDir

Out = Annotated[Path, Parameter(name=["--out", "-o"])]
OutIfAny = Annotated[Path | None, Parameter(name=["--out", "-o"])]


def prepare(
    source: str,
    *words: str,
    out: Out,
    flags: PrepareFlags | None = None,
) -> None:
    """Read text or rows, clean and chunk them if asked, drop duplicates, and write train and validation files.

    Args:
        source: A file, a folder or a hub id.
        words: Further settings of the data as data.key=value, such as "data.clean=[strip_html,normalize_whitespace]".
        out: Folder to write train.jsonl, validation.jsonl and data_report.json into.
        flags: What has a flag of its own.
    """
    terminal = open_terminal()
    from smolora.config import PrepareConfig, resolve_config

    assignments = require_assignments(words, source)
    config = resolve_config(PrepareConfig, flags=collect_settings(flags or PrepareFlags()), assignments=assignments)
    from smolora.recipes.prepare import prepare as run_prepare

    report = run_prepare(source, out, config.data, task=config.task, seed=config.seed)
    print_plainly(terminal, report.describe())


def pretrain(
    *words: str,
    out: Out,
    resume: bool = False,
    flags: PretrainFlags | None = None,
) -> None:
    """Train a tokenizer and a small GPT from nothing. The model is written to OUT/model.

    Args:
        words: A YAML file, and any setting as key.path=value.
        out: Folder of the run: a new one, or with --resume that of the run.
        resume: Go on from the newest whole checkpoint in OUT, with the settings it was started with.
        flags: What has a flag of its own.
    """
    flags = flags or PretrainFlags()
    terminal = open_terminal(quiet=flags.quiet, is_shared=True)
    from smolora.config import PretrainConfig

    config = build_config(PretrainConfig, words, flags, resumed=out if resume else None)
    require_start(config, out, resume=resume)
    from smolora.recipes.pretrain import pretrain as run_pretrain
    from smolora.training.callbacks import ProgressCallback

    model = run_pretrain(config, out, resume=resume, callbacks=[ProgressCallback(terminal)])
    print_plainly(terminal, f'model: {model}\nnext: smolora generate {out} "..."')


def train(
    *words: str,
    out: OutIfAny = None,
    resume: bool = False,
    preset: str | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
    flags: TrainFlags | None = None,
    show: bool = False,
) -> None:
    """Fine-tune a model, with LoRA or another method. The adapter is written to OUT/adapter_checkpoint.

    Args:
        words: A YAML file, and any setting as key.path=value.
        out: Folder of the run: a new one, or with --resume that of the run.
        resume: Go on from the newest whole checkpoint in OUT, with the settings it was started with.
        preset: Experiment to start from, such as e2e_attention, samsum_mlp or e2e_dynamic.
        dataset: Benchmark to learn from, in place of --data: e2e_nlg, samsum, wikisql, sst2, sick and others.
        data_dir: Folder with the files of the benchmark, of --dataset or of the preset.
        flags: What has a flag of its own.
        show: Print the first examples with what is trained in [[ ]], and stop.
    """
    flags = flags or TrainFlags()
    terminal = open_terminal(quiet=flags.quiet, is_shared=not show)
    from smolora.config import ExperimentConfig

    resumed = require_out(out) if resume else None
    config = build_config(
        ExperimentConfig, words, flags, resumed=resumed, preset=preset, data_dir=data_dir, dataset=dataset
    )
    if show:
        from smolora.recipes.finetune import show_examples

        _print_examples(show_examples(config))
        return
    out = require_out(out)
    require_start(config, out, resume=resume)
    from smolora.recipes.finetune import finetune
    from smolora.training.callbacks import ProgressCallback

    run = finetune(config, out, resume=resume, callbacks=[ProgressCallback(terminal)])
    made = f"adapter: {run.adapter}" if run.adapter.is_dir() else f"model: {run.model}"
    print_plainly(terminal, f"{made}\nnext: {_propose_next(run)}")


def _propose_next(run: RunDir) -> str:
    """Return the commands that make sense of a finished run: not all answer a text, and virtual tokens don't merge."""
    from smolora.adapters.adapter_files import read_adapter
    from smolora.models.loading import read_model_settings
    from smolora.models.tasks import read_saved_task

    adapter = read_adapter(run.adapter) if run.adapter.is_dir() else None
    task = adapter.task if adapter else read_saved_task(read_model_settings(run.model))
    asking = f'smolora generate {run.path} "..."'
    if task in ("qa", "token_classification"):  # A text alone is no question.
        asking = f"smolora evaluate {run.path} --data FILE"
    return f"smolora merge {run.path}, or {asking}" if adapter and not adapter.config.is_prompt_learning else asking


def probe(
    *words: str,
    out: Out,
    preset: str | None = None,
    data_dir: Path | None = None,
    batches: int = 32,
    flags: TrainFlags | None = None,
) -> None:
    """Measure where a fine-tune would learn, without an update, and write OUT/probe.yaml, which train takes.

    Args:
        words: A YAML file, and any setting as key.path=value, as for train.
        out: Folder to write probe.yaml, probe.json and probe.png into.
        preset: Experiment to start from.
        data_dir: Folder with the files of the preset's benchmark, in place of --data.
        batches: Batches to measure; 20 to 50 are usual.
        flags: What has a flag of its own.
    """
    flags = flags or TrainFlags()
    terminal = open_terminal(quiet=flags.quiet)
    from smolora.config import ExperimentConfig

    config = build_config(ExperimentConfig, words, flags, preset=preset, data_dir=data_dir)
    require_inputs(config)
    from smolora.recipes.probe import probe as run_probe

    folder = run_probe(config, out, num_batches=batches)
    print_plainly(terminal, f"configuration: {folder.config}\nnext: smolora train {folder.config} -o RUN")


def merge(run: Path, *, out: OutIfAny = None, base: str | None = None) -> None:
    """Add an adapter to its base and write a plain model, checked to answer the same.

    Args:
        run: A run of `train`, or an adapter folder.
        out: Folder to write. Left out, RUN/final_merged.
        base: Base of the adapter, where it isn't where it was in training.
    """
    terminal = open_terminal()
    from smolora.models.folders import require_model

    for name in filter(None, (str(run), base)):  # Before torch and transformers are imported.
        require_model(name)
    from smolora.recipes.merge import merge as run_merge

    report = run_merge(run, out, base=base)
    print_plainly(
        terminal,
        f"merged model: {report.out} (base and adapter to within {report.max_difference:.1e}, by {report.compared})",
    )


def _print_examples(examples: Sequence[Sequence[tuple[str, bool]]]) -> None:
    for number, spans in enumerate(examples, start=1):
        print(f"--- example {number}")
        print("".join(f"[[{text}]]" if is_trained else text for text, is_trained in spans))
