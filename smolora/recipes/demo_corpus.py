"""The demo's own text: a seeded grammar of small stories about the animals of one valley, and questions about them.

`write_corpus` leaves stories to pretrain on, question rows to tune on and question rows to hold out. Every hero draws
kind, colour, home, food, work and find at random, and a story says a fact again in other words, so the only way to
predict it is to look back: that is what a small model has to learn before it can answer questions.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import NamedTuple

HEROINES = (
    "Ada Bella Clara Daisy Elsa Fern Greta Hazel Ida Juno Kiki Lola Mila Nora Olive Pippa Ruby Stella Tilly Wanda"
).split()
HEROES = "Alfie Bruno Caspar Dylan Emil Felix Gus Hugo Igor Jasper Kasimir Leo Max Ned Otto Pip Rufus Sam Toby Walter".split()
KINDS = (
    "badger bear beaver cat crow dog dormouse duck fox frog goat goose hare hedgehog heron mole mouse owl otter pig rabbit "
    "raven sheep sparrow squirrel toad weasel wolf"
).split()
COLOURS = "brown grey black white red golden silver spotted striped".split()
HOMES = (
    "above the waterfall, among the ferns, at the bottom of the garden, at the edge of the wood, at the end of the lane, "
    "behind the chapel, behind the old barn, beside the mill, beside the railway, by the river, in a cave by the sea, "
    "in a hollow oak, in the apple orchard, in the clock tower, in the reeds, near the lighthouse, on a small island, "
    "on the windy hill, under the hawthorn hedge, under the stone bridge"
).split(", ")
FOODS = (
    "apple pie, barley bread, blackberry jam, buttered toast, cold porridge, crab apples, dandelion leaves, ginger biscuits, "
    "honey cakes, hot chestnuts, mushroom stew, pear tart, pumpkin soup, ripe plums, roasted corn, salted walnuts, "
    "sour cherries, sunflower seeds, sweet peas, wild strawberries"
).split(", ")
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
FINDS = (
    "a blue kite, a brass key, a copper bell, a feather pen, a glass marble, a little drum, a lost letter, a music box, "
    "a paper lantern, a pearl button, a pocket watch, a round mirror, a silk ribbon, a silver spoon, a straw hat, "
    "a tin whistle, a torn map, a toy soldier, a velvet glove, a wooden boat"
).split(", ")
SPOTS = (
    "in the long grass, under a pile of leaves, on the path, in an empty nest, behind a milestone, in a snowdrift, "
    "between two roots, at the side of the road"
).split(", ")
DAYS = (
    "fine morning, rainy morning, windy day, summer evening, cold winter day, day in spring, foggy afternoon, quiet Sunday"
).split(", ")

FACTS = ("kind", "home", "food", "job", "find")


@dataclass(frozen=True)
class Hero:
    """An animal of the valley and what is true of it. Properties are the forms that a sentence needs."""

    name: str
    she: str
    kind: str
    colour: str
    home: str
    food: str
    job: str
    find: str

    @property
    def She(self) -> str:  # noqa: N802 - the capital is the form
        """Return the pronoun at the start of a sentence."""
        return self.she.capitalize()

    @property
    def her(self) -> str:
        """Return the possessive pronoun."""
        return "her" if self.she == "she" else "his"

    @property
    def Her(self) -> str:  # noqa: N802
        """Return the possessive pronoun at the start of a sentence."""
        return self.her.capitalize()

    @property
    def object(self) -> str:
        """Return the pronoun of an object: thank her, thank him."""
        return "her" if self.she == "she" else "him"

    @property
    def Home(self) -> str:  # noqa: N802
        """Return the home at the start of a sentence."""
        return _capitalised(self.home)

    @property
    def Food(self) -> str:  # noqa: N802
        """Return the food at the start of a sentence."""
        return _capitalised(self.food)

    @property
    def deed(self) -> str:
        """Return what somebody of this work does."""
        return WORK[self.job]

    @property
    def thing(self) -> str:
        """Return what was found, once the reader knows of it."""
        return self.find.replace("a ", "the ", 1)


# In the sentences below `a` is the hero and `b` the friend; a field tells which fact the sentence gives away.
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
MEETINGS = (
    "One {day} {a.name} met {b.name}, a {b.colour} {b.kind} who lived {b.home}.",
    "{a.Her} best friend was {b.name}, a {b.colour} {b.kind} who lived {b.home}.",
    "{a.name} had a friend called {b.name}, a {b.colour} {b.kind} who lived {b.home}.",
    "Then {b.name} came to visit, a {b.colour} {b.kind} who lived {b.home}.",
)
DISCOVERIES = (
    "One {day} {a.name} found {a.find} {spot}.",
    "On the way to market {a.name} found {a.find} {spot}.",
    "Who would have thought it? {a.name} found {a.find} {spot}.",
)
# Told facts again, in other words. A sentence is used only where the story has told all that it takes for granted.
SOLO_TURNS = (
    "{a.name} put {a.thing} in {a.her} pocket and smiled.",
    '"Who has lost {a.thing}?" asked {a.name}, but nobody knew.',
    "The clouds grew dark, and {a.name} ran back {a.home}.",
    '"Time for {a.food}!" said {a.name}.',
    '"What would the valley do without a {a.job}?" said {a.name}.',
    "{a.name} sang a little song about {a.food}.",
    "The wind sang {a.home}, and {a.name} sang too.",
    "All the children wanted to be a {a.job}, just like {a.name}.",
    "At noon {a.name} sat down and ate some {a.food}.",
    "There was no {a.kind} like {a.name}.",
    "If you look for {a.name}, look {a.home}.",
    '"Where do you live?" asked {b}. "I live {a.home}," said {a.name}.',
    '"What do you like best?" asked {b}. "{a.Food}!" said {a.name}.',
    '"What work do you do?" asked {b}. "I am a {a.job}," said {a.name}.',
    '"Is it hard to be a {a.job}?" asked {b}. "Only on Mondays," said {a.name}.',
    '"What have you got there?" asked {b}. "I found {a.find}," said {a.name}.',
    "{b} had never seen a {a.kind} laugh so much.",
    "It began to rain, so {b} ran to the house of {a.name} {a.home}.",
    "{b} knew what {a.name} liked, and brought some {a.food}.",
    '"Every {a.kind} can dance," said {a.name}, and danced with {b}.',
    '"You are the best {a.job} I know," said {b}.',
    "{a.name} and {b} quarrelled about {a.thing}, and then they forgot why.",
)
TURNS = (
    '"Where do you live?" asked {b.name}. "I live {a.home}," said {a.name}.',
    '"Where is your house?" asked {a.name}. "My house is {b.home}," said {b.name}.',
    '"What do you like best?" asked {b.name}. "{a.Food}!" said {a.name}.',
    '"Are you hungry?" asked {a.name}. "Only for {b.food}," said {b.name}.',
    '"What work do you do?" asked {a.name}. "I am a {b.job}," said {b.name}.',
    '"Is it hard to be a {a.job}?" asked {b.name}. "Only on Mondays," said {a.name}.',
    '"What have you got there?" asked {b.name}. "I found {a.find}," said {a.name}.',
    "If you look for {a.name}, look {a.home}.",
    "If you look for {b.name}, look {b.home}.",
    "Never ask {a.name} about {a.food}, or you will be there all day.",
    "Never ask {b.name} about {b.food}, or you will be there all day.",
    "There is no {a.kind} like {a.name}, and no {b.kind} like {b.name}.",
    "{a.name} ran home {a.home}, and {b.name} ran home {b.home}.",
    "{a.name} talked of {a.food}, and {b.name} talked of {b.food}.",
    "The {b.job} was called {b.name}, and the {a.job} was called {a.name}.",
    "{a.name} was a {a.job} and {b.name} was a {b.job}, so they talked about their work.",
    "It began to rain, so they ran to the house of {a.name} {a.home}.",
    "They walked all the way to the house of {b.name} {b.home}.",
    "{a.name} knew what {b.name} liked, and brought some {b.food}.",
    "{b.name} had heard that {a.name} loved {a.food}, and had packed a whole bag.",
    '"Every {b.kind} can dance," said {b.name}, and danced.',
    "{a.name} the {a.kind} told a joke, and {b.name} the {b.kind} fell over laughing.",
    '"You are the best {a.job} I know," said {b.name} to {a.name}.',
    '"You are the best {b.job} I know," said {a.name} to {b.name}.',
    "{a.name} and {b.name} quarrelled about {a.thing}, and then they forgot why.",
)
SOLO_ENDINGS = (
    "That night {a.name} slept soundly {a.home}.",
    "{a.name} kept {a.thing} as long as {a.she} lived.",
    "And for supper {a.she} had {a.food}.",
    "In the end the {a.job} went home, tired and glad.",
    "If you go there today, you may still see a {a.colour} {a.kind} {a.home}.",
    "Then {a.name} and {b} shared some {a.food} and watched the stars come out.",
    "So {a.name} gave {a.thing} to {b}, and both were happy.",
    "{b} waved for a long time, until {a.name} was safe {a.home}.",
)
ENDINGS = (
    "From that day on the {a.kind} and the {b.kind} were friends.",
    "They shared some {a.food} and watched the stars come out.",
    "They shared some {b.food}, and it was the best supper of the year.",
    "That night {b.name} stayed with {a.name} {a.home}.",
    "{a.name} waved for a long time, until {b.name} was safe in the little house {b.home}.",
    "So {a.name} gave {a.thing} to {b.name}, and both were happy.",
)

# A round says one fact of several heroes, and then says it again in another order.
ROUNDS = {
    "home": (
        ("Some friends told each other where they lived.", "{a.name} lived {a.home}."),
        ("The snow came early that year.", "{a.name} stayed at home {a.home}."),
        ("The postman went from door to door.", "For {a.name} {a.home} he had a letter."),
        ("At night the moon looked in everywhere.", "It saw {a.name} {a.home}."),
        ("Everybody went home.", "{a.name} went home {a.home}."),
    ),
    "food": (
        ("It was a fine day for a picnic.", "{a.name} brought {a.food}."),
        ("Everybody was hungry.", "{a.name} wanted {a.food}."),
        ("What a dinner that was!", "{a.name} ate {a.food}."),
        ("There was a feast on the meadow.", "{a.name} could not get enough of {a.food}."),
        ("They went to market together.", "{a.name} bought {a.food}."),
    ),
    "job": (
        ("There was much to do in the valley.", "{a.name} was a {a.job}."),
        ("Everyone had work.", "{a.name} worked as a {a.job}."),
        ("When they were small they had told their mothers what they would be.", "{a.name} became a {a.job}."),
        ("They played at being grown up.", "{a.name} was the {a.job}."),
    ),
    "find": (
        ("They all went treasure hunting.", "{a.name} found {a.find}."),
        ("On the beach there was much to find.", "{a.name} picked up {a.find}."),
        ("In the evening they showed what they had.", "{a.name} had {a.find}."),
        ("They would never part with their treasures.", "{a.name} kept {a.find}."),
    ),
    "kind": (
        ("There was a party in the barn.", "{a.name} was a {a.colour} {a.kind}."),
        ("They had their portraits painted.", "{a.name} was painted as a {a.colour} {a.kind}."),
        ("At the dance they all wore masks, but one could tell.", "{a.name} was still a {a.colour} {a.kind}."),
    ),
}


class Question(NamedTuple):
    """How one fact of one hero is asked for, and the answer."""

    fact: str
    prompt: str
    completion: str


QUESTIONS = (
    Question("kind", "What kind of animal was {a.name}?", "{a.name} was a {a.colour} {a.kind}."),
    Question("home", "Where did {a.name} live?", "{a.name} lived {a.home}."),
    Question("food", "What did {a.name} like to eat?", "{a.name} liked to eat {a.food}."),
    Question("job", "What was the work of {a.name}?", "{a.name} was a {a.job}."),
    Question("find", "What did {a.name} find?", "{a.name} found {a.find}."),
)


class Told(NamedTuple):
    """A story, its heroes, and which facts (`a.home`, `b.food`, ...) it has told."""

    text: str
    heroes: dict[str, Hero]
    facts: frozenset[str]


def _capitalised(words: str) -> str:
    return words[0].upper() + words[1:]


def _draw_heroes(rng: random.Random, names: Sequence[str], num: int) -> list[Hero]:
    """Return heroes who share no fact, so that every answer is one of them."""
    drawn = (rng.sample(values, num) for values in (names, KINDS, COLOURS, HOMES, FOODS, list(WORK), FINDS))
    return [_hero(*values) for values in zip(*drawn, strict=True)]


def _hero(name: str, kind: str, colour: str, home: str, food: str, job: str, find: str) -> Hero:
    return Hero(name, "she" if name in HEROINES else "he", kind, colour, home, food, job, find)


_FACT_OF_FORM = {
    **{fact: fact for fact in FACTS},
    **{"colour": "kind", "Home": "home", "Food": "food", "deed": "job", "thing": "find"},
}


@cache
def _facts_in(sentence: str) -> frozenset[str]:
    """Return the facts that a sentence takes or gives, such as `a.home`."""
    fields = (field for _, field, _, _ in Formatter().parse(sentence) if field and "." in field)
    roles = (field.split(".") for field in fields)
    return frozenset(f"{role}.{_FACT_OF_FORM[form]}" for role, form in roles if form in _FACT_OF_FORM)


def tell_story(rng: random.Random, names: Sequence[str] = (*HEROINES, *HEROES)) -> Told:
    """Tell one story: who there is, what they are like, what happens, how it ends."""
    a, b = _draw_heroes(rng, names, 2)
    has_friend = False
    facts = rng.sample([rng.choice(LIKINGS), rng.choice(TRADES), rng.choice(DISCOVERIES)], rng.choice((2, 2, 3)))
    sentences = [rng.choice(OPENINGS), *facts]
    told = frozenset[str]().union(*map(_facts_in, sentences))
    turns, endings = _fitting(SOLO_TURNS, told), _fitting(SOLO_ENDINGS, told)
    sentences += rng.sample(turns, rng.choice((1, 2))) + rng.sample(endings, 1)
    filled = (
        sentence.format(a=a, b=b if has_friend else b.name, day=rng.choice(DAYS), spot=rng.choice(SPOTS))
        for sentence in sentences
    )
    return Told(" ".join(filled), {"a": a, "b": b} if has_friend else {"a": a}, told)


def _habits(rng: random.Random, num: int) -> list[str]:
    return rng.sample([rng.choice(LIKINGS), rng.choice(TRADES)], num)


def _fitting(sentences: Iterable[str], told: frozenset[str]) -> list[str]:
    return [sentence for sentence in sentences if _facts_in(sentence) <= told]


def tell_round(rng: random.Random, names: Sequence[str] = (*HEROINES, *HEROES)) -> str:
    """Tell one fact of three or four heroes twice, in two orders and in two ways."""
    heroes = _draw_heroes(rng, names, rng.choice((3, 4)))
    sentences = []
    for opening, line in rng.sample(ROUNDS[rng.choice(FACTS)], 2):
        rng.shuffle(heroes)
        sentences += [opening, *(line.format(a=hero) for hero in heroes)]
    return " ".join(sentences)


def ask(rng: random.Random, story: Told) -> dict[str, str]:
    """Return a row that asks for one fact the story has told."""
    role, fact = rng.choice(sorted(story.facts)).split(".")
    question = next(question for question in QUESTIONS if question.fact == fact)
    hero = {"a": story.heroes[role]}
    prompt = f"{story.text}\nQuestion: {question.prompt.format(**hero)}\nAnswer:"
    return {"prompt": prompt, "completion": question.completion.format(**hero)}
