"""Predictions of any system: which file they are in, and where they are kept."""

from __future__ import annotations

import pytest

from smolora.errors import ConfigError
from smolora.evaluation.predictions import evaluate_predictions
from smolora.evaluation.row_source import open_benchmark


def test_the_file_of_predictions_is_not_written_over(tmp_path):
    (tmp_path / "testset_w_refs.csv").write_text("mr,ref\nname[A],A cat sat.\nname[B],B.\n")
    file = tmp_path / "predictions.jsonl"
    file.write_text("A cat sat.\nB.\n")
    with pytest.raises(ConfigError, match="is where the scored predictions would be written"):
        evaluate_predictions(file, open_benchmark("e2e_nlg", tmp_path), folder=tmp_path)
    assert file.read_text() == "A cat sat.\nB.\n"
