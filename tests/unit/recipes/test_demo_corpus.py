"""The demo's grammar and its cutting of a person's own text."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from string import Formatter

import pytest

from smolora.errors import DataError
from smolora.recipes import demo_corpus
from smolora.recipes.demo_corpus import (
    HELD_OUT_NAMES,
    NAMES,
    QUESTIONS,
    Hero,
    ask,
    tell_story,
    write_corpus,
    write_passages,
)

SENTENCES = [
    *demo_corpus.OPENINGS,
    *demo_corpus.LIKINGS,
    *demo_corpus.TRADES,
    *demo_corpus.DISCOVERIES,
    *demo_corpus.TURNS,
    *demo_corpus.ENDINGS,
]


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def stories():
    rng = random.Random(3)
    return [tell_story(rng) for _ in range(300)]


def test_the_same_bytes_are_written_every_time(tmp_path):
    one, other = (write_corpus(tmp_path / name, num_stories=20, num_rows=20, num_held_out=5) for name in "ab")
    for path, twin in ((one.text, other.text), (one.rows, other.rows), (one.held_out, other.held_out)):
        assert path.read_bytes() == twin.read_bytes()


def test_no_row_to_tune_on_asks_about_a_held_out_hero(tmp_path):
    corpus = write_corpus(tmp_path, num_stories=1, num_rows=400, num_held_out=50)
    heroes = {row["completion"].split()[0] for row in read_rows(corpus.rows)}
    assert heroes == set(NAMES) - set(HELD_OUT_NAMES)
    assert {row["completion"].split()[0] for row in read_rows(corpus.held_out)} <= set(HELD_OUT_NAMES)


def test_no_held_out_story_is_pretrained_on(tmp_path):
    corpus = write_corpus(tmp_path, num_stories=4000, num_rows=1, num_held_out=100)
    told = {row["text"] for row in read_rows(corpus.text)}
    assert not any(row["prompt"].split("\n")[0] in told for row in read_rows(corpus.held_out))


def test_every_answer_stands_in_its_story(stories):
    rng = random.Random(0)
    for story in stories:
        row = ask(rng, story)
        answer = row["completion"].removeprefix(story.hero.name).removesuffix(".")
        value = answer.split(" ", 2)[2]  # without the verb
        assert value.removeprefix("a ") in story.text


def test_a_prompt_ends_where_the_answer_begins(stories):
    row = ask(random.Random(0), stories[0])
    assert row["prompt"].endswith("\nAnswer:")
    assert row["completion"].endswith(".")


def test_every_fact_is_asked_for_when_it_is_told(stories):
    rng = random.Random(0)
    questions = {ask(rng, story)["prompt"].split("\nQuestion: ")[1] for story in stories}
    for question, _ in QUESTIONS.values():
        start = question.split("{")[0]
        assert any(asked.startswith(start) for asked in questions)


def test_a_wanted_fact_is_asked_for_if_it_was_told(stories):
    rng = random.Random(0)
    for story in stories:
        asks_find = "What did" in ask(rng, story, "find")["prompt"]
        assert asks_find == ("find" in story.facts)


def test_what_happens_builds_only_on_what_was_told(stories):
    for story in stories:
        found = story.hero.find.removeprefix("a ")
        assert (found in story.text) == ("find" in story.facts)
        assert (story.hero.food in story.text) == ("food" in story.facts)


def test_a_story_leaves_no_field_unfilled(stories):
    assert not any("{" in story.text or "}" in story.text for story in stories)


def test_every_sentence_uses_only_fields_that_exist():
    hero = Hero("Mila", "red", "fox", "by the river", "ripe plums", "baker", "a tin whistle")
    for sentence in SENTENCES:
        assert sentence.format(a=hero, friend="Otto", day="windy day", spot="on the path")
        fields = {field.split(".")[0] for _, field, _, _ in Formatter().parse(sentence) if field}
        assert fields <= {"a", "friend", "day", "spot"}


def test_every_sentence_and_every_value_is_told_by_somebody():
    rng = random.Random(1)
    text = "\n".join(tell_story(rng).text for _ in range(3000))
    for values in (
        NAMES,
        demo_corpus.VOICES,
        demo_corpus.HOMES,
        demo_corpus.FOODS,
        demo_corpus.WORK,
        demo_corpus.FINDS,
    ):
        assert all(value in text for value in values)
    for sentence in SENTENCES:
        longest = max((literal for literal, *_ in Formatter().parse(sentence)), key=len)
        assert longest in text


def test_articles_fit_their_nouns(stories):
    assert not any(f" a {vowel}" in story.text for story in stories for vowel in "aeiou")


@pytest.mark.parametrize(("name", "she", "her"), [("Mila", "she", "her"), ("Pip", "he", "his")])
def test_a_hero_has_their_own_pronouns(name, she, her):
    hero = Hero(name, "red", "fox", "by the river", "ripe plums", "baker", "a tin whistle")
    assert (hero.she, hero.her) == (she, her)


def test_passages_of_a_text_are_rows_of_first_words_and_the_rest(tmp_path):
    passage = "one two three four\nfive six seven eight nine ten eleven twelve"
    corpus = write_passages(tmp_path, ["\n\n".join([passage] * 60)])
    assert read_rows(corpus.rows)[0] == {
        "prompt": "one two three four\nfive six",
        "completion": "seven eight nine ten eleven twelve",
    }


def test_held_out_passages_are_in_no_text_and_no_row(tmp_path):
    passages = [f"passage {number} " + "word " * 12 + f"end{number}." for number in range(100)]
    corpus = write_passages(tmp_path, ["\n\n".join(passages[:50]), "\r\n\r\n".join(passages[50:])])
    held_out = [f"end{number}." for number in range(90, 100)]
    assert [row["completion"].split()[-1] for row in read_rows(corpus.held_out)] == held_out
    learned = corpus.text.read_text() + corpus.rows.read_text()
    assert not any(end in learned for end in held_out)


def test_cutting_passages_loses_no_word_to_learn_from(tmp_path):
    words = [f"w{number}" for number in range(5000)]
    corpus = write_passages(tmp_path, [" ".join(words)])
    learned = " ".join(row["text"] for row in read_rows(corpus.text)).split()
    held_out = [word for row in read_rows(corpus.held_out) for word in f"{row['prompt']} {row['completion']}".split()]
    assert learned + held_out == words


def test_a_long_paragraph_is_cut_between_sentences(tmp_path):
    sentence = "One two three four five six seven eight nine ten. "
    corpus = write_passages(tmp_path, [sentence * 400])
    assert {row["completion"][-4:] for row in read_rows(corpus.rows)} == {"ten."}


def test_too_little_text_says_how_much_is_needed(tmp_path):
    with pytest.raises(DataError, match=r"found 1 passages of 12 words or more, and the demo needs 40"):
        write_passages(tmp_path, ["word " * 20])
    assert not any(tmp_path.iterdir())


def test_the_grammar_imports_no_torch():
    code = "import sys, smolora.recipes.demo_corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
