"""Methods, tasks, precisions and checkpointing: a cover of all pairs by default, every combination among the slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolora.config.adapter import METHODS
from smolora.errors import ConfigError
from tests.matrix import CELLS, TASKS, Cell, Ground, build_config, build_ground, cover_pairs, run_cell, write_page
from tests.tiny import WHOLE_BLOCKS, save_tiny_model

WORKING = [cell for cell in CELLS if cell.refusal is None]
COVER = cover_pairs(WORKING)
REST = [cell for cell in WORKING if cell not in COVER]


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ground]:
    return {task: build_ground(task, tmp_path_factory.mktemp(task)) for task in TASKS}


@pytest.mark.parametrize("cell", COVER, ids=str)
def test_a_combination_of_the_cover_works(cell, grounds, tmp_path):
    run_cell(cell, grounds[cell.task], tmp_path)


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning", "full"])
def test_a_decoder_classifies_with_adapters_and_virtual_tokens(method, grounds, tmp_path):
    base = save_tiny_model("llama", tmp_path / "base", **WHOLE_BLOCKS["llama"])
    ground = Ground(base, grounds["classification"].rows)
    (tmp_path / "run").mkdir()
    run_cell(Cell(method, "classification", "float32", False), ground, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("cell", REST, ids=str)
def test_a_combination_works(cell, grounds, tmp_path):
    run_cell(cell, grounds[cell.task], tmp_path)


def test_every_other_combination_is_refused_with_its_reason_before_a_model_is_loaded(grounds):
    nowhere = {task: Ground(ground.base / "nowhere", ground.rows) for task, ground in grounds.items()}
    for cell in CELLS:
        if cell.refusal:
            with pytest.raises(ConfigError) as error:
                build_config(cell, nowhere[cell.task])
            assert cell.refusal in str(error.value), cell


def test_the_cover_is_small_and_every_method_meets_every_task_that_it_works_with():
    assert len(COVER) <= 60
    assert {(cell.method, cell.task) for cell in COVER} == {(cell.method, cell.task) for cell in WORKING}
    assert {cell.method for cell in COVER} == set(METHODS)


def test_two_cells_that_differ_in_one_value_are_both_needed():
    cells = [Cell("lora", "qa", "float32", False), Cell("lora", "qa", "bfloat16", False)]
    assert cover_pairs(cells) == cells


def test_the_page_of_the_documentation_is_the_table():
    page = Path(__file__).parents[2] / "docs/matrix.md"
    assert page.read_text(encoding="utf-8") == write_page(), "python -m tests.matrix > docs/matrix.md"
