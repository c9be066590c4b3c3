import pytest

from smolora.data.encoding import check_spelling, decode_ids, encode_continuation, encode_texts
from smolora.errors import DataError


def test_a_continuation_gets_no_space_of_its_own(llama):
    ids = [*encode_texts(["once"], llama)[0], *encode_continuation("upon", llama)]
    assert decode_ids(ids, llama) == "onceupon"


@pytest.mark.parametrize("text", ["b", " b", "\n\nb", "  two", "é", "."])
def test_a_continuation_spells_its_text(tokenizer, text):
    start = encode_texts(["x"], tokenizer)[0]
    assert decode_ids([*start, *encode_continuation(text, tokenizer)], tokenizer) == "x" + text


def test_tokens_that_spell_another_text_are_refused(bpe):
    ids = encode_texts(["the dog"], bpe)[0]
    check_spelling(ids, "the dog", bpe)
    with pytest.raises(DataError, match="'the cat' was meant"):
        check_spelling(ids, "the cat", bpe)


def test_no_texts_have_no_ids(bpe):
    assert encode_texts([], bpe) == []
