"""What glibc's allocator costs a training step, and which of its settings matters.

Each measurement is a fresh process, since a setting can't be taken back; the settings alternate, round after round, so
that a busy moment hits all of them. `smolora` is what `runtime.memory.keep_large_blocks` does.

python benchmarks/allocator.py --rounds 5
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from _measuring import median, print_table, time_steps
from torch.nn import functional as F

from smolora.adapters.attach import attach_adapter
from smolora.config import GPTConfig, LoRAConfig
from smolora.models.anatomy import build_anatomy
from smolora.models.building import build_gpt
from smolora.models.bundle import ModelBundle
from smolora.models.gpt import GPTModel
from smolora.models.gpt2_weights import to_gpt2
from smolora.runtime.memory import MemoryManager, keep_large_blocks
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained

# malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MOST = 2**31 - 1
_LARGEST_THRESHOLD = 32 * 2**20
"""glibc refuses a larger threshold for mmap on 64-bit machines."""

SETTINGS: dict[str, tuple[tuple[int, int], ...]] = {
    "default": (),
    "trim": ((_M_TRIM_THRESHOLD, _MOST),),
    "mmap_max=0": ((_M_MMAP_MAX, 0),),
    "threshold=32M": ((_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD),),
    "threshold=32M, trim": ((_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD), (_M_TRIM_THRESHOLD, _MOST)),
    "smolora": (),
}


class StepCost(NamedTuple):
    """One process: its median step, and its memory."""

    seconds: float
    peak_bytes: int
    page_faults: float
    """Pages that the kernel had to supply, per step."""


def measure_allocator(rounds: int, arguments: list[str]) -> dict[str, list[StepCost]]:
    """Return the costs of every setting, measured in turns."""
    costs: dict[str, list[StepCost]] = {name: [] for name in SETTINGS}
    for _ in range(rounds):
        for name in SETTINGS:
            command = [sys.executable, str(Path(__file__).resolve()), "--child", name, *arguments]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            costs[name].append(StepCost(*json.loads(output.splitlines()[-1])))
    return costs


def measure_step_cost(args: argparse.Namespace) -> StepCost:
    """Apply one setting to this process and measure its training step."""
    if args.child == "smolora":
        keep_large_blocks()
    for option, value in SETTINGS[args.child]:
        assert ctypes.CDLL(None).mallopt(option, value), f"glibc refused mallopt({option}, {value})"
    step = _build_step(args)
    time_steps(step, num_warmup=3, num_steps=0)
    before = _count_page_faults()
    seconds = time_steps(step, num_warmup=0, num_steps=args.steps)
    faults = (_count_page_faults() - before) / args.steps
    return StepCost(median(seconds), MemoryManager().get_memory_usage().process_peak, faults)


def _count_page_faults() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _build_step(args: argparse.Namespace) -> Callable[[], None]:
    tokenizer = to_pretrained(CharTokenizer.train(["abc"]), args.length)
    shape = GPTConfig(num_layers=args.layers, width=args.width, context=args.length, vocab_size=args.vocab_size)
    bundle = build_gpt(shape, tokenizer, seed=0)
    if args.kind == "lora":
        bundle = _with_adapter(bundle)
    model = bundle.model.train()
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=1e-4)
    tokens = torch.randint(args.vocab_size, (args.rows, args.length + 1))

    def step() -> None:
        output = model(tokens[:, :-1])
        logits = output.logits if args.kind == "lora" else output
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _with_adapter(bundle: ModelBundle) -> ModelBundle:
    assert isinstance(bundle.model, GPTModel), "build_gpt builds one"
    model = to_gpt2(bundle.model)
    return attach_adapter(replace(bundle, model=model, anatomy=build_anatomy(model)), LoRAConfig(), seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=("gpt", "lora"), default=["gpt", "lora"])
    parser.add_argument("--kind", choices=("gpt", "lora"), default="gpt", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=tuple(SETTINGS), help=argparse.SUPPRESS)
    sizes = {"layers": 4, "width": 256, "vocab-size": 8192, "rows": 8, "length": 256, "steps": 10}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure_step_cost(args)))
        return
    if platform.libc_ver()[0] != "glibc":
        sys.exit(f"skipped: {sys.platform} has no glibc.")
    for kind in args.kinds:
        chosen = [f"--{name}={vars(args)[name.replace('-', '_')]}" for name in sizes]
        costs = measure_allocator(args.rounds, ["--kind", kind, *chosen])
        _print_costs(f"one {kind} step, median of {args.rounds} processes x {args.steps} steps", costs)


def _print_costs(title: str, costs: dict[str, list[StepCost]]) -> None:
    base = median([cost.seconds for cost in costs["default"]])
    rows = []
    for name, measured in costs.items():
        seconds = median([cost.seconds for cost in measured])
        peak = max(cost.peak_bytes for cost in measured) / 2**20
        faults = round(median([cost.page_faults for cost in measured]))
        rows.append((name, seconds * 1e3, seconds / base, peak, faults))
    print_table(title, ["setting", "ms", "of default", "peak MiB", "page faults"], rows)


if __name__ == "__main__":
    main()
