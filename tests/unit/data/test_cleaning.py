import time

import pytest
from datasets import Dataset

from smolora.data.cleaning import TextCleaningProcessor
from smolora.errors import ConfigError

CODE = "def f(a):\n\n    if a < 1 and a > 0:\n        return  a\n"


def test_every_switch_is_off_by_default():
    assert TextCleaningProcessor().clean(CODE + "<b>É</b>\r\n") == CODE + "<b>É</b>\r\n"


def test_html_loses_its_tags_and_keeps_its_text():
    html = (
        '<!DOCTYPE html><p class="a > b">one &amp; two<br/>three</p><!-- no <b> -->'
        '<script>var x = "<p>";</script><b>four</b>'
    )
    assert TextCleaningProcessor(strip_html=True).clean(html) == "one & two\nthree\nfour"


@pytest.mark.parametrize("text", ["a < b and c > d", "x <3", "if a<1: b>2", "<", "a <!-- b", "<<<<", "&lt;b&gt; 1"])
def test_what_is_no_tag_stays(text):
    expected = "<b> 1" if text.startswith("&") else text
    assert TextCleaningProcessor(strip_html=True).clean(text) == expected


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("a<!x>b &am<!x>p; c", "ab & c"),
        ("a<script>if (b) </b> <script>x</script>c", "ac"),
        ("a<STYLE>b</script>c</Style >d", "ad"),
        ("a<script>b", "a"),
        ("a</script>b<br/><br>c<p/>", "ab\nc"),
        ("a<sp>b", "ab"),
    ],
)
def test_declarations_and_scripts_leave_nothing(html, text):
    assert TextCleaningProcessor(strip_html=True).clean(html) == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<tr><th>Name</th><th>Price</th></tr><tr><td>Apple</td><td>2</td></tr>", "Name Price\nApple 2"),
        ("<td>a</td> <td></td><td>b", "a b"),
        ("<table><caption>a</caption><tr><td>b</table>", "a\nb"),
        ("<select><option>a<option>b</select>c", "a\nb\nc"),
        ("<title>a</title></head><body>b", "a\nb"),
        ("<legend>a</legend><label>b</label><label>c</label>", "a\nb c"),
        ("press <button>a</button><button>b</button>.", "press a b."),
    ],
)
def test_cells_and_captions_do_not_run_together(html, text):
    assert TextCleaningProcessor(strip_html=True).clean(html) == text


@pytest.mark.parametrize(
    "unit", ["<", "<a ", "<!--", "<a<", "</", "<?", "<a b='", '<a ="', "<a '\"", "<script><!--", "x<!a>"]
)
def test_html_takes_linear_time(unit):
    # html.parser alone takes over 40 s for these 80,000 characters of `<a `.
    text = unit * (80_000 // len(unit))
    start = time.process_time()
    TextCleaningProcessor(strip_html=True).clean(text)
    assert time.process_time() - start < 5


def test_normalising_white_space_keeps_indentation_and_paragraphs():
    cleaned = TextCleaningProcessor(normalize_whitespace=True).clean("one  \r\n\r\n\r\n\r\n    two\t\rthree\n")
    assert cleaned == "one\n\n    two\nthree"
    assert TextCleaningProcessor(normalize_whitespace=True).clean(CODE) == CODE.rstrip("\n")


def test_flattening_makes_one_line():
    assert TextCleaningProcessor(flatten_whitespace=True).clean(" a\n\n  b\t") == "a b"


def test_unicode_is_composed_and_case_folded_where_asked():
    assert TextCleaningProcessor(normalize_unicode=True, lowercase=True).clean("E\u0301") == "\u00e9"


def test_a_dataset_is_cleaned_in_its_text_column_only():
    dataset = Dataset.from_dict({"body": ["A "], "title": ["B "]})
    cleaned = TextCleaningProcessor("body", lowercase=True)(dataset)
    assert cleaned[0] == {"body": "a ", "title": "B "}


def test_switches_are_turned_on_by_name():
    assert TextCleaningProcessor.from_names(["lowercase"]).clean("A") == "a"


def test_an_unknown_switch_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"no switch 'strip_htm'. Did you mean 'strip_html'\?"):
        TextCleaningProcessor.from_names(["strip_htm"])
