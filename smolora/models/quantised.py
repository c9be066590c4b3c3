"""Bases whose linear layers are held in 8 or 4 bits by bitsandbytes (the extra `quant`): which layers, how, and what.

A quantised base is a function of the base's files alone: weights are rounded as they are stored, whatever type the
rest computes in. So a merge can repeat the rounding tensor by tensor.

On a CPU every quantised layer multiplies by its dequantised weight, in training and in evaluation alike. Left to
itself, bitsandbytes 0.50 there rounds activations to 8 bits in evaluation but not in training, and once a 4-bit layer
has evaluated it packs its weight for another kernel, through which no gradient flows in the steps that follow.
"""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smolora.config.model import Quantization
from smolora.errors import ConfigError, ModelError
from smolora.models.anatomy import Anatomy, build_anatomy
from smolora.models.frozen_linear import multiply
from smolora.models.structure import is_quantised, is_stored_transposed, read_bias, read_shape
from smolora.runtime.memory import page_out, return_freed_blocks

_BLOCK = 64
"""Weights of NF4 that share one scale."""
_OUTLIER = 6.0
"""Inputs from this size on stay in 16 bits in bitsandbytes' own product of 8 bits, on a GPU (Dettmers et al. 2022)."""


def require_quantisation(quantization: Quantization) -> None:
    """Raise unless the library behind `quantization` is installed.

    Raises:
        ConfigError: It isn't.
    """
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization: {quantization} needs bitsandbytes, which isn't installed. "
            "Install it with pip install 'smolora[quant]'. A run with model.quantization=none, or a merged model, "
            "does without."
        )


def quantise(model: PreTrainedModel, quantization: Quantization, *, dtype: torch.dtype, device: str) -> None:
    """Hold every linear layer but the head in few bits, where it can be; the rest, and what is computed, is of `dtype`.

    `model` is changed, one layer after the other: where its weights are mapped from files, as they are once it has been
    opened in the files' own type, no more than one of them is in memory beside what is held already.

    Raises:
        ConfigError: No layer of it can be held.
    """
    linears = build_anatomy(model).linear_modules()
    holdable = linears if quantization == "8bit" else _find_holdable_in_4_bits(model, linears)
    if not holdable:
        raise ConfigError(
            f"model.quantization: no linear layer of {model.name_or_path} can be held in 4 bits, which takes a "
            f"multiple of {_BLOCK} inputs. Choose 8bit or none."
        )
    for name in holdable:
        linear = model.get_submodule(name)
        model.set_submodule(name, _hold(linear, quantization, device))
        page_out(linear.get_parameter("weight"))
        return_freed_blocks()  # Between them, layers that stay would keep the allocator from giving anything back.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device, dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    for layer in filter(is_quantised, model.modules()):
        if quantization == "4bit":
            layer.compute_dtype = layer.weight.quant_state.dtype = dtype
        if is_dequantised_to_multiply(layer):
            layer.forward = MethodType(_multiply, layer)
        layer.register_forward_pre_hook(_refuse_integers)
    vars(model)[f"is_loaded_in_{quantization}"] = True  # How peft and accelerate know.


def _find_holdable_in_4_bits(model: PreTrainedModel, linears: Iterable[str]) -> list[str]:
    """Return the layers of whole blocks that transformers doesn't leave whole, as it does T5's `wo`.

    T5 casts what `wo` reads to the type of its weight, unless that is int8; 4 bits lie in uint8.
    """
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    return [
        name
        for name in linears
        if _fills_blocks(model.get_submodule(name)) and not any(f".{part}." in f".{name}." for part in kept)
    ]


