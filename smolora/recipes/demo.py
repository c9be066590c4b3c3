"""`smolora demo`: the whole walk in minutes, offline: write text, pretrain, tune, merge, and ask before and after.

With a text of the person's own the walk is the same and the task another: to finish a passage from its first words.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from smolora.adapters.store import load_bundle
from smolora.config import (
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    GPTConfig,
    LoRAConfig,
    ModelConfig,
    PretrainConfig,
    TokenizerConfig,
    TrainingConfig,
)
from smolora.data.sources import read_source_documents
from smolora.errors import StoppedBySignal
from smolora.generation.sampling import SamplingSettings
from smolora.generation.text_generator import TextGenerator
from smolora.models.bundle import ModelBundle
from smolora.recipes.demo_corpus import DemoCorpus, write_corpus, write_passages
from smolora.recipes.finetune import finetune
from smolora.recipes.merge import merge
from smolora.recipes.pretrain import pretrain
from smolora.records.metrics_log import MetricsLog
from smolora.records.run_dir import RunDir
from smolora.records.staging import refuse_existing
from smolora.runtime.console import print_plainly, stderr_console
from smolora.training.callbacks import ProgressCallback

_PRETRAINING_STEPS, _TUNING_STEPS = 2500, 300
_NUM_STORIES, _NUM_ROWS, _NUM_HELD_OUT = 16_000, 8_000, 200
_NUM_SHOWN = 5
_ANSWER_TOKENS = 32


@dataclass(frozen=True)
class DemoTask:
    """What the demo learns, and how it is judged."""

    corpus: DemoCorpus
    pretraining: str
    tuning: str
    has_one_answer: bool
    """Whether an answer is right or wrong; else both texts are shown and the loss decides."""

    sampling: SamplingSettings


@dataclass
class Walk:
    """The console, how much of the usual work to do, and how long each part took."""

    console: Console
    effort: float
    seconds: dict[str, float] = field(default_factory=dict)

    def scale(self, count: int) -> int:
        """Return a usual count at this walk's effort."""
        return max(10, round(count * self.effort))

    def say(self, text: str = "") -> None:
        """Print a line."""
        print_plainly(self.console, text)

    @contextmanager
    def part(self, title: str, explanation: str) -> Iterator[None]:
        """Announce a part of the walk, and time it."""
        self.say(f"\n{len(self.seconds) + 1}. {title}: {explanation}")
        started = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - started
        self.say(f"   {self.seconds[title]:.0f} s")


def run_demo(out: Path, text: Path | None = None, *, console: Console | None = None, effort: float = 1.0) -> None:
    """Walk the whole way in `out`, and print on stderr what each part does and what it reached.

    Args:
        out: A folder that doesn't exist yet, or is empty.
        text: A file or folder of text, in place of the demo's own stories.
        console: Where to print. Left out, a new one on stderr.
        effort: Share of the usual steps and stories. The answers need all of it; less shows the walk alone.

    Raises:
        ConfigError: There is something in `out`.
        DataError: `text` is missing or too short.
        StoppedBySignal: A signal arrived while it trained.
    """
    refuse_existing(out)
    walk = Walk(console or stderr_console(), effort)
    task = _write_stories(walk, out) if text is None else _write_own_text(walk, out, text)
    with _stopped_for_good(out):
        base = _pretrain(walk, task, out / "base")
        run = _tune(walk, task, base, out / "tuned")
    _merge(walk, run)
    _ask(walk, task, base, run)
    _suggest(walk, out, task)


@contextmanager
def _stopped_for_good(out: Path) -> Iterator[None]:
    """Say of a training that is stopped how to start anew: the whole walk can't be resumed, as a run can."""
    try:
        yield
    except StoppedBySignal as stopped:
        raise StoppedBySignal(
            f"the demo was stopped, and doesn't go on from there. Remove {out}, or choose another folder with -o, "
            "and start it again."
        ) from stopped


def _write_stories(walk: Walk, out: Path) -> DemoTask:
    with walk.part("write", "a small grammar tells stories about the animals of a valley, and asks about other ones"):
        corpus = write_corpus(
            out / "text",
            num_stories=max(400, walk.scale(_NUM_STORIES)),
            num_rows=walk.scale(_NUM_ROWS),
            num_held_out=walk.scale(_NUM_HELD_OUT),
        )
        walk.say(f"   for example: {_read_rows(corpus.text)[0]['text']}")
    return DemoTask(
        corpus,
        "a GPT learns from nothing to continue the stories; it has never seen a question",
        "an adapter learns to answer questions about a story",
        has_one_answer=True,
        sampling=SamplingSettings(max_new_tokens=_ANSWER_TOKENS, temperature=0.0),
    )


def _write_own_text(walk: Walk, out: Path, text: Path) -> DemoTask:
    with walk.part("read", f"{text} is cut into passages, the last tenth of which is held out"):
        documents = read_source_documents(DataConfig(sources=(str(text),)))
        corpus = write_passages(out / "text", documents.train)
    return DemoTask(
        corpus,
        "a GPT learns from nothing to continue your text",
        "an adapter learns to finish a passage from its first words, and to stop there",
        has_one_answer=False,
        sampling=SamplingSettings(max_new_tokens=3 * _ANSWER_TOKENS, temperature=0.7, top_k=50, seed=0),
    )


