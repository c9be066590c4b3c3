"""A model's head in a decode: no logits that nobody reads, and the highest one without the others, exactly."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from smolora.errors import BrokenRunError
from smolora.generation import head as module
from smolora.generation.choosing import Row
from smolora.generation.decoding import decode
from smolora.generation.fused_blocks import FusedBlocks
from smolora.generation.head import Head
from smolora.generation.sampling import SamplingSettings
from smolora.generation.step import Step, making
from smolora.runtime.device import has_native_bfloat16
from tests.tiny import random_input_ids, tiny_model

V, D = 1015, 48  # Nine tokens short of whole parts.
GREEDY = SamplingSettings(temperature=0.0)
CPU = torch.device("cpu")

screens = pytest.mark.skipif(
    not has_native_bfloat16(CPU), reason="this processor has no native bfloat16 to screen with"
)


def _head(weight):
    return Head(weight, num_rows=4, most_bytes=2**20)


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _with_long_tokens():
    weight = _normal(V, D)
    weight[::97] *= 30.0
    return weight, _normal(60, D, seed=1)


def _with_outlying_states():
    hidden = _normal(60, D, seed=1)
    hidden[:, 5] *= 200.0
    return _normal(V, D), hidden


def _with_all_logits_below_zero():
    weight, hidden = _normal(V, D).abs(), _normal(60, D, seed=1).abs()
    return weight, -hidden


def _with_large_numbers_that_cancel():
    """Neighbours whose order bfloat16 changes, by more than it rounds the highest of their logits."""
    weight, hidden = 0.1 * _normal(V, D), _normal(60, D, seed=1)
    near = weight[1::70]
    near[:] = 0.3 * _normal(1, D, seed=2) + 0.003 * _normal(len(near), D, seed=3)
    near[:, 0] = 50 + 5 * _normal(len(near), seed=4)
    near[:, 1] = -near[:, 0] / 3  # A third is rounded elsewhere.
    hidden = _normal(1, D, seed=2) + 0.1 * _normal(60, D, seed=1)
    hidden[:, :2] = torch.tensor([1.0, 3.0])
    return weight, hidden


def _with_squares_too_small_for_float32():
    return 1e-24 * _normal(V, D), _normal(60, D, seed=1)


def _with_long_states_and_tokens_of_zeros():
    weight = _normal(V, D)
    weight[256:512] = 0.0
    return weight, 1e20 * _normal(60, D, seed=1)


WORK = {
    "normal": lambda: (_normal(V, D), _normal(60, D, seed=1)),
    "long tokens": _with_long_tokens,
    "outlying states": _with_outlying_states,
    "below zero": _with_all_logits_below_zero,
    "cancelling": _with_large_numbers_that_cancel,
    "tiny": _with_squares_too_small_for_float32,
    "long states": _with_long_states_and_tokens_of_zeros,
    "one row": lambda: (_normal(V, D), _normal(1, D, seed=1)),
    "whole parts": lambda: (_normal(512, D), _normal(9, D, seed=1)),
}


@screens
@pytest.mark.parametrize("build", WORK.values(), ids=WORK)
def test_the_highest_is_the_highest_of_all_logits(build):
    weight, hidden = build()
    found = _head(weight).screen(hidden)
    logits = hidden.double() @ weight.double().T
    chosen = logits.gather(1, found.tokens[:, None])[:, 0]
    # What float32 itself may take for the highest.
    slack = 8 * torch.finfo(torch.float32).eps * hidden.double().norm(dim=1) * weight.double().norm(dim=1).max()
    assert (chosen >= logits.amax(-1) - slack).all()
    torch.testing.assert_close(found.logits.double(), chosen, rtol=0, atol=slack.max().item())


@screens
def test_numbers_may_move_by_the_whole_of_their_rounding():
    """Every number here lies next to the middle of two of bfloat16's: one token's move up, the other's down."""
    up, down, step = 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, 2**-7
    hidden, weight = torch.zeros(1, 65), torch.zeros(512, 65)
    hidden[0, :32], hidden[0, 32:64], hidden[0, 64] = down, up, 2**-6
    weight[3, :32], weight[300, 32:64], weight[300, 64] = down, up, -0.09375
    weight[3, :16] += step
    weight[300, 32:48] += step
    logits = (hidden.double() @ weight.double().T)[0]
    assert logits[3] > logits[300] + 1e-3
    assert _head(weight).screen(hidden).to_list() == [3]


@screens
@pytest.mark.parametrize("equal", [(3, V - 1), (255, 256), (V - 2, V - 1), (0, 512, 700)])
def test_of_equal_logits_the_first_is_taken(equal):
    weight, hidden = _normal(V, D), _normal(5, D, seed=1)
    weight[list(equal)] = 3 * hidden[2]
    assert _head(weight).screen(hidden).tokens[2] == equal[0]


