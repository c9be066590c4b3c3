"""Which parameter is what: the one table behind LoRA targets, phase groups, gradient groups and layer numbers.

A model comes in, its parts come out: every module that owns parameters, with its group, its layer and its role. Known
families are read from the registry by `config.model_type`; any other by its structure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from smolora.models.gpt import GPTModel
from smolora.models.registry import FAMILIES, Family, Role
from smolora.models.structure import holds_experts, infer_family, is_linear, returns_product
from smolora.models.tasks import find_heads

Group = Literal["attention", "mlp", "embedding", "head", "norm", "other"]

PEFT_PREFIX = "base_model.model."
"""What peft puts before the paths of the plain model."""

_BYPASSED = {
    **dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), ("dt_proj", "out_proj")),
    "jamba": ("dt_proj",),
}
"""Linear layers whose weight a family's own code reads, past whatever stands in their place; peft refuses out_proj."""


@dataclass(frozen=True)
class Part:
    """A module that owns parameters."""

    name: str
    """Path in the plain model."""
    group: Group
    layer: int | None
    """Index of its block, from 0; None outside of the blocks."""
    role: Role | None
    """What it computes inside attention or MLP."""
    is_linear: bool
    """Whether it is a linear layer, and returns its product."""


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model."""

    family: str
    """`config.model_type`."""
    parts: tuple[Part, ...]
    blocks: tuple[str, ...]
    """Paths of the lists of numbered blocks in the plain model; of an encoder-decoder the encoder's come first."""
    num_layers: int
    heads: tuple[str, ...] = ()
    """Paths of the modules that are a task's head, trained whole beside any adapter; a language model has none."""

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        """Return the blocks of the plain model that this is the anatomy of, in order."""
        return [block for path in self.blocks for block in model.get_submodule(path).children()]

    def linear_modules(self) -> list[str]:
        """Every linear layer but the head, and those whose weight the family's own code reads."""
        left = self.unadaptable_modules()
        return [part.name for part in self.parts if part.is_linear and part.group != "head" and part.name not in left]

    def unadaptable_modules(self) -> list[str]:
        """The layers that nothing can be put on: experts in one tensor, and those whose weight is read past them."""
        bypassed = _BYPASSED.get(self.family, ())
        return [
            part.name
            for part in self.parts
            if (part.group == "mlp" and not part.is_linear) or part.name.rpartition(".")[2] in bypassed
        ]

    def modules_with_role(self, *roles: Role) -> list[str]:
        """The modules that compute one of `roles`."""
        return [part.name for part in self.parts if part.role in roles]

    def part_of(self, parameter_name: str) -> Part:
        """Return the part that owns a parameter, under its plain name or the one peft gives it.

        A parameter that no part of the plain model owns, such as a soft prompt, is in the group "other".
        """
        path = parameter_name.removeprefix(PEFT_PREFIX)
        while path:
            path = path.rpartition(".")[0]  # q_proj.lora_A.default.weight is owned by the longest known path, q_proj.
            if path in self._by_name:
                return self._by_name[path]
        return Part(parameter_name, "other", layer=None, role=None, is_linear=False)

    @cached_property
    def _by_name(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts}


def build_anatomy(model: nn.Module, heads: Sequence[str] | None = None) -> Anatomy:
    """Return the anatomy of a plain model: a GPTModel, one of transformers', or any with numbered blocks.

    Args:
        model: The plain model.
        heads: Paths of the modules that are its task's head; left out, those that its class adds to the base.

    Raises:
        ModelError: The family is unknown and the model has no numbered blocks with linear layers.
    """
    model_type = _read_model_type(model)
    heads = find_heads(model) if heads is None else tuple(heads)
    family = FAMILIES.get(model_type)
    expected = {*family.blocks, *([] if heads else [family.head])} if family else set()
    if family is None or not expected <= dict(model.named_modules()).keys():
        # Also a known family without a head, or under the names of another transformers version.
        family = infer_family(model)
    parts = tuple(_iter_parts(model, family, heads))
    num_layers = sum(len(list(model.get_submodule(path).children())) for path in family.blocks)
    return Anatomy(model_type, parts, family.blocks, num_layers, heads)


def _read_model_type(model: nn.Module) -> str:
    if isinstance(model, GPTModel):
        return "smolora_gpt"
    return str(model.config.model_type) if isinstance(model, PreTrainedModel) else type(model).__name__


def _iter_parts(model: nn.Module, family: Family, heads: tuple[str, ...]) -> Iterator[Part]:
    sizes = {path: len(list(model.get_submodule(path).children())) for path in family.blocks}
    fitting: dict[type[nn.Module], bool] = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        if name in heads or name.startswith(tuple(f"{head}." for head in heads)):
            yield Part(name, "head", None, None, is_linear(module))
            continue
        layer, path = _split_layer(name, sizes)
        group, role = _read_place(path, module, family)
        if layer is not None and holds_experts(module):
            group = "mlp"
        if is_linear(module) and type(module) not in fitting:
            fitting[type(module)] = returns_product(module)
        yield Part(name, group, layer, role, fitting.get(type(module), False))


def _split_layer(name: str, sizes: Mapping[str, int]) -> tuple[int | None, str]:
    """Split model.layers.3.mlp.fc1 into (3, mlp.fc1); outside of the blocks there is no layer.

    Args:
        name: Path of a module.
        sizes: The number of blocks by the path of their list; those of a later list are counted on.
    """
    before = 0
    for blocks, size in sizes.items():
        if name.startswith(f"{blocks}."):
            number, _, path = name.removeprefix(f"{blocks}.").partition(".")
            return before + int(number), path
        before += size
    return None, name


def _read_place(path: str, module: nn.Module, family: Family) -> tuple[Group, Role | None]:
    if path == family.head:
        return "head", None
    if path in family.embeddings:
        return "embedding", None
    if path in family.attention:
        return "attention", family.attention[path]
    if path in family.mlp:
        return "mlp", family.mlp[path]
    is_norm = all(parameter.ndim == 1 for parameter in module.parameters(recurse=False))
    return ("norm" if is_norm else "other"), None
