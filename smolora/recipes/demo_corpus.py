"""The demo's own text: a seeded grammar of small stories about the animals of one valley, and questions about them.

`write_corpus` leaves stories to pretrain on, and rows of story, question and answer to tune on and to hold out. Each
hero draws kind, home, food, work and find at random, and a story says the same fact again in other words. The second
time it can only be predicted by looking back, which is what a model must have learned before it can answer questions.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import NamedTuple

HEROINES = "Ada Bella Clara Daisy Elsa Fern Greta Hazel Ida Juno Kiki Lola Mila Nora Olive Pippa Ruby Stella Tilly Wanda"
HEROES = "Alfie Bruno Caspar Dylan Emil Felix Gus Hugo Igor Jasper Leo Max Ned Otto Pip Rufus Sam Toby Victor Walter"
NAMES = (*HEROINES.split(), *HEROES.split())
HELD_OUT_NAMES = ("Clara", "Hazel", "Mila", "Ruby", "Wanda", "Emil", "Hugo", "Otto", "Pip", "Toby")
"""Heroes of the held-out questions: the stories tell of them, but no row that the adapter learns from does."""

COLOURS = tuple("brown grey black white red golden silver spotted striped".split())
KINDS = tuple(
    "badger bear beaver cat crow dog duck fox frog goat goose hare hedgehog heron mole mouse owl otter pig rabbit raven "
    "sheep sparrow squirrel toad weasel wolf".split()
)
HOMES = tuple(
    "above the waterfall, among the ferns, at the bottom of the garden, at the edge of the wood, behind the chapel, "
    "behind the old barn, beside the mill, beside the railway, by the river, in a cave by the sea, in a hollow oak, "
    "in the apple orchard, in the clock tower, in the reeds, near the lighthouse, on a small island, on the windy hill, "
    "under the hawthorn hedge, under the stone bridge".split(", ")
)
FOODS = tuple(
    "apple pie, barley bread, blackberry jam, buttered toast, cold porridge, dandelion leaves, ginger biscuits, "
    "honey cakes, hot chestnuts, mushroom stew, pear tart, pumpkin soup, ripe plums, roasted corn, salted walnuts, "
    "sour cherries, sunflower seeds, sweet peas, wild strawberries".split(", ")
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
    "lamplighter": "lit the lamps one by one",
    "painter": "painted pictures of the sea",
    "potter": "made bowls as thin as eggshells",
    "sailor": "knew the name of every wind",
    "shepherd": "counted the lambs at sunset",
    "tailor": "sewed coats with too many pockets",
    "teacher": "taught the little ones to read",
    "weaver": "wove blankets in seven colours",
}
FINDS = tuple(
    "a blue kite, a brass key, a copper bell, a feather pen, a glass marble, a little drum, a lost letter, a music box, "
    "a paper lantern, a pearl button, a pocket watch, a round mirror, a silk ribbon, a straw hat, a tin whistle, "
    "a torn map, a toy soldier, a velvet glove, a wooden boat".split(", ")
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
    "Once there was a {a.colour} {a.kind} called {a.name}, who lived {a.home}.",
    "{a.name} was a {a.colour} {a.kind} who lived {a.home}.",
    "Everyone in the valley knew {a.name}, the {a.colour} {a.kind} who lived {a.home}.",
    "A {a.colour} {a.kind} named {a.name} had a small house {a.home}.",
    "Long ago a {a.colour} {a.kind} named {a.name} came to live {a.home}.",
    "This is the story of {a.name}, a {a.colour} {a.kind} who lived {a.home}.",
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
    '"Who has lost {a.thing}?" asked the {a.colour} {a.kind}, but nobody knew.',
    "The clouds grew dark, and the {a.colour} {a.kind} ran back {a.home}.",
    '"Time for {a.food}!" said the {a.colour} {a.kind}.',
    '"What would the valley do without a {a.job}?" said {a.name}.',
    "The {a.colour} {a.kind} sang a little song about {a.food}.",
    "The wind sang {a.home}, and {a.name} sang too.",
    "All the children wanted to be a {a.job}, just like {a.name}.",
    "At noon the {a.colour} {a.kind} sat down and ate some {a.food}.",
    "There was no other {a.colour} {a.kind} like {a.name}.",
    "If you look for {a.name}, look {a.home}.",
    '"Where do you live?" asked {friend}. "I live {a.home}," said {a.name}.',
    '"What do you like best?" asked {friend}. "{a.Food}!" said the {a.colour} {a.kind}.',
    '"What work do you do?" asked {friend}. "I am a {a.job}," said {a.name}.',
    '"Is it hard to be a {a.job}?" asked {friend}. "Only on Mondays," said the {a.colour} {a.kind}.',
    '"What have you got there?" asked {friend}. "I found {a.find}," said {a.name}.',
    "{friend} had never seen a {a.colour} {a.kind} laugh so much.",
    "It began to rain, so {friend} ran to the house of {a.name} {a.home}.",
    "{friend} knew what {a.name} liked, and brought some {a.food}.",
    '"Every {a.kind} can dance," said {a.name}, and danced with {friend}.',
    '"You are the best {a.job} I know," said {friend} to {a.name}.',
    "{a.name} and {friend} quarrelled about {a.thing}, and then they forgot why.",
)
ENDINGS = (
    "That night {a.name} slept soundly {a.home}.",
    "{a.name} kept {a.thing} as long as {a.she} lived.",
    "And for supper the {a.colour} {a.kind} had {a.food}.",
    "In the end the {a.job} went home, tired and glad.",
    "If you go there today, you may still see a {a.colour} {a.kind} {a.home}.",
    "Then {a.name} and {friend} shared some {a.food} and watched the stars come out.",
    "So the {a.colour} {a.kind} gave {a.thing} to {friend}, and both were happy.",
    "{friend} waved for a long time, until {a.name} was safe {a.home}.",
)

QUESTIONS = {
    "kind": ("What kind of animal was {a.name}?", "{a.name} was a {a.colour} {a.kind}."),
    "home": ("Where did {a.name} live?", "{a.name} lived {a.home}."),
    "food": ("What did {a.name} like to eat?", "{a.name} liked to eat {a.food}."),
    "job": ("What was the work of {a.name}?", "{a.name} was a {a.job}."),
    "find": ("What did {a.name} find?", "{a.name} found {a.find}."),
}


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
    """The files that `write_corpus` left."""

    stories: Path
    """Rows of `text`, a story each."""

    rows: Path
    """Rows of `prompt` and `completion` to tune on."""

    held_out: Path
    """Rows like them, about heroes whom no row to tune on asks about."""


def write_corpus(
    folder: Path, seed: int = 0, *, num_stories: int = 16_000, num_rows: int = 8_000, num_held_out: int = 200
) -> DemoCorpus:
    """Write stories.jsonl, questions.jsonl and held_out.jsonl into `folder`, the same for the same seed."""
    rng = random.Random(seed)
    corpus = DemoCorpus(folder / "stories.jsonl", folder / "questions.jsonl", folder / "held_out.jsonl")
    learned = [name for name in NAMES if name not in HELD_OUT_NAMES]
    folder.mkdir(parents=True, exist_ok=True)
    _write_rows(corpus.stories, ({"text": tell_story(rng, NAMES).text} for _ in range(num_stories)))
    _write_rows(corpus.rows, (ask(rng, tell_story(rng, learned)) for _ in range(num_rows)))
    _write_rows(corpus.held_out, (ask(rng, tell_story(rng, HELD_OUT_NAMES)) for _ in range(num_held_out)))
    return corpus


def tell_story(rng: random.Random, names: Sequence[str] = NAMES) -> Story:
    """Tell who there was, what was special about them, what happened, and how it ended."""
    hero = Hero(*(rng.choice(values) for values in (names, COLOURS, KINDS, HOMES, FOODS, tuple(WORK), FINDS)))
    friend = rng.choice([name for name in NAMES if name != hero.name])
    specialities = [rng.choice(LIKINGS), rng.choice(TRADES), rng.choice(DISCOVERIES)]
    sentences = [rng.choice(OPENINGS), *rng.sample(specialities, rng.choice((2, 2, 3)))]
    facts = frozenset[str]().union(*map(_facts_in, sentences))
    sentences += rng.sample(_fitting(TURNS, facts), rng.choice((1, 2)))
    sentences.append(rng.choice(_fitting(ENDINGS, facts)))
    filled = (sentence.format(a=hero, friend=friend, day=rng.choice(DAYS), spot=rng.choice(SPOTS)) for sentence in sentences)
    return Story(" ".join(filled), hero, facts)


def ask(rng: random.Random, story: Story) -> dict[str, str]:
    """Return a row that asks for one fact the story has told."""
    question, answer = QUESTIONS[rng.choice(sorted(story.facts))]
    prompt = f"{story.text}\nQuestion: {question.format(a=story.hero)}\nAnswer:"
    return {"prompt": prompt, "completion": answer.format(a=story.hero)}


_FACT_OF_FORM = {**{fact: fact for fact in QUESTIONS}, "colour": "kind", "Food": "food", "deed": "job", "thing": "find"}


@cache
def _facts_in(sentence: str) -> frozenset[str]:
    forms = (field.split(".")[1] for _, field, _, _ in Formatter().parse(sentence) if field and "." in field)
    return frozenset(_FACT_OF_FORM[form] for form in forms if form in _FACT_OF_FORM)


def _fitting(sentences: Iterable[str], facts: frozenset[str]) -> list[str]:
    """Return the sentences that say nothing new."""
    return [sentence for sentence in sentences if _facts_in(sentence) <= facts]


def _write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
