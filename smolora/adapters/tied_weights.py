"""What becomes of a weight that two modules share, as most small models' heads are tied to their token embedding.

peft puts its layers on each module by itself. Where they make one weight of both, the merged model is tied as its base
is; where they change only one, or each in another way, it has two weights. (peft 0.21 adds all LoRA to the one that
both share, and its merged model answers otherwise than the adapter.)
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from smolora.adapters.merged_weights import Update
from smolora.errors import ModelError
from smolora.models.anatomy import Anatomy
from smolora.models.weight_files import INDEX_FILE, StoredTensor, name_in_files
from smolora.records.staging import write_json

Tied = list[tuple[str, ...]]
"""Names of parameters that are one."""


def find_tied(model: nn.Module) -> Tied:
    """Return the names of the parameters that modules of a plain model share."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [tuple(shared) for shared in names.values() if len(shared) > 1]


@dataclass(frozen=True)
class Settled:
    """What becomes of a base's parameters, once it is clear which of them stay one."""

    updates: dict[str, Update]
    untied: dict[str, str]
    """The parameters that are to have a tensor of their own, and the one they shared it with."""


def settle_tied(updates: Mapping[str, Update], tied: Tied, anatomy: Anatomy, stored: Container[str]) -> Settled:
    """Return the updates by the names of parameters that the merged files hold.

    Args:
        updates: What the adapter makes of each parameter, by its name in the plain model.
        tied: Names that are one parameter of the base.
        anatomy: Of the plain model.
        stored: Names of the tensors in the base's files.

    Raises:
        ModelError: Modules that aren't embedding and head would have to part.
    """
    settled, untied = dict(updates), dict[str, str]()
    for names in tied:
        held = [name for name in names if any(place in stored for place in name_in_files(name))]
        if not updates.keys() & set(names) or not held:
            continue
        left = [name for name in names if name not in held]
        if all(_is_same(updates.get(names[0]), updates.get(name)) for name in names):
            for name in left:
                del settled[name]
            continue
        _refuse_other_than_head(updates, names, anatomy)
        untied |= {name: held[0] for name in names if name != held[0]}
        settled |= {name: Update(None) for name in left if name not in updates}
    return Settled(settled, untied)


def _refuse_other_than_head(updates: Mapping[str, Update], names: tuple[str, ...], anatomy: Anatomy) -> None:
    if sorted(anatomy.part_of(name).group for name in names) != ["embedding", "head"]:
        changed = next(name for name in names if name in updates)
        others = ", ".join(name for name in names if name != changed)
        raise ModelError(
            f"the adapter changes {changed}, which is one weight with {others}: merged, it would change them too. "
            "Keep base and adapter side by side."
        )


def _is_same(one: object, other: object) -> bool:
    """Whether two updates, or parts of them, are the same numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if is_dataclass(one) and type(one) is type(other):
        return all(_is_same(vars(one)[part.name], vars(other)[part.name]) for part in fields(one))
    return one == other


def write_untied_settings(folder: Path, added: Mapping[str, StoredTensor]) -> None:
    """Say in a merged folder's config.json, and in its index of shards, that a head has a tensor of its own.

    Args:
        folder: The merged folder.
        added: What its files hold beside the base's tensors: by the new name, the tensor that it was copied from.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {**settings, "tie_word_embeddings": False})
    if not (folder / INDEX_FILE).is_file():
        return
    index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    for name, tensor in added.items():
        index["weight_map"][name] = tensor.file.name
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += tensor.end - tensor.start
    write_json(folder / INDEX_FILE, index)