def _refuse_integers(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if not inputs[0].is_floating_point():
        raise ModelError(
            f"this model casts what a layer reads to the type of its weight, here {inputs[0].dtype}, so it would "
            "multiply whole numbers. Choose model.quantization=8bit or none."
        )


def _fills_blocks(linear: nn.Module) -> bool:
    """Whether every row of the weight is whole blocks.

    Elsewhere the AVX512 kernel of bitsandbytes 0.50 dequantises to other numbers, without a word. A layer's place in
    the set doesn't depend on the machine, so that an adapter finds the same base on another one.
    """
    return read_shape(linear)[0] % _BLOCK == 0


def _hold(linear: nn.Module, quantization: Quantization, device: str) -> nn.Linear:
    """Return a linear layer in few bits that computes what `linear` does."""
    import bitsandbytes as bnb

    weight = linear.get_parameter("weight").detach()
    weight = weight.T if is_stored_transposed(linear) else weight
    layer: nn.Linear
    if quantization == "8bit":
        eight = bnb.nn.Linear8bitLt(*read_shape(linear), has_fp16_weights=False, threshold=_OUTLIER, device="meta")
        eight.weight = bnb.nn.Int8Params(weight, requires_grad=False).to(device)
        eight.init_8bit_state()
        layer = eight
    else:
        layer = bnb.nn.Linear4bit(*read_shape(linear), quant_type="nf4", compress_statistics=False, device="meta")
        layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=False, module=layer).to(device)
    layer.register_parameter("bias", read_bias(linear))
    vars(layer)["source_cls"] = type(linear)
    return layer.train(linear.training)


def is_dequantised_to_multiply(layer: nn.Module) -> bool:
    """Whether a layer multiplies by its dequantised weight, as quantised ones do on a CPU."""
    return is_quantised(layer) and layer.get_parameter("weight").device.type == "cpu"


def dequantise(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] that a quantised layer multiplies by."""
    import bitsandbytes as bnb

    if isinstance(layer, bnb.nn.Linear4bit):
        weight: Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight.to(dtype)
    assert isinstance(layer, bnb.nn.Linear8bitLt)
    return _scale_rows(layer.state.CB, layer.state.SCB, dtype)


def round_trip(weight: Tensor, quantization: Quantization) -> Tensor:
    """Return what a layer that is held so keeps of its weight [out, in]: in float32, or with none the weight itself."""
    if quantization == "none":
        return weight
    import bitsandbytes as bnb

    if quantization == "8bit":
        rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        return _scale_rows(rows, scales, torch.float32)
    data, state = bnb.functional.quantize_4bit(weight.contiguous(), quant_type="nf4")
    state.dtype = torch.float32
    rounded: Tensor = bnb.functional.dequantize_4bit(data, state)
    return rounded


def describe_quantised(model: nn.Module, anatomy: Anatomy) -> str:
    """Return which linear layers of a quantised model are held in few bits, and which are left, as a sentence."""
    left: dict[str, Counter[str]] = defaultdict(Counter)
    for name in anatomy.linear_modules():
        linear = model.get_submodule(name)
        if not is_quantised(linear):
            inputs = read_shape(linear)[0]
            reason = (
                "as transformers leaves them" if _fills_blocks(linear) else f"having no multiple of {_BLOCK} inputs"
            )
            left[reason][f"{name.rpartition('.')[2]} ({inputs} inputs)"] += 1
    held = len(anatomy.linear_modules()) - sum(names.total() for names in left.values())
    if not left:
        return f"all {held} linear layers but the head"
    lists = (
        f"{reason}: {', '.join(f'{count} {name}' for name, count in names.items())}" for reason, names in left.items()
    )
    return f"{held} linear layers; left as they are, {', and '.join(lists)}"


class HeldLinear:
    """x -> x W^T + b and its transpose, for one or several quantised layers on a CPU that read the same input.

    A weight is dequantised for each product and let go of, since kept it would take the memory that quantising saves.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = list(layers)
        self.sizes = [read_shape(layer)[1] for layer in layers]
        self.num_inputs = read_shape(layers[0])[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return `[N, sum O_i]` of `[N, D]`."""
        outputs = [multiply(x, dequantise(layer, x.dtype), read_bias(layer)) for layer in self._layers]
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]

    def backward(self, grad: Tensor) -> Tensor:
        """Return `[N, D]`, the gradient of the input, of `[N, sum O_i]`."""
        first, *others = [
            multiply(part, dequantise(layer, grad.dtype).t())
            for part, layer in zip(torch.split(grad, self.sizes, dim=-1), self._layers, strict=True)
        ]
        for other in others:
            first.add_(other)
        return first


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: HeldLinear) -> Tensor:
        ctx.held = held
        return held.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        held: HeldLinear = ctx.held
        return held.backward(grad), None


def _multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    output: Tensor = _Product.apply(x, HeldLinear([layer]))  # type: ignore[no-untyped-call]
    return output


def _scale_rows(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype, copy=True).mul_(scales[:, None] / 127)
