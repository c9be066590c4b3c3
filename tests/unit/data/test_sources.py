import gzip
import json
import os
from functools import partial

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from smolora.config.data import DataConfig
from smolora.data.sources import (
    DatasetHandler,
    check_first_form,
    check_sources,
    load_dataset_from_hub,
    load_text_data,
    prepare_dataset,
    read_dataset,
    read_source_documents,
    read_sources,
)
from smolora.errors import DataError, StorageError
from tests.unit.data.conftest import require_shared


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def numbered(count, start=0):
    return [{"text": f"row {number}"} for number in range(start, start + count)]


def read(*sources, seed=0, **settings):
    return read_sources(DataConfig(sources=tuple(map(str, sources)), **settings), seed=seed)


def test_rows_are_read_and_split(tmp_path):
    rows = read(write_rows(tmp_path / "a.jsonl", numbered(100)))
    assert (len(rows.train), len(rows.held_out)) == (95, 5)
    assert rows.fmt.kind == "text"
    assert (rows.report.read, rows.report.kept) == (100, 100)


def test_held_out_rows_may_be_named(tmp_path):
    train, test = (
        write_rows(tmp_path / "a.jsonl", numbered(60)),
        write_rows(tmp_path / "b.jsonl", numbered(3, start=59)),
    )
    rows = read(train, eval_source=str(test))
    assert (len(rows.train), len(rows.held_out)) == (59, 3)
    assert rows.report.also_held_out == 1


def test_a_prepared_folder_is_its_two_files(tmp_path):
    write_rows(tmp_path / "train.jsonl", numbered(60))
    write_rows(tmp_path / "validation.jsonl", numbered(2, start=60))
    (tmp_path / "data_report.json").write_text("{}")
    rows = read(tmp_path)
    assert [row.values["text"] for row in rows.held_out] == ["row 60", "row 61"]
    assert len(rows.train) == 60


def test_a_prepared_folder_under_home_is_its_two_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "out" / "train.jsonl", numbered(60))
    write_rows(tmp_path / "out" / "validation.jsonl", numbered(2, start=60))
    rows = read("~/out")
    assert (len(rows.train), len(rows.held_out)) == (60, 2)


def test_whole_texts_are_read_whatever_the_case_of_their_column(tmp_path):
    files = [write_rows(tmp_path / f"{name}.jsonl", [{name: f"of {name}"}]) for name in ("text", "Text")]
    documents = read_source_documents(DataConfig(sources=tuple(map(str, files))))
    assert documents.train == ["of text", "of Text"]


def write_prepared(folder, train, held_out):
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "validation.jsonl", held_out)
    return folder


def test_a_prepared_folder_with_nothing_held_out_holds_nothing_out_and_it_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = write_prepared(tmp_path / "a", numbered(60), [])
    assert len(read(folder).train) == 60
    assert "validation.jsonl is empty. Name others with data.eval_source" in caplog.text


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_it_is_said_that_a_prepared_folder_is_split_already(tmp_path, caplog, fraction):
    folder = write_prepared(tmp_path / "a", numbered(60), numbered(2, start=60))
    assert len(read(folder, validation_fraction=fraction).held_out) == 2
    assert f"data.validation_fraction={fraction:g} changes nothing: held out are the rows of {folder}" in caplog.text


@pytest.mark.parametrize(("given", "held_out"), [(2, 2), (0, 5)])
def test_what_one_of_two_sources_holds_out_is_held_out(tmp_path, caplog, given, held_out):
    caplog.set_level("INFO")
    folder = write_prepared(tmp_path / "a", numbered(40), numbered(given, start=40))
    rows = read(folder, write_rows(tmp_path / "b.jsonl", numbered(60, start=60)))
    assert (len(rows.train) + len(rows.held_out), len(rows.held_out)) == (100 + given, held_out)
    assert ("held out are the rows of" in caplog.text) == bool(given)


