"""Tokenizers of the three habits: none added, a llama-style begin-of-text with a leading space, chat templates."""

import os
from pathlib import Path

import pytest

from smolora.tokenizers.bpe import BPETokenizer
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import load_tokenizer, to_pretrained

SHARED = Path(os.environ.get("SMOLORA_SHARED", Path(__file__).parents[4] / "shared"))

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def require_shared(relative: str) -> Path:
    """Return a path in the shared folder, or skip with the reason."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{relative} is not in the shared folder (SMOLORA_SHARED)")
    return path


@pytest.fixture
def char():
    return to_pretrained(CharTokenizer.train("abcdefghijklmnopqrstuvwxyz .:\n"), context=128)


@pytest.fixture
def bpe():
    return to_pretrained(
        BPETokenizer(300).train("the cat sat on the mat. User: hi\nAssistant: hello " * 9), context=128
    )


@pytest.fixture
def chatml(bpe):
    bpe.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    bpe.chat_template = CHATML
    return bpe


@pytest.fixture
def llama():
    return load_tokenizer(require_shared("models/stories260K"))


@pytest.fixture
def gpt2():
    return load_tokenizer(require_shared("tokenizers/gpt2"))


@pytest.fixture(params=["char", "bpe", "llama", "gpt2"])
def tokenizer(request):
    return request.getfixturevalue(request.param)
