"""Infers a Family from an unknown model: by position and shape of its linear layers inside numbered blocks.

Names are used in two places only, each a whole word and never a substring of the model's name: a module whose class
calls itself attention is attention, and q, k, v tell three projections of one shape apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers import PreTrainedModel as PreTrainedModel  # noqa: PLC0414 - passed on to adapters
from transformers.masking_utils import AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from smolora.errors import ModelError
from smolora.models.registry import Family, Role

_PROJECTION_WORDS: dict[str, Role] = {
    "q": "query",
    "query": "query",
    "k": "key",
    "key": "key",
    "v": "value",
    "value": "value",
}


def is_linear(module: nn.Module) -> bool:
    """Whether `module` multiplies by one matrix: nn.Linear or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def returns_product(linear: nn.Module) -> bool:
    """Whether a linear layer returns its product; some routers of experts return what they chose by it."""
    if has_plain_forward(linear) or is_quantised(linear):
        return True
    inputs, outputs = read_shape(linear)
    try:
        with torch.no_grad(), without_dropout(linear):
            found = linear(linear.get_parameter("weight").new_zeros(1, 1, inputs))
    except (TypeError, ValueError, RuntimeError, IndexError):  # It takes more than an input, or one in groups.
        return False
    return isinstance(found, Tensor) and found.shape[-1] == outputs


def holds_experts(module: nn.Module) -> bool:
    """Whether a module of a block holds the matrices of all experts in one tensor, as transformers 5 does."""
    is_convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return not is_convolution and any(parameter.ndim == 3 for parameter in module.parameters(recurse=False))


