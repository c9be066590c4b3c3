"""Liger's kernels for norms and gates, where a CUDA device and the package are: its one door.

They are taken as functions of tensors, one launch where torch's operations are eight; nothing of a model is patched.
Its cross-entropy isn't among them: it rounds every token's loss to the logits' type, and waits for the device.

Legend: `N` tokens, `D` width, `I` width inside the MLP.
"""

from __future__ import annotations

from importlib.util import find_spec
from subprocess import SubprocessError

import torch
from torch import Tensor

from smolora.models.fused_ops import TORCH_KERNELS, Activation, Kernels, gate, gate_backward


def choose_kernels(device: torch.device, dtype: torch.dtype) -> tuple[Kernels, str | None]:
    """Return Liger's kernels where `device` is a CUDA device that they are right on, else torch's operations.

    Returns:
        The kernels, and on a CUDA device why they aren't Liger's.
    """
    if device.type != "cuda":
        return TORCH_KERNELS, None
    if find_spec("liger_kernel") is None:
        return TORCH_KERNELS, "Liger's kernels, which aren't installed"
    try:
        kernels = load_kernels()
    except (ImportError, RuntimeError) as error:
        return TORCH_KERNELS, f"Liger's kernels, which can't be imported ({error})"
    reason = why_not(kernels, device, dtype)
    return (TORCH_KERNELS, f"Liger's kernels, which {reason}") if reason else (kernels, None)


def load_kernels() -> Kernels:
    """Return Liger's norm, and its gate for silu; the other gates stay torch's, since Liger's want g and u apart.

    Raises:
        ImportError: Liger isn't installed, or is older than 0.8.2.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward, swiglu_fused_gate_up_forward

    def norm(x: Tensor, weight: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
        rounding = "gemma" if offset else "llama"
        # In place, it would write into a gradient that a residual connection reads too.
        in_place = False
        output: Tensor = LigerRMSNormFunction.apply(x, weight, eps, offset, rounding, in_place)
        return output

    def gate_silu(gate_up: Tensor, activation: Activation) -> Tensor:
        if activation != "silu":
            return gate(gate_up, activation)
        output: Tensor = swiglu_fused_gate_up_forward(gate_up.contiguous())[1]
        return output

    def gate_silu_backward(grad: Tensor, gate_up: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
        if activation != "silu":
            return gate_backward(grad, gate_up, activation)
        gate_up = gate_up.contiguous()
        return swiglu_fused_gate_up_backward(gate_up, grad.contiguous()), gate_silu(gate_up, activation)

    return Kernels(norm, gate_silu, gate_silu_backward)


def why_not(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why `kernels` can't stand for torch's operations on `device`, or None where they give the same numbers.

    A few random tensors go through norm and gate and back; 16 eps of the largest number are rounding.
    """
    # A compiler that lacks Python's headers ends in a SubprocessError, a cache that can't be written in an OSError.
    refusals: tuple[type[Exception], ...] = (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        OSError,
        SubprocessError,
    )
    refusals += _triton_errors()
    try:
        pairs = zip(_sample(kernels, device, dtype), _sample(TORCH_KERNELS, device, dtype), strict=True)
        shares = torch.stack([(found - expected).abs().max() / expected.abs().max() for found, expected in pairs])
    except refusals as error:
        return f"fail here ({type(error).__name__}: {error})"
    share, allowed = shares.max().item(), 16 * torch.finfo(dtype).eps  # NaN stays NaN, and is refused.
    return None if share <= allowed else f"are {share:.1e} off (rounding explains {allowed:.1e})"


def _triton_errors() -> tuple[type[Exception], ...]:
    if find_spec("triton") is None:
        return ()
    from triton import TritonError

    return (TritonError,)


def _sample(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return what norm and gate make of a few numbers, and their gradients, in float32."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, 80, generator=generator).to(device, dtype) for _ in range(2))  # 80: no power of two.
    weight = torch.rand(80, generator=generator).to(device, dtype)
    found: list[Tensor] = []
    with torch.enable_grad():
        for offset in (0.0, 1.0):
            read = x.clone().requires_grad_()
            normed = kernels.rms_norm(read, weight, eps=1e-6, offset=offset)
            found += [normed.detach(), *torch.autograd.grad(normed, read, grad)]
    found += [kernels.gate(x, "silu"), *kernels.gate_backward(grad[:, :40], x, "silu")]
    return [tensor.float() for tensor in found]
