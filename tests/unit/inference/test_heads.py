"""Models that label words or find answers, asked from Python; what they don't do is refused with what they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForTokenClassification

from smolora.data.prompts import PromptFormat
from smolora.data.spans import QuestionAnsweringPreprocessor, find_answer
from smolora.errors import ConfigError, DataError
from smolora.evaluation.head_logits import compute_head_logits
from smolora.generation.sampling import SamplingSettings
from smolora.inference.pipeline import InferencePipeline
from smolora.models.loading import load_model
from smolora.recipes.generate import generate
from tests.tiny import CONTEXT, save_tiny_encoder, save_tiny_model

CONTEXT_TEXT = "The Eagle is an Italian place in the riverside area. " * 3


def save_head(kind, folder, **names):
    save_tiny_encoder("bert", folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = kind.from_pretrained(folder, **names)
        for head in (module for name, module in model.named_children() if name in ("classifier", "qa_outputs")):
            torch.nn.init.normal_(head.weight)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger") / "base"
    return save_head(AutoModelForTokenClassification, folder, id2label={0: "O", 1: "X", 2: "Y"})


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return save_head(AutoModelForQuestionAnswering, tmp_path_factory.mktemp("reader") / "base")


def test_every_word_gets_a_label_with_its_shares(tagger):
    pipeline = InferencePipeline.from_path(tagger, device="cpu")
    rows = [["The", "Eagle", "isn't", "there", "."], ["riverside"]]
    found = pipeline.label_words(rows)
    assert [len(row) for row in found] == [5, 1]
    for word in found[0]:
        assert sum(word.shares.values()) == pytest.approx(1)
        assert word.shares[word.label] == max(word.shares.values())
    alone = pipeline.label_words(rows[0])
    assert [word.label for word in alone] == [word.label for word in found[0]]
    assert pipeline.label_words([]) == [] and pipeline.label_words([[]]) == [[]]


def test_what_has_no_label_is_refused(tagger):
    pipeline = InferencePipeline.from_path(tagger, device="cpu")
    with pytest.raises(ConfigError, match="reads lists of words, found a text"):
        pipeline.label_words("the Eagle")
    with pytest.raises(ConfigError, match="reads lists of words, found a text"):
        pipeline.label_words(["the", ["Eagle"]])
    with pytest.raises(ConfigError, match="reads lists of words, each a text"):
        pipeline.label_words([["dog", 3]])
    with pytest.raises(DataError, match=rf"row 2: \d+ of {CONTEXT} words have no token .* context of {CONTEXT} tokens"):
        pipeline.label_words([["dog"], ["dog"] * CONTEXT])
    with pytest.raises(DataError, match="row 1: 1 of 2 words have no token of their own .*'' first"):
        pipeline.label_words(["dog", ""])


def test_what_is_no_text_has_no_answer(reader):
    pipeline = InferencePipeline.from_path(reader, device="cpu")
    with pytest.raises(ConfigError, match="reads texts"):
        pipeline.find_answer(["Where?"], [None])
    with pytest.raises(ConfigError, match="reads texts"):
        pipeline.answer([3], contexts=CONTEXT_TEXT)


def test_an_answer_has_its_place_and_its_score(reader):
    pipeline = InferencePipeline.from_path(reader, device="cpu")
    found = pipeline.find_answer("Where is it?", CONTEXT_TEXT)
    bundle = load_model(reader)
    form = PromptFormat(kind="qa", columns={role: role for role in ("context", "question", "answers")})
    preprocessor = QuestionAnsweringPreprocessor(form, bundle.tokenizer)
    asked = {"question": "Where is it?", "context": CONTEXT_TEXT, "answers": []}
    windows = preprocessor.encode_windows(asked, CONTEXT)
    logits = [compute_head_logits(bundle, [window.example], batch_size=1)[0].numpy() for window in windows]
    expected = find_answer(CONTEXT_TEXT, windows, [tuple(one) for one in logits])
    assert len(windows) > 1 and CONTEXT_TEXT[found.start :].startswith(found.text)
    assert (found.text, found.start) == (expected.text, expected.start)
    assert np.allclose([found.score, found.null_score], [expected.score, expected.null_score], atol=1e-4)


def test_questions_are_about_one_context_or_each_about_its_own(reader):
    pipeline = InferencePipeline.from_path(reader, device="cpu")
    spans = pipeline.find_answer(["Where?", "What is it?"], CONTEXT_TEXT)
    assert pipeline.answer(["Where?", "What is it?"], [CONTEXT_TEXT] * 2) == [span.text for span in spans]
    assert pipeline.answer("Where?", CONTEXT_TEXT) == spans[0].text
    with pytest.raises(ConfigError, match="1 contexts for 2 questions"):
        pipeline.answer(["Where?", "What?"], [CONTEXT_TEXT])
    with pytest.raises(ConfigError, match="finds answers in contexts"):
        pipeline.answer("Where?")
    with pytest.raises(ConfigError, match="--temperature would change nothing"):
        pipeline.answer("Where?", CONTEXT_TEXT, settings=SamplingSettings(temperature=0.5))
    with pytest.raises(DataError, match="question 2: the question takes"):
        pipeline.answer(["Where?", "Where? " * CONTEXT], CONTEXT_TEXT)


@pytest.mark.parametrize("ask", ["generate", "chat", "stream", "start_conversation"])
def test_what_would_have_it_write_names_the_way_to_ask_it(tagger, reader, ask):
    given = {"generate": ("a",), "stream": ("a",), "chat": ([{"role": "user", "content": "a"}],)}.get(ask, ())
    for model, words in (
        (tagger, "token classifier .*label_words"),
        (reader, r"question answering .*Pipeline\.answer"),
    ):
        with pytest.raises(ConfigError, match=rf"{words}, or score it with `smolora evaluate`"):
            list(getattr(InferencePipeline.from_path(model, device="cpu"), ask)(*given))


def test_the_command_that_writes_names_the_way_to_ask_it(tagger):
    with pytest.raises(ConfigError, match=r"a token classifier \(O, X, Y\) and writes no text: ask it with InferenceP"):
        generate(str(tagger), "the Eagle")


def test_a_method_for_another_model_names_the_one_for_this(tagger, reader, tmp_path):
    writer = InferencePipeline.from_path(save_tiny_model("llama", tmp_path / "base"), device="cpu")
    tagger, reader = (InferencePipeline.from_path(model, device="cpu") for model in (tagger, reader))
    with pytest.raises(ConfigError, match=r"a token classifier, and this is for a text classifier: .*label_words"):
        tagger.classify("the Eagle")
    with pytest.raises(ConfigError, match=r"a model for question answering, and .* a token classifier: .*\.answer"):
        reader.label_words(["the"])
    with pytest.raises(
        ConfigError, match=r"a causal language model, and .* a model for question answering: .*generate"
    ):
        writer.find_answer("Where?", CONTEXT_TEXT)
    with pytest.raises(ConfigError, match=r"this model is a token classifier .* and writes no text"):
        tagger.answer("Where?", CONTEXT_TEXT)
