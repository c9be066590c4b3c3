"""AdamW over every trainable tensor, and its state as named tensors for a checkpoint."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from smolora.adapters.factors import rescales
from smolora.adapters.tensors import to_bytes
from smolora.errors import BrokenRunError, ModelError, count_of


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors that an update may change, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], *, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> AdamW:
    """Return AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101) in two named groups.

    Tensors of one dimension (norms, biases) are not decayed, nor are those that change nothing at 1 rather than 0. The
    fused step updates all tensors in one kernel.
    """
    is_decayed = {name: parameter.dim() >= 2 and not rescales(name) for name, parameter in parameters.items()}
    decayed = [parameter for name, parameter in parameters.items() if is_decayed[name]]
    plain = [parameter for name, parameter in parameters.items() if not is_decayed[name]]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": plain, "weight_decay": 0.0, "name": "not_decayed"},
    ]
    devices = {parameter.device.type for parameter in parameters.values()}
    return AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=betas,
        fused=devices <= {"cpu", "cuda", "mps"},
    )


def optimizer_tensors(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the optimiser's state as `<parameter>.<moment>` tensors."""
    return {
        f"{name}.{moment}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimiser the state that `optimizer_tensors` returned.

    Raises:
        ModelError: The state belongs to other tensors.
    """
    unknown = {key.rpartition(".")[0] for key in tensors} - parameters.keys()
    if unknown:
        raise ModelError(f"the checkpoint's optimiser knows {sorted(unknown)[0]}, which this run doesn't train.")
    for key, value in tensors.items():
        name, _, moment = key.rpartition(".")
        parameter = parameters[name]
        optimizer.state[parameter][moment] = value.to(parameter.device, copy=True)  # Fused: the step count too.


def tensor_checksums(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return a CRC-32 of each tensor's bytes."""
    return {name: zlib.crc32(memoryview(to_bytes(tensor))) for name, tensor in parameters.items()}


def require_movement(
    parameters: Mapping[str, Tensor], before: Mapping[str, int], num_updates: int, *, waiting: Collection[str] = ()
) -> None:
    """Raise unless every trainable tensor differs from its checksum before the first update.

    Args:
        parameters: The trainable tensors.
        before: Their checksums.
        num_updates: Updates since.
        waiting: Tensors whose gradient was exactly zero in the first update, as a factor beside them was zero; after a
            single update they may stand still.

    Raises:
        BrokenRunError: Tensors that were declared trainable did not move.
    """
    after = tensor_checksums(parameters)
    still = [name for name in after if after[name] == before.get(name)]
    if num_updates == 1:
        still = [name for name in still if name not in waiting]
    if still:
        raise BrokenRunError(
            f"{len(still)} of {len(after)} trainable tensors did not move in {count_of(num_updates, 'update')}, "
            f"first {still[0]}. Check the learning rate, and that the loss depends on them."
        )


def require_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise unless backward reached every trainable tensor.

    Raises:
        BrokenRunError: Names the first tensor without a gradient.
    """
    missing = list(_without_gradient(parameters))
    if missing:
        raise BrokenRunError(
            f"{len(missing)} of {len(parameters)} trainable tensors received no gradient, first {missing[0]}. "
            "The loss doesn't depend on them: train other modules, or freeze these."
        )


def _without_gradient(parameters: Mapping[str, nn.Parameter]) -> Iterator[str]:
    return (name for name, parameter in parameters.items() if parameter.grad is None)
