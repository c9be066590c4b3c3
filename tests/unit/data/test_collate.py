import pytest
import torch

from smolora.data.collate import collate_packed, collate_padded, collate_windows, get_data_collator
from smolora.data.token_dataset import TextDataset, build_example
from smolora.errors import DataError

EXAMPLES = [build_example([1, 2, 3], [(2, 3)]), build_example([4, 5], [(1, 2)])]


def test_packed_rows_lie_end_to_end_with_positions_restarting():
    batch = collate_packed(EXAMPLES)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.attention_mask is None
    assert batch.num_input_tokens == 5


def test_a_target_is_predicted_from_the_position_before_it():
    batch = collate_packed(EXAMPLES)
    assert batch.target_positions.tolist() == [1, 3]
    assert batch.targets.tolist() == [3, 5]


def test_padded_rows_are_masked_by_place_even_where_the_pad_id_is_a_real_token():
    batch = collate_padded(EXAMPLES, pad_token_id=5)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.num_input_tokens == 5


def test_both_layouts_predict_the_same_targets_from_the_same_tokens():
    packed, padded = collate_packed(EXAMPLES), collate_padded(EXAMPLES)
    assert packed.targets.tolist() == padded.targets.tolist()
    assert packed.input_ids.flatten()[packed.target_positions].tolist() == [2, 4]
    assert padded.input_ids.flatten()[padded.target_positions].tolist() == [2, 4]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_batch_without_a_target_is_refused(layout):
    with pytest.raises(DataError, match="none of the 1 rows of a batch has a target"):
        get_data_collator(layout)([build_example([1, 2], [])])


def test_windows_predict_every_position():
    dataset = TextDataset(list(range(9)), context=4)
    batch = collate_windows([dataset[0], dataset[1]])
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batch.targets.tolist() == list(range(1, 9))
    assert batch.target_positions is None
    assert batch.num_target_tokens == 8


def test_a_window_that_begins_sooner_predicts_what_no_other_does():
    dataset = TextDataset(list(range(7)), context=4)
    batch = collate_windows([dataset[0], dataset[1]])
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5]]
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.input_ids.flatten()[batch.target_positions].tolist() == [0, 1, 2, 3, 4, 5]


def test_windows_of_different_lengths_are_refused():
    with pytest.raises(DataError, match=r"one length, found \[2, 3\]"):
        collate_windows(EXAMPLES)


def test_moving_a_batch_moves_every_tensor():
    batch = collate_padded(EXAMPLES).to("meta")
    tensors = [batch.input_ids, batch.attention_mask, batch.target_positions, batch.targets]
    assert all(tensor.device == torch.device("meta") for tensor in tensors)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="packed, padded, windows"):
        get_data_collator("ragged")
