"""LoRA tuning on this machine: smolora against its peers, the same weights, rows, order and learning rate, in turns.

Arms: `smolora`; `trl fp32` as older guides set it (float32, no checkpointing, stock allocator); `trl bf16` (bfloat16,
the rest alike); `trl best` (glibc's allocator set as smolora sets it); `peft loop`, transformers and peft in a plain
loop; `litgpt`, its model and LoRA in the same loop, where it is installed (_peers.py says how). smolora and the last
three hold the base in the type that this machine multiplies natively, bfloat16 or float32, and keep large blocks.
Each measurement is a process of its own. Tokens are input tokens; the share is 4 FLOPs for each weight of the blocks
and input token and for each weight of the head and target token, over the rate of a matrix product of that type: the
best product of the run, and the median one, which a long run can sustain. Exits with 1 where losses are apart by more
than rounding, or where a part of smolora's fast path is off.

python benchmarks/tuning.py --shape 15m --rows e2e --rounds 3       # needs: pip install -e .[bench]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _measuring import median, print_table, time_steps
from _peers import Steps, run_litgpt, run_peft, run_trl
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
from smolora.training.state import StepRecord
from smolora.training.trainer import Trainer

SHAPES = {
    "15m": {"num_hidden_layers": 6, "hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 6}
    | {"num_key_value_heads": 6, "vocab_size": 32_000},
    "135m": {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49_152},
}
ROWS_PER_STEP = 8
RATE = 2e-4
NATIVE = resolve_dtype("auto", torch.device("cpu")).dtype


FARTHEST_LOSSES = {torch.float32: 1e-4, torch.bfloat16: 2e-3}
"""How far losses may be apart by rounding."""


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


def run_smolora(folder: Path, rows: TokenDataset, config: TrainingConfig, dtype: torch.dtype) -> Steps:
    """Train with our loop and the whole fast path; exit where a part of it is off, since that is another question."""
    bundle = load_adapter(load_model(folder / "base", dtype=dtype), folder / "adapter", trainable=True)
    times = StepTimes()
    with fast_path(bundle, SpeedConfig(), is_packed=True) as parts:
        if parts.left:
            sys.exit(f"smolora's fast path is not whole, so this would measure something else: {parts.describe()}.")
        Trainer(bundle, rows, config, collate=collate_packed, callbacks=[times]).train()
    return Steps([record.seconds for record in times.records], [record.loss for record in times.records])


class Arm(NamedTuple):
    """Who trains, and how it is set."""

    run: Callable[[Path, TokenDataset, TrainingConfig, torch.dtype], Steps]
    package: str
    dtype: torch.dtype = NATIVE
    keeps_blocks: bool = True


ARMS = {
    "smolora": Arm(run_smolora, "smolora"),
    "trl fp32": Arm(run_trl, "trl", torch.float32, keeps_blocks=False),
    "trl bf16": Arm(run_trl, "trl", torch.bfloat16, keeps_blocks=False),
    "trl best": Arm(run_trl, "trl"),
    "peft loop": Arm(run_peft, "peft"),
    "litgpt": Arm(run_litgpt, "litgpt"),
}


def measure(args: argparse.Namespace) -> Cost:
    """Run one arm in this process."""
    examples = make_rows(args.rows, SHAPES[args.shape]["vocab_size"], ROWS_PER_STEP * args.steps)
    config = TrainingConfig(max_steps=args.steps, learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0)
    rows = TokenDataset(examples)
    arm = ARMS[args.child]
    if arm.keeps_blocks:
        keep_large_blocks()
    seconds, losses = arm.run(Path(args.folder), rows, config, arm.dtype)
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


def time_products() -> list[float]:
    """Return the seconds of products of 1,024 x 2,048 x 2,048 in the native type, one after another."""
    x, weight = (torch.randn(1024, 2048, dtype=NATIVE), torch.randn(2048, 2048, dtype=NATIVE))
    return time_steps(lambda: torch.nn.functional.linear(x, weight), num_warmup=3, num_steps=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="15m")
    parser.add_argument("--rows", choices=("e2e", "samsum"), default="e2e")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), help="smolora is always one")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--child", choices=tuple(ARMS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    arms = [name for name in ARMS if name == "smolora" or name in args.arms]
    for name in [name for name in arms if not importlib.util.find_spec(ARMS[name].package)]:
        arms.remove(name)
        print(f"left out: {name}, since {ARMS[name].package} isn't installed (_peers.py says how)", file=sys.stderr)
    for name in [name for name in arms if ARMS[name].dtype not in (NATIVE, torch.float32)]:
        arms.remove(name)
        print(f"left out: {name}, since this machine computes its type by another", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        prepare(args.shape, Path(folder))
        costs: dict[str, list[Cost]] = {arm: [] for arm in arms}
        products = time_products()
        for _ in range(args.rounds):
            for arm in arms:
                costs[arm].append(_measure_apart(arm, folder, args))
            products += time_products()
    _print_costs(args, costs, products)
    _require_equal_losses(costs)


def _measure_apart(arm: str, folder: str, args: argparse.Namespace) -> Cost:
    """Run one arm in a process of its own."""
    options = [f"--{name}={getattr(args, name)}" for name in ("shape", "rows", "steps", "warmup")]
    command = [sys.executable, __file__, "--child", arm, "--folder", folder, *options]
    process = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        sys.exit(f"{arm} ended with status {process.returncode}; nothing is measured without it.")
    return Cost(*json.loads(process.stdout.splitlines()[-1]))


def _print_costs(args: argparse.Namespace, costs: dict[str, list[Cost]], products: list[float]) -> None:
    ours = median([cost.tokens_per_second for cost in costs["smolora"]])
    best, usual = (2 * 1024 * 2048 * 2048 / seconds for seconds in (min(products), median(products)))
    rows = []
    for arm, measured in costs.items():
        speed = median([cost.tokens_per_second for cost in measured])
        seconds = median([cost.seconds for cost in measured])
        rate = measured[0].operations / seconds
        peak = max(cost.peak_bytes for cost in measured) / 2**30
        rows.append((arm, speed, ours / speed, seconds * 1e3, rate / best, rate / usual, peak, _apart(costs, arm)))
    type_name = str(NATIVE).removeprefix("torch.")
    rates = f"{type_name} products at {best / 1e9:.0f} GFLOP/s at best, {usual / 1e9:.0f} in the median"
    title = f"{args.shape}, {args.rows} rows, {ROWS_PER_STEP} a step; {rates}"
    header = ["arm", "tokens/s", "smolora is", "ms a step", "of the best", "of the median", "peak GiB", "losses apart"]
    print_table(title, header, rows)


def _apart(costs: dict[str, list[Cost]], arm: str) -> float:
    """Return how far the losses of an arm are from ours, at most."""
    ours = costs["smolora"][0].losses
    return float(np.max([np.abs(np.subtract(cost.losses, ours)) for cost in costs[arm]]))


def _require_equal_losses(costs: dict[str, list[Cost]]) -> None:
    """Exit where an arm learned something else than ours did."""
    for arm in costs:
        allowed = max(FARTHEST_LOSSES[dtype] for dtype in (NATIVE, ARMS[arm].dtype))
        if not (apart := _apart(costs, arm)) <= allowed:  # Not a number is apart, too.
            sys.exit(f"{arm}: a loss is {apart:.1e} from smolora's, and rounding explains {allowed:.0e}: not one task.")


if __name__ == "__main__":
    main()
