"""The files of an adapter folder, read and judged before any model is touched.

A folder is peft's (adapter_config.json, adapter_model.safetensors); ours adds base_identity.json, which says on which
weights it was trained and which bytes its own are, and prompt_format.json. Adapters of the same shape fit many bases,
so the shapes alone prove nothing.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast, get_args

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smolora.config.model import Quantization, TaskType
from smolora.data.prompts import read_prompt_format
from smolora.errors import ModelError, clause
from smolora.records.staging import hash_file, hash_folder

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
IDENTITY_FILE = "base_identity.json"

_OPENED = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "IA3": "ia3",
    "VERA": "vera",
    "LN_TUNING": "layernorm",
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
    "PREFIX_TUNING": "prefix_tuning",
}
"""Our name of a method, by peft's."""

PEFT_TASKS: dict[TaskType, str] = {
    "causal_lm": "CAUSAL_LM",
    "classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
    "seq2seq": "SEQ_2_SEQ_LM",
}
"""What peft calls a task."""
_TASKS = {name: task for task, name in PEFT_TASKS.items()}

_METHOD_KEY = re.compile(r"\.(lora|ia3|vera|trainable_tokens)_|^prompt_e")
"""In the names of a method's own tensors; the others are of a head that is trained whole."""


_BASE_COPY = (".base_layer.weight", ".base_layer.bias")
"""Ends of the names of what isn't an adapter's own: on a head, peft writes the layer under it beside. (A bias that was
trained is the adapter's own, and has the same name.)"""


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it lies on disk."""

    folder: Path
    config: peft.PeftConfig
    tensors: Mapping[str, Tensor]
    identity: Mapping[str, str | None]
    """`fingerprint`, `source`, `revision` and `quantization` of the base, `relative_source`, its path from the folder
    that the adapter's lies in, and `weights`, the SHA-256 of the adapter's own file; empty for a folder that plain
    peft wrote."""
    base_copies: Mapping[str, Tensor] = field(default_factory=dict)
    """What peft brings along of the base where an adapter is on its head or embedding: that layer's own weight."""

    @property
    def base(self) -> str | None:
        """The folder or hub id of the base: where base and adapter were moved together, where it is now."""
        recorded = self.config.base_model_name_or_path or self.identity.get("source")
        relative = self.identity.get("relative_source")
        if not relative or recorded != self.identity.get("source") or Path(str(recorded)).is_dir():
            return recorded
        moved = self.folder.resolve().parent / relative
        return str(moved.resolve()) if moved.is_dir() else recorded

    @property
    def method(self) -> str:
        """The method by its name here; PiSSA's and LoftQ's adapters are LoRA once they are saved."""
        if isinstance(self.config, peft.LoraConfig) and (self.config.use_dora or self.config.use_rslora):
            return "dora" if self.config.use_dora else "rslora"
        return _OPENED[str(self.config.peft_type.value)]

    @property
    def quantization(self) -> Quantization:
        """How the base was held while the adapter was trained.

        Raises:
            ModelError: In a way that isn't known here.
        """
        found = self.identity.get("quantization", "none")
        if found not in get_args(Quantization):
            raise ModelError(
                f"{self.folder / IDENTITY_FILE} names the quantization {found!r}; known: "
                f"{', '.join(get_args(Quantization))}. It is from a newer version, or damaged."
            )
        return cast("Quantization", found)

    @property
    def task(self) -> TaskType:
        """What base and adapter are asked; of an adapter that doesn't say, text."""
        return self.named_task or "causal_lm"

    @property
    def named_task(self) -> TaskType | None:
        """What the adapter says that it is asked; plain peft may leave it open."""
        return _TASKS.get(str(self.config.task_type), "causal_lm") if self.config.task_type else None

    @property
    def labels(self) -> tuple[str, ...]:
        """What a classifier tells apart: as kept with the adapter, else numbered, as many as the head answers."""
        if self.task not in ("classification", "token_classification"):
            return ()
        fmt = read_prompt_format(self.folder)
        if fmt is not None and fmt.labels:
            return fmt.labels
        heads = [tensor for key, tensor in self.tensors.items() if not _METHOD_KEY.search(key) and tensor.ndim == 2]
        # Layers of a head before the answer are square, and an embedding has more rows than there are answers.
        answering = min(heads, key=lambda weight: (weight.shape[0] == weight.shape[1], len(weight)), default=())
        return tuple(f"LABEL_{number}" for number in range(len(answering)))

    @property
    def label_names(self) -> tuple[str, ...]:
        """What numbers in place of labels stood for in its rows; nothing where they didn't say it."""
        fmt = read_prompt_format(self.folder)
        return fmt.label_names if fmt else ()

    @property
    def trained_biases(self) -> list[str]:
        """The biases of the base that it has its own version of."""
        own = [key for key in self.tensors if key.endswith(".bias") and not key.endswith(".lora_B.bias")]
        return own if trains_biases(self.config) else []

    def refuse_other_base(self, fingerprint: str, source: str) -> None:
        """Raise if the adapter says that it was trained on other weights.

        Raises:
            ModelError: The fingerprints differ.
        """
        expected = self.identity.get("fingerprint")
        if expected and fingerprint and expected != fingerprint:
            raise ModelError(
                f"{self.folder} was trained on another base: {self.identity.get('source')} (weights {expected[:12]}), "
                f"not on {source} ({fingerprint[:12]}). Open it on the base it was trained on."
            )

    def warn_of_unproved_base(self, source: str) -> None:
        """Say so where nothing but a name tells on which weights it was trained, and `source` has another name."""
        recorded = self.config.base_model_name_or_path or "none"
        if not self.identity and Path(recorded).name != Path(source).resolve().name:
            logger.warning(
                "%s doesn't record the weights that it was trained on, and names as its base: %s. "
                "Whether %s holds them can't be checked",
                self.folder,
                recorded,
                source,
            )


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG_FILE).is_file()


