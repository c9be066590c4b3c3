"""What to write for a flag that isn't there: people type the names of Hugging Face's settings as flags."""

from __future__ import annotations

from smolora.cli.flags import LoopFlags, PretrainFlags, TrainFlags, paths_of
from smolora.config import ExperimentConfig, PretrainConfig
from smolora.config.base import Section

_KINDS: dict[str, tuple[type[LoopFlags], type[Section]]] = {
    "pretrain": (PretrainFlags, PretrainConfig),
    "train": (TrainFlags, ExperimentConfig),
}


def find_equal(verb: str, unknown: str) -> str | None:
    """Return the flag, or else the setting, that an unknown flag of `verb` is another name of.

    >>> find_equal("train", "--learning-rate=1e-3"), find_equal("train", "--weight_decay")
    ('--lr', 'training.weight_decay=VALUE')
    """
    if verb not in _KINDS:
        return None
    flags, config = _KINDS[verb]
    flag_of = {path: f"--{name.replace('_', '-')}" for path, name in paths_of(flags).items()}
    equal = {"output_dir": "--out"}
    for section, field in sorted(config.model_fields.items(), key=lambda item: item[0] == "training"):
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            for name in field.annotation.model_fields:  # training is last, since phases have names of its own too.
                path = f"{section}.{name}"
                equal[name] = flag_of.get(path, f"{path}=VALUE")  # vocab_size is the tokenizer's: the GPT's follows it.
    return equal.get(unknown.lstrip("-").partition("=")[0].replace("-", "_"))
