"""LoRA layers that read one input, as a single function: one product with the frozen weights, two small ones beside it.

Plain peft adds four small autograd functions to every layer, computes them in float32 and keeps four activations; here
the scale is folded into the small product, every branch accumulates into the product's own output, and only the input
is kept.

Legend: `N` tokens, `D` input width, `O` outputs of all layers side by side, `R` ranks of all layers side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from smolora.models.frozen_linear import FrozenLinear
from smolora.models.fused_ops import TORCH_KERNELS, Activation, Dropped, Kernels
from smolora.models.quantised import HeldLinear, is_dequantised_to_multiply
from smolora.models.structure import has_plain_forward, is_linear, is_quantised, read_bias, read_weight


@dataclass(frozen=True)
class _Branch:
    """One layer's adapter: its matrices, and where its rank and its outputs lie in the joint ones."""

    a: nn.Parameter
    """[r, D]"""
    b: nn.Parameter
    """[O_i, r]"""
    scale: float
    ranks: slice
    outputs: slice


class _Joint(NamedTuple):
    """The adapters of all layers as two matrices in the type of the computation; one's own may be its parameters."""

    a: Tensor
    """[R, D]: every A, one below the other."""
    b: Tensor
    """[O, R]: every B, on the diagonal."""


@dataclass(frozen=True)
class _Adapters:
    """The adapters that are on in layers side by side; a backward pass keeps those of its forward pass."""

    branches: Sequence[_Branch]
    dropout: nn.Dropout | None
    num_outputs: int

    @property
    def matrices(self) -> list[nn.Parameter]:
        """A_1, B_1, A_2, ..."""
        return [matrix for branch in self.branches for matrix in (branch.a, branch.b)]

    def draw(self, like: Tensor) -> Dropped | None:
        """Return which inputs dropout drops, or None where it is off."""
        if self.dropout is None or not self.dropout.training or not self.dropout.p:
            return None
        return Dropped.draw(like, self.dropout.p)

    def join(self, dtype: torch.dtype) -> _Joint:
        """Return the joint matrices of this moment. (The fused optimiser doesn't count versions, so none are kept.)"""
        if len(self.branches) == 1 and len(self.branches[0].b) == self.num_outputs:
            (branch,) = self.branches
            return _Joint(branch.a.detach().to(dtype), branch.b.detach().to(dtype))
        a = torch.cat([branch.a.detach() for branch in self.branches]).to(dtype)
        b = a.new_zeros(self.num_outputs, len(a))
        for branch in self.branches:
            b[branch.outputs, branch.ranks] = branch.b.detach()
        return _Joint(a, b)

    def scale_(self, low: Tensor, dropped: Dropped | None) -> Tensor:
        """Multiply `[N, R]` by the scales of the branches and of dropout, in place: these columns are the fewest."""
        of_dropout = 1.0 if dropped is None or self.dropout is None else 1 / (1 - self.dropout.p)
        scales = {branch.scale * of_dropout for branch in self.branches}
        if len(scales) == 1:
            return low if scales == {1.0} else low.mul_(scales.pop())
        for branch in self.branches:
            low[:, branch.ranks] *= branch.scale * of_dropout
        return low

    def split_gradients(self, grad_a: Tensor | None, grad_b: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of A_1, B_1, A_2, ... from those of the joint matrices, B's being `[R, O]`."""
        gradients: list[Tensor | None] = []
        wide = None if grad_a is None else grad_a.to(self.branches[0].a.dtype)
        for branch in self.branches:
            gradients.append(wide[branch.ranks] if wide is not None and branch.a.requires_grad else None)
            b = None
            if grad_b is not None and branch.b.requires_grad:
                b = torch.empty_like(branch.b).copy_(grad_b[branch.ranks, branch.outputs].t())
            gradients.append(b)
        return gradients


class LoRAProduct:
    """x -> [x W_i^T + b_i + scale_i * dropout(x) A_i^T B_i^T for each layer i], side by side.

    Args:
        layers: Linear layers, adapted or not, that read the same input.
        packed: Hold the frozen weights packed for the CPU's matrix units.
        gated: Read `[g, u]`, `[N, 2 * D]`, and multiply act(g) * u; that product isn't kept but made again in backward.
        kernels: What computes it.

    Raises:
        ValueError: A layer that `why_not_fast` refuses.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        *,
        packed: bool,
        gated: Activation | None = None,
        kernels: Kernels = TORCH_KERNELS,
    ) -> None:
        for layer in layers:
            if reason := why_not_fast(layer):
                raise ValueError(reason)
        bases = [_base_of(layer) for layer in layers]
        self.frozen = _freeze(bases, packed=packed)
        self.gated: Activation | None = gated
        self.kernels = kernels
        self._layers = list(layers)
        self._adapters = _read_adapters(layers, self.frozen.sizes)
        self._switched = [_switches_of(layer) for layer in layers]
        self._reason: str | None = None

    def follow(self) -> str | None:
        """Read which adapter is on; return why this can't compute it, or None where it can.

        It is cheap, so that every forward pass can ask.
        """
        switched = [_switches_of(layer) for layer in self._layers]
        if switched != self._switched:
            self._switched = switched
            self._reason = next((reason for layer in self._layers if (reason := why_not_fast(layer))), None)
            self._adapters = self._adapters if self._reason else _read_adapters(self._layers, self.frozen.sizes)
        return self._reason

    def __call__(self, x: Tensor) -> Tensor:
        """Return `[..., O]` of `[..., D]`, with the adapters that `follow` found."""
        flat, adapters = x.flatten(0, -2), self._adapters
        dropped = adapters.draw(flat[:, : self.frozen.num_inputs])
        output: Tensor = _Product.apply(flat, self, adapters, dropped, *adapters.matrices)  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], -1)

    def read(self, x: Tensor) -> Tensor:
        """Return what the frozen weights multiply: `x`, or its gated half."""
        return self.kernels.gate(x, self.gated) if self.gated else x


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, product: LoRAProduct, adapters: _Adapters, dropped: Dropped | None, *matrices: Tensor
    ) -> Tensor:
        ctx.product, ctx.adapters = product, adapters
        if not matrices:
            ctx.save_for_backward(x if product.gated else None)
            return product.frozen.forward(product.read(x))
        joint = adapters.join(x.dtype)
        read = product.read(x)
        kept = read if dropped is None else dropped.zero_(read.clone(memory_format=torch.contiguous_format))
        low = adapters.scale_(kept @ joint.a.t(), dropped)  # [N, R]
        # What dropout left is kept as it is, unless it can be made again from the gate's input.
        ctx.save_for_backward(x if product.gated else kept, low, dropped and dropped.places, *joint)
        return product.frozen.forward(read).addmm_(low, joint.b.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        product: LoRAProduct = ctx.product
        adapters: _Adapters = ctx.adapters
        needs_x, _, _, _, *needs_matrices = ctx.needs_input_grad
        saved, *rest = ctx.saved_tensors  # Once: recomputed activations are gone after the first look.
        if not needs_matrices:
            grad_x = product.frozen.backward(grad) if needs_x else None
            if grad_x is not None and product.gated:
                grad_x, _ = product.kernels.gate_backward(grad_x, saved, product.gated)
            return grad_x, None, None, None
        low, places, a, b = rest
        dropped = None if places is None else Dropped(places)
        # In the order in which what is read was just in use, so that it is still in the processor's cache.
        grad_low = adapters.scale_(grad @ b, dropped)  # [N, R]
        grad_b = low.t() @ grad if any(needs_matrices[1::2]) else None  # [R, O]
        grad_x = product.frozen.backward(grad) if needs_x else None
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_low, a) if dropped is None else grad_x.add_(dropped.zero_(grad_low @ a))
        kept = saved
        if product.gated:
            if grad_x is not None:
                grad_x, kept = product.kernels.gate_backward(grad_x, saved, product.gated)
            else:
                kept = product.read(saved)
            kept = kept if dropped is None else dropped.zero_(kept)
        grad_a = grad_low.t() @ kept if any(needs_matrices[0::2]) else None
        return grad_x, None, None, None, *adapters.split_gradients(grad_a, grad_b)


def why_not_fast(layer: nn.Module) -> str | None:
    """Return why a layer can't be part of a LoRAProduct, or None where it can."""
    if isinstance(layer, BaseTunerLayer) and (isinstance(layer, AdaLoraLayer) or not isinstance(layer, LoraLayer)):
        return f"{type(layer).__module__.split('.')[2]} isn't LoRA"  # peft.tuners.<method>.layer
    if isinstance(layer, ModulesToSaveWrapper):
        return "a head that is trained whole"
    base = _base_of(layer)
    if is_quantised(base):
        if not is_dequantised_to_multiply(base):
            return f"{type(base).__name__} multiplies by its quantised weight itself"
    elif not is_linear(base) or not has_plain_forward(base):
        return f"{type(base).__name__} isn't a plain linear layer"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "its base is trained too"
    return _why_not_plain_lora(layer) if isinstance(layer, LoraLayer) else None


def _why_not_plain_lora(layer: LoraLayer) -> str | None:
    if len(layer.active_adapters) != 1:
        return f"{len(layer.active_adapters)} adapters are active, and one is needed"
    (name,) = layer.active_adapters
    if name in layer.lora_variant:
        return f"{type(layer.lora_variant[name]).__name__} is more than LoRA"
    if name in layer.lora_A and layer.lora_bias[name]:
        return "its LoRA has a bias"
    return "it is switched off or merged" if layer.disable_adapters or layer.merged else None


def _switches_of(layer: nn.Module) -> tuple[tuple[str, ...], dict[str, float], bool, bool] | None:
    """Return what peft switches: the adapters that are on, all scales, whether adapters are disabled, or merged."""
    if not isinstance(layer, LoraLayer):
        return None
    return tuple(layer.active_adapters), dict(layer.scaling), layer.disable_adapters, layer.merged


def _read_adapters(layers: Sequence[nn.Module], sizes: Sequence[int]) -> _Adapters:
    branches: list[_Branch] = []
    dropout: nn.Module | None = None
    rank = output = 0
    for layer, size in zip(layers, sizes, strict=True):
        if isinstance(layer, LoraLayer) and (name := layer.active_adapters[0]) in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            ranks, outputs = slice(rank, rank + len(a)), slice(output, output + size)
            branches.append(_Branch(a, b, layer.scaling[name], ranks, outputs))
            dropout = layer.lora_dropout[name]  # One adapter's layers have one probability.
            rank += len(a)
        output += size
    return _Adapters(branches, dropout if isinstance(dropout, nn.Dropout) else None, output)


def _freeze(bases: Sequence[nn.Module], *, packed: bool) -> FrozenLinear | HeldLinear:
    if all(map(is_quantised, bases)):
        return HeldLinear(bases)
    return FrozenLinear([read_weight(base) for base in bases], [read_bias(base) for base in bases], packed=packed)


def _base_of(layer: nn.Module) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
