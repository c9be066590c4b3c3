"""Liger's kernels give the numbers of our own operations, on a GPU or under triton's interpreter, and say why not."""

from __future__ import annotations

import importlib.util
import sys
from subprocess import CalledProcessError

import pytest
import torch
from torch.testing import assert_close

from smolora.models.fused_ops import TORCH_KERNELS, Kernels, gate, gate_backward, rms_norm
from smolora.models.liger import choose_kernels, load_kernels, why_not

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
"""Of numbers up to about 4: float16 has 11 bits, and two roundings may fall apart."""


def draw(*shape, device, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(found, expected):
    assert found.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_the_norm_and_its_gradient_are_ours(liger_device, shape, offset, dtype):
    x, weight = draw(*shape, device=liger_device, dtype=dtype), draw(48, device=liger_device, dtype=dtype, seed=1)
    grad = draw(*shape, device=liger_device, dtype=dtype, seed=2)
    given = grad.clone()
    results = []
    for norm in (load_kernels().rms_norm, rms_norm):
        read = x.clone().requires_grad_()
        output = norm(read, weight, eps=1e-6, offset=offset)
        results.append((output.detach(), *torch.autograd.grad(output, read, given)))
    for found, expected in zip(*results, strict=True):
        assert_near(found, expected)
    assert torch.equal(given, grad)  # A residual connection reads it too.


def test_the_norm_takes_heads_out_of_a_wider_tensor(liger_device):
    heads, weight = draw(7, 6, 24, device=liger_device), draw(24, device=liger_device, seed=1)
    assert_near(load_kernels().rms_norm(heads[:, 2:4], weight, eps=1e-6), rms_norm(heads[:, 2:4], weight, eps=1e-6))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_the_gate_and_its_gradient_are_ours_and_leave_what_they_read(liger_device, activation):
    gate_up, grad = draw(7, 96, device=liger_device), draw(7, 48, device=liger_device, seed=1)
    read, given, kernels = gate_up.clone(), grad.clone(), load_kernels()
    assert_near(kernels.gate(read, activation), gate(gate_up, activation))
    found, expected = kernels.gate_backward(given, read, activation), gate_backward(grad, gate_up, activation)
    for ours, theirs in zip(expected, found, strict=True):
        assert_near(theirs, ours)
    assert torch.equal(read, gate_up)
    assert torch.equal(given, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_check_before_use_finds_them_right(liger_device, dtype):
    assert why_not(load_kernels(), liger_device, dtype) is None


@pytest.mark.parametrize("factor", [1.001, float("nan")])
@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_the_check_before_use_finds_a_wrong_kernel(wrong, factor):
    def backward(grad, gate_up, activation):
        gradient, gated = gate_backward(grad, gate_up, activation)
        return gradient * factor, gated

    kernels = {
        "forward": Kernels(rms_norm=lambda x, weight, **settings: rms_norm(x, weight, **settings) * factor),
        "backward": Kernels(gate_backward=backward),
    }[wrong]
    reason = why_not(kernels, torch.device("cpu"), torch.float32)
    assert reason is not None and reason.endswith("off (rounding explains 1.9e-06)")
    assert why_not(TORCH_KERNELS, torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("error", [RuntimeError("no C compiler"), CalledProcessError(1, "gcc"), OSError("no cache")])
def test_a_kernel_that_fails_is_refused_with_its_error(error):
    def refuse(*_):
        raise error

    reason = why_not(Kernels(gate=refuse), torch.device("cpu"), torch.float32)
    assert reason == f"fail here ({type(error).__name__}: {error})"


def test_a_cpu_keeps_torchs_operations_and_gives_no_reason():
    assert choose_kernels(torch.device("cpu"), torch.float32) == (TORCH_KERNELS, None)


@pytest.mark.skipif(HAS_LIGER, reason="liger-kernel is installed")
def test_a_gpu_without_the_package_keeps_torchs_operations_and_says_so():
    kernels, reason = choose_kernels(torch.device("cuda"), torch.bfloat16)
    assert kernels is TORCH_KERNELS
    assert reason == "Liger's kernels, which aren't installed"


@pytest.mark.skipif(HAS_LIGER, reason="liger-kernel is installed")
def test_a_package_without_these_kernels_is_named(tmp_path, monkeypatch):
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    kernels, reason = choose_kernels(torch.device("cuda"), torch.bfloat16)
    monkeypatch.delitem(sys.modules, "liger_kernel")
    assert kernels is TORCH_KERNELS
    assert "which can't be imported (No module named 'liger_kernel.ops')" in reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_with_the_package_takes_them(liger_device):
    kernels, reason = choose_kernels(liger_device, torch.bfloat16)
    assert reason is None
    assert kernels is not TORCH_KERNELS
