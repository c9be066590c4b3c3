"""GPTModel to and from GPT-2 checkpoints: the same numbers under other names.

GPT-2 keeps query, key and value in one matrix and stores its matrices [in, out] (Conv1D), the transpose of nn.Linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from smolora.config.model import GPTConfig
from smolora.errors import ModelError
from smolora.models.folders import read_json
from smolora.models.gpt import GPTModel
from smolora.models.loading import quiet_transformers
from smolora.models.weight_files import list_weight_files
from smolora.records.staging import share

AnyGPT = TypeVar("AnyGPT", bound=GPTModel)

# transformers' "gelu_new" is the same curve in eight kernels instead of one; the name in the file decides which runs.
_ACTIVATION_WRITTEN = {"gelu_new": "gelu_pytorch_tanh", "gelu": "gelu"}
_ACTIVATION_READ: dict[str, Literal["gelu_new", "gelu"]] = {
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu": "gelu",
}

_LAYER_NAMES = {"ln1": "ln_1", "ln2": "ln_2"}
_MATRIX_NAMES = {
    "attention.W_o": "attn.c_proj",
    "feed_forward.linear1": "mlp.c_fc",
    "feed_forward.linear2": "mlp.c_proj",
}
_PROJECTIONS = ("attention.W_q", "attention.W_k", "attention.W_v")

# Settings of GPT-2's config that change the arithmetic, with the only value that GPTModel computes.
_REQUIRED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def to_gpt2(model: GPTModel, *, eos_token_id: int | None = None) -> GPT2LMHeadModel:
    """Return transformers' GPT-2 with a copy of the weights, on the same device and in the same train or eval mode."""
    with torch.device(
        "meta"
    ):  # No memory, and no draw from the random generator, for weights that are replaced at once.
        gpt2 = GPT2LMHeadModel(_build_gpt2_config(model, eos_token_id))
    gpt2.load_state_dict(dict(_iter_gpt2_tensors(model)), assign=True, strict=False)
    gpt2.tie_weights()
    return gpt2.train(model.training)


def save_gpt2(model: GPTModel, folder: Path, *, eos_token_id: int | None = None) -> None:
    """Write `model` as a GPT-2 folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        to_gpt2(model, eos_token_id=eos_token_id).save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        share(file)


def load_gpt2(kind: type[AnyGPT], folder: Path, *, dropout: float | None = None) -> AnyGPT:
    """Read a GPT-2 folder as a `kind`, in eval mode; also OpenAI's own files, without the prefix `transformer.`."""
    values = read_json(folder / "config.json")
    if values is None:
        raise ModelError(f"no config.json in {folder}. A GPT-2 folder holds it beside its weights.")
    if values.get("model_type") != "gpt2":
        raise ModelError(
            f"{folder} holds a '{values.get('model_type')}' model; GPTModel reads gpt2. Use load_model for others."
        )
    config = _read_gpt_config(GPT2Config(**values), dropout=dropout)
    tensors: dict[str, Tensor] = {}
    for file in list_weight_files(folder):
        try:
            tensors |= {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
        except SafetensorError as error:
            raise ModelError(f"{file} can't be read: {error}. Copy or download it again.") from None
    return _build_from_tensors(kind, config, tensors, is_tied=bool(values.get("tie_word_embeddings", True))).eval()


def _build_gpt2_config(model: GPTModel, eos_token_id: int | None) -> GPT2Config:
    config = model.config
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context,
        n_embd=config.width,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        activation_function=_ACTIVATION_WRITTEN[config.activation],
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        tie_word_embeddings=model.lm_head.weight is model.token_embedding.weight,
        dtype=model.token_embedding.weight.dtype,
    )


