"""One packed batch through an adapted tiny model, on the plain path and on the fast one."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.config import LoRAConfig, SpeedConfig
from smolora.models.rows import Rows
from tests.tiny import random_input_ids, tiny_bundle

LENGTHS = (5, 9, 33, 40, 12)


def adapted(family, folder, *, dtype=torch.float32, config=None, **settings):
    """A tiny model with an adapter whose B isn't zero."""
    bundle = tiny_bundle(family, folder, **settings)
    bundle.model.to(dtype)
    bundle = attach_adapter(bundle, config or LoRAConfig(lora_dropout=0.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return bundle


def run(bundle, *, by_rows, lengths=LENGTHS):
    """Logits and the gradient of every trainable tensor for one packed batch."""
    bundle.model.zero_grad()
    device = bundle.model.device
    rows = {"rows": Rows(lengths, device)} if by_rows else {}
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    input_ids = random_input_ids(sum(lengths)).to(device)
    output = bundle.model(input_ids=input_ids, position_ids=positions, use_cache=False, **rows).logits
    output.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in bundle.model.named_parameters() if p.grad is not None}
    return output.detach().float(), gradients


def run_fast(bundle, config=None):
    with fast_path(bundle, config or SpeedConfig(), is_packed=True) as parts:
        return *run(bundle, by_rows="row attention" in parts.used), parts


def assert_same(found, expected):
    """float32 to 1e-5 of the largest number: the sums run in another order."""
    assert found[1].keys() == expected[1].keys()
    for a, b in [(found[0], expected[0]), *((found[1][name], expected[1][name]) for name in expected[1])]:
        assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, b.abs().max().item()))