def _pretrain(walk: Walk, task: DemoTask, out: Path) -> Path:
    steps = walk.scale(_PRETRAINING_STEPS)
    config = PretrainConfig(
        gpt=GPTConfig(num_layers=2, num_heads=4, width=128, context=160),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=1280),
        data=DataConfig(sources=(str(task.corpus.text),), validation_fraction=0.02),
        training=TrainingConfig(
            learning_rate=5e-3,
            max_steps=steps,
            per_device_train_batch_size=8,
            warmup_steps=0.04,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            logging_steps=steps // 5,
            save_steps=steps,
        ),
    )
    with walk.part("pretrain", task.pretraining):
        return pretrain(config, out, callbacks=[ProgressCallback(walk.console)])


def _tune(walk: Walk, task: DemoTask, base: Path, out: Path) -> RunDir:
    steps = walk.scale(_TUNING_STEPS)
    config = ExperimentConfig(
        model=ModelConfig(name_or_path=str(base), dtype="float32"),
        data=DataConfig(sources=(str(task.corpus.rows),), eval_source=str(task.corpus.held_out), overlong="truncate"),
        adapter=LoRAConfig(r=16, lora_alpha=32, lora_dropout=0.0),
        training=TrainingConfig(
            learning_rate=4e-3,
            max_steps=steps,
            per_device_train_batch_size=8,  # Packed attention is quadratic in the rows that lie end to end.
            gradient_accumulation_steps=4,
            logging_steps=steps // 5,
            save_steps=steps,
        ),
        evaluation=EvaluationConfig(batch_size=8),
    )
    with walk.part("tune", task.tuning):
        return finetune(config, out, callbacks=[ProgressCallback(walk.console)])


def _merge(walk: Walk, run: RunDir) -> None:
    with walk.part("merge", "the adapter is added to the base's weights, and the sum checked to answer the same"):
        merge(run.path)
        walk.say(f"   {run.merged} is a plain Hugging Face folder")


def _ask(walk: Walk, task: DemoTask, base: Path, run: RunDir) -> None:
    tuned = load_bundle(run.merged)
    with walk.part("ask", "the base and the tuned model get the same prompts, none of them seen in training"):
        rows = _read_fitting_rows(task, tuned)
        prompts = [row["prompt"] for row in rows]
        # Both read a prompt in the form the adapter was trained on, so the weights are the only difference.
        before = _answer(replace(load_bundle(base), prompt_format=tuned.prompt_format), prompts, task)
        after = _answer(tuned, prompts, task)
        for row, *answers in list(zip(rows, before, after, strict=True))[:_NUM_SHOWN]:
            _show_answers(walk, row, *answers)
    right = [sum(map(_is_right, answers, rows)) for answers in (before, after)]
    _show_result(walk, run, [f"{count} of {len(rows)}" for count in right] if task.has_one_answer else None)


def _answer(bundle: ModelBundle, prompts: Sequence[str], task: DemoTask) -> list[str]:
    return TextGenerator(bundle).generate(prompts, settings=task.sampling, batch_size=50)


def _is_right(answer: str, row: dict[str, str]) -> bool:
    return answer.strip() == row["completion"]


def _show_answers(walk: Walk, row: dict[str, str], before: str, after: str) -> None:
    walk.say(f"\n{row['prompt']}")
    walk.say(f"   before: {_one_line(before)}")
    walk.say(f"   after:  {_one_line(after)}")


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines() if line.strip())


def _show_result(walk: Walk, run: RunDir, right: list[str] | None) -> None:
    losses = [record["eval_loss"] for record in MetricsLog(run.metrics).read() if "eval_loss" in record]
    numbers = [loss for loss in losses if isinstance(loss, float)]
    table = Table("on held-out rows", "before", "after")
    table.add_row("loss, nats a token", f"{numbers[0]:.3f}", f"{min(numbers):.3f}")
    if right:
        table.add_row("answers right to the letter", *right)
    walk.say()
    walk.console.print(table)
    parts = ", ".join(f"{title} {seconds:.0f} s" for title, seconds in walk.seconds.items())
    walk.say(f"{parts}; {sum(walk.seconds.values()):.0f} s in all")


def _suggest(walk: Walk, out: Path, task: DemoTask) -> None:
    example = out / "text" / "prompt.txt"
    example.write_text(_read_rows(task.corpus.held_out)[0]["prompt"], encoding="utf-8")
    base, tuned, prompt = (shlex.quote(str(path)) for path in (out / "base", out / "tuned", example))
    commands = {
        f'smolora generate {tuned} "$(cat {prompt})" --greedy': "ask the tuned model; change the file and ask again",
        f"smolora chat {base}": "let the base go on with your words",
        f"smolora train --model {base} --data YOUR.jsonl -o my-run": "another task: rows of prompt and completion",
        "smolora demo --text YOUR_FOLDER -o my-demo": "the same walk on your own text",
    }
    walk.say("\nWhat to try next:")
    for command, purpose in commands.items():
        walk.say(f"  {command}\n      {purpose}")


def _read_fitting_rows(task: DemoTask, bundle: ModelBundle) -> list[dict[str, str]]:
    """Return held-out rows whose prompts leave room for an answer."""
    generator = TextGenerator(bundle)
    room = (bundle.context or 0) - task.sampling.max_new_tokens
    rows = _read_rows(task.corpus.held_out)
    return [row for row in rows if generator.count_tokens(row["prompt"]) <= room]


def _read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
