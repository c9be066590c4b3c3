"""Rows in memory: what is taken as rows, and what is said of the rest."""

from __future__ import annotations

import pytest
from datasets import Dataset, DatasetDict

from smolora.data.memory_rows import as_dataset
from smolora.errors import DataError

ROWS = [{"prompt": "a"}, {"prompt": "b", "completion": "c"}]


def test_rows_have_the_columns_of_all_of_them():
    assert list(as_dataset(iter(ROWS))) == [{"prompt": "a", "completion": None}, ROWS[1]]


def test_a_dataset_stays_as_it_is():
    dataset = Dataset.from_dict({"text": ["a"]})
    assert as_dataset(dataset) is dataset


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (DatasetDict(train=Dataset.from_list(ROWS)), "DatasetDict"),
        ({"text": ["a", "b"]}, "dict"),
        (["a", "b"], "str in a list"),
        ([{"text": "a"}, None], "NoneType in a list"),
        ("rows.jsonl", "str in a str"),
        (7, "int"),
    ],
)
def test_what_holds_no_rows_is_named_with_what_does(rows, found):
    with pytest.raises(DataError, match=rf"are a datasets.Dataset, or dicts .* found {found}\. Dataset.from_pandas"):
        as_dataset(rows)


def test_a_value_of_another_type_than_those_before_is_named_with_its_place():
    rows = [{"completion": None}, {"completion": "b"}, {"completion": 3}]
    with pytest.raises(DataError, match="row 3, column 'completion', is 3, of the type int, where row 2 has str"):
        as_dataset(rows)
    with pytest.raises(DataError, match="^the values of a column have one type"):
        as_dataset([{"messages": [{"content": "a"}, {"content": 3}]}])