def trains_biases(config: peft.PeftConfig) -> bool:
    """Whether an adapter has its own version of biases of the base, which peft puts in the place of the base's."""
    return isinstance(config, peft.LoraConfig | peft.VeraConfig) and config.bias != "none"


def read_adapter(folder: Path) -> StoredAdapter:
    """Read an adapter folder.

    Raises:
        ModelError: It isn't one, is pickled or damaged, of a method that can't be opened, not finite, or not what was
        written.
    """
    if not is_adapter_folder(folder):
        raise ModelError(f"{folder} holds no adapter: there is no {CONFIG_FILE}. Name an adapter folder, or a run.")
    tensors, config = _read_tensors(folder), _read_config(folder)
    copied = _BASE_COPY[:1] if trains_biases(config) else _BASE_COPY
    copies = {key: tensors.pop(key) for key in [*tensors] if key.endswith(copied)}
    adapter = StoredAdapter(folder, config, tensors, _read_identity(folder), copies)
    for key, tensor in adapter.tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{folder}: {key} holds NaN or infinity. Take an earlier checkpoint of its run.")
    written = adapter.identity.get("weights")
    if written and written != hash_file(folder / WEIGHTS_FILE):
        raise ModelError(
            f"{folder / WEIGHTS_FILE} isn't what was written: its SHA-256 is another one than in {IDENTITY_FILE}. "
            f'Copy the adapter again; if you changed its numbers on purpose, take "weights" out of {IDENTITY_FILE}.'
        )
    return adapter


def _read_config(folder: Path) -> peft.PeftConfig:
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} can't be read: {clause(error)}. Copy the adapter again.") from None
    if config.peft_type is None:
        raise ModelError(f"{folder / CONFIG_FILE} can't be read: it names no peft_type. Copy the adapter again.")
    if config.peft_type not in _OPENED:
        raise ModelError(f"{folder} is a {config.peft_type.value} adapter; {', '.join(_OPENED)} can be opened.")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickled = " Pickled weights (*.bin) can run code and are not opened." if any(folder.glob("*.bin")) else ""
        raise ModelError(f"{folder} has no {WEIGHTS_FILE}.{pickled}")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file} can't be read: {error}. Copy the adapter again.") from None
    return tensors


def is_same_adapter(one: Path, other: Path) -> bool:
    """Whether two folders hold the same adapter, wherever their bases stand."""
    files, others = ({**hash_folder(folder), IDENTITY_FILE: ""} for folder in (one, other))
    return files == others


def _read_identity(folder: Path) -> dict[str, str | None]:
    file = folder / IDENTITY_FILE
    if not file.is_file():
        return {}
    try:
        identity = json.loads(file.read_text(encoding="utf-8"))
        known = {name: identity[name] for name in ("fingerprint", "source", "revision")}
        later = {name: identity.get(name) for name in ("relative_source", "weights")}
        return {**known, **later, "quantization": identity.get("quantization", "none")}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{file} can't be read. Copy the adapter again.") from None
