"""What a module computes can be replaced for a while, within a replacement too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smolora.models.structure import replaced_forward


def test_a_replaced_forward_is_put_back_within_another_and_after_an_error():
    linear, x = nn.Linear(2, 2), torch.ones(1, 2)
    expected = linear(x)
    with replaced_forward(linear, lambda _: 1):
        with pytest.raises(ZeroDivisionError), replaced_forward(linear, lambda _: 2):
            assert linear(x) == 2
            raise ZeroDivisionError
        assert linear(x) == 1
    assert torch.equal(linear(x), expected)
    assert "forward" not in vars(linear)
