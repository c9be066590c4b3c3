"""What watching the gradients costs a LoRA training step, which should be under 1 %.

The same step runs in turns without and with the callback that every tuning run has; one step in ten is a logged one.
What is added up is the callback's own time, since a difference of whole steps drowns in a machine's noise.

python benchmarks/gradient_norms.py --sizes 15M 135M
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from _measuring import median, print_table
from transformers import LlamaConfig, LlamaForCausalLM

from smolora.adapters.attach import attach_adapter
from smolora.config import LoRAConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.models.anatomy import build_anatomy
from smolora.models.bundle import ModelBundle
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import to_pretrained
from smolora.training.callback import Callback
from smolora.training.gradients import GradientNormCallback
from smolora.training.trainer import Trainer

SIZES = {
    "15M": {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 32_000, "heads": 6},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152, "heads": 9},
}


class Timed(Callback):
    """Passes every event on and adds up what it takes."""

    def __init__(self, inner: GradientNormCallback) -> None:
        self.inner, self.seconds, self.steps = inner, 0.0, []

    def on_train_begin(self, trainer):
        self.inner.on_train_begin(trainer)

    def on_gradients(self, trainer):
        self._time(lambda: self.inner.on_gradients(trainer))

    def on_log(self, trainer, record):
        self._time(lambda: self.inner.on_log(trainer, record))

    def on_step_end(self, trainer, record):
        self.steps.append(record.seconds)

    def _time(self, event):
        started = time.perf_counter()
        event()
        self.seconds += time.perf_counter() - started


def measure_cost(size: str, steps: int) -> tuple[float, float, float]:
    """Return the median step and the callback's time per step, in milliseconds, and their ratio."""
    bundle = attach_adapter(build_bundle(**SIZES[size]), LoRAConfig(), seed=0)
    random = np.random.default_rng(0)
    rows = [random.integers(1, 90, size=96).tolist() for _ in range(64)]
    dataset = TokenDataset([build_example(row, [(48, 96)]) for row in rows])
    timed = Timed(GradientNormCallback())
    Trainer(bundle, dataset, TrainingConfig(max_steps=steps), collate=collate_packed, callbacks=[timed]).train()
    step, own = median(timed.steps), timed.seconds / steps
    return step * 1e3, own * 1e3, own / step


def build_bundle(heads: int, **shape: int) -> ModelBundle:
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=3, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    tokenizer = to_pretrained(CharTokenizer.train("abc"), 512)
    return ModelBundle(model, tokenizer, build_anatomy(model), source="random", fingerprint=str(heads))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    rows = [(size, *measure_cost(size, args.steps)) for size in args.sizes]
    print_table("LoRA on all linear modules, 8 rows of 96 tokens", ["size", "step ms", "own ms", "share"], rows)


if __name__ == "__main__":
    main()
