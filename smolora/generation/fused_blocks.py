"""A model's blocks as fewer and larger operations on a CPU, for the many steps of a generation.

Linear layers compute from packed weights: torch hands a float32 product to a BLAS that lays the matrix out anew each
time (64 rows and a vocabulary of 32,000 took 15 ms a step instead of 3). Layers that read one input are one product
then. In the families whose blocks are known, norms, rotary positions and gates take a third of the operations: a step
of a small model is mostly their dispatch.

`B` rows of a step, `T` tokens of each, `D` width, `H` heads, `G` heads of keys, `K` head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from smolora.generation.head import Head
from smolora.generation.slots import FEWEST_ROWS, SlotCache, attend, attend_prompts, compares_float32
from smolora.generation.step import is_filling, is_packed
from smolora.models.anatomy import PEFT_PREFIX
from smolora.models.bundle import read_config
from smolora.models.frozen_linear import can_pack, join_biases, multiply_by_onednn, pack
from smolora.models.fused_ops import ACTIVATIONS, gate
from smolora.models.registry import FAMILIES, Family, Fused, Role
from smolora.models.structure import (
    find_head_norms,
    has_plain_forward,
    read_bias,
    read_weight,
    replaced_forwards,
)
from smolora.runtime.device import has_intel_processor

_MOST_BYTES, _MOST_BYTES_FOR_FEW_ROWS = 2**31, 2**29
"""What copies may take. For an answer or two they pay from the eighth token on, and a chat should stay small."""

_WIDE = 8192
"""Outputs from which a product is a head's."""

_NORM_TYPES = (torch.float32, torch.bfloat16, torch.float16)

Product = Callable[[Tensor], Tensor]


class FusedBlocks:
    """What the modules of a model compute in place of their own, from copies of the weights of this moment.

    A model on another device keeps its own blocks, and one whose copies would take more than 2 GiB (512 MiB for up to
    three rows) its own products. One of the head in bfloat16 may come to them (`Head`). An adapter that isn't merged is
    computed by peft's layers.

    Args:
        model: One of transformers', or peft's around it, that decodes inside `slot_attention`, by `forward` alone.
        num_rows: How many rows a layer usually gets; oneDNN chooses the layout for them.
    """

    def __init__(self, model: nn.Module, *, num_rows: int) -> None:
        self._model = model
        self._num_rows = num_rows
        self._forwards: dict[nn.Module, Callable[..., object]] = {}
        self.packs_prompts = False
        """Whether attention can be asked for prompts that lie end to end."""
        self.head: Head | None = None
        """What stands for the model's head, unless that is more than a matrix."""

        if next(model.parameters()).device.type == "cpu":
            linears = [module for module in model.modules() if _is_packable(module, num_rows)]
            self._most_bytes = _MOST_BYTES if num_rows >= FEWEST_ROWS else _MOST_BYTES_FOR_FEW_ROWS
            is_small = sum(module.get_parameter("weight").nbytes for module in linears) <= self._most_bytes
            self._to_pack = dict.fromkeys(linears) if is_small else {}
            self._fuse()

    def installed(self) -> AbstractContextManager[None]:
        """Let the model compute so for the block: a step's, so that nothing is replaced while others have the model."""
        return replaced_forwards(self._forwards)

    def _fuse(self) -> None:
        """Take first what belongs together, then the head, then every other linear layer."""
        config = read_config(self._model)
        settings, family = config.to_dict(), FAMILIES.get(str(config.model_type))
        if family and family.fused:
            self._fuse_norms(family.fused, eps=float(settings["rms_norm_eps"]))
            activation = ACTIVATIONS.get(str(settings.get("hidden_activation") or settings.get("hidden_act")))
            blocks = list(_find_blocks(self._model, family))
            can_pack_prompts = family.fused.attention and compares_float32(next(self._model.parameters()))
            self.packs_prompts = bool(blocks) and can_pack_prompts
            for block in blocks:
                if family.fused.attention:
                    self._fuse_attention(block, family, is_last=block is blocks[-1])
                if activation:
                    self._fuse_mlp(block, family, partial(gate, activation=activation), is_last=block is blocks[-1])
        self._fuse_head()
        for linear in list(self._to_pack):
            if not _multiplies_by_blas(read_weight(linear)):
                self._forwards[linear] = self._pack([linear])

    def _fuse_head(self) -> None:
        transformer = next(module for module in self._model.modules() if isinstance(module, PreTrainedModel))
        linear = transformer.get_output_embeddings()
        if not isinstance(linear, nn.Linear) or not _is_plain(linear) or linear.bias is not None:
            return
        is_packed = linear in self._to_pack and not _multiplies_by_blas(linear.weight)
        self._to_pack.pop(linear, None)
        build = partial(self._build_product, [linear]) if is_packed else None
        self.head = Head(linear.weight, build, num_rows=self._num_rows, most_bytes=self._most_bytes)
        self._forwards[linear] = self.head

    def _fuse_norms(self, fused: Fused, *, eps: float) -> None:
        for module in self._model.modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            # The first in llama's norms, the second in gemma's. (DoRA's lengths are a layer with a vector, too.)
            is_norm = vars(module).keys() & {"variance_epsilon", "eps"}
            if weight is not None and is_norm and weight.ndim == 1 and weight.dtype in _NORM_TYPES:
                self._forwards[module] = _RMSNorm(weight.detach(), eps=eps, offset=fused.norm_offset)

    def _fuse_attention(self, block: nn.Module, family: Family, *, is_last: bool) -> None:
        query, key, value = (_find(block, family.attention, role) for role in ("query", "key", "value"))
        attention = block.get_submodule(next(iter(family.attention)).rpartition(".")[0])
        inputs, output = self._join([query, key, value]), self._join([_find(block, family.attention, "output")])
        self._forwards[attention] = _attention_forward(attention, inputs, output, is_last=is_last)

    def _fuse_mlp(self, block: nn.Module, family: Family, gated: Product, *, is_last: bool) -> None:
        layers = [_find(block, family.mlp, role) for role in ("gate", "up")]
        if not all(layer in self._to_pack for layer in layers):
            return  # Two products and a gate are what it is.
        mlp = block.get_submodule(next(iter(family.mlp)).rpartition(".")[0])
        gate_up, down = self._join(layers), self._join([_find(block, family.mlp, "down")])
        self._forwards[mlp] = lambda x: x if is_last and is_filling() else down(gated(gate_up(x)))

    def _join(self, layers: Sequence[nn.Module]) -> Product:
        """Return one product of layers, outputs side by side."""
        if all(layer in self._to_pack for layer in layers):
            return self._pack(layers)
        if len(layers) == 1:
            return layers[0]
        return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)

    def _pack(self, layers: Sequence[nn.Module]) -> Product:
        """Return one product of plain layers, and take them from what is to be packed."""
        for layer in layers:
            del self._to_pack[layer]
        return self._build_product(layers)

    def _build_product(self, layers: Sequence[nn.Module]) -> Product:
        """Return one product of plain layers, from a copy of their weights."""
        weights = [read_weight(layer).detach() for layer in layers]
        joint = weights[0] if len(weights) == 1 else torch.cat(weights)
        bias = join_biases([len(weight) for weight in weights], [read_bias(layer) for layer in layers], joint)
        if _multiplies_by_blas(joint):
            return partial(F.linear, weight=joint, bias=bias)
        return partial(multiply_by_onednn, weight=pack(joint, num_rows=self._num_rows), bias=bias)


