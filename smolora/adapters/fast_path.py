"""Puts the fast path under a model for a while: same names, same weights, same results, fewer and larger operations.

Attention goes through transformers' AttentionInterface; the forward methods of blocks and adapted layers are replaced
on the instances and put back at the end. A probe holds every model to its plain logits before a step is taken.

Legend: `N` tokens of the packed batch, `D` width, `H` heads, `K` head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from smolora.adapters.attach import plain_model
from smolora.adapters.lora_product import LoRAProduct, why_not_fast
from smolora.config import SpeedConfig
from smolora.errors import count_of
from smolora.models.anatomy import Anatomy
from smolora.models.bundle import ModelBundle, read_config
from smolora.models.frozen_linear import FrozenLinear
from smolora.models.fused_ops import ACTIVATIONS, TORCH_KERNELS, Activation
from smolora.models.liger import choose_kernels
from smolora.models.padded_attention import is_faster_by_products, padded_attention
from smolora.models.registry import FAMILIES, Fused
from smolora.models.rounding import allow_rounding, shifted_embeddings
from smolora.models.row_attention import AttentionSettings, attend_rows, row_attention
from smolora.models.rows import Rows
from smolora.models.structure import PreTrainedModel, find_embedding, find_head_norms, replaced_forward, without_dropout
from smolora.models.tasks import task_of
from smolora.runtime.available_memory import is_out_of_memory
from smolora.runtime.memory import return_freed_blocks

logger = logging.getLogger(__name__)

_PROBE = (5, 2, 7)
"""Lengths of the rows that the probe packs."""


@dataclass
class FastParts:
    """What is fast, and why the rest isn't."""

    used: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return one sentence for the log and env.json."""
        used = ", ".join(self.used) or "nothing"
        return f"{used}; plain: {'; '.join(self.left)}" if self.left else used


_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError)
"""What a forward pass raises that something else was put under."""


@contextmanager
def fast_path(
    bundle: ModelBundle, config: SpeedConfig, *, is_packed: bool, is_sharded: bool = False
) -> Iterator[FastParts]:
    """Make `bundle.model` fast inside the block; yields what it did.

    Args:
        bundle: An adapted model; its trainable tensors and their names stay what they are.
        config: The parts to use.
        is_packed: Whether its batches are packed rows; attention by rows needs that.
        is_sharded: Whether its base will be sharded; a fused layer would keep the whole weight.

    A model whose probe logits differ from the plain ones by more than rounding, or that can't be probed, stays plain,
    with a warning; one that differs by rows alone keeps the other parts. The probe is four forward passes over three
    short rows; backward passes, long rows and dropout are held to plain code by the tests of each family. An adapter
    that is switched to inside the block is followed; layers whose adapter is switched off, merged, or one of several
    are plain for that time, with a warning.
    """
    config = config.replace(fused_lora=False) if is_sharded else config
    parts = FastParts(left=["linear layers, since the base is sharded"] if is_sharded else [])
    model = plain_model(bundle)
    if model is None:
        yield FastParts(left=[f"{type(bundle.model).__name__} is no transformers model"])
        return
    with ExitStack() as stack:
        try:
            probe = _Probe.measure(model)
            _Installer(probe, bundle.anatomy, config, parts, stack, is_packed=is_packed).install()
            reason = probe.why_not(by_rows="row attention" in parts.used) if parts.used else None
        except _REFUSALS as error:
            reason = _refusal(error)
        if reason:
            stack.close()
            parts = FastParts(left=[reason])
            logger.warning("the fast path is off: %s", reason)
        yield parts


def page_out_copied(model: nn.Module) -> None:
    """Take the weights out of memory that the fast path holds packed, after something else has read them."""
    for module in model.modules():
        forward = vars(module).get("forward")
        for product in forward.products if isinstance(forward, _FastForward) else ():
            if isinstance(product.frozen, FrozenLinear):
                product.frozen.page_out_copied()


@dataclass(frozen=True)
class _FastForward:
    """What a module computes inside the block: `fast`, or `plain` while a product can't compute its adapter."""

    plain: Callable[..., object]
    fast: Callable[..., object]
    products: Sequence[LoRAProduct]
    warn: Callable[[str], None]

    def __call__(self, *args: object, **kwargs: object) -> object:
        for product in self.products:
            if reason := product.follow():
                self.warn(reason)
                return self.plain(*args, **kwargs)
        return self.fast(*args, **kwargs)


