"""What to write for a flag that isn't there: people type the names of Hugging Face's settings as flags."""

from __future__ import annotations

from smolora.cli.flags import LoopFlags, PrepareFlags, PretrainFlags, TextFlags, TrainFlags, paths_of
from smolora.config import ExperimentConfig, PrepareConfig, PretrainConfig
from smolora.config.base import Section

_KINDS: dict[str, tuple[type[TextFlags | LoopFlags], type[Section]]] = {
    "prepare": (PrepareFlags, PrepareConfig),
    "pretrain": (PretrainFlags, PretrainConfig),
    "train": (TrainFlags, ExperimentConfig),
    "plan": (TrainFlags, ExperimentConfig),
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
                # A flag before any path (phases have a learning_rate too); of paths the last: vocab_size is the
                # tokenizer's, which the GPT's follows.
                if path in flag_of or not equal.get(name, "").startswith("--"):
                    equal[name] = flag_of.get(path, f"{path}=VALUE")
    return equal.get(unknown.lstrip("-").partition("=")[0].replace("-", "_"))
