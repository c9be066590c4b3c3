"""What to write for a flag that isn't there: people type other tools' names of settings as flags."""

from __future__ import annotations

from smolora.cli.flags import LoopFlags, PrepareFlags, PretrainFlags, TextFlags, TrainFlags, paths_of
from smolora.config import ExperimentConfig, PrepareConfig, PretrainConfig
from smolora.config.aliases import OUTPUT_NAMES, find_alias
from smolora.config.base import Section

_KINDS: dict[str, tuple[type[TextFlags | LoopFlags], type[Section]]] = {
    "prepare": (PrepareFlags, PrepareConfig),
    "pretrain": (PretrainFlags, PretrainConfig),
    "train": (TrainFlags, ExperimentConfig),
    "plan": (TrainFlags, ExperimentConfig),
    "init": (TrainFlags, ExperimentConfig),
}


def find_equal(verb: str, unknown: str) -> str | None:
    """Return the flag, or else the setting, that an unknown flag of `verb` is another name of.

    >>> find_equal("train", "--learning-rate=1e-3"), find_equal("train", "--weight_decay")
    ('--lr', 'training.weight_decay=VALUE')
    """
    if verb not in _KINDS:
        return None
    flags, config = _KINDS[verb]
    name = unknown.lstrip("-").partition("=")[0].replace("-", "_")
    if name in OUTPUT_NAMES:
        return "--out"
    if (alias := find_alias(config, "", name)) is None:
        return None
    flag = paths_of(flags).get(alias.path)
    return f"--{flag.replace('_', '-')}" if flag else f"{alias.path}=VALUE"