def test_the_test_file_beside_a_train_file_is_never_learned(tmp_path):
    for start, name in enumerate(("train", "valid", "test")):
        write_rows(tmp_path / f"{name}.jsonl", numbered(60, start=60 * start))
    rows = read(tmp_path)
    assert {row.file for row in rows.train} == {str(tmp_path / "train.jsonl")}
    assert {row.file for row in rows.held_out} == {str(tmp_path / "valid.jsonl")}


def test_a_train_file_alone_is_split(tmp_path):
    write_rows(tmp_path / "train.jsonl", numbered(60))
    assert len(read(tmp_path).held_out) == 3


def test_sources_are_read_in_order_and_columns_matched_across_them(tmp_path):
    (tmp_path / "a.csv").write_text("MR,ref\na,b\n")
    write_rows(tmp_path / "b.jsonl", [{"mr": "c", "REF": "d", "id": 1}])
    rows = read(tmp_path / "a.csv", tmp_path / "b.jsonl", prompt_field="mr", completion_field="ref")
    assert [row.values for row in rows.train] == [{"MR": "a", "ref": "b"}, {"MR": "c", "ref": "d", "id": 1}]


def test_sources_of_different_forms_are_refused(tmp_path):
    first, second = (
        write_rows(tmp_path / "a.jsonl", numbered(1)),
        write_rows(tmp_path / "b.jsonl", [{"prompt": "a", "completion": "b"}]),
    )
    with pytest.raises(DataError, match=r"b\.jsonl holds rows of the form prompt_completion"):
        read(first, second)


