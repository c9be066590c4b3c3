"""Forward passes of GPTModel: input tokens per second for each batch size and length.

python benchmarks/forward.py --layers 4 --width 128 --batch-sizes 1 8 32 --lengths 64 256
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from _measuring import median, print_table, time_steps

from smolora.config import GPTConfig
from smolora.models.gpt import GPTModel
from smolora.runtime.memory import keep_large_blocks


class ForwardTiming(NamedTuple):
    """The median of one shape."""

    batch_size: int
    length: int
    milliseconds: float
    tokens_per_second: float


@torch.inference_mode()
def benchmark_forward(
    model: GPTModel, *, batch_sizes: Sequence[int], lengths: Sequence[int], num_warmup: int = 3, num_steps: int = 10
) -> list[ForwardTiming]:
    """Time `model(input_ids)` for every batch size and length, in evaluation mode."""
    model.eval()
    vocab_size = model.token_embedding.num_embeddings
    timings = []
    for batch_size in batch_sizes:
        for length in lengths:
            input_ids = torch.randint(vocab_size, (batch_size, length))
            seconds = median(time_steps(partial(model, input_ids), num_warmup=num_warmup, num_steps=num_steps))
            timings.append(ForwardTiming(batch_size, length, seconds * 1e3, batch_size * length / seconds))
    return timings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    keep_large_blocks()
    config = GPTConfig(
        num_layers=args.layers,
        num_heads=args.heads,
        width=args.width,
        context=max(args.lengths),
        vocab_size=args.vocab_size,
    )
    timings = benchmark_forward(
        GPTModel(config), batch_sizes=args.batch_sizes, lengths=args.lengths, num_steps=args.steps
    )
    title = f"GPT forward: {args.layers} layers, {args.width} wide, vocabulary {args.vocab_size}"
    print_table(title, ["batch", "length", "ms", "tokens/s"], timings)


if __name__ == "__main__":
    main()