def _iter_gpt2_tensors(model: GPTModel) -> Iterator[tuple[str, Tensor]]:
    """Yield GPT-2's name and a copy of the values, for every tensor of `model`; biases it doesn't have are zeros."""
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if not model.config.bias:
        biases = {
            name.replace(".weight", ".bias"): tensor for name, tensor in tensors.items() if _has_bias_in_gpt2(name)
        }
        tensors |= {name: tensor.new_zeros(tensor.shape[0]) for name, tensor in biases.items()}
    yield "transformer.wte.weight", tensors["token_embedding.weight"]
    yield "transformer.wpe.weight", tensors["position_embedding.weight"]
    for kind in ("weight", "bias"):
        yield f"transformer.ln_f.{kind}", tensors[f"ln_final.{kind}"]
        for layer in range(model.config.num_layers):
            ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
            for name, written in _LAYER_NAMES.items():
                yield f"{theirs}.{written}.{kind}", tensors[f"{ours}.{name}.{kind}"]
            for name, written in _MATRIX_NAMES.items():
                yield f"{theirs}.{written}.{kind}", _transposed(tensors[f"{ours}.{name}.{kind}"])
            fused = torch.cat([tensors[f"{ours}.{name}.{kind}"] for name in _PROJECTIONS])
            yield f"{theirs}.attn.c_attn.{kind}", _transposed(fused)
    if "lm_head.weight" in tensors:  # Untied; a tied head isn't named twice.
        yield "lm_head.weight", tensors["lm_head.weight"]


def _has_bias_in_gpt2(name: str) -> bool:
    return name.endswith(".weight") and not name.startswith(("token_embedding", "position_embedding", "lm_head"))


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous() if tensor.ndim == 2 else tensor


def _read_gpt_config(found: GPT2Config, *, dropout: float | None) -> GPTConfig:
    values = found.to_dict()
    for name, required in _REQUIRED.items():
        if values.get(name, required) != required:
            raise ModelError(f"config.json: GPTModel computes {name}={required}, found {values[name]}. Use load_model.")
    if found.n_inner not in (None, 4 * found.n_embd):
        raise ModelError(
            f"config.json: GPTModel's feed-forward is 4 * {found.n_embd} wide, found n_inner={found.n_inner}."
        )
    if found.activation_function not in _ACTIVATION_READ:
        raise ModelError(
            f"config.json: activation_function '{found.activation_function}' isn't {' or '.join(_ACTIVATION_READ)}."
        )
    if dropout is None:
        rates = {found.resid_pdrop, found.embd_pdrop, found.attn_pdrop}
        if len(rates) > 1:
            raise ModelError(f"config.json: GPTModel has one dropout, found {sorted(rates)}. Choose one with dropout=.")
        dropout = rates.pop()
    return GPTConfig(
        num_layers=found.n_layer,
        num_heads=found.n_head,
        width=found.n_embd,
        context=found.n_positions,
        dropout=dropout,
        activation=_ACTIVATION_READ[found.activation_function],
        bias=True,
        vocab_size=found.vocab_size,
    )


def _build_from_tensors(
    kind: type[AnyGPT], config: GPTConfig, tensors: Mapping[str, Tensor], *, is_tied: bool
) -> AnyGPT:
    with torch.device("meta"):
        model = kind(config)
    try:
        model.load_state_dict(dict(_iter_gpt_tensors(config, tensors)), assign=True, strict=False)
    except KeyError as error:
        raise ModelError(f"the checkpoint holds no tensor {error}, which its config.json promises.") from None
    except RuntimeError as error:
        raise ModelError(f"the checkpoint doesn't have the shape that its config.json promises: {error}") from None
    head = (
        model.token_embedding.weight if is_tied else nn.Parameter(tensors.get("lm_head.weight", tensors["wte.weight"]))
    )
    model.lm_head.weight = head
    return model


def _iter_gpt_tensors(config: GPTConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield our name and the values, for every tensor of a GPT-2 checkpoint; the inverse of `_iter_gpt2_tensors`."""
    yield "token_embedding.weight", tensors["wte.weight"]
    yield "position_embedding.weight", tensors["wpe.weight"]
    for kind in ("weight", "bias"):
        yield f"ln_final.{kind}", tensors[f"ln_f.{kind}"]
        for layer in range(config.num_layers):
            ours, theirs = f"blocks.{layer}", f"h.{layer}"
            for name, written in _LAYER_NAMES.items():
                yield f"{ours}.{name}.{kind}", tensors[f"{theirs}.{written}.{kind}"]
            for name, written in _MATRIX_NAMES.items():
                yield f"{ours}.{name}.{kind}", _transposed(tensors[f"{theirs}.{written}.{kind}"])
            fused = _transposed(tensors[f"{theirs}.attn.c_attn.{kind}"])
            for name, part in zip(_PROJECTIONS, fused.chunk(3), strict=True):
                yield f"{ours}.{name}.{kind}", part.contiguous()
