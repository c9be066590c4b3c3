"""Cleaning of text, every switch off by default: data is changed only where a person asked for it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from html import unescape
from typing import TYPE_CHECKING

from smolora.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

_BLOCK_TAGS = {"address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "dialog", "div"}
_BLOCK_TAGS |= {"dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6"}
_BLOCK_TAGS |= {"header", "hr", "legend", "li", "main", "menu", "nav", "ol", "optgroup", "option", "p", "pre"}
_BLOCK_TAGS |= {"section", "select", "summary", "table", "title", "tr", "ul"}
_LINE_BREAKS = _BLOCK_TAGS | {f"/{tag}" for tag in _BLOCK_TAGS}
_BOXES = {"button", "label", "td", "textarea", "th"}
"""Tags whose text is apart from what is before it in the line."""

_SILENT_TAGS = {"script": "/script", "style": "/style"}
"""Tags whose text is not for people, and where it ends."""


class TextCleaningProcessor:
    """A step of a DatasetPipeline, or a plain function on text by `clean`.

    >>> TextCleaningProcessor(strip_html=True).clean("<b>a &lt; b</b> if a < b and c > d")
    'a < b if a < b and c > d'
    """

    def __init__(
        self,
        text_field: str = "text",
        *,
        strip_html: bool = False,
        normalize_unicode: bool = False,
        normalize_whitespace: bool = False,
        flatten_whitespace: bool = False,
        lowercase: bool = False,
    ) -> None:
        """Choose what to change.

        Args:
            text_field: The column to clean.
            strip_html: Keep the text of HTML, without tags, scripts and styles.
            normalize_unicode: Compose characters (NFC), so that equal text has equal bytes.
            normalize_whitespace: Every line end becomes a line feed, white space at line ends and blank lines around
                the text go, and several blank lines become one. Line breaks, paragraphs, indentation and spaces within
                a line stay, so code keeps its shape.
            flatten_whitespace: Every run of white space becomes one space, line breaks too: a text becomes one line.
            lowercase: Fold to lower case.
        """
        self.text_field = text_field
        chosen = {
            "strip_html": strip_html,
            "normalize_unicode": normalize_unicode,
            "normalize_whitespace": normalize_whitespace,
            "flatten_whitespace": flatten_whitespace,
            "lowercase": lowercase,
        }
        self._steps = [_SWITCHES[name] for name, is_on in chosen.items() if is_on]

    @classmethod
    def from_names(cls, names: Iterable[str]) -> TextCleaningProcessor:
        """Turn on the switches of these names.

        Raises:
            ConfigError: There is no such switch.
        """
        chosen = set(names)
        for name in sorted(chosen):
            if name not in _SWITCHES:
                raise ConfigError(
                    f"data.clean: no switch {name!r}.{did_you_mean(name, _SWITCHES)} Switches: {', '.join(_SWITCHES)}."
                )
        return cls(
            strip_html="strip_html" in chosen,
            normalize_unicode="normalize_unicode" in chosen,
            normalize_whitespace="normalize_whitespace" in chosen,
            flatten_whitespace="flatten_whitespace" in chosen,
            lowercase="lowercase" in chosen,
        )

    def clean(self, text: str) -> str:
        """Return the cleaned text."""
        for step in self._steps:
            text = step(text)
        return text

    def __call__(self, dataset: Dataset) -> Dataset:
        """Return the dataset with its text column cleaned."""
        field = self.text_field
        return dataset.map(lambda row: {field: self.clean(row[field])}) if self._steps else dataset


# A tag (its name captured) or a declaration. Nothing in it reads past the next `<`, and nothing is tried twice (`*+`),
# so any text takes linear time.
_MARKUP = re.compile(
    r"""<(?:(/?[a-zA-Z][a-zA-Z0-9:._-]*+)(?=[\s/>])(?:[^<>"']|"[^"<]*+"|'[^'<]*+')*+>|[!?][a-zA-Z][^<>]*+>)"""
)


def _strip_html(text: str) -> str:
    """Return the text of HTML, with a line break where a block begins or ends, and a space between cells of a row.

    html.parser gives the same at a third to a fifth of the speed, and takes quadratic time over attributes and unclosed
    markup.
    """
    pieces = iter(_MARKUP.split(_drop_comments(text)))
    raw = [next(pieces)]  # Text since the last tag; a declaration splits it, and no character reference.
    parts: list[str] = []
    awaited: str | None = None  # The tag that ends a script or a style.
    for tag, after in zip(pieces, pieces, strict=True):
        name = tag and tag.lower()
        if awaited:
            if name == awaited:
                raw, awaited = [after], None
        elif not name:
            raw.append(after)
        else:
            if before := "".join(raw):
                parts.append(unescape(before))
            awaited = _SILENT_TAGS.get(name)
            raw = [] if awaited else [after]
            if name in _LINE_BREAKS:
                if parts and not parts[-1].endswith("\n"):
                    parts.append("\n")
            elif name in _BOXES and parts and not parts[-1][-1:].isspace():
                parts.append(" ")
    return "".join([*parts, unescape("".join(raw))]).strip()


def _drop_comments(text: str) -> str:
    if "<!--" not in text:
        return text
    kept, position = [], 0
    while (start := text.find("<!--", position)) >= 0 and (end := text.find("-->", start + 4)) >= 0:
        kept.append(text[position:start])
        position = end + 3
    return "".join([*kept, text[position:]])


def _normalize_unicode(text: str) -> str:
    return unicodedata.normalize("NFC", text)


_BLANK_LINES = re.compile(r"\n{3,}")


def _normalize_whitespace(text: str) -> str:
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    joined = "\n".join(lines).strip("\n")
    return _BLANK_LINES.sub("\n\n", joined) if "\n\n\n" in joined else joined


def _flatten_whitespace(text: str) -> str:
    return " ".join(text.split())


_SWITCHES: dict[str, Callable[[str], str]] = {
    "strip_html": _strip_html,
    "normalize_unicode": _normalize_unicode,
    "normalize_whitespace": _normalize_whitespace,
    "flatten_whitespace": _flatten_whitespace,
    "lowercase": str.lower,
}
