"""Bases whose linear layers are held in 8 or 4 bits by bitsandbytes (the extra `quant`): which layers, how, and what.

A quantised base is a function of the base's files alone: weights are rounded as they are stored, whatever type the
rest computes in. So a merge can repeat the rounding tensor by tensor.

On a CPU every quantised layer multiplies by its dequantised weight, in training and in evaluation alike. Left to
itself, bitsandbytes 0.50 there rounds activations to 8 bits in evaluation but not in training, and once a 4-bit layer
has evaluated it packs its weight for another kernel, through which no gradient flows in the steps that follow.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel

from smolora.config.model import Quantization, TaskType
from smolora.errors import ConfigError
from smolora.models.anatomy import Anatomy, build_anatomy
from smolora.models.structure import is_linear, is_quantised, read_shape
from smolora.models.tasks import AUTO_MODELS

_BLOCK = 64
"""Weights of NF4 that share one scale."""


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


def build_quantisation(folder: Path, quantization: Quantization, task: TaskType = "causal_lm") -> BitsAndBytesConfig:
    """Return how transformers is to load the model of `folder`: every linear layer but the head, where it can be held.

    Raises:
        ConfigError: No layer of it can.
    """
    with torch.device("meta"):  # The shapes alone; no weight is read.
        skeleton = AUTO_MODELS[task].from_config(AutoConfig.from_pretrained(folder))
    chosen = [
        name
        for name in build_anatomy(skeleton).linear_modules()
        if _is_holdable(skeleton.get_submodule(name), quantization)
    ]
    if not chosen:
        raise ConfigError(
            f"model.quantization: no linear layer of {folder} can be held in 4 bits, which takes a multiple of "
            f"{_BLOCK} inputs. Choose 8bit or none."
        )
    skipped = [name for name, module in skeleton.named_modules() if is_linear(module) and name not in chosen]
    return BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=skipped,
    )


def _is_holdable(linear: nn.Module, quantization: Quantization) -> bool:
    """Whether every row of the weight is whole blocks.

    Elsewhere the AVX512 kernel of bitsandbytes 0.50 dequantises to other numbers, without a word. A layer's place in
    the set doesn't depend on the machine, so that an adapter finds the same base on another one.
    """
    return quantization == "8bit" or read_shape(linear)[0] % _BLOCK == 0


def settle_quantised(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model that was just quantised compute in `dtype`, and on a CPU the same in training and evaluation."""
    import bitsandbytes as bnb

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for layer in filter(is_quantised, model.modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.compute_dtype = layer.weight.quant_state.dtype = dtype
        else:
            layer.init_8bit_state()
        if layer.weight.device.type == "cpu":
            layer.forward = MethodType(_multiply, layer)


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
    linears = {name: model.get_submodule(name) for name in anatomy.linear_modules()}
    left = Counter(
        f"{name.rpartition('.')[2]} ({read_shape(linear)[0]} inputs)"
        for name, linear in linears.items()
        if not is_quantised(linear)
    )
    if not left:
        return f"all {len(linears)} linear layers but the head"
    names = ", ".join(f"{count} {name}" for name, count in left.items())
    return (
        f"{len(linears) - left.total()} linear layers; left as they are, having no multiple of {_BLOCK} inputs: {names}"
    )


class _Product(torch.autograd.Function):
    """x W^T + b; the backward pass dequantises W anew, since kept it would take the memory that quantising saves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, dequantise(layer, x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ dequantise(ctx.layer, grad.dtype), None


def _multiply(layer: nn.Linear, x: Tensor) -> Tensor:
    output: Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return output


def _scale_rows(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype, copy=True).mul_(scales[:, None] / 127)
