"""The page asks for nothing from outside, escapes all that comes from a run, and is well-formed."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser

import pytest

from smolora.analysis.report import build_report
from smolora.analysis.report_page import render_page
from smolora.analysis.run_record import RunRecord
from tests.run_folders import SETTINGS, write_run

PHASES = (("both", 4), ("mlp", 8))
VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and sees that every tag is closed."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(*runs):
    reader = Reader(render_page(build_report([RunRecord(run) for run in runs])))
    assert reader.open == []
    return reader


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", phases=PHASES, eval_losses={0: 4.0, 8: 3.0})


@pytest.mark.usefixtures("painted_reports")
def test_the_page_asks_for_nothing_from_outside(run):
    page = render_page(build_report([RunRecord(run)]))
    sources = [value for name, value in Reader(page).attributes if name in ("src", "href", "srcset", "action", "data")]
    assert len(sources) == 5
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"url\(|@import|https?://|<script|<link|<iframe|\bon\w+=", page)


def test_a_policy_forbids_what_the_page_does_not_need(run):
    policies = [value for name, value in read(run).attributes if name == "content" and "default-src" in value]
    assert policies == [
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]


def test_the_page_follows_the_readers_choice_of_light_or_dark(run):
    page = render_page(build_report([RunRecord(run)]))
    assert "color-scheme: light dark" in page
    assert "@media (prefers-color-scheme: dark)" in page


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=http://x onerror=a>', "</style><b>&amp;"])
def test_all_that_comes_from_a_run_is_only_text(tmp_path, evil):
    settings = {**SETTINGS, "model": {"name_or_path": evil}, "data": {"sources": [evil]}, evil: evil}
    folder = tmp_path / evil.replace("/", "|")
    reader = read(write_run(folder, phases=PHASES, settings=settings))
    assert not {"script", "b"} & set(reader.tags)
    assert reader.tags.count("img") == 5
    assert evil in reader.text
    assert any(evil in text and "with lora" in text for text in reader.text)
    assert folder.name in reader.text


@pytest.mark.usefixtures("painted_reports")
def test_a_folder_whose_name_is_no_text_can_be_reported(tmp_path):
    run = write_run(tmp_path / os.fsdecode(b"run-\xff"))
    page = render_page(build_report([RunRecord(run)]))
    assert b"run-?" in page.encode("utf-8")


@pytest.mark.usefixtures("painted_reports")
def test_every_picture_has_its_size_and_says_what_it_shows(run):
    attributes = read(run).attributes
    assert [value for name, value in attributes if name == "width"] == ["748"] * 5
    assert all(value for name, value in attributes if name == "alt")


def test_one_run_shows_its_summary_plots_and_settings(run):
    text = read(run).text
    assert {"What was trained", "Phases", "Plots", "Settings", "training.learning_rate", "0.0002"} <= set(text)


def test_what_could_not_be_drawn_is_said(tmp_path):
    run = write_run(tmp_path / "run", has_gradients=False)
    reader = read(run)
    assert reader.tags.count("img") == 1
    assert any("this run kept no gradient log" in text for text in reader.text)
