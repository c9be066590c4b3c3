"""What becomes of a weight that two modules share, as most small models' heads are tied to their token embedding.

peft puts its layers on each module by itself. Where they make one weight of both, the merged model is tied as its base
is; where they change only one, or each in another way, it has two weights, where its family can have two. (peft 0.21
adds all LoRA to the one that both share, and its merged model answers otherwise than the adapter.)
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
from smolora.models.structure import PreTrainedModel
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


def find_bound(model: PreTrainedModel) -> Tied:
    """Return the names of the parameters that are one whatever the model's config.json says.

    T5's embedding and head are: its `tie_word_embeddings` says whether outputs are scaled, and nothing else.
    """
    settings = {**model.config.to_dict(), "tie_word_embeddings": False}
    with torch.device("meta"):
        return find_tied(type(model)(type(model.config).from_dict(settings)))


@dataclass(frozen=True)
class Settled:
    """What becomes of a base's parameters, once it is clear which of them stay one."""

    updates: dict[str, Update]
    untied: dict[str, str]
    """The parameters that are to have a tensor of their own, and the one they shared it with."""


def settle_tied(updates: Mapping[str, Update], tied: Tied, bound: Tied, stored: Container[str]) -> Settled:
    """Return the updates by the names of parameters that the merged files hold.

    Where one weight parts, each does that can: config.json has one word for all.

    Args:
        updates: What the adapter makes of each parameter, by its name in the plain model.
        tied: Names that are one parameter of the base.
        bound: Those of them that can't be parted.
        stored: Names of the tensors in the base's files.

    Raises:
        ModelError: Parameters that can't would have to part.
    """
    settled, untied = dict(updates), dict[str, str]()
    held = {names: [name for name in names if any(place in stored for place in name_in_files(name))] for names in tied}
    differing = [names for names in tied if held[names] and not _is_alike(updates, names)]
    for names in differing:
        if _is_bound(names, bound):
            _refuse_bound(updates, names)
    for names, found in held.items():
        left = [name for name in names if name not in found]
        if differing and found and not _is_bound(names, bound):
            untied |= {name: found[0] for name in names if name != found[0]}
            settled |= {name: Update(None) for name in left if name not in updates}
        elif found:
            for name in left:
                settled.pop(name, None)
    return Settled(settled, untied)


def _is_alike(updates: Mapping[str, Update], names: tuple[str, ...]) -> bool:
    """Whether the same becomes of all of these parameters, or nothing of any."""
    return all(_is_same(updates.get(names[0]), updates.get(name)) for name in names)


def _is_bound(names: tuple[str, ...], bound: Tied) -> bool:
    return any(set(names) <= set(together) for together in bound)


def _refuse_bound(updates: Mapping[str, Update], names: tuple[str, ...]) -> None:
    changed = next(name for name in names if name in updates)
    others = ", ".join(name for name in names if name != changed)
    raise ModelError(
        f"the adapter changes {changed}, which is one weight with {others}, and no config.json of this family can part "
        "them: merged, it would change them too. Keep base and adapter side by side."
    )


def _is_same(one: object, other: object) -> bool:
    """Whether two updates, or parts of them, are the same numbers."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if is_dataclass(one) and type(one) is type(other):
        return all(_is_same(vars(one)[part.name], vars(other)[part.name]) for part in fields(one))
    return one == other


def write_untied_settings(folder: Path, added: Mapping[str, StoredTensor]) -> None:
    """Say in a merged folder's config.json, and in its index of shards, that what was one weight has several tensors.

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
