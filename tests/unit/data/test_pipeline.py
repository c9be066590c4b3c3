import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from smolora.data.cleaning import TextCleaningProcessor
from smolora.data.encoding import encode_texts
from smolora.data.pipeline import DatasetPipeline, chunk_texts
from smolora.errors import ConfigError


def test_steps_run_in_the_order_they_were_added():
    pipeline = (
        DatasetPipeline()
        .add_processor(TextCleaningProcessor(lowercase=True))
        .add_processor(lambda dataset: dataset.filter(lambda row: row["text"] == "a"))
    )
    assert pipeline.process(Dataset.from_dict({"text": ["A", "B"]}))["text"][:] == ["a"]


def test_a_pipeline_without_steps_changes_nothing():
    dataset = Dataset.from_dict({"text": ["A"]})
    assert DatasetPipeline().process(dataset) is dataset


def test_a_step_that_returns_no_dataset_is_named():
    with pytest.raises(ConfigError, match="step 1 of the pipeline returned NoneType"):
        DatasetPipeline().add_processor(lambda dataset: None).process(Dataset.from_dict({"text": ["A"]}))


@given(st.lists(st.text()), st.integers(1, 5))
def test_chunking_by_words_loses_no_word_and_keeps_to_the_size(texts, size):
    chunks = chunk_texts(texts, size)
    assert [word for chunk in chunks for word in chunk.split()] == [word for text in texts for word in text.split()]
    assert all(1 <= len(chunk.split()) <= size for chunk in chunks)


def test_chunks_keep_paragraphs_and_indentation():
    assert chunk_texts(["if a:\n\n    b c"], 3) == ["if a:\n\n    b", "c"]


def test_a_size_of_zero_splits_nothing():
    assert chunk_texts(["a b", ""], 0) == ["a b", ""]


def test_a_negative_size_is_refused():
    with pytest.raises(ConfigError, match="at least 0"):
        chunk_texts(["a"], -1)


def test_chunking_by_tokens_loses_no_character_and_cuts_none(tokenizer):
    text = "the cat sat 日本 on 😀 the mat. " * 5
    for size in (1, 3, 7):
        assert "".join(chunk_texts([text], size, tokenizer=tokenizer)).strip() == text.strip()


def test_chunks_hold_about_as_many_tokens_as_asked(bpe):
    chunks = chunk_texts(["the cat sat on the mat. " * 20], 8, tokenizer=bpe)
    assert {len(ids) for ids in encode_texts(chunks[:-1], bpe)} == {8}