@pytest.mark.parametrize("lacking", ["a.jsonl", "b.jsonl"])
def test_sources_of_one_and_of_two_texts_to_classify_are_refused(tmp_path, lacking):
    for name in ("a.jsonl", "b.jsonl"):
        pair = {} if name == lacking else {"text_pair": "so it is"}
        write_rows(tmp_path / name, [{"text": f"of {name}", **pair, "label": "true"}])
    data = DataConfig(sources=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")))
    with pytest.raises(DataError, match=r"b\.jsonl holds rows of the form classification: text from column 'text', "):
        read_sources(data, seed=0, task="classification")


@pytest.mark.parametrize("lacking", ["a.csv", "b.csv", "held_out.csv"])
def test_the_file_that_lacks_a_column_is_named(tmp_path, lacking):
    for name in ("a.csv", "b.csv", "held_out.csv"):
        (tmp_path / name).write_text("wrong\nx\n" if name == lacking else "story\nx\n")
    names = {"text_field": "story", "eval_source": str(tmp_path / "held_out.csv")}
    with pytest.raises(DataError, match=rf"{lacking}: no column 'story'.* Columns found: 'wrong'"):
        read(tmp_path / "a.csv", tmp_path / "b.csv", **names)


def test_rejects_stop_the_run_after_they_are_written(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{bad\n')
    config = DataConfig(sources=(str(tmp_path / "a.jsonl"),))
    with pytest.raises(DataError, match=r"1 of 2 rows can't be used[\s\S]*data.max_rejects=1"):
        read_sources(config, seed=0, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "rejects.jsonl").read_text())["line"] == 2


def test_tolerated_rejects_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{bad\n')
    rows = read(tmp_path / "a.jsonl", max_rejects=1)
    assert (len(rows.train), len(rows.report.rejects)) == (1, 1)


@pytest.mark.parametrize("reader", [partial(read_sources, seed=0), read_source_documents])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n\n"),
        ("a.jsonl", '{"text": " "}\n'),
        ("a.txt", ""),
        ("a.txt", "\n"),
        ("a.csv", ""),
    ],
)
def test_a_file_without_text_is_refused_with_one_message_that_names_it(tmp_path, reader, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"no rows in .*{name}: it is empty, or every row lacks text"):
        reader(DataConfig(sources=(str(tmp_path / name),)))


@pytest.mark.parametrize("reader", [partial(read_sources, seed=0), read_source_documents])
@pytest.mark.parametrize("content", ["{bad\n", '{"text": 1}\n'])
def test_where_every_row_is_rejected_the_account_is_written_and_no_limit_blamed(tmp_path, reader, content):
    (tmp_path / "a.jsonl").write_text(content)
    data = DataConfig(sources=(str(tmp_path / "a.jsonl"),), max_rejects=5)
    with pytest.raises(DataError, match=r"no row is left: 1 of 1 rows[\s\S]*a.jsonl:1") as caught:
        reader(data, out=tmp_path / "out")
    assert "max_rejects" not in str(caught.value)
    assert (tmp_path / "out" / "rejects.jsonl").read_text()


@pytest.mark.parametrize("field", ["sources", "eval_source"])
def test_sources_are_checked_without_being_read(tmp_path, field):
    (tmp_path / "a.jsonl").write_text("{bad\n")
    check_sources(DataConfig(sources=(str(tmp_path / "a.jsonl"),)))
    names = {"sources": (str(tmp_path / "a.jsonl"),)} | {field: str(tmp_path / "b.jsonl")}
    with pytest.raises(DataError, match=r"no such file or folder: .*b.jsonl. Did you mean '.*a.jsonl'"):
        check_sources(DataConfig(**names))


def test_of_a_relative_name_the_folder_is_said_that_it_was_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no such file or folder: rows.jsonl. .* in the current folder, {tmp_path}"):
        check_sources(DataConfig(sources=("rows.jsonl",)))


def test_a_wrong_column_is_named_from_the_first_row_of_the_first_file(tmp_path):
    (tmp_path / "a.csv").write_text("mr,ref\na,b\n")
    check_first_form(DataConfig(sources=("benchmark:sst2@nowhere",)), "causal_lm")
    data = DataConfig(sources=(str(tmp_path),), prompt_field="mr", completion_field="reff")
    with pytest.raises(DataError, match="no column 'reff'. Did you mean 'ref'?"):
        check_first_form(data, "causal_lm")
    check_first_form(data.replace(completion_field="ref"), "causal_lm")


@pytest.mark.parametrize("locked", ["a.jsonl", "."])
def test_what_may_not_be_read_is_named_before_it_is_read(tmp_path, locked):
    folder = tmp_path / "data"
    write_rows(folder / "a.jsonl", numbered(1))
    (folder / locked).chmod(0)
    if os.access(folder / locked, os.R_OK):
        pytest.skip("root may read everything")
    with pytest.raises(StorageError, match=rf"can't read {(folder / locked).resolve()}: permission denied"):
        check_sources(DataConfig(sources=(str(folder),)))
    (folder / locked).chmod(0o700)


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path):
    write_rows(tmp_path / "train_rows.jsonl", numbered(1))
    with pytest.raises(
        DataError, match=r"no such file or folder: .*train_row.jsonl. Did you mean '.*train_rows.jsonl'\?"
    ):
        read(tmp_path / "train_row.jsonl")


def test_a_file_of_unknown_type_asks_for_the_type(tmp_path):
    (tmp_path / "a.dat").write_text("one\n")
    with pytest.raises(DataError, match="data.file_type: arrow, csv, json, jsonl, parquet, txt"):
        read(tmp_path / "a.dat")
    assert read(tmp_path / "a.dat", file_type="txt").train[0].values == {"text": "one"}


@pytest.mark.parametrize("file_type", [None, "jsonl"])
def test_a_file_that_is_packed_in_another_way_is_refused_with_the_ways_that_are_read(tmp_path, file_type):
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(DataError, match=r"a.jsonl.zst is packed as .zst, which isn't read. .* .gz, .bz2 or .xz"):
        read(tmp_path / "a.jsonl.zst", file_type=file_type)


