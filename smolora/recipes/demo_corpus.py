"""The demo's own text: a seeded grammar of small stories about the animals of one valley, and questions about them.

`write_corpus` leaves stories to pretrain on, and rows of story, question and answer to tune on and to hold out. Each
hero draws kind, home, food, work and find at random, and a story says the same fact again in other words. The second
time it can only be predicted by looking back, which is what a model must have learned before it can answer questions.
`write_passages` does the like with a person's own texts: the rows ask for the rest of a passage. No torch.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, groupby, islice
from pathlib import Path
from string import Formatter
from typing import NamedTuple

from smolora.errors import DataError

# A name has its surname, an animal its voice and a trade its deed. A value with a consequence gets an embedding of its
# own; names that nothing follows from stay alike, and a model of this size then never learns to copy them.
HEROINES = {
    "Clara": "Clover",
    "Daisy": "Dewdrop",
    "Fern": "Featherby",
    "Hazel": "Honeywell",
    "Mila": "Merryweather",
    "Ruby": "Rosehip",
    "Tilly": "Thistle",
}
HEROES = {
    "Bruno": "Bramble",
    "Emil": "Evergreen",
    "Felix": "Fairweather",
    "Gus": "Gooseberry",
    "Leo": "Larkspur",
    "Otto": "Oakleaf",
    "Pip": "Pepperpot",
}
SURNAMES = {**HEROINES, **HEROES}
NAMES = tuple(SURNAMES)
HELD_OUT_NAMES = ("Clara", "Mila", "Otto", "Pip")
"""Heroes of the held-out questions: the stories tell of them, but no row that the adapter learns from does."""

COLOURS = ("brown", "grey", "black", "white", "red", "golden", "silver", "spotted", "striped")
VOICES = {
    "badger": "grunted",
    "bear": "growled",
    "cat": "purred",
    "crow": "cawed",
    "fox": "barked",
    "frog": "croaked",
    "goose": "honked",
    "goat": "bleated",
    "hedgehog": "snuffled",
    "horse": "neighed",
    "mouse": "squeaked",
    "pigeon": "cooed",
    "duck": "quacked",
    "squirrel": "chattered",
}
HOMES = tuple(
    "above the waterfall, among the ferns, at the edge of the wood, behind the chapel, beside the mill, by the river, "
    "in a hollow oak, in the apple orchard, in the clock tower, near the lighthouse, on a small island, "
    "on the windy hill, under the stone bridge".split(", ")
)
FOODS = tuple(
    "barley bread, blackberry jam, buttered toast, cold porridge, ginger biscuits, honey cakes, hot chestnuts, "
    "mushroom stew, pear tart, pumpkin soup, ripe plums, salted walnuts, sour cherries".split(", ")
)
WORK = {
    "baker": "baked the bread for the whole valley",
    "beekeeper": "looked after forty hives of bees",
    "blacksmith": "made horseshoes and garden gates",
    "candlemaker": "made candles that smelled of summer",
    "carpenter": "built tables that never wobbled",
    "clockmaker": "kept every clock in the valley ticking",
    "cobbler": "mended shoes for feet of every size",
    "doctor": "cured sore throats and broken wings",
    "fiddler": "played at every wedding",
    "gardener": "grew roses taller than a house",
    "painter": "painted pictures of the sea",
    "tailor": "sewed coats with too many pockets",
    "weaver": "wove blankets in seven colours",
}
FINDS = tuple(
    "a blue kite, a brass key, a copper bell, a feather pen, a glass marble, a little drum, a music box, "
    "a paper lantern, a pocket watch, a straw hat, a tin whistle, a torn map, a wooden boat".split(", ")
)
SPOTS = tuple(
    "in the long grass, under a pile of leaves, on the path, in an empty nest, behind a milestone, in a snowdrift, "
    "between two roots, at the side of the road".split(", ")
)
DAYS = tuple(
    "fine morning, rainy morning, windy day, summer evening, cold winter day, day in spring, foggy afternoon, "
    "quiet Sunday".split(", ")
)

# The sentences. `a` is the hero and `friend` a name; the fields of `a` tell which facts a sentence gives away.
OPENINGS = (
    "Once there was a {a.colour} {a.kind} called {a.full_name}, who lived {a.home}.",
    "{a.full_name} was a {a.colour} {a.kind} who lived {a.home}.",
    "Everyone in the valley knew {a.full_name}, the {a.colour} {a.kind} who lived {a.home}.",
    "A {a.colour} {a.kind} named {a.full_name} had a small house {a.home}.",
    "Long ago a {a.colour} {a.kind} named {a.full_name} came to live {a.home}.",
    "This is the story of {a.full_name}, a {a.colour} {a.kind} who lived {a.home}.",
)
LIKINGS = (
    "{a.name} loved {a.food} more than anything.",
    "Nothing made {a.name} happier than {a.food}.",
    "For breakfast {a.name} always ate {a.food}.",
    "{a.name} could smell {a.food} from a mile away.",
    "On cold days {a.name} dreamed of {a.food}.",
    "{a.name} never went out without some {a.food}.",
)
TRADES = (
    "{a.name} was a {a.job} and {a.deed}.",
    "{a.name} was the only {a.job} in the valley.",
    "{a.name} worked as a {a.job}, and all day long {a.she} {a.deed}.",
    "{a.name} was a {a.job}, like {a.her} mother before {a.object}.",
    "{a.name} was a good {a.job} who {a.deed}.",
)
DISCOVERIES = (
    "One {day} {a.name} found {a.find} {spot}.",
    "On the way to market {a.name} found {a.find} {spot}.",
    "Who would have thought it? {a.name} found {a.find} {spot}.",
)
# From here on facts come again, in other words. A sentence is used only where the story has told what it builds on.
TURNS = (
    "{a.name} put {a.thing} in {a.her} pocket and smiled.",
    'The {a.kind} {a.voice}: "Who has lost {a.thing}?" But nobody knew.',
    "The clouds grew dark, and the {a.kind} ran to the little house {a.home}.",
    'The {a.kind} {a.voice}: "Time for {a.food}!"',
    '"What would the valley do without a {a.job}?" said {a.name}.',
    "The {a.kind} {a.voice} a little song about {a.food}.",
    "The wind sang {a.home}, and {a.name} sang too.",
    "All the children wanted to be a {a.job}, just like {a.name}.",
    "At noon the {a.kind} sat down and ate some {a.food}.",
    "No {a.kind} in the valley {a.voice} as loud as {a.name}.",
    "If you look for {a.name}, look {a.home}.",
    '"Where do you live?" asked {friend}. "I live {a.home}," said {a.name}.',
    '"What do you like best?" asked {friend}. The {a.kind} {a.voice}: "{a.Food}!"',
    '"What work do you do?" asked {friend}. "I am a {a.job}," said {a.name}.',
    '"Is it hard to be a {a.job}?" asked {friend}. The {a.kind} {a.voice}: "Only on Mondays."',
    '"What have you got there?" asked {friend}. "I found {a.find}," said {a.name}.',
    "{friend} laughed so much that the {a.kind} {a.voice} too.",
    "It began to rain, so {friend} ran to the house of {a.name} {a.home}.",
    "{friend} knew what {a.name} liked, and brought some {a.food}.",
    '"Every {a.kind} can dance," said {a.name}, and danced with {friend}.',
    '"You are the best {a.job} I know," said {friend} to {a.name}.',
    "{a.name} and {friend} quarrelled about {a.thing}, and then they forgot why.",
)
ENDINGS = (
    "That night {a.name} slept soundly {a.home}.",
    "{a.name} kept {a.thing} as long as {a.she} lived.",
    "And for supper the {a.kind} had {a.food}.",
    "In the end the {a.job} went home, tired and glad.",
    "If you go there today, you may still see a {a.colour} {a.kind} {a.home}.",
    "Then {a.name} and {friend} shared some {a.food} and watched the stars come out.",
    "So the {a.kind} gave {a.thing} to {friend}, and both were happy.",
    "{friend} waved for a long time, until {a.name} was safe {a.home}.",
)

QUESTIONS = {
    "kind": ("What kind of animal was {a.name}?", "{a.name} was a {a.kind}."),
    "home": ("Where did {a.name} live?", "{a.name} lived {a.home}."),
    "food": ("Which food did {a.name} love?", "{a.name} loved {a.food}."),
    "job": ("What was the work of {a.name}?", "{a.name} was a {a.job}."),
    "find": ("What did {a.name} find?", "{a.name} found {a.find}."),
}

# Passages of a person's own text.
_FEWEST_PASSAGES, _MOST_HELD_OUT = 40, 200
_PROMPT_WORDS, _FEWEST_WORDS, _MOST_WORDS = 6, 12, 40
_SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"')\u201d\u2019]*(?=\s)|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Hero:
    """An animal of the valley, what is true of it, and the word forms that a sentence needs."""

    name: str
    colour: str
    kind: str
    home: str
    food: str
    job: str
    find: str

    @property
    def she(self) -> str:
        """Return the pronoun."""
        return "she" if self.name in HEROINES else "he"

    @property
    def her(self) -> str:
        """Return the possessive."""
        return "her" if self.name in HEROINES else "his"

    @property
    def object(self) -> str:
        """Return the pronoun of an object."""
        return "her" if self.name in HEROINES else "him"

    @property
    def Food(self) -> str:  # noqa: N802 - the capital is what the name says
        """Return the food as a sentence begins."""
        return self.food[0].upper() + self.food[1:]

    @property
    def full_name(self) -> str:
        """Return name and surname."""
        return f"{self.name} {SURNAMES[self.name]}"

    @property
    def voice(self) -> str:
        """Return the sound that an animal of this kind makes."""
        return VOICES[self.kind]

    @property
    def deed(self) -> str:
        """Return what somebody of this work does."""
        return WORK[self.job]

    @property
    def thing(self) -> str:
        """Return what was found, once the reader knows of it."""
        return self.find.replace("a ", "the ", 1)


class Story(NamedTuple):
    """A story, its hero, and the facts that it tells, by the names in QUESTIONS."""

    text: str
    hero: Hero
    facts: frozenset[str]


@dataclass(frozen=True)
class DemoCorpus:
    """Files in JSONL: what to pretrain on, tune on, and ask in the end."""

    text: Path
    """Rows of `text`."""

    rows: Path
    """Rows of `prompt` and `completion`."""

    held_out: Path
    """Rows like them that neither the text nor the other rows hold."""


def write_corpus(
    folder: Path, *, num_stories: int = 16_000, num_rows: int = 8_000, num_held_out: int = 200
) -> DemoCorpus:
    """Write stories and questions into `folder`; the same everywhere."""
    rng = random.Random(0)
    learned = [name for name in NAMES if name not in HELD_OUT_NAMES]
    stories = [tell_story(rng) for _ in range(num_stories)]
    rows = [ask(rng, tell_story(rng, learned)) for _ in range(num_rows)]
    wanted = islice(cycle(QUESTIONS), num_held_out)
    held_out = [ask(rng, tell_story(rng, HELD_OUT_NAMES), fact) for fact in wanted]
    return _write(folder, [story.text for story in stories], rows, held_out)


def write_passages(folder: Path, texts: Sequence[str]) -> DemoCorpus:
    """Cut texts into passages and write them into `folder`; the last tenth is held out of the text and of the rows.

    Raises:
        DataError: There are too few passages to learn from and to hold some out.
    """
    passages = [(number, passage) for number, text in enumerate(texts) for passage in _cut_passages(text)]
    cut = len(passages) * 9 // 10
    kept = ["\n\n".join(words for _, words in group) for _, group in groupby(passages[:cut], key=lambda pair: pair[0])]
    rows = [_ask_for_rest(passage) for _, passage in passages if len(passage.split()) >= _FEWEST_WORDS]
    num_held_out = sum(len(passage.split()) >= _FEWEST_WORDS for _, passage in passages[cut:])
    if len(rows) < _FEWEST_PASSAGES or num_held_out == 0:
        raise DataError(
            f"found {len(rows)} passages of {_FEWEST_WORDS} words or more, and the demo needs {_FEWEST_PASSAGES}. "
            "Passages are set apart by blank lines; give it more text."
        )
    return _write(folder, kept, rows[:-num_held_out], rows[-num_held_out:][:_MOST_HELD_OUT])


def _cut_passages(text: str) -> list[str]:
    """Return the paragraphs of a text; a long one comes in pieces."""
    paragraphs = (paragraph.strip() for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")))
    return [piece for paragraph in paragraphs if paragraph for piece in _cut_words(paragraph)]


def _cut_words(paragraph: str) -> list[str]:
    """Return pieces of at most _MOST_WORDS words, cut between sentences; only a longer sentence is cut inside."""
    starts, num_words = [0], 0
    for sentence in _SENTENCE.finditer(paragraph):
        words = [sentence.start() + word.start() for word in re.finditer(r"\S+", sentence.group())]
        if num_words and num_words + len(words) > _MOST_WORDS:
            starts.append(words[0])
            num_words = 0
        starts += words[_MOST_WORDS::_MOST_WORDS]
        num_words += len(words) if len(words) <= _MOST_WORDS else _MOST_WORDS
    return [paragraph[start:end].strip() for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _ask_for_rest(passage: str) -> dict[str, str]:
    """Return a row that gives the first words of a passage and asks for the rest."""
    seam = [match.end() for match in re.finditer(r"\S+", passage)][_PROMPT_WORDS - 1]
    return {"prompt": passage[:seam], "completion": passage[seam:].strip()}


def tell_story(rng: random.Random, names: Sequence[str] = NAMES) -> Story:
    """Tell who there was, what was special about them, what happened, and how it ended."""
    hero = Hero(*(rng.choice(values) for values in (names, COLOURS, tuple(VOICES), HOMES, FOODS, tuple(WORK), FINDS)))
    friend = rng.choice([name for name in NAMES if name != hero.name])
    specialities = [rng.choice(LIKINGS), rng.choice(TRADES), rng.choice(DISCOVERIES)]
    sentences = [rng.choice(OPENINGS), *rng.sample(specialities, rng.choice((2, 2, 3)))]
    facts = frozenset[str]().union(*map(_facts_in, sentences))
    sentences += rng.sample(_fitting(TURNS, facts), 2)
    sentences.append(rng.choice(_fitting(ENDINGS, facts)))
    filled = (
        sentence.format(a=hero, friend=friend, day=rng.choice(DAYS), spot=rng.choice(SPOTS)) for sentence in sentences
    )
    return Story(" ".join(filled), hero, facts)


def ask(rng: random.Random, story: Story, wanted: str | None = None) -> dict[str, str]:
    """Return a row that asks for a fact the story has told: `wanted`, if it has told that, else any."""
    fact = wanted if wanted in story.facts else rng.choice(sorted(story.facts))
    question, answer = QUESTIONS[fact]
    prompt = f"{story.text}\nQuestion: {question.format(a=story.hero)}\nAnswer:"
    return {"prompt": prompt, "completion": answer.format(a=story.hero)}


_FACT_OF_FORM = {**{fact: fact for fact in QUESTIONS}, "voice": "kind", "Food": "food", "deed": "job", "thing": "find"}


@cache
def _facts_in(sentence: str) -> frozenset[str]:
    forms = (field.split(".")[1] for _, field, _, _ in Formatter().parse(sentence) if field and "." in field)
    return frozenset(_FACT_OF_FORM[form] for form in forms if form in _FACT_OF_FORM)


def _fitting(sentences: Iterable[str], facts: frozenset[str]) -> list[str]:
    """Return the sentences that say nothing new."""
    return [sentence for sentence in sentences if _facts_in(sentence) <= facts]


def _write(
    folder: Path, texts: Sequence[str], rows: Sequence[dict[str, str]], held_out: Sequence[dict[str, str]]
) -> DemoCorpus:
    corpus = DemoCorpus(folder / "text.jsonl", folder / "rows.jsonl", folder / "held_out.jsonl")
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (corpus.text, [{"text": text} for text in texts]),
        (corpus.rows, rows),
        (corpus.held_out, held_out),
    ):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return corpus
