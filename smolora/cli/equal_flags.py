"""What to write for a flag that isn't there: people type other tools' names of settings as flags."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches

from smolora.cli.flags import LoopFlags, PrepareFlags, PretrainFlags, TextFlags, TrainFlags, paths_of
from smolora.config import ExperimentConfig, PrepareConfig, PretrainConfig
from smolora.config.aliases import OUTPUT_NAMES, find_alias, list_names
from smolora.config.base import Section

_KINDS: dict[str, tuple[type[TextFlags | LoopFlags], type[Section]]] = {
    "prepare": (PrepareFlags, PrepareConfig),
    "pretrain": (PretrainFlags, PretrainConfig),
    "train": (TrainFlags, ExperimentConfig),
    "plan": (TrainFlags, ExperimentConfig),
    "init": (TrainFlags, ExperimentConfig),
}

_ALIKE = 0.8
"""From 0 to 1: lerning_rate is .96 of learning_rate; epoch_count is .7 of anything."""


def find_equal(verb: str, unknown: str) -> str | None:
    """Return the flag, or else the setting, that an unknown flag of `verb` is another name of, or a misspelt one.

    >>> find_equal("train", "--learning-rate=1e-3"), find_equal("train", "--weight_decay")
    ('--lr', 'training.weight_decay=VALUE')
    >>> find_equal("train", "--lerning-rate"), find_equal("train", "--batchsize")
    ('--lr', '--batch-size')
    >>> find_equal("pretrain", "--max-length"), find_equal("pretrain", "--prompt-field")
    ('--context', None)
    """
    if verb not in _KINDS:
        return None
    flags, config = _KINDS[verb]
    own = [field.name for field in fields(flags)]
    name = unknown.lstrip("-").partition("=")[0].replace("-", "_")
    known = (*own, *OUTPUT_NAMES, *list_names(config))
    if name not in known:
        name = next(iter(get_close_matches(name, known, n=1, cutoff=_ALIKE)), name)
    if name in OUTPUT_NAMES:
        return "--out"
    alias = find_alias(config, "", name) if name in known else None
    flag = name if name in own else paths_of(flags).get(alias.path) if alias else None
    if flag is None:
        return f"{alias.path}=VALUE" if alias else None
    return f"--{flag.replace('_', '-')}"