def _attention_forward(
    attention: nn.Module, inputs: Product, output: Product, *, is_last: bool
) -> Callable[..., tuple[Tensor, None]]:
    own = vars(attention)
    width, scaling, layer = int(own["head_dim"]), float(own["scaling"]), int(own["layer_idx"])
    heads_of_kind = 2 + int(own["num_key_value_groups"])  # Of queries that share a key, that key and its value.
    norms = find_head_norms(attention)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        past_key_values: SlotCache,
        **_unused: object,
    ) -> tuple[Tensor, None]:
        heads = inputs(hidden_states).view(*hidden_states.shape[:-1], -1, width)  # [B, T, H + 2 * G, K]
        num_shared = heads.shape[2] // heads_of_kind
        kinds = [heads.shape[2] - 2 * num_shared, num_shared, num_shared]
        if norms:
            query, key, value = torch.split(heads, kinds, dim=2)
            heads = torch.cat((norms[0](query), norms[1](key), value), dim=2)
        if is_packed():
            heads = heads.float()  # As their scores are: rounded to 16 bits, they would change what is read.
        turned, value = torch.split(heads, [kinds[0] + num_shared, num_shared], dim=2)
        turned = past_key_values.turn(turned, *position_embeddings)
        query, key = torch.split(turned.transpose(1, 2), kinds[:2], dim=1)
        value = value.transpose(1, 2).to(hidden_states.dtype)
        key, value = past_key_values.update_for_attend(key, value, layer)
        if is_last and is_filling():
            return hidden_states, None  # Nothing reads what the last block makes of a prompt but its keys and values.
        if is_packed():
            mixed = attend_prompts(heads, num_heads=kinds[0], window=attention_mask, scaling=scaling)
            return output(mixed.flatten(2).to(hidden_states.dtype)), None
        mixed, _ = attend(attention, query, key, value, attention_mask, scaling=scaling)
        return output(mixed.flatten(2)), None

    return forward


class _RMSNorm:
    """`smolora.models.fused_ops.rms_norm` without gradient, in half of the operations: for a few rows."""

    def __init__(self, weight: Tensor, *, eps: float, offset: float) -> None:
        self._weight = weight.float().add(offset) if offset else weight
        self._eps = torch.tensor([eps])
        self._is_rounded_first = not offset

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()  # Once: each operation on mixed types would do so.
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        normed = wide * torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        if self._is_rounded_first:
            return normed.to(x.dtype).mul_(self._weight)
        return normed.mul_(self._weight).to(x.dtype)


def _find_blocks(model: nn.Module, family: Family) -> Iterator[nn.Module]:
    """Yield the blocks of a plain model, or of one inside peft's."""
    for name, module in model.named_modules():
        if name.removeprefix(PEFT_PREFIX) in family.blocks:
            yield from module.children()


def _find(block: nn.Module, roles: Mapping[str, Role], role: Role) -> nn.Module:
    [path] = [path for path, found in roles.items() if found == role]
    return block.get_submodule(path)


def _is_plain(module: nn.Module) -> bool:
    """Whether nothing but a product with a matrix, and perhaps a bias, is computed here."""
    is_linear = isinstance(module, nn.Linear | Conv1D)
    return is_linear and has_plain_forward(module) and "forward" not in vars(module)


def _is_packable(module: nn.Module, num_rows: int) -> bool:
    """Whether it is plain, and a copy of its weight is faster."""
    if not _is_plain(module):
        return False
    weight = read_weight(module)
    return can_pack(weight) and (num_rows >= FEWEST_ROWS or weight.dtype != torch.float32)


def _multiplies_by_blas(weight: Tensor) -> bool:
    """Whether a product with few rows of float32 is left to torch's BLAS: MKL on Intel, but for a vocabulary's.

    It takes 5 us where oneDNN takes 30 (1 row of 288 numbers), 110 and 130 (64 rows, 864 outputs), but 1.3 times as
    long for 32 rows and 32,000 outputs.
    """
    return weight.dtype == torch.float32 and has_intel_processor() and len(weight) < _WIDE
