"""A character GPT on tiny shakespeare: a plain loop against smolora's `pretrain`, in turns, in one run.

The plain loop is what people write first (and what nanoGPT's small CPU setting is): one fused query-key-value layer,
AdamW at 3e-3 falling to 3e-4, warm-up of 100 steps, batches drawn at random. Both are judged by one function, on every
whole window of the last 10 % of the file. nanoGPT's README gives 1.88 for this setting. In bfloat16 the plain loop's
forward pass is under torch.autocast, as nanoGPT's is.

python benchmarks/nanogpt.py            # 2,000 steps, two turns each
python benchmarks/nanogpt.py --steps 50 --rounds 1
python benchmarks/nanogpt.py --large --steps 60 --rounds 1
python benchmarks/nanogpt.py --large --steps 100 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from _measuring import find_shared, median, print_table
from torch import Tensor, nn
from torch.nn import functional as F
from tuning import NATIVE

from smolora.config import DataConfig, GPTConfig, PretrainConfig, TrainingConfig
from smolora.data.encoding import encode_texts
from smolora.models.gpt import GPTModel
from smolora.recipes.pretrain import pretrain
from smolora.tokenizers.pretrained import load_tokenizer
from smolora.training.callback import Callback
from smolora.training.state import StepRecord
from smolora.training.trainer import Trainer


class Shape(NamedTuple):
    """nanoGPT's settings for characters."""

    batch: int
    context: int
    layers: int
    heads: int
    width: int


SHAPE = Shape(16, 256, 6, 6, 384) if "--large" in sys.argv else Shape(12, 64, 4, 4, 128)
PEAK_RATE, LAST_RATE, WARMUP = (1e-3, 1e-4, 100) if SHAPE.width > 256 else (3e-3, 3e-4, 100)
EVAL_EVERY, EVAL_BATCHES = 250, 20
VALIDATION_SHARE = 0.1

ProductType = Literal["float32", "bfloat16"]


class Outcome(NamedTuple):
    """What one training run reached, and what it took."""

    validation_loss: float
    step_seconds: float
    """In training steps alone."""
    seconds: float
    """From text to trained model, with evaluations, tokenizer and files."""


class PlainBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(SHAPE.width, bias=False), nn.LayerNorm(SHAPE.width, bias=False)
        self.c_attn = nn.Linear(SHAPE.width, 3 * SHAPE.width, bias=False)
        self.c_proj = nn.Linear(SHAPE.width, SHAPE.width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(SHAPE.width, 4 * SHAPE.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * SHAPE.width, SHAPE.width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        query, key, value = (
            part.view(B, T, SHAPE.heads, -1).transpose(1, 2) for part in self.c_attn(self.norm1(x)).split(D, dim=2)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.c_proj(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """GPT-2's shape without biases, with a tied head."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, SHAPE.width)
        self.positions = nn.Embedding(SHAPE.context, SHAPE.width)
        self.blocks = nn.Sequential(*(PlainBlock() for _ in range(SHAPE.layers)))
        self.norm = nn.LayerNorm(SHAPE.width, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                is_residual = name.endswith(("c_proj.weight", "mlp.2.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * SHAPE.layers) if is_residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def train_plain(text: str, steps: int, seed: int, dtype: ProductType) -> Outcome:
    """Train `PlainGPT` on characters, and judge it."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([characters[character] for character in text])
    train, validation = split(tokens)
    model = PlainGPT(len(characters))
    optimizer = _build_plain_optimizer(model)
    step_seconds = 0.0
    for step in range(steps):
        if step % EVAL_EVERY == 0:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                _estimate_loss(model, train, validation)
        step_started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = _plain_rate(step, steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = _loss(model, *_draw_batch(train))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step_seconds += time.perf_counter() - step_started
    seconds = time.perf_counter() - started
    return Outcome(evaluate_windows(model, validation), step_seconds, seconds)


def train_smolora(text_file: Path, steps: int, seed: int, dtype: ProductType) -> Outcome:
    """Train the same shape with `pretrain`, and judge it."""
    timer = _StepTimer()
    started = time.perf_counter()
    config = PretrainConfig(
        gpt=GPTConfig(
            num_layers=SHAPE.layers, num_heads=SHAPE.heads, width=SHAPE.width, context=SHAPE.context, dropout=0.0
        ),
        data=DataConfig(sources=(str(text_file),), validation_fraction=VALIDATION_SHARE),
        training=TrainingConfig(
            learning_rate=PEAK_RATE,
            max_steps=steps,
            per_device_train_batch_size=SHAPE.batch,
            warmup_steps=min(WARMUP, steps // 2),
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            logging_steps=EVAL_EVERY,
            save_steps=steps,
            seed=seed,
        ),
        dtype=dtype,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        saved = pretrain(config, Path(folder) / "run", callbacks=[timer])
        seconds = time.perf_counter() - started
        model, tokenizer = GPTModel.from_pretrained(saved), load_tokenizer(str(saved))
    ids = torch.tensor(encode_texts([text_file.read_text(encoding="utf-8")], tokenizer)[0], dtype=torch.long)
    return Outcome(evaluate_windows(model, split(ids)[1]), timer.seconds, seconds)


class _StepTimer(Callback):
    """Adds up the seconds of the steps alone."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_step_end(self, trainer: Trainer, record: StepRecord) -> None:
        self.seconds += record.seconds


def split(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first 90 % and the last 10 %."""
    cut = int(len(tokens) * (1 - VALIDATION_SHARE))
    return tokens[:cut], tokens[cut:]


@torch.inference_mode()
def evaluate_windows(model: nn.Module, tokens: Tensor) -> float:
    """Return the mean loss over every whole window, end to end."""
    model.eval()
    windows = tokens[: (len(tokens) - 1) // SHAPE.context * SHAPE.context + 1].unfold(
        0, SHAPE.context + 1, SHAPE.context
    )
    losses = [_loss(model, batch[:, :-1], batch[:, 1:]).item() * len(batch) for batch in windows.split(256)]
    return sum(losses) / len(windows)


def _build_plain_optimizer(model: nn.Module) -> torch.optim.AdamW:
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.99))


def _plain_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / (WARMUP + 1)
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return LAST_RATE + 0.5 * (1 + math.cos(math.pi * progress)) * (PEAK_RATE - LAST_RATE)


def _draw_batch(tokens: Tensor) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(tokens) - SHAPE.context, (SHAPE.batch,))
    windows = torch.stack([tokens[start : start + SHAPE.context + 1] for start in starts.tolist()])
    return windows[:, :-1], windows[:, 1:]


def _loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


@torch.no_grad()
def _estimate_loss(model: nn.Module, *parts: Tensor) -> list[float]:
    model.eval()
    means = [sum(_loss(model, *_draw_batch(part)).item() for _ in range(EVAL_BATCHES)) / EVAL_BATCHES for part in parts]
    model.train()
    return means


def compare(text_file: Path, *, steps: int, rounds: int, dtype: ProductType) -> dict[str, list[Outcome]]:
    """Train both in turns, and return what each turn reached."""
    text = text_file.read_text(encoding="utf-8")
    outcomes: dict[str, list[Outcome]] = {"plain loop": [], "smolora": []}
    for seed in range(rounds):
        outcomes["plain loop"].append(train_plain(text, steps, seed, dtype))
        outcomes["smolora"].append(train_smolora(text_file, steps, seed, dtype))
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each; their median is printed")
    parser.add_argument("--large", action="store_true", help="6 layers, 384 wide, context 256, 16 rows a step")
    types = list(dict.fromkeys(("float32", str(NATIVE).removeprefix("torch."))))
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], nargs="+", default=types, help="of products; default: %(default)s"
    )
    parser.add_argument("--text", type=Path, help="another text file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    text_file = args.text or find_shared("data/pretrain/tinyshakespeare.txt")
    for dtype in args.dtype:
        outcomes = compare(text_file, steps=args.steps, rounds=args.rounds, dtype=dtype)
        medians = {name: [median(column) for column in zip(*turns, strict=True)] for name, turns in outcomes.items()}
        plain, ours = medians["plain loop"], medians["smolora"]
        rows = [[name, *values] for name, values in medians.items()]
        rows.append(["smolora / plain", *(mine / theirs for mine, theirs in zip(ours, plain, strict=True))])
        setting = f"{args.steps} steps of {SHAPE.batch} x {SHAPE.context}, {dtype}"
        title = f"tiny shakespeare, characters, {setting}, median of {args.rounds}"
        print_table(title, ["", "validation loss", "seconds in steps", "seconds in all"], rows)


if __name__ == "__main__":
    main()