class _Installer:
    """Replaces forward methods until `stack` closes."""

    def __init__(
        self,
        probe: _Probe,
        anatomy: Anatomy,
        config: SpeedConfig,
        parts: FastParts,
        stack: ExitStack,
        *,
        is_packed: bool,
    ) -> None:
        self._probe = probe
        self._model = probe.model
        self._anatomy = anatomy
        self._config = config
        self._parts = parts
        self._stack = stack
        self._is_packed = is_packed
        family = FAMILIES.get(anatomy.family)
        self._fused = family.fused if family is not None else None
        self._settings = read_config(self._model).to_dict()
        self._fallbacks: dict[str, set[str]] = {}
        self._kernels = TORCH_KERNELS
        self._warned: set[str] = set()

    def install(self) -> None:
        """Install every part that is asked for and possible."""
        if self._config.row_attention:
            self._install_row_attention()
        done: set[str] = set()
        if self._config.fused_blocks:
            done = self._install_blocks()
        if self._config.fused_lora:
            self._install_products(done)
            return_freed_blocks()  # What weights took before they became parts of joint ones.
        self._parts.left += [f"{reason} ({count_of(len(names), 'layer')})" for reason, names in self._fallbacks.items()]

    def _install_row_attention(self) -> None:
        if not self._is_packed:
            self._install_padded_attention()
        elif reason := self._why_not_by_rows():
            self._parts.left.append(f"attention, {reason}")
        else:
            self._stack.enter_context(row_attention(self._model))
            self._parts.used.append("row attention")

    def _why_not_by_rows(self) -> str | None:
        if self._settings.get("attn_logit_softcapping"):
            return "whose scores are capped"
        if not self._model.is_backend_compatible():
            return f"which transformers can't replace in '{self._anatomy.family}'"
        with row_attention(self._model):
            reason = self._probe.why_not(by_rows=True)
        return reason and f"since row by row {reason}"

    def _install_padded_attention(self) -> None:
        if is_faster_by_products(self._model):
            self._stack.enter_context(padded_attention(self._model))
            self._parts.used.append("attention by products")
        else:
            self._parts.left.append("attention, since batches are padded")

    def _install_blocks(self) -> set[str]:
        """Fuse what the family's profile knows; return the linear layers that are part of it."""
        fused = self._fused
        if fused is None:
            self._parts.left.append(f"blocks, since '{self._anatomy.family}' has no profile")
            return set()
        self._kernels, reason = choose_kernels(self._model.device, self._model.dtype)
        self._parts.left += [reason] if reason else []
        done: set[str] = set()
        for layer in range(self._anatomy.num_layers):
            done |= self._install_attention(layer, fused) | self._install_mlp(layer)
        norms = [part.name for part in self._anatomy.parts if part.group == "norm"]
        fast_norms = [name for name in norms if self._install_norm(name, fused)]
        if not done and not fast_norms:
            return done
        used = "fused blocks" if done else "fused norms"
        self._parts.used.append(used if self._kernels is TORCH_KERNELS else f"{used} with Liger's kernels")
        return done

    def _install_attention(self, layer: int, fused: Fused) -> set[str]:
        names = self._names(layer, "query", "key", "value", "output")
        if "row attention" not in self._parts.used or not fused.attention or len(names) != 4:
            return set()
        inputs, output = self._product(names[:3]), self._product(names[3:])
        if inputs is None or output is None:
            return set()
        attention = self._model.get_submodule(names[0].rpartition(".")[0])
        forward = _attention_forward(attention, inputs, output)
        self._replace(attention, forward, inputs, output)
        return set(names)

    def _install_mlp(self, layer: int) -> set[str]:
        names = self._names(layer, "gate", "up", "down")
        named = str(self._settings.get("hidden_activation") or self._settings.get("hidden_act"))
        activation = ACTIVATIONS.get(named)
        if activation is None or len(names) != 3:
            self._fallbacks.setdefault(f"an MLP with {named}", set()).update(names)
            return set()
        gate_up, down = self._product(names[:2]), self._product(names[2:], gated=activation)
        if gate_up is None or down is None:
            return set()
        mlp = self._model.get_submodule(names[0].rpartition(".")[0])
        self._replace(mlp, lambda x: down(gate_up(x)), gate_up, down)
        return set(names)

    def _install_norm(self, name: str, fused: Fused) -> bool:
        """Fuse a norm that is frozen; return whether it is."""
        norm = self._model.get_submodule(name)
        if isinstance(norm, BaseTunerLayer) or norm.get_parameter("weight").requires_grad:
            self._fallbacks.setdefault("norms are trained", set()).add(name)
            return False
        weight, rms_norm = norm.get_parameter("weight"), self._kernels.rms_norm
        eps, offset = float(self._settings["rms_norm_eps"]), fused.norm_offset
        self._replace(norm, lambda x: rms_norm(x, weight, eps=eps, offset=offset))
        return True

    def _install_products(self, done: set[str]) -> None:
        """Fuse every linear layer, the head too, that isn't in a fused block."""
        for part in self._anatomy.parts:
            if part.is_linear and part.name not in done and (product := self._product([part.name])):
                self._replace(self._model.get_submodule(part.name), product, product)
                done = done | {part.name}
        linear = done & set(self._anatomy.linear_modules())
        if any(isinstance(self._model.get_submodule(name), BaseTunerLayer) for name in linear):
            self._parts.used.append("fused LoRA")
        elif linear:
            self._parts.used.append("linear layers as single functions")

    def _product(self, names: list[str], *, gated: Activation | None = None) -> LoRAProduct | None:
        layers = [self._model.get_submodule(name) for name in names]
        reasons = {name: why_not_fast(layer) for name, layer in zip(names, layers, strict=True)}
        for name, reason in reasons.items():
            if reason:
                self._fallbacks.setdefault(reason, set()).add(name)
        if any(reasons.values()) or not self._config.fused_lora:
            return None
        return LoRAProduct(layers, packed=self._config.packed_weights, gated=gated, kernels=self._kernels)

    def _names(self, layer: int, *roles: str) -> list[str]:
        return [
            part.name for role in roles for part in self._anatomy.parts if part.layer == layer and part.role == role
        ]

    def _replace(self, module: nn.Module, forward: Callable[..., object], *products: LoRAProduct) -> None:
        """Let `module` compute `forward`, or its own where an adapter is on now that a product can't compute."""
        found = _FastForward(module.forward, forward, products, self._warn_once) if products else forward
        self._stack.enter_context(replaced_forward(module, found))

    def _warn_once(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("layers leave the fast path while their adapter is so: %s", reason)


def _attention_forward(
    attention: nn.Module, inputs: LoRAProduct, output: LoRAProduct
) -> Callable[..., tuple[Tensor, None]]:
    own = vars(attention)  # Numbers as config.json has them: an attention_dropout of 0 is an integer.
    width, scale, dropout = int(own["head_dim"]), float(own["scaling"]), float(own["attention_dropout"])
    num_heads, num_shared = (size // width for size in inputs.frozen.sizes[:2])
    norms = find_head_norms(attention)

    def forward(
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: int | None,
        *,
        rows: Rows,
        **_unused: object,
    ) -> tuple[Tensor, None]:
        heads = inputs(hidden_states[0]).view(-1, num_heads + 2 * num_shared, width)
        if norms:
            query, key, value = torch.split(heads, [num_heads, num_shared, num_shared], dim=1)
            heads = torch.cat((norms[0](query), norms[1](key), value), dim=1)
        rotary = rows.rotary(*position_embeddings)
        settings = AttentionSettings(scale, dropout if attention.training else 0.0, attention_mask)
        attended = attend_rows(heads, num_heads=num_heads, rows=rows, settings=settings, rotary=rotary)
        return output(attended.flatten(1)[None]), None

    return forward


@dataclass(frozen=True)
class _Probe:
    """Three short rows, and the plain logits to which those of the fast path are held."""

    model: PreTrainedModel
    expected: Tensor
    tolerance: float

    @classmethod
    def measure(cls, model: PreTrainedModel) -> Self:
        """Return the probe of `model` as it is now."""
        expected = _probe_logits(model, None)
        with shifted_embeddings(model):
            return cls(model, expected, allow_rounding(expected, _probe_logits(model, None), model.dtype))

    def why_not(self, *, by_rows: bool) -> str | None:
        """Return why the logits aren't the plain ones up to rounding, or None where they are."""
        try:
            found = _probe_logits(self.model, Rows(_PROBE, self.model.device) if by_rows else None)
        except _REFUSALS as error:
            return _refusal(error)
        difference = (found - self.expected).abs().max().item()
        if difference <= self.tolerance:
            return None
        return f"its logits differ from the plain ones by {difference:.1e} (rounding explains {self.tolerance:.1e})"


def _refusal(error: Exception) -> str:
    if is_out_of_memory(error):
        raise error
    return f"its forward pass refuses it ({type(error).__name__}: {error})"


@torch.no_grad()
def _probe_logits(model: PreTrainedModel, rows: Rows | None) -> Tensor:
    embedding = find_embedding(model)
    vocab_size = sum(_PROBE) + 1 if embedding is None else len(embedding.get_parameter("weight"))
    input_ids = torch.arange(1, 1 + sum(_PROBE), device=model.device)[None] % vocab_size
    with without_dropout(model):
        if read_config(model).is_encoder_decoder:
            written: Tensor = model(input_ids=input_ids, decoder_input_ids=input_ids, use_cache=False).logits
            return written.float()
        position_ids = torch.cat([torch.arange(length) for length in _PROBE]).to(model.device)[None]
        extra = {"rows": rows} if rows is not None else {}
        found = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **extra)
        logits: Tensor = found.start_logits if task_of(model) == "qa" else found.logits
        return logits.float()
