"""LoRA tuning on this machine: smolora against trl, the same weights, rows, order and learning rate, in turns.

Arms: `smolora`; `trl fp32` as older guides set it (float32, no checkpointing, stock allocator); `trl bf16` (bfloat16,
the rest alike); `trl best` (glibc's allocator set as smolora sets it). smolora and `trl best` hold the base in the type
that this machine multiplies natively, bfloat16 or float32. Each measurement is a process of its own. Tokens are input
tokens; the share is 4 FLOPs for each weight of the blocks and input token and for each weight of the head and target
token, over the matrix rate of that type, measured in the same run.

python benchmarks/tuning.py --shape 15m --rows e2e --rounds 3       # needs: pip install -e .[bench]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _measuring import median, print_table
from transformers import LlamaConfig, LlamaForCausalLM

from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.adapters.store import load_adapter, save_adapter
from smolora.config import LoRAConfig, SpeedConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import Example, TokenDataset, build_example
from smolora.models.loading import load_model
from smolora.runtime.device import resolve_dtype
from smolora.runtime.memory import MemoryManager, keep_large_blocks
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained
from smolora.training.callback import Callback
from smolora.training.plan import StepPlan
from smolora.training.state import StepRecord
from smolora.training.trainer import Trainer

SHAPES = {
    "15m": {"num_hidden_layers": 6, "hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 6}
    | {"num_key_value_heads": 6, "vocab_size": 32_000},
    "135m": {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49_152},
}
ARMS = ("smolora", "trl fp32", "trl bf16", "trl best")
ROWS_PER_STEP = 8
RATE = 2e-4
NATIVE = resolve_dtype("auto", torch.device("cpu")).dtype


class Cost(NamedTuple):
    """What one process measured."""

    seconds: float
    """Median step."""
    tokens_per_second: float
    peak_bytes: int
    losses: list[float]
    operations: float
    """Of a mean step."""


def make_rows(kind: str, vocab_size: int, count: int) -> list[Example]:
    """Return random rows shaped like E2E (about 70 tokens, 45 % targets) or SAMSum (150 to 700, 15 %)."""
    draw = np.random.default_rng(0)
    examples = []
    for _ in range(count):
        length = int(draw.integers(45, 96) if kind == "e2e" else draw.integers(150, 701))
        prompt = round(length * (0.55 if kind == "e2e" else 0.85))
        examples.append(build_example(draw.integers(3, vocab_size, length).tolist(), [(prompt, length)]))
    return examples


def prepare(shape: str, folder: Path) -> None:
    """Write a random base model and a fresh adapter, which every arm starts from."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True, max_position_embeddings=1024)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    to_pretrained(CharTokenizer.train(["abc"]), 1024).save_pretrained(folder / "base")
    bundle = attach_adapter(load_model(folder / "base"), LoRAConfig(lora_dropout=0.0), seed=0)
    (folder / "adapter").mkdir()
    save_adapter(bundle, folder / "adapter")


