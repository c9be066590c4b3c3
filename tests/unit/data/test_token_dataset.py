import numpy as np
import pytest

from smolora.data.token_dataset import TextDataset, TokenDataset, build_example
from smolora.errors import DataError


def test_the_first_position_is_never_a_target():
    assert build_example([5, 6, 7], [(0, 3)]).is_target.tolist() == [False, True, True]


def test_examples_come_back_as_they_went_in():
    examples = [build_example([1, 2, 3], [(1, 3)]), build_example([4], []), build_example([5, 6], [(1, 2)])]
    dataset = TokenDataset(examples)
    assert [example.input_ids.tolist() for example in dataset] == [[1, 2, 3], [4], [5, 6]]
    assert dataset[-1].is_target.tolist() == [False, True]
    assert (dataset.lengths.tolist(), dataset.num_input_tokens, dataset.num_target_tokens) == ([3, 1, 2], 6, 3)


def test_an_index_past_the_end_is_refused():
    with pytest.raises(IndexError):
        TokenDataset([build_example([1, 2], [(1, 2)])])[1]


def test_the_fingerprint_sees_tokens_targets_and_boundaries():
    base = [build_example([1, 2], [(1, 2)]), build_example([3, 4], [(1, 2)])]
    others = [
        [build_example([1, 2], [(1, 2)]), build_example([3, 5], [(1, 2)])],
        [build_example([1, 2], [(1, 2)]), build_example([3, 4], [])],
        [build_example([1, 2, 3, 4], [(1, 2), (3, 4)])],
    ]
    assert len({TokenDataset(examples).fingerprint for examples in [base, *others]}) == 4
    assert TokenDataset(base).fingerprint == TokenDataset(list(base)).fingerprint


@pytest.mark.parametrize(
    ("count", "tokens"), [(3, [0, 2, 4]), (1, [0]), (0, [0, 1, 2, 3, 4, 5]), (9, [0, 1, 2, 3, 4, 5])]
)
def test_some_of_the_examples_come_from_all_parts_of_them(count, tokens):
    dataset = TokenDataset([build_example([token], []) for token in range(6)])
    assert [example.input_ids.tolist() for example in dataset.spread(count)] == [[token] for token in tokens]


def test_an_empty_dataset_has_no_tokens():
    assert (len(TokenDataset([])), TokenDataset([]).num_target_tokens) == (0, 0)


@pytest.mark.parametrize("count", [5, 6, 8, 9, 10, 13])
def test_windows_make_every_token_but_the_first_a_target_once(count):
    dataset = TextDataset(np.arange(count), context=4)
    targets = np.concatenate([example.input_ids[example.is_target] for example in dataset])
    assert targets.tolist() == list(range(1, count))
    assert {len(example) for example in dataset} == {5}
    assert dataset.num_target_tokens == count - 1


def test_windows_with_gaps_between_them_stay_whole_at_the_end():
    dataset = TextDataset(np.arange(14), context=2, stride=4)
    assert [example.input_ids.tolist() for example in dataset] == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
    assert dataset.num_target_tokens == 6


def test_a_stride_makes_windows_overlap():
    dataset = TextDataset(np.arange(10), context=4, stride=1)
    assert len(dataset) == 6
    assert dataset[5].input_ids.tolist() == [5, 6, 7, 8, 9]


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="4 tokens, fewer than one window"):
        TextDataset(np.arange(4), context=4)


@pytest.mark.parametrize("tokens", [[1.7, 2.2, 3.0], np.ones((3, 3), dtype=np.int32), ["a", "b", "c"]])
def test_windows_of_anything_but_one_run_of_whole_numbers_are_refused(tokens):
    with pytest.raises(DataError, match="tokens are one run of whole numbers, found"):
        TextDataset(tokens, context=2)


def test_the_fingerprint_of_windows_sees_the_tokens_and_the_cut():
    fingerprints = {
        TextDataset(np.arange(10), context=4).fingerprint,
        TextDataset(np.arange(10), context=5).fingerprint,
        TextDataset(np.arange(1, 11), context=4).fingerprint,
    }
    assert len(fingerprints) == 3


def test_the_fingerprint_of_windows_sees_how_many_there_are():
    class WithoutTheEnd(TextDataset):
        def __len__(self):
            return super().__len__() - 1

    assert WithoutTheEnd(np.arange(10), context=4).fingerprint != TextDataset(np.arange(10), context=4).fingerprint