def is_quantised(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that holds its weight in 8 or 4 bits."""
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


def has_plain_forward(linear: nn.Module) -> bool:
    """Whether a linear layer computes nothing but its product; some subclasses route, scale or return more."""
    return type(linear).forward in {nn.Linear.forward, Conv1D.forward}


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Let this one module compute `forward` inside the block; names, weights and its class stay what they are."""
    with replaced_forwards({module: forward}):
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Let each of these modules compute so inside the block."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward  # An instance's own attribute comes before its class's method.
    try:
        yield
    finally:
        for module, own in before.items():
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own


def find_configs(model: nn.Module) -> list[PretrainedConfig]:
    """Return the configs that modules of `model` read: T5's two stacks have copies."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if isinstance(config, PretrainedConfig)}.values())


@contextmanager
def replaced_attention(
    configs: Collection[PretrainedConfig],
    name: str,
    attend: Callable[..., tuple[Tensor, None]],
    mask: Callable[..., object],
) -> Iterator[None]:
    """Let a model of these `find_configs` ask `attend` for attention and `mask` for its masks inside the block.

    Both have the signatures of transformers' AttentionInterface and AttentionMaskInterface, which know them by `name`.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    before = [config._attn_implementation for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Have every module of `model` in eval mode inside the block, where nothing draws from the random generator."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def is_stored_transposed(module: nn.Module) -> bool:
    """Whether a linear layer's weight is stored [in, out], as GPT-2's Conv1D does; quantised, only in the file."""
    return isinstance(module, Conv1D) or vars(module).get("source_cls") is Conv1D


def read_shape(linear: nn.Module) -> tuple[int, int]:
    """Return (input features, output features) of a linear layer."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    assert isinstance(linear, Conv1D)
    return linear.nx, linear.nf


def read_weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer that isn't quantised, `[outputs, inputs]`, however it is stored."""
    weight = linear.get_parameter("weight")
    return weight.t() if is_stored_transposed(linear) else weight


def read_bias(linear: nn.Module) -> nn.Parameter | None:
    """Return the bias of a linear layer, or None where it has none."""
    return dict(linear.named_parameters(recurse=False)).get("bias")


def find_embedding(model: PreTrainedModel) -> nn.Module | None:
    """Return what looks up a token's embedding; None where nothing does (Canine hashes characters)."""
    try:
        embedding: nn.Module = model.get_input_embeddings()
    except NotImplementedError:  # What transformers raises.
        return None
    return embedding


def find_head_norms(attention: nn.Module) -> list[nn.Module]:
    """Return the norms that an attention puts on each head's query and key, in this order, or none (qwen3, gemma3)."""
    return [module for name, module in attention.named_children() if name in ("q_norm", "k_norm")]


def infer_family(model: nn.Module) -> Family:
    """Return where `model` keeps what, read from its modules alone.

    Raises:
        ModelError: It has no numbered blocks with linear layers.
    """
    blocks = _find_blocks(model)
    outside = {name: module for name, module in model.named_modules() if not name.startswith(f"{blocks}.")}
    embeddings = {name: module for name, module in outside.items() if isinstance(module, nn.Embedding)}
    sizes = {embedding.num_embeddings for embedding in embeddings.values()}
    heads = [name for name, module in outside.items() if is_linear(module) and read_shape(module)[1] in sizes]
    attention: dict[str, Role] = {}
    mlp: dict[str, Role] = {}
    for block in model.get_submodule(blocks).children():
        in_attention, in_mlp = _split_block(block)
        attention |= _read_attention_roles(in_attention)
        mlp |= _read_mlp_roles(in_mlp)
    return Family((blocks,), attention, mlp, tuple(embeddings), heads[-1] if heads else "")


def _find_blocks(model: nn.Module) -> str:
    """Return the path of the module list that holds most of the linear layers (the outermost of equals)."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    counted = [(sum(map(is_linear, module.modules())), name) for name, module in lists]
    most = max((count for count, _ in counted), default=0)
    if most == 0:
        raise ModelError(
            f"{type(model).__name__} has no numbered blocks with linear layers, so its layers can't be told apart."
        )
    paths: list[str] = [name for count, name in counted if count == most]
    return min(paths, key=len)


def _split_block(block: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the linear layers of attention and of the MLP, by path in the block."""
    linears = {name: module for name, module in block.named_modules() if is_linear(module)}
    attention = {name: module for name, module in linears.items() if _is_inside_attention(block, name)}
    if not attention:  # No class says so: in the order of the maths, attention is the first of two containers.
        containers = list(dict.fromkeys(name.partition(".")[0] for name in linears))
        first = f"{containers[0]}." if len(containers) > 1 else None
        attention = {name: module for name, module in linears.items() if first and name.startswith(first)}
    return attention, {name: module for name, module in linears.items() if attention and name not in attention}


def _is_inside_attention(block: nn.Module, path: str) -> bool:
    segments = path.split(".")[:-1]
    parents = [block.get_submodule(".".join(segments[: depth + 1])) for depth in range(len(segments))]
    return any("attention" in type(parent).__name__.lower() for parent in parents)


def _read_attention_roles(linears: Mapping[str, nn.Module]) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    paths = list(linears)
    if len(paths) == 2:
        fused = max(paths, key=lambda path: read_shape(linears[path])[1])  # Three projections are wider than one.
        return {path: "query_key_value" if path == fused else "output" for path in paths}
    for path in paths:
        words = path.rpartition(".")[2].lower().removeprefix("w").strip("_").split("_")
        found = {_PROJECTION_WORDS[word] for word in words if word in _PROJECTION_WORDS}
        if len(found) == 1:
            roles |= {path: found.pop()}
    rest = [path for path in paths if path not in roles]
    return roles | ({rest[0]: "output"} if len(rest) == 1 else {})


def _read_mlp_roles(linears: Mapping[str, nn.Module]) -> dict[str, Role]:
    if len(linears) not in (2, 3):
        return {}
    shapes = {path: read_shape(linear) for path, linear in linears.items()}
    narrowing = next((path for path, (inputs, outputs) in shapes.items() if inputs > outputs), list(shapes)[-1])
    widening = [path for path in shapes if path != narrowing]
    if len(widening) == 2:
        return {widening[0]: "gate", widening[1]: "up", narrowing: "down"}
    is_fused = shapes[widening[0]][1] == 2 * shapes[narrowing][0]
    return {widening[0]: "gate_up" if is_fused else "up", narrowing: "down"}