@screens
def test_where_all_logits_may_be_the_highest_all_are_computed(monkeypatch):
    weight, computed = torch.ones(V, D), []
    weight[400] += 1e-6  # Nothing in bfloat16.
    find = module.find_highest
    monkeypatch.setattr(module, "find_highest", lambda logits: computed.append(logits.shape) or find(logits))
    assert _head(weight).screen(torch.ones(3, D)).to_list() == [400] * 3
    assert _head(weight).screen(torch.zeros(3, D)).to_list() == [0] * 3
    assert computed == [(3, V)] * 2


@screens
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["weight", "hidden"])
def test_what_is_not_finite_is_an_error(broken, part):
    weight, hidden = _normal(V, D), _normal(4, D, seed=1)
    (weight if part == "weight" else hidden)[2, 7] = broken
    with pytest.raises(BrokenRunError, match="not finite"):
        _head(weight).screen(hidden).to_list()


@pytest.fixture
def screened(monkeypatch):
    """Screen a tiny vocabulary, and count how many rows were looked at."""
    monkeypatch.setattr(module, "_FEWEST_TOKENS", 1)
    rows = []
    screen = Head.screen

    def count(head, hidden):
        rows.append(len(hidden))
        return screen(head, hidden)

    monkeypatch.setattr(Head, "screen", count)
    return rows


def _rows(settings=GREEDY, *, num_rows=5):
    prompts = [random_input_ids(3 + 2 * number, seed=number)[0].tolist() for number in range(num_rows)]
    return [Row(prompt, 6 + number, settings, key=bytes([number])) for number, prompt in enumerate(prompts)]


def _answers(model, rows):
    for _ in decode(model, rows, num_slots=4):
        pass
    return [row.ids for row in rows]


@screens
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "gpt_neox"])
def test_greedy_answers_are_screened_and_the_same(family, screened, monkeypatch):
    model = tiny_model(family)
    found = _answers(model, _rows())
    assert sum(screened) >= sum(map(len, found)) - 4  # The first step sees whether they may be.
    monkeypatch.setattr(module, "_FEWEST_TOKENS", 10**6)
    assert _answers(model, _rows()) == found


@screens
@pytest.mark.parametrize(
    "settings", [SamplingSettings(seed=0), SamplingSettings(temperature=0.0, repetition_penalty=1.2)]
)
def test_a_row_that_reads_its_logits_has_them(settings, screened):
    _answers(tiny_model("llama"), [*_rows(num_rows=2), *_rows(settings, num_rows=2)])
    assert screened == []


@screens
def test_a_row_or_two_begin_without_a_copy_of_the_matrix(screened, monkeypatch):
    [whole] = _answers(tiny_model("llama"), _rows(num_rows=1))
    assert screened == []
    monkeypatch.setattr(module, "_FIRST_STEPS", 2)
    assert _answers(tiny_model("llama"), _rows(num_rows=1)) == [whole]
    assert screened == [1] * (len(whole) - 2)


class CutLlama(LlamaForCausalLM):
    """One whose head is longer than its vocabulary."""

    def forward(self, *args, **settings):
        output = super().forward(*args, **settings)
        output.logits = output.logits[..., :100]
        return output


class HidingLlama(LlamaForCausalLM):
    """One that never says some tokens, and hides them in place."""

    def forward(self, *args, **settings):
        output = super().forward(*args, **settings)
        output.logits[..., 100:] = torch.finfo(output.logits.dtype).min
        return output


@screens
@pytest.mark.parametrize("kind", [CutLlama, HidingLlama, None], ids=["cuts", "hides", "caps"])
def test_a_model_that_changes_what_its_head_gives_is_not_screened(kind, screened):
    model = tiny_model("llama" if kind else "gemma2")
    if kind:
        model.__class__ = kind
    answers = _answers(model, _rows())
    assert screened == []
    assert not kind or max(map(max, answers)) < 100


@screens
def test_a_head_in_16_bits_or_without_room_for_a_copy_is_not_screened(screened, monkeypatch):
    _answers(tiny_model("llama").bfloat16(), _rows())
    model = tiny_model("llama")
    monkeypatch.setattr("smolora.generation.fused_blocks._MOST_BYTES", model.lm_head.weight.nbytes // 2 - 1)
    _answers(model, _rows())
    assert screened == []


def test_a_head_that_an_adapter_trains_is_left_alone():
    assert FusedBlocks(tiny_model("llama"), num_rows=4).head is not None
    for own in ({"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}):
        model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", **own)).eval()
        assert FusedBlocks(model, num_rows=4).head is None


def test_no_logits_of_prompts_are_computed():
    products = []
    head = Head(_normal(V, D), lambda: lambda x: products.append(x) or x @ _normal(V, D).T, num_rows=4, most_bytes=0)
    prompts, tokens = (Step.of_prompts(0, 4, 3, CPU), Step.of_next_tokens([[3]] * 4, CPU))
    for step, num_products in ((prompts, 0), (tokens, 1)):
        with making(step):
            assert head(_normal(4, 1, D)).shape == (4, 1, V)
        assert len(products) == num_products
