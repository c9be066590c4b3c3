"""Every piece of Python in a docstring or on a page runs as it is written, on tiny things under the names it uses."""

from __future__ import annotations

import json
import os
import re
import shutil
from functools import reduce
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import smolora
from smolora.adapters.attach import attach_adapter
from smolora.adapters.store import save_adapter
from smolora.config import LoRAConfig
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.models.loading import load_model
from tests.run_folders import write_run
from tests.tiny import save_tiny_encoder, save_tiny_model

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SMOLORA_SHARED", ROOT.parent / "shared"))
FENCE = re.compile(r"^( *)```python\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

SHORTER = {
    '"./out")\n': '"./out")\ntraining = trainer.config.training.replace(max_steps=2)\n'
    "trainer.config = trainer.config.replace(training=training)\n",
    "max_steps=100": "max_steps=2",
    "max_new_tokens=60": "max_new_tokens=2",
    'upon a time")': 'upon a time", max_new_tokens=2)',
    "num_samples=20": "num_samples=2",
    "num_seeds=5": "num_seeds=2",
}
"""What would take long, and what takes its place."""
SLOW = {"docs/compare.md", "docs/customise.md"}
"""Whose runs are processes of their own, or four in one page."""
NEEDED = {"docs/track.md": "tensorboard"}
"""Packages that not everybody has."""

# Of settings that the examples leave to Hugging Face's Trainer.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


def find_blocks(file):
    return [dedent(block) for _, block in FENCE.findall(file.read_text(encoding="utf-8"))]


def find_files(files):
    names = {str(file.relative_to(ROOT)): file for file in files if find_blocks(file)}
    marks = {name: [pytest.mark.slow] if name in SLOW else [] for name in names}
    return [pytest.param(file, id=name, marks=marks[name]) for name, file in names.items()]


HEADS = {
    "moods": AutoModelForSequenceClassification,
    "tagger": AutoModelForTokenClassification,
    "reader": AutoModelForQuestionAnswering,
}
TEXTS = [{"text": f"the cat sat on log {i}, away from all dogs"} for i in range(9)]
PAIRS = [{"prompt": f"name[{i}]", "completion": f"The Eagle {i}"} for i in range(9)]
SETTINGS = """
model: {name_or_path: demo-run/base}
data: {sources: [demo-run/text/rows.jsonl, demo-run/text/rows.jsonl], eval_source: demo-run/text/rows.jsonl}
training: {max_steps: 2}
"""


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with a file or folder of every name that the examples use."""
    folder = tmp_path_factory.mktemp("things")
    for name in ("demo-run/base", "demo-run/base/model", "stories260K", "path/or/hub-id"):
        save_tiny_model("llama", folder / name, max_position_embeddings=160)
    adapted = attach_adapter(load_model(str(folder / "stories260K")), LoRAConfig(r=2), seed=0)
    save_adapter(adapted, folder / "restaurants")
    for name, kind in HEADS.items():
        settings = AutoConfig.from_pretrained(save_tiny_encoder("bert", folder / name))
        kind.from_config(settings).save_pretrained(folder / name)
    for name in ("my-run", "static", "phased"):
        write_run(folder / name)
        (folder / f"{name}.yaml").write_text(SETTINGS)
    (folder / "demo-run/text").mkdir()
    for name, rows in {"data": TEXTS, "demo-run/text/text": TEXTS, "demo-run/text/rows": PAIRS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data").symlink_to(SHARED / "data")
    return folder


@pytest.fixture
def folder(things, tmp_path, monkeypatch):
    shutil.copytree(things, tmp_path, symlinks=True, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def given(folder):
    """What the examples of docstrings leave to their reader."""
    bundle = attach_adapter(load_model("demo-run/base"), LoRAConfig(r=2), seed=0)
    ids = torch.arange(1, 9)
    rows = TokenDataset([build_example(ids.tolist(), [(1, 8)])] * 8)
    public = {name: getattr(smolora, name) for name in smolora.__all__}
    return {**public, "bundle": bundle, "rows": rows, "model": bundle.model, "input_ids": ids[None]}


def run(blocks, names):
    for block in blocks:
        if '"data/' in block and not Path("data").is_dir():
            pytest.skip(f"no data at {SHARED} (set SMOLORA_SHARED)")
        exec(reduce(lambda text, change: text.replace(*change), SHORTER.items(), block), names)


@pytest.mark.parametrize("page", find_files(PAGES))
def test_the_python_of_a_page_runs_from_its_first_line_to_its_last(folder, page):
    if package := NEEDED.get(str(page.relative_to(ROOT))):
        pytest.importorskip(package)
    run(find_blocks(page), {"__name__": "__main__"})


@pytest.mark.parametrize("module", find_files(sorted((ROOT / "smolora").rglob("*.py"))))
def test_an_example_of_a_docstring_runs(given, module):
    run(find_blocks(module), given)