class StepTimes(Callback):
    """Keeps the record of every step."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.records.append(record)


def run_smolora(folder: Path, rows: TokenDataset, config: TrainingConfig) -> tuple[list[float], list[float]]:
    """Return the seconds and the losses of every step of ours."""
    keep_large_blocks()
    bundle = load_adapter(load_model(folder / "base", dtype=NATIVE), folder / "adapter", trainable=True)
    times = StepTimes()
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        Trainer(bundle, rows, config, collate=collate_packed, callbacks=[times]).train()
    return [record.seconds for record in times.records], [record.loss for record in times.records]


def run_trl(arm: str, folder: Path, rows: TokenDataset, config: TrainingConfig) -> tuple[list[float], list[float]]:
    """Return the seconds and the losses of every step of trl's, on the same rows in the same order."""
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    if arm == "trl best":
        keep_large_blocks()
    dtype = {"trl fp32": torch.float32, "trl bf16": torch.bfloat16, "trl best": NATIVE}[arm]
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    plan = StepPlan(len(rows), config)
    ordered = [rows[index] for step in range(plan.total_steps) for index in plan.rows_of(step)]
    columns = {
        "input_ids": [example.input_ids.tolist() for example in ordered],
        "completion_mask": [example.is_target.astype(int).tolist() for example in ordered],
    }
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_args: object, **_kwargs: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_args: object, **_kwargs: object) -> None:
            seconds.append(time.perf_counter() - self.started)

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_args: object) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=plan.total_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        bf16=False,  # The weights are bfloat16 already; autocast on top made the step slower.
        gradient_checkpointing=False,
        use_cpu=True,
        max_length=None,
        completion_only_loss=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(folder / "base", pad_token="<|endoftext|>"),
        callbacks=[Clock()],
    )
    trainer.train()
    return seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measure(args: argparse.Namespace) -> Cost:
    """Run one arm in this process."""
    examples = make_rows(args.rows, SHAPES[args.shape]["vocab_size"], ROWS_PER_STEP * args.steps)
    config = TrainingConfig(max_steps=args.steps, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0)
    rows = TokenDataset(examples)
    folder = Path(args.folder)
    run = run_smolora if args.child == "smolora" else lambda *rest: run_trl(args.child, *rest)
    seconds, losses = run(folder, rows, config)
    tokens = rows.num_input_tokens / args.steps
    kept = seconds[args.warmup :]
    shape = SHAPES[args.shape]
    head = shape["vocab_size"] * shape["hidden_size"]
    with torch.device("meta"):  # Counting must not cost memory, whose peak is measured here.
        block_weights = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**shape)).model.layers.parameters())
    operations = 4 * (block_weights * tokens + head * rows.num_target_tokens / args.steps)
    return Cost(
        median(kept),
        tokens / (sum(kept) / len(kept)),
        MemoryManager().get_memory_usage().process_peak,
        losses,
        operations,
    )


def measure_matrix_rate() -> float:
    """Return FLOP/s of a product of 1,024 x 2,048 x 2,048 in the native type, the best of many."""
    x, weight = (torch.randn(1024, 2048, dtype=NATIVE), torch.randn(2048, 2048, dtype=NATIVE))
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024 * 2048 * 2048 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="15m")
    parser.add_argument("--rows", choices=("e2e", "samsum"), default="e2e")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    arms = args.arms if importlib.util.find_spec("trl") else ["smolora"]
    if arms != args.arms:
        print("trl isn't installed (pip install -e .[bench]): smolora alone", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.shape, Path(folder))
        costs: dict[str, list[Cost]] = {arm: [] for arm in arms}
        rate = measure_matrix_rate()
        for _ in range(args.rounds):
            for arm in arms:
                options = [f"--{name}={getattr(args, name)}" for name in ("shape", "rows", "steps", "warmup")]
                command = [sys.executable, __file__, "--child", arm, "--folder", folder, *options]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                costs[arm].append(Cost(*json.loads(output.splitlines()[-1])))
            rate = max(rate, measure_matrix_rate())  # The best of the run: a busy moment is no rate.
    _print_costs(args, costs, rate)


def _print_costs(args: argparse.Namespace, costs: dict[str, list[Cost]], rate: float) -> None:
    ours = median([cost.tokens_per_second for cost in costs["smolora"]])
    rows = []
    for arm, measured in costs.items():
        speed = median([cost.tokens_per_second for cost in measured])
        seconds = median([cost.seconds for cost in measured])
        apart = max(
            abs(a - b) for cost in measured for a, b in zip(cost.losses, costs["smolora"][0].losses, strict=True)
        )
        peak = max(cost.peak_bytes for cost in measured) / 2**30
        rows.append((arm, speed, ours / speed, seconds * 1e3, measured[0].operations / seconds / rate, peak, apart))
    type_name = str(NATIVE).removeprefix("torch.")
    title = f"{args.shape}, {args.rows} rows, {ROWS_PER_STEP} a step; {type_name}, matrix rate {rate / 1e9:.0f} GFLOP/s"
    header = ["arm", "tokens/s", "smolora is", "ms a step", "share of rate", "peak GiB", "losses apart"]
    print_table(title, header, rows)


if __name__ == "__main__":
    main()
