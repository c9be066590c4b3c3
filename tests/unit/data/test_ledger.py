import json

import pytest

from smolora.data.ledger import DataReport
from smolora.data.rows import Reject
from smolora.errors import BrokenRunError, DataError, StorageError


def report(**counts):
    made = DataReport(**counts)
    made.files["a.jsonl"] = 10
    return made


def test_totals_that_add_up_pass():
    report(
        rejects=[Reject("a.jsonl", 3, "bad")],
        empty=2,
        duplicate=1,
        train=4,
        also_held_out=1,
        held_out=3,
        added_by_chunking=2,
    ).check()


def test_a_lost_row_stops_the_run():
    with pytest.raises(BrokenRunError, match="10 rows read .* but 9 accounted for"):
        report(train=9).check()


def test_a_row_lost_in_encoding_stops_the_run():
    made = report(train=10)
    made.encoding("train").rows = 10
    with pytest.raises(BrokenRunError, match="10 train rows encoded, but 0 accounted for"):
        made.check()


def test_rejects_past_the_limit_are_written_and_stop_the_run(tmp_path):
    made = report(rejects=[Reject("a.jsonl", line, "bad") for line in range(1, 8)], train=3)
    with pytest.raises(
        DataError,
        match=r"7 of 10 rows can't be used:\s*a.jsonl:1: bad[\s\S]*and 2 more\s*Repair.* data.max_rejects=7 \(now 6\)",
    ):
        made.check_rejects(6, tmp_path / "out")
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert next(json.loads(line) for line in lines) == {"file": "a.jsonl", "line": 1, "reason": "bad"}
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["rejected"] == 7


def test_rejects_within_the_limit_pass(tmp_path):
    report(rejects=[Reject("a.jsonl", 1, "bad")], train=9).check_rejects(1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rejects_that_leave_no_row_are_written_and_stop_the_run_whatever_is_allowed(tmp_path):
    made = report(rejects=[Reject("a.jsonl", line, "bad") for line in range(1, 11)])
    with pytest.raises(DataError, match="no row is left: 10 of 10 rows can't be used") as caught:
        made.check_rejects(10, tmp_path / "out")
    assert "max_rejects" not in str(caught.value)
    assert f"All are listed in {tmp_path / 'out' / 'rejects.jsonl'}" in str(caught.value)
    assert (tmp_path / "out" / "rejects.jsonl").is_file()


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        report().write(tmp_path / "file" / "out")


def test_the_description_leaves_out_headings_that_nothing_fell_under():
    text = report(train=8, empty=2).describe()
    assert "empty" in text
    assert "duplicate" not in text
    assert "8 to learn from, 0 held out" in text


def test_the_description_says_what_was_cut_and_dropped():
    made = report(train=10)
    counts = made.encoding("train")
    counts.truncated, counts.cut_target_tokens, counts.dropped_overlong, counts.dropped_without_target = 1, 5, 2, 3
    assert (
        "1 truncated (5 target tokens cut); 2 dropped as too long; 3 dropped with nothing to learn" in made.describe()
    )