def test_a_folder_of_several_types_asks_for_one(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "b.csv").write_text("text\ntwo\n")
    with pytest.raises(DataError, match=r"several types \(csv, txt\)"):
        read(tmp_path)
    assert len(read(tmp_path, file_type="csv").train) == 1


def test_a_folder_with_nothing_to_read_is_named_with_what_it_holds(tmp_path):
    with pytest.raises(DataError, match="holds no file to read.*at any depth.$"):
        read(tmp_path)
    (tmp_path / "a.html").touch()
    with pytest.raises(DataError, match=r"at any depth. It holds 1 .html. data.file_type=txt reads pages"):
        read(tmp_path)


def test_hidden_files_of_a_folder_are_left_out(tmp_path):
    for name in ("a.txt", ".b.txt", ".ipynb_checkpoints/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [row.values["text"] for row in read(tmp_path).train] == ["a.txt"]


def test_pages_of_html_are_text_where_text_is_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.HTML").write_text("<p>two")
    assert len(read(tmp_path).train) == 1
    rows = read(tmp_path, file_type="txt", clean="strip_html")
    assert [row.values["text"] for row in rows.train] == ["one", "two"]


def test_what_goes_over_lines_in_a_text_with_markup_is_no_row(tmp_path):
    (tmp_path / "a.md").write_text(
        "<!-- a\ncomment -->\n<script>\nlet a;\n</script>\n<p\nclass='b'>one</p>\n<p>two</p>\n"
    )
    [row] = read(tmp_path, clean="strip_html").train
    assert row.values["text"].split() == ["one", "two"]


@pytest.mark.parametrize("name", ["a.txt", "a.TXT.gz", "a.text"])
def test_lines_of_plain_text_are_rows_where_markup_is_cleaned_away(tmp_path, name):
    (tmp_path / name).write_bytes((gzip.compress if name.endswith("gz") else bytes)(b"<b>one</b>\ntwo\n\nthree\n"))
    rows = read(tmp_path / name, clean="strip_html").train
    assert [row.values["text"] for row in rows] == ["one", "two", "three"]


@pytest.mark.parametrize("held_out", ["pages", "pages/a.htm", "b.csv"])
def test_held_out_rows_are_read_like_the_sources_unless_a_file_tells_its_type(tmp_path, held_out):
    (tmp_path / "rows.dat").write_text("learned\n")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.htm").write_text("<p>held out")
    (tmp_path / "b.csv").write_text("text\nheld out\n")
    data = DataConfig(sources=(str(tmp_path / "rows.dat"),), eval_source=str(tmp_path / held_out), file_type="txt")
    check_sources(data)
    assert "held out" in read_sources(data, seed=0).held_out[0].values["text"]


def test_the_files_that_a_folder_holds_beside_are_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a.txt", "b.docx", "c.html", "d/e.docx", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    check_sources(DataConfig(sources=(str(tmp_path / "a.txt"),), eval_source=str(tmp_path)))
    hint = "data.file_type=txt reads pages of HTML too."
    assert caplog.messages == [f"3 of 4 files in {tmp_path} are left out: 2 .docx, 1 .html. {hint}"]


def test_a_saved_dataset_is_read_by_the_files_that_it_names(tmp_path, caplog):
    saved = Dataset.from_dict({"text": ["one", "two", "three"]})
    saved.save_to_disk(tmp_path, num_shards=2)
    (tmp_path / "cache-1a2b.arrow").write_text("what a map over it left")
    check_sources(DataConfig(sources=(str(tmp_path),)))
    assert [row.values["text"] for row in read(tmp_path).train] == saved["text"]
    assert caplog.messages == []


def test_a_saved_dataset_in_splits_asks_for_one(tmp_path):
    part = Dataset.from_dict({"text": ["one"]})
    DatasetDict(train=part, test=part).save_to_disk(tmp_path)
    with pytest.raises(DataError, match=r"holds a dataset in splits\. Name the one to read: \S*test or \S*train\."):
        read(tmp_path)
    assert len(read(tmp_path / "test").train) == 1


@pytest.mark.parametrize("state", ["", "[]", "{}"])
def test_a_saved_dataset_that_names_no_files_is_refused(tmp_path, state):
    Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path)
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"state\.json doesn't name the files of its dataset"):
        read(tmp_path)


