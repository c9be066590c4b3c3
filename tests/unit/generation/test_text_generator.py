"""Answers: the same one by one, in batches and streamed; they end in the right place and disturb nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from smolora.data.prompts import PromptFormat, encode_prompt
from smolora.errors import ConfigError, DataError, ModelError
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.bundle import ModelBundle
from smolora.models.gpt import GPTModel
from smolora.models.loading import load_model
from tests.tiny import CONTEXT, LONG_ROPE, save_tiny_model, tiny_bundle

PROMPTS = ["the cat", "name: The Eagle, food: Italian, area:", "", "the dog sat on the log. Where"]
GREEDY = SamplingSettings(temperature=0.0, max_new_tokens=12)
SAMPLED = SamplingSettings(seed=5, max_new_tokens=12)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> ModelBundle:
    return tiny_bundle("llama", tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture
def generator(bundle) -> TextGenerator:
    return TextGenerator(bundle)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("gpt2", {}), ("gpt_neo", {"window_size": 20}), ("rwkv", {"seed": 2}), ("phi3", LONG_ROPE)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_greedy_answers_of_a_batch_equal_those_one_by_one(family, changes, tmp_path):
    generator = TextGenerator(tiny_bundle(family, tmp_path / "base", **changes))
    together = generator.generate(PROMPTS, settings=GREEDY)
    assert together == [generator.generate(prompt, settings=GREEDY)[0] for prompt in PROMPTS]
    assert len(set(together)) > 1


def _greedy_ids(bundle, prompt, num_tokens):
    """The naive oracle: the whole text through the model for every token."""
    prompt_ids = encode_prompt(prompt, None, bundle.tokenizer)
    ids = list(prompt_ids)
    with torch.no_grad():
        for _ in range(num_tokens):
            ids.append(int(bundle.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt_ids) :]


def test_greedy_takes_the_likeliest_token_each_time(generator, bundle):
    expected = bundle.tokenizer.decode(_greedy_ids(bundle, "the cat", 12))
    assert generator.generate("the cat", settings=GREEDY)[0] == expected


def test_a_batch_smaller_than_the_prompts_changes_no_greedy_answer(generator):
    assert generator.generate(PROMPTS, settings=GREEDY, batch_size=3) == generator.generate(PROMPTS, settings=GREEDY)


def test_no_rows_at_a_time_are_refused(generator):
    with pytest.raises(ConfigError, match="batch_size must be at least 1, found 0"):
        generator.generate(PROMPTS, batch_size=0)


def test_no_prompts_give_no_answers(generator):
    assert generator.generate([]) == []


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_streamed_pieces_join_to_the_generated_answer(generator, prompt, settings):
    pieces = list(generator.stream(prompt, settings=settings))
    assert len(pieces) > 1
    assert "".join(pieces) == generator.generate(prompt, settings=settings)[0]


def test_the_same_seed_repeats_an_answer_and_another_seed_does_not(generator):
    first, again = (generator.generate("the cat", settings=SAMPLED) for _ in range(2))
    other = generator.generate("the cat", settings=SAMPLED.replace(seed=6))
    assert first == again != other


def test_without_a_seed_every_answer_is_drawn_anew(generator):
    settings = SamplingSettings(max_new_tokens=20)
    assert generator.generate("the cat", settings=settings) != generator.generate("the cat", settings=settings)


def test_a_seed_gives_a_prompt_the_same_answer_whatever_it_is_asked_with(generator):
    alone = [generator.generate(prompt, settings=SAMPLED)[0] for prompt in PROMPTS]
    for batch_size in (1, 3, 16):
        assert generator.generate(PROMPTS[::-1], settings=SAMPLED, batch_size=batch_size) == alone[::-1]


def test_a_prompt_asked_twice_gets_two_answers_and_the_first_is_that_of_asking_once(generator):
    first, second = generator.generate(["the cat", "the cat"], settings=SAMPLED)
    assert first == generator.generate("the cat", settings=SAMPLED)[0] != second


def test_each_prompt_may_have_its_own_settings(generator):
    settings = [GREEDY.replace(max_new_tokens=3), SAMPLED, GREEDY, SAMPLED.replace(top_k=1)]
    expected = [generator.generate(prompt, settings=own)[0] for prompt, own in zip(PROMPTS, settings, strict=True)]
    assert generator.generate(PROMPTS, settings=settings) == expected


def test_settings_for_another_number_of_prompts_are_refused(generator):
    with pytest.raises(ConfigError, match="2 settings for 4 prompts"):
        generator.generate(PROMPTS, settings=[GREEDY, GREEDY])


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_stop_text_ends_an_answer_before_it_begins_streamed_or_not(generator, settings):
    whole = _answer(generator, "the cat", settings)
    stop = whole[4:7]
    stopping = settings.replace(stop=["never there", stop])
    assert _answer(generator, "the cat", stopping) == whole[: whole.index(stop)]
    assert "".join(generator.stream("the cat", settings=stopping)) == whole[: whole.index(stop)]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_special_token_as_a_stop_text_ends_an_answer_though_no_answer_shows_it(num_beams, tmp_path):
    bundle = tiny_bundle("llama", tmp_path / "base")
    settings = GREEDY.replace(num_beams=num_beams)
    bundle.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    often = _greedy_ids(bundle, "the cat", 4)[3]
    torch.manual_seed(0)  # One draw in forty lets the other answer win.
    bundle.model.resize_token_embeddings(len(bundle.tokenizer), mean_resizing=False)
    with torch.no_grad():
        head = bundle.model.get_output_embeddings().weight
        head[-1] = head[often] * 2
    generator = TextGenerator(bundle)
    whole, stopped = generator.generate(["the cat"] * 2, settings=[settings, settings.replace(stop=["<|im_end|>"])])
    assert whole.startswith(stopped)
    assert whole != stopped


def test_a_stop_text_spares_the_tokens_after_it(generator):
    stop = _answer(generator, "the cat")[2:4]
    steps = []
    hook = generator.bundle.model.register_forward_hook(lambda *_: steps.append(1))
    generator.generate("the cat", settings=GREEDY.replace(stop=[stop], max_new_tokens=50))
    hook.remove()
    assert len(steps) < 25


def test_the_models_own_repetition_penalty_counts_where_none_is_given(bundle, tmp_path):
    own = tiny_bundle("llama", tmp_path / "base")
    own.model.generation_config.repetition_penalty = 30.0
    expected = _answer(TextGenerator(bundle), "the cat", GREEDY.replace(repetition_penalty=30.0))
    assert _answer(TextGenerator(own), "the cat") == expected != _answer(TextGenerator(bundle), "the cat")
    assert _answer(TextGenerator(own), "the cat", GREEDY.replace(repetition_penalty=1.0)) == _answer(
        TextGenerator(bundle), "the cat"
    )


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_models_own_stop_strings_end_an_answer_beside_those_given(num_beams, generator, tmp_path):
    asked = GREEDY.replace(num_beams=num_beams)
    own = tiny_bundle("llama", tmp_path / "base")
    whole = _answer(generator, "the cat", asked)
    own.model.generation_config.stop_strings = [whole[4]]
    for given in ((), (whole[1],)):
        expected = _answer(generator, "the cat", asked.replace(stop=(*given, whole[4])))
        assert _answer(TextGenerator(own), "the cat", asked.replace(stop=given)) == expected != whole


def test_sampling_leaves_the_global_random_state_as_it_was(generator):
    before = torch.get_rng_state()
    generator.generate("the cat", settings=SAMPLED)
    list(generator.stream("the cat", settings=SAMPLED))
    assert torch.equal(torch.get_rng_state(), before)


def test_top_k_of_one_is_greedy(generator):
    drawn = generator.generate("the cat", settings=SAMPLED.replace(top_k=1))
    assert drawn == generator.generate("the cat", settings=GREEDY)


def test_settings_win_over_the_models_own_generation_config_without_a_warning(tmp_path, capfd):
    folder = save_tiny_model("llama", tmp_path / "base")
    plain = TextGenerator(load_model(folder)).generate("the cat", settings=GREEDY)
    own = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "num_beams": 2, "max_length": 5}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, **own}))
    generator = TextGenerator(load_model(folder))
    assert generator.generate("the cat", settings=GREEDY) == plain
    assert "".join(generator.stream("the cat", settings=GREEDY)) == plain[0]
    assert capfd.readouterr().err == ""


def test_an_answer_ends_at_any_end_token_of_the_model_and_does_not_show_it(tmp_path):
    bundle = tiny_bundle("llama", tmp_path / "base")
    ids = _greedy_ids(bundle, "the cat", 12)
    bundle.model.generation_config.eos_token_id = [0, ids[4]]
    before_it = bundle.tokenizer.decode(ids[: ids.index(ids[4])])
    generator = TextGenerator(bundle)
    assert generator.generate([PROMPTS[1], "the cat"], settings=GREEDY)[1] == before_it
    assert "".join(generator.stream("the cat", settings=GREEDY)) == before_it


def test_a_prompt_past_the_context_is_refused_with_both_lengths(generator):
    with pytest.raises(DataError, match=rf"{CONTEXT + 10} tokens.*context is {CONTEXT} tokens"):
        generator.generate(["a", "\n" * (CONTEXT + 10)], settings=GREEDY)


def test_a_token_that_the_model_has_no_embedding_for_is_named(tmp_path):
    bundle = tiny_bundle("llama", tmp_path / "base")
    bundle.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    bundle.tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}"
    message = r"encodes '<\|im_start\|>' as 288, .* 0 to 287. .*resize_token_embeddings\(len\(tokenizer\)\)"
    with pytest.raises(ModelError, match=message):
        TextGenerator(bundle).generate([[{"role": "user", "content": "the cat"}]], settings=GREEDY)
    assert TextGenerator(bundle).generate("the cat", settings=GREEDY), "which doesn't hold the token"


def test_a_stream_refuses_a_prompt_past_the_context_before_it_is_read(generator):
    with pytest.raises(DataError, match="no room"):
        generator.stream("\n" * CONTEXT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_context_ends_each_answer_in_its_place_with_one_warning(family, tmp_path, caplog):
    bundle = tiny_bundle(family, tmp_path / "base")
    prompts = ["\n" * (CONTEXT - 10), "\n" * (CONTEXT - 3), "the cat"]
    answers = TextGenerator(bundle).generate(prompts, settings=GREEDY)
    expected = [_greedy_ids(bundle, prompt, num) for prompt, num in zip(prompts, (10, 3, 12), strict=True)]
    assert answers == [bundle.tokenizer.decode(ids) for ids in expected]
    assert caplog.messages == ["the context of 64 tokens ended an answer after 3 tokens, before max_new_tokens=12."]


def test_an_answer_that_ends_by_itself_is_given_no_word_on_the_context(tmp_path, caplog):
    bundle = tiny_bundle("llama", tmp_path / "base")
    generator, prompt = TextGenerator(bundle), "\n" * (CONTEXT - 10)
    asked = GREEDY.replace(max_new_tokens=200)
    ids = _greedy_ids(bundle, prompt, 10)
    generator.generate(prompt, settings=asked.replace(stop=[bundle.tokenizer.decode(ids)]))
    bundle.model.generation_config.eos_token_id = ids[-1]
    list(TextGenerator(bundle).stream(prompt, settings=asked))
    assert caplog.messages == []


def test_a_closed_stream_stops_computing(generator):
    steps = []
    hook = generator.bundle.model.register_forward_hook(lambda *_: steps.append(1))
    pieces = generator.stream("the cat", settings=GREEDY.replace(max_new_tokens=60))
    next(pieces)
    pieces.close()
    hook.remove()
    assert len(steps) < 60


@pytest.mark.parametrize("family", ["llama", "rwkv"])
def test_answers_stop_where_it_is_said_to_be_over(family, tmp_path):
    generator = TextGenerator(tiny_bundle(family, tmp_path / "base"))
    asked, settings = PROMPTS[:1] * 2, GREEDY.replace(max_new_tokens=60)  # A thread may run ahead of who looks.
    whole = generator.generate(asked, settings=settings)
    looks, steps = iter([False, False, True]), []
    hook = generator.bundle.model.register_forward_hook(lambda *_: steps.append(1))
    cut, are_whole = generator.generate_until(lambda: next(looks), asked, settings=settings)
    hook.remove()
    assert are_whole == [False, False]
    assert len(steps) < settings.max_new_tokens
    for part, text in zip(cut, whole, strict=True):
        assert text.startswith(part)
        assert "" < part < text
    assert generator.generate_until(lambda: False, asked, settings=settings) == (whole, [True, True])


def test_between_two_pieces_the_model_is_its_own_so_that_streams_may_overlap(generator, bundle):
    expected = [generator.generate(prompt, settings=GREEDY)[0] for prompt in PROMPTS[:2]]
    first, second = (generator.stream(prompt, settings=GREEDY) for prompt in PROMPTS[:2])
    begun = [next(first), next(second)]
    assert not any("forward" in vars(module) for module in bundle.model.modules())
    assert [begun[0] + "".join(first), begun[1] + "".join(second)] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_change_beside_an_open_stream_count_for_the_next_answer(tmp_path, dtype):
    bundle = tiny_bundle("llama", tmp_path / "base")
    bundle.model.to(dtype)
    generator = TextGenerator(bundle)
    before, pieces = generator.generate(PROMPTS, settings=GREEDY), generator.stream(PROMPTS[0], settings=GREEDY)
    next(pieces)
    with torch.no_grad():
        for parameter in bundle.model.parameters():
            parameter.copy_(parameter.flip(0))
    found = generator.generate(PROMPTS, settings=GREEDY)
    assert found == TextGenerator(bundle).generate(PROMPTS, settings=GREEDY) != before
    if dtype == torch.float32:
        assert found[0] == bundle.tokenizer.decode(_greedy_ids(bundle, PROMPTS[0], 12))


def test_an_error_while_streaming_reaches_the_reader(bundle):
    def fail(*_):
        raise RuntimeError("broken layer")

    hook = bundle.model.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="broken layer"):
            list(TextGenerator(bundle).stream("the cat"))
    finally:
        hook.remove()


def test_a_gpt_in_memory_answers_like_its_saved_form(tmp_path):
    saved = tiny_bundle("gpt2", tmp_path / "base", activation_function="gelu_pytorch_tanh")
    in_memory = replace(saved, model=GPTModel.from_pretrained(tmp_path / "base"))
    assert TextGenerator(in_memory).generate(PROMPTS, settings=GREEDY) == TextGenerator(saved).generate(
        PROMPTS, settings=GREEDY
    )


def test_dropout_is_off_while_answering_and_back_on_afterwards(tmp_path):
    bundle = tiny_bundle("gpt2", tmp_path / "base", resid_pdrop=0.5, embd_pdrop=0.5)
    answer = TextGenerator(bundle).generate("the cat", settings=GREEDY)
    bundle.model.train()
    assert TextGenerator(bundle).generate("the cat", settings=GREEDY) == answer
    assert bundle.model.training


def test_the_space_at_the_seam_of_a_completion_is_not_part_of_the_answer(bundle):
    fmt = PromptFormat(kind="prompt_completion", columns={"prompt": "p", "completion": "c"})
    tuned = TextGenerator(replace(bundle, prompt_format=fmt))
    plain = TextGenerator(bundle)
    spaced = next(p for p in ("the", "dog", "a", "it", "log", "on", "area") if _answer(plain, p).startswith(" "))
    assert _answer(tuned, spaced) == _answer(plain, spaced)[1:]
    assert "".join(tuned.stream(spaced, settings=GREEDY)) == _answer(tuned, spaced)


def _answer(generator, prompt, settings=GREEDY):
    return generator.generate(prompt, settings=settings)[0]


def test_control_tokens_typed_by_a_user_do_not_end_the_prompt(generator, bundle):
    assert bundle.tokenizer.eos_token_id not in encode_prompt("a <|endoftext|> b", None, bundle.tokenizer)
    assert generator.count_tokens("a <|endoftext|> b") > 5
