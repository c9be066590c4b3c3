"""Labels: what they are called, in which order a head answers them, and that held-out rows have no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from smolora.errors import DataError, count_of, did_you_mean

if TYPE_CHECKING:
    from smolora.data.prompts import PromptFormat
    from smolora.data.rows import Row, Values

_SHOWN, _SHOWN_LEARNED = 5, 20


def name_label(value: object) -> str | None:
    """Return what a label is called, the same for 1 of JSON and "1" of CSV; None for what is no label.

    >>> name_label(1), name_label(" yes "), name_label(True), name_label(0.5)
    ('1', 'yes', 'true', None)
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    return value.strip() if isinstance(value, str) else None


def number_names(names: Sequence[str]) -> dict[str, str]:
    """Return which name each number stands for; none does where one is itself the name of another label.

    >>> number_names(["no", "yes"]), number_names(["1", "2"])
    ({'0': 'no', '1': 'yes'}, {})
    """
    numbers = {f"{number}": name for number, name in enumerate(names)}
    return numbers if all(numbers.get(name, name) == name for name in names) else {}


def order_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Return labels, each once, in an order that the rows' order and the machine have no part in.

    >>> order_labels(["10", "9", "9"]), order_labels(["b", "a", "10"])
    (('9', '10'), ('10', 'a', 'b'))
    """
    unique = set(names)
    are_numbers = all(name.isascii() and name.isdecimal() for name in unique)
    return tuple(sorted(unique, key=lambda name: (int(name), name) if are_numbers else (0, name)))


def learn_labels(
    train: Sequence[Row], held_out: Sequence[Row], fmt: PromptFormat, *, known: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the labels that a run learns: those of its training rows.

    Args:
        train: The rows to learn from.
        held_out: Rows to evaluate on, which may have no other label.
        fmt: The rows' form.
        known: The labels of the adapter that is trained further, which stay what they are.

    Raises:
        DataError: Fewer than two labels, true or false beside numbers, or rows with labels that aren't learned.
    """
    if known:
        refuse_unknown("training", _iter_names(train, fmt), known, fmt.label_names)
    learned = tuple(known) or order_labels(name for row in train for name in iter_labels(row.values, fmt))
    if len(learned) < 2:
        raise DataError(
            f"all labels in column {fmt.columns[_ROLES[fmt.kind]]!r} are {learned[0]!r}: there is nothing to tell "
            "apart. Add rows of another label, or name another column with --label-field."
        )
    if not known and _TRUTHS & set(learned) and any(name.isdecimal() for name in learned):
        odd = next(row for row in train if not _TRUTHS.isdisjoint(iter_labels(row.values, fmt)))
        raise DataError(
            f"labels mix true or false, as in {odd.origin}, with numbers. Found are: "
            f"{', '.join(learned[:_SHOWN_LEARNED])}. Write them all alike."
        )
    refuse_unknown("held-out", _iter_names(held_out, fmt), learned, fmt.label_names)
    return learned


_TRUTHS = {"true", "false"}


def match_label(name: str, labels: Sequence[str], aliases: Mapping[str, str]) -> str | None:
    """Return the one of a head's labels that rows call `name`, but for case or by another name; None where none is.

    >>> match_label("Yes", ["no", "yes"], {}), match_label("1", ["no", "yes"], {"1": "yes"})
    ('yes', 'yes')
    """
    if name in labels:
        return name
    alike = [label for label in labels if label.casefold() == name.casefold()]
    return alike[0] if len(alike) == 1 else aliases.get(name)


def iter_labels(values: Values, fmt: PromptFormat) -> Iterator[str]:
    """Yield the names of a row's labels: one of a text, or one of each word."""
    value = values[fmt.columns[_ROLES[fmt.kind]]]
    for label in cast("Sequence[object]", value) if fmt.kind == "token_classification" else [value]:
        name = name_label(label)
        assert name is not None, "rows whose labels are none were rejected"
        yield name


_ROLES = {"classification": "label", "token_classification": "tags"}


def _iter_names(rows: Iterable[Row], fmt: PromptFormat) -> Iterator[set[str]]:
    return (set(iter_labels(row.values, fmt)) for row in rows)


def refuse_unknown(
    side: str, rows: Iterable[set[str]], learned: Sequence[str], label_names: Sequence[str] = ()
) -> None:
    """Raise where rows, each given by its labels, have some that aren't learned; numbers stand for `label_names`.

    Raises:
        DataError: So they have; it names them with the counts of their rows.
    """
    unknown = Counter(name for names in rows for name in names - set(learned))
    if unknown:
        shown = ", ".join(f"{name!r} ({count_of(count, 'row')})" for name, count in unknown.most_common(_SHOWN))
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        hint = did_you_mean(next(iter(unknown)), learned)
        verb = "isn't" if len(unknown) == 1 else "aren't"
        others = f" and {len(learned) - _SHOWN_LEARNED} more" if len(learned) > _SHOWN_LEARNED else ""
        raise DataError(
            f"{side} rows have {count_of(len(unknown), 'label')} that {verb} learned: {shown}{more}.{hint} "
            f"Learned are: {', '.join(learned[:_SHOWN_LEARNED])}{others}{_describe_numbers(unknown, label_names)}. "
            "Correct those rows, or leave them out."
        )


def _describe_numbers(unknown: Iterable[str], names: Sequence[str]) -> str:
    """Say which numbers stand for names, where some that aren't known are numbers."""
    if not number_names(names) or not any(name.removeprefix("-").isdecimal() for name in unknown):
        return ""
    return f"; numbers from 0 ({names[0]}) to {len(names) - 1} ({names[-1]}) stand for names"