def test_what_stands_beside_a_prepared_folder_s_files_is_not_counted(tmp_path, caplog):
    caplog.set_level("INFO")
    write_rows(tmp_path / "train.jsonl", numbered(1))
    for name in ("validation.jsonl", "data_report.json", "rejects.jsonl"):
        (tmp_path / name).write_text("{}")
    check_sources(DataConfig(sources=(str(tmp_path),)))
    assert not caplog.messages


def test_other_files_beside_a_train_file_are_counted_and_read_where_their_type_is_asked_for(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("train", "validation", "train2"):
        write_rows(tmp_path / f"{name}.jsonl", numbered(1))
    (tmp_path / "notes.txt").write_text("a note")
    check_sources(DataConfig(sources=(str(tmp_path),)))
    advice = "Beside train.jsonl only held-out rows are read; name other files one by one."
    assert caplog.messages == [f"2 of 4 files in {tmp_path} are left out: 1 .txt, 1 .jsonl. {advice}"]
    rows = read(tmp_path, file_type="txt")
    assert ([row.values["text"] for row in rows.train], rows.held_out) == (["a note"], [])


def test_no_source_is_an_error():
    with pytest.raises(DataError, match="no data is named"):
        read()


@pytest.mark.parametrize(("status", "reason"), [(404, "it has no such dataset"), (503, "it can't be reached")])
def test_a_hub_id_that_is_not_there_is_asked_for_once(hub, status, reason):
    hub.status = status
    with pytest.raises(DataError, match=f"no file or folder 'smolora-tests/none' here, and the hub .*: {reason}"):
        load_dataset_from_hub("smolora-tests/none")
    assert hub.requests == ["/api/datasets/smolora-tests/none"]


def test_a_name_that_the_hub_lacks_is_held_against_the_files_here(hub, tmp_path, monkeypatch):
    hub.status = 404
    (tmp_path / "devset.csv").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"Check the name, or the network\. Did you mean 'devset\.csv'\?"):
        load_dataset_from_hub("devset.cs")
    assert not datasets.config.HF_HUB_OFFLINE


def test_text_is_chunked_over_lines_and_not_within_them(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    pieces = prepare_dataset(tmp_path, chunk_size=2)
    assert (pieces["text"][:], pieces["space_to_next"][:]) == (["one\ntwo", "three"], ["\n\n", None])


def test_prepare_dataset_keeps_what_says_that_pieces_go_on(tmp_path):
    rows = [{"text": "one", "space_to_next": " "}, {"text": "two"}]
    assert prepare_dataset(write_rows(tmp_path / "train.jsonl", rows).parent)["space_to_next"][:] == [" ", None]


def test_prepare_dataset_gives_the_text_without_duplicates_in_order(tmp_path):
    (tmp_path / "a.csv").write_text("Text,id\nb,1\na,2\nb,3\n")
    assert prepare_dataset(tmp_path / "a.csv").to_dict() == {"Text": ["b", "a"]}


def test_prepare_dataset_takes_another_column_by_name(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"body": "one", "text": "two"}])
    assert prepare_dataset(tmp_path / "a.jsonl", "Body").to_dict() == {"body": ["one"]}


def test_prepare_dataset_keeps_pairs_as_they_are(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    assert prepare_dataset(tmp_path / "a.jsonl").to_dict() == {"prompt": ["a"], "completion": ["b"]}


def test_prepare_dataset_names_a_missing_column(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"txt": "one"}])
    with pytest.raises(DataError, match="'txt' fit no form"):
        prepare_dataset(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="no column 'body'"):
        prepare_dataset(tmp_path / "a.jsonl", "body")


