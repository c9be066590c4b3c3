from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from smolora.config.model import GPTConfig
from smolora.errors import ConfigError, DataError
from smolora.models.gpt import GPTModel

SHAPE = GPTConfig(num_layers=3, num_heads=4, width=32, context=24, vocab_size=50, bias=True)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPTModel(SHAPE).eval()


def draw_ids(*shape, seed=0):
    return torch.randint(SHAPE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def naive_logits(model: GPTModel, ids: torch.Tensor) -> torch.Tensor:
    """The maths of GPT-2 for one text [T], written out with loops and no fast path."""
    num_tokens = len(ids)
    x = model.token_embedding.weight[ids] + model.position_embedding.weight[:num_tokens]
    for block in model.blocks:
        h, heads = block.ln1(x), []
        q, k, v = block.attention.W_q(h), block.attention.W_k(h), block.attention.W_v(h)
        size = SHAPE.width // SHAPE.num_heads
        for head in range(SHAPE.num_heads):
            part = slice(head * size, (head + 1) * size)
            scores = q[:, part] @ k[:, part].T / size**0.5
            scores = scores.masked_fill(torch.ones(num_tokens, num_tokens).triu(1).bool(), float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, part])
        x = x + block.attention.W_o(torch.cat(heads, -1))
        h = block.feed_forward.linear1(block.ln2(x))
        x = x + block.feed_forward.linear2(functional.gelu(h))
    return model.ln_final(x) @ model.token_embedding.weight.T


def test_logits_equal_the_maths_written_out(model):
    ids = draw_ids(11)
    # float32 rounding of three layers; the two sum in another order.
    torch.testing.assert_close(model(ids[None])[0], naive_logits(model, ids), atol=1e-6, rtol=1e-5)


def test_a_later_token_changes_no_earlier_logit(model):
    ids = draw_ids(1, 10)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % SHAPE.vocab_size
    assert torch.equal(model(ids)[:, :-1], model(changed)[:, :-1])
    assert not torch.equal(model(ids)[:, -1], model(changed)[:, -1])


def test_packed_logits_equal_one_by_one_logits(model):
    rows = [draw_ids(length, seed=length) for length in (3, 9, 1, 5)]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed = model(torch.cat(rows)[None], positions)[0]
    alone = torch.cat([model(row[None])[0] for row in rows])
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-5)  # Rounding of another kernel.


def test_a_packed_row_may_reach_past_the_context_together_with_the_others(model):
    rows = draw_ids(1, 3 * 20)
    positions = torch.arange(20).repeat(3)[None]
    assert model(rows, positions).shape == (1, 60, SHAPE.vocab_size)


def test_target_positions_choose_logits_in_their_order(model):
    ids, chosen = draw_ids(2, 6), torch.tensor([7, 0, 11])
    everywhere = model(ids).flatten(0, 1)
    torch.testing.assert_close(model(ids, target_positions=chosen), everywhere[chosen], atol=1e-6, rtol=1e-5)


def test_the_head_is_the_token_embedding(model):
    assert model.lm_head.weight is model.token_embedding.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_the_promised_names_are_there(model):
    names = dict(model.named_modules())
    inside = ("ln1", "attention.W_q", "attention.W_k", "attention.W_v", "attention.W_o", "attention.dropout", "ln2")
    inside += tuple(f"feed_forward.{name}" for name in ("linear1", "gelu", "linear2", "dropout"))
    outside = {"token_embedding", "position_embedding", "dropout", "ln_final", "lm_head"}
    assert {f"blocks.2.{name}" for name in inside} | outside <= names.keys()


def test_initial_weights_follow_gpt2():
    torch.manual_seed(1)
    model = GPTModel(GPTConfig(num_layers=8, num_heads=4, width=128, context=64, vocab_size=500, bias=True))
    block = model.blocks[3]
    for weight in (model.token_embedding.weight, block.attention.W_q.weight, block.feed_forward.linear1.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    for weight in (block.attention.W_o.weight, block.feed_forward.linear2.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)  # sqrt(2 * 8 layers)
    assert not block.attention.W_q.bias.any()


def test_dropout_acts_in_training_only():
    model = GPTModel(SHAPE.replace(dropout=0.5))
    ids = draw_ids(1, 8)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids = draw_ids(2, 8)

    def gradients():
        model.zero_grad()
        model.train()(ids).logsumexp(-1).sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))


def test_gradient_checkpointing_keeps_no_activation_of_a_block(model):
    kept = []

    def count_kept():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            model.train()(draw_ids(1, 8))
        return len(kept)

    plain = count_kept()
    model.gradient_checkpointing_enable()
    assert count_kept() < plain / 3


def test_a_text_past_the_context_is_refused(model):
    with pytest.raises(DataError, match="25 tokens in a row, but the model reads at most 24"):
        model(draw_ids(1, 25))


@pytest.mark.parametrize("positions", [range(20, 25), range(-1, 4)])
def test_a_position_that_the_model_lacks_is_refused(model, positions):
    said = f"position_ids go from {positions[0]} to {positions[-1]}, but the model has positions 0 to 23"
    with pytest.raises(DataError, match=said):
        model(draw_ids(1, 5), torch.tensor([positions]))


def test_a_model_without_a_vocabulary_size_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        GPTModel(GPTConfig())


def test_the_gelu_of_gpt2_is_used_when_chosen(model):
    tanh = GPTModel(SHAPE.replace(activation="gelu_new")).eval()
    tanh.load_state_dict(model.state_dict())
    assert not torch.equal(tanh(draw_ids(1, 8)), model(draw_ids(1, 8)))