def test_a_handler_keeps_the_report(tmp_path):
    handler = DatasetHandler(write_rows(tmp_path / "a.jsonl", [*numbered(3), *numbered(1)]))
    assert handler.load().num_rows == 3
    assert handler.report.duplicate == 1


def test_load_text_data_is_a_row_per_line_of_every_text_file(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("two\n\nthree\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n"))
    assert load_text_data(tmp_path)["text"][:] == ["one", "two", "three"]


def test_a_dataset_in_memory_is_selected_like_a_file():
    dataset = Dataset.from_dict({"text": ["a", "a", "", "b"]})
    rows = read_dataset(dataset, DataConfig(), seed=0, eval_dataset=Dataset.from_dict({"Text": ["c"]}))
    assert [row.values["text"] for row in rows.train + rows.held_out] == ["a", "b", "c"]
    assert rows.train[1].origin == "dataset:4"


def test_numbered_labels_of_a_dataset_in_memory_are_called_by_their_names():
    features = Features(text=Value("string"), label=ClassLabel(names=["no", "yes"]))
    dataset = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    rows = read_dataset(dataset, DataConfig(), seed=0, task="classification")
    assert [row.values["label"] for row in rows.train] == ["yes", "no"]


@pytest.mark.parametrize(
    ("sources", "eval_source"), [("ab", None), ("ba", None), ("a", "b"), ("b", "a")], ids=lambda value: value or "none"
)
def test_numbers_of_labels_are_called_by_the_names_that_another_source_has_and_it_is_said(
    tmp_path, monkeypatch, caplog, sources, eval_source
):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    features = Features(text=Value("string"), Label=ClassLabel(names=["no", "yes"]))
    Dataset.from_dict({"text": ["y", "n"], "Label": [1, 0]}, features=features).to_parquet("a.parquet")
    (tmp_path / "b.csv").write_text("text,label\nn2,0\ny2,1\ny3,yes\n")
    named = {"a": "a.parquet", "b": "b.csv", None: None}
    data = DataConfig(sources=tuple(named[source] for source in sources), eval_source=named[eval_source])
    rows = read_sources(data, seed=0, task="classification")
    assert "labels of b.csv that are numbers are called by the names in a.parquet: 0 is no." in caplog.messages
    assert len(rows.train + rows.held_out) == 5
    for row in rows.train + rows.held_out:
        assert row.values[rows.fmt.columns["label"]] == {"n": "no", "y": "yes"}[row.values["text"][0]]


def test_numbered_labels_that_two_sources_call_differently_are_refused_beside_rows_without_names(tmp_path):
    for name, names in (("a", ["no", "yes"]), ("b", ["yes", "no"])):
        features = Features(text=Value("string"), label=ClassLabel(names=names))
        Dataset.from_dict({"text": [name], "label": [1]}, features=features).to_parquet(tmp_path / f"{name}.parquet")
    write_rows(tmp_path / "c.jsonl", [{"text": "c", "label": 1}])
    sources = tuple(str(tmp_path / name) for name in ("a.parquet", "b.parquet", "c.jsonl"))
    rows = read_sources(DataConfig(sources=sources[:2]), seed=0, task="classification")
    assert [row.values["label"] for row in rows.train] == ["yes", "no"]
    assert rows.fmt.label_names == ()  # A number alone doesn't say which is meant.
    with pytest.raises(DataError, match=r"b\.parquet call numbered labels by different names, .* in \S*c\.jsonl"):
        read_sources(DataConfig(sources=sources), seed=0, task="classification")


def test_a_file_of_held_out_rows_goes_with_a_dataset_in_memory(tmp_path):
    write_rows(tmp_path / "held.jsonl", [{"text": "c"}])
    data = DataConfig(eval_source=str(tmp_path / "held.jsonl"))
    rows = read_dataset(Dataset.from_dict({"text": ["a", "b", "c"]}), data, seed=0)
    assert [row.values["text"] for row in rows.train] == ["a", "b"]
    assert [row.values["text"] for row in rows.held_out] == ["c"]


def test_a_page_of_held_out_text_is_one_beside_a_dataset_in_memory_too(tmp_path):
    (tmp_path / "held.md").write_text("<p\nclass='b'>one</p>\n<p>two</p>\n")
    data = DataConfig(eval_source=str(tmp_path / "held.md"), clean=("strip_html",))
    [row] = read_dataset(Dataset.from_dict({"text": ["a"]}), data, seed=0).held_out
    assert row.values["text"].split() == ["one", "two"]


def test_a_folder_of_held_out_rows_whose_names_tell_another_type_is_read_as_that(tmp_path):
    (tmp_path / "rows.dat").write_text("text\none\n")
    (tmp_path / "held").mkdir()
    write_rows(tmp_path / "held" / "a.jsonl", [{"text": "two"}])
    data = DataConfig(sources=(str(tmp_path / "rows.dat"),), eval_source=str(tmp_path / "held"), file_type="csv")
    assert [row.values["text"] for row in read_sources(data, seed=0).held_out] == ["two"]


def test_documents_are_whole_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two\n")
    assert read_source_documents(DataConfig(sources=(str(tmp_path),))).train == ["one\n\n  two\n"]


def test_documents_of_a_prepared_folder_are_its_rows(tmp_path):
    write_rows(tmp_path / "train.jsonl", numbered(60))
    write_rows(tmp_path / "validation.jsonl", numbered(1, start=60))
    documents = read_source_documents(DataConfig(sources=(str(tmp_path),)))
    assert (len(documents.train), documents.held_out) == (60, ["row 60"])


def test_documents_that_are_held_out_too_are_not_learned(tmp_path):
    source = str(write_rows(tmp_path / "a.jsonl", numbered(3)))
    others = str(write_rows(tmp_path / "b.jsonl", numbered(3, start=1)))
    documents = read_source_documents(DataConfig(sources=(source,), eval_source=others))
    assert documents.train == ["row 0"]
    assert documents.report.also_held_out == 2


def test_documents_need_a_text_column(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(
        DataError, match=r"no column 'text'.*'prompt', 'completion'.*--text-field X \(data.text_field=X\)"
    ):
        read_source_documents(DataConfig(sources=(str(tmp_path),)))


@pytest.mark.parametrize(
    ("file", "fields", "read_count", "empty", "duplicate"),
    [
        ("e2e/devset.csv", ("mr", "ref"), 4672, 0, 151),
        ("e2e/trainset_rebuilt.csv.gz", ("MR", "REF"), 42061, 0, 1202),
        ("samsum/train.jsonl.gz", ("dialogue", "summary"), 14732, 1, None),
        ("nli/sick_train.jsonl", ("premise", "hypothesis"), 4439, 0, 0),
    ],
)
def test_real_files_are_read_without_a_reject(file, fields, read_count, empty, duplicate):
    rows = read(require_shared(f"data/{file}"), prompt_field=fields[0], completion_field=fields[1])
    assert (rows.report.read, len(rows.report.rejects), rows.report.empty) == (read_count, 0, empty)
    assert duplicate in {None, rows.report.duplicate}


def test_real_dialogues_keep_their_line_ends():
    rows = read(require_shared("data/samsum/val.jsonl"), prompt_field="dialogue", completion_field="summary")
    assert sum("\r\n" in row.values["dialogue"] for row in rows.train) > 600


def test_real_stories_are_split_where_the_file_marks_their_ends():
    path = require_shared("data/pretrain/tinystories_train_2MiB.txt")
    documents = read_source_documents(DataConfig(sources=(str(path),)))
    assert len(documents.train) > 2000
    assert not any("<|endoftext|>" in document for document in documents.train)
