"""`smolora pretrain`: from text to a small GPT in a Hugging Face folder, its tokenizer learned from the same text."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from smolora.config import PretrainConfig
from smolora.data.collate import collate_windows
from smolora.data.encoding import encode_texts, get_eos_id
from smolora.data.ledger import DataReport
from smolora.data.overlap import measure_shared_text
from smolora.data.sources import Documents, check_sources, read_source_documents
from smolora.data.token_dataset import TextDataset, TokenArray
from smolora.errors import BrokenRunError, count_of
from smolora.models.building import build_gpt
from smolora.models.bundle import ModelBundle
from smolora.models.frozen_linear import goes_by_onednn
from smolora.models.gpt import GPTModel
from smolora.models.mixed_precision import mixed_precision
from smolora.models.trained_linear import linears_by_onednn
from smolora.recipes.report import leave_report
from smolora.recipes.run_folder import (
    choose_callbacks,
    fingerprint_settings,
    recorded_run,
    refuse_unmeasurable,
    restore_best,
    settle_config,
)
from smolora.records.run_dir import RunDir
from smolora.records.staging import replaced_folder
from smolora.runtime.device import has_native_bfloat16, resolve_device
from smolora.runtime.memory import keep_large_blocks
from smolora.runtime.seeding import permutation
from smolora.tokenizers.bpe import BPETokenizer
from smolora.tokenizers.char import CharTokenizer
from smolora.tokenizers.pretrained import fingerprint_tokenizer, to_pretrained
from smolora.training.callback import Callback
from smolora.training.callbacks import EvaluationTimeCallback
from smolora.training.checkpoint import RunIdentity, require_one_identity
from smolora.training.plan import StepPlan
from smolora.training.processes import join_processes
from smolora.training.sharding import require_shardable
from smolora.training.state import TrainerState
from smolora.training.trainer import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BETAS = (0.9, 0.99)
"""AdamW's decay rates: squares are forgotten ten times sooner than by default, which suits short runs from nothing."""

_MUCH_SHARED = 0.2
"""Of two files of one program's code a tenth is shared."""

_LINE_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


def pretrain(config: PretrainConfig, out: Path, *, resume: bool = False, callbacks: Sequence[Callback] = ()) -> Path:
    """Train a tokenizer and a GPT on the text of `config.data`; return the model's folder, `out/model`.

    Raises:
        ConfigError: A run is in `out` and `resume` isn't set, or a setting changed that a checkpoint depends on.
        DataError: The text is missing or too short.
        BrokenRunError: The run can't have learned, or hasn't and `config.evaluation.require` is set.
        FailedElsewhere: Another process of the run failed.
    """
    run = RunDir(out)
    processes = join_processes(resolve_device(config.device).device)
    with processes.together():
        asked = config
        config = processes.from_main(lambda: settle_config(run, asked, resume=resume, num_processes=processes.count))
        pretraining = open_pretraining(config, out if processes.is_main else None, processes.count)
        require_one_identity(processes.gather_values(pretraining.identity))
        bundle = pretraining.bundle
        require_shardable(bundle, processes)
        with ExitStack() as stack:
            assert isinstance(bundle.model, GPTModel), "a pretraining run trains a GPTModel"
            if config.dtype == "bfloat16":
                stack.enter_context(mixed_precision(bundle.model))
            elif goes_by_onednn(next(bundle.model.parameters())):
                stack.enter_context(linears_by_onednn(bundle.model))
            if processes.is_main:
                stack.enter_context(_recorded_pretraining(run, config, pretraining, resume=resume))
            trainer = Trainer(
                bundle,
                pretraining.train,
                config.training,
                collate=collate_windows,
                eval_dataset=pretraining.held_out,
                evaluation=config.evaluation,
                run_dir=run,
                identity=pretraining.identity,
                callbacks=choose_callbacks(
                    run, config, [*callbacks, EvaluationTimeCallback()], is_main=processes.is_main
                ),
                betas=_BETAS,
                plan=pretraining.steps,
                processes=processes,
            )
            state = trainer.train(resume=resume)
            processes.from_main(lambda: _finish(run, config, bundle, state))
    return run.model


@dataclass(frozen=True)
class Pretraining:
    """A run that is ready but for its folder."""

    bundle: ModelBundle
    train: TextDataset
    held_out: TextDataset | None
    report: DataReport
    steps: StepPlan
    identity: RunIdentity
    machine: dict[str, str]
    """What env.json says of how the run computes."""


def open_pretraining(config: PretrainConfig, out: Path | None = None, num_processes: int = 1) -> Pretraining:
    """Read the text, train the tokenizer and build the model: all that a run does before its folder is made.

    Args:
        config: The whole run.
        out: Where rejected rows are written; left out, they aren't.
        num_processes: How many share the run.

    Raises:
        ConfigError, DataError: As `pretrain`.
    """
    allocator = keep_large_blocks()
    device, reason = resolve_device(config.device)
    check_sources(config.data)
    read = read_source_documents(config.data, out=out)
    logger.info("device: %s (%s); products: %s", device, reason, _describe_precision(config, device))
    documents, tokenizer, held_out = _split_documents(read, config)
    _warn_of_shared_text(documents)
    train = _build_train_windows(config, documents, tokenizer)
    refuse_unmeasurable(config, is_evaluated=held_out is not None)
    bundle = build_gpt(config.gpt, tokenizer, seed=config.training.seed, device=device)
    _report_split(documents)
    logger.info("text: %s", _describe_text(config, documents, train, held_out))
    logger.info("model: %s parameters, vocabulary %s", f"{bundle.num_parameters:,}", f"{len(tokenizer):,}")
    identity = RunIdentity(
        base=bundle.fingerprint,
        tokenizer=fingerprint_tokenizer(tokenizer),
        data=train.fingerprint,
        held_out=held_out.fingerprint if held_out else "",
        settings=fingerprint_settings(config),
    )
    machine = {
        "device": f"{device} ({reason})",
        "dtype": config.dtype,
        "allocator": allocator,
        "processes": str(num_processes),
    }
    steps = StepPlan(len(train), config.training, num_processes)
    return Pretraining(bundle, train, held_out, documents.report, steps, identity, machine)


def _describe_precision(config: PretrainConfig, device: torch.device) -> str:
    is_native = has_native_bfloat16(device)
    if config.dtype == "bfloat16":
        return "bfloat16, beside float32 weights" if is_native else "bfloat16, which isn't native here"
    return "float32 (--dtype bfloat16 is native here)" if is_native else "float32"


@contextmanager
def _recorded_pretraining(
    run: RunDir, config: PretrainConfig, pretraining: Pretraining, *, resume: bool
) -> Iterator[None]:
    steps, identity, machine = pretraining.steps, pretraining.identity, pretraining.machine
    with recorded_run(run, config, resume=resume, steps=steps, identity=identity, machine=machine):
        pretraining.report.write(run.path)
        yield


def _finish(run: RunDir, config: PretrainConfig, bundle: ModelBundle, state: TrainerState) -> None:
    """Leave the best weights and the report; raise where the run was to learn, and has not."""
    restore_best(run, bundle, state)
    _save_model(run, bundle)
    leave_report(run)
    if config.evaluation.require and not state.has_improved:
        raise BrokenRunError(
            f"the held-out loss never fell below its start, and evaluation.require={config.evaluation.require}. "
            f"The run is kept in {run.path}."
        )


def _warn_of_shared_text(documents: Documents) -> None:
    """Say how much of the text that is held out stands in what is learned, where that is much."""
    share = measure_shared_text(documents.train, documents.held_out)
    if share > _MUCH_SHARED:
        words = "%.0f %% of the held-out text is learned too, line by line: a low held-out loss proves little"
        logger.warning(words, 100 * share)


def _split_documents(
    documents: Documents, config: PretrainConfig
) -> tuple[Documents, PreTrainedTokenizerBase, TextDataset | None]:
    """Return the text, a tokenizer trained on what is learned of it, and windows to evaluate on.

    Text that would be held out and is too short for a window is learned.
    """
    is_split = not documents.held_out and bool(config.data.validation_fraction and config.data.max_validation_rows)
    for candidate in [_hold_out(documents, config), documents] if is_split else [documents]:
        tokenizer = _train_tokenizer(config, candidate)
        if held_out := _build_held_out_windows(config, candidate, tokenizer):
            return candidate, tokenizer, held_out
    return documents, tokenizer, None


def _hold_out(documents: Documents, config: PretrainConfig) -> Documents:
    """Hold out `validation_fraction` of the text: whole documents where some come near that, else one document's end.

    That one is the longest, and its beginning is learned last, without an end: no other text ends where it wasn't to.
    """
    share, texts = config.data.validation_fraction, documents.train
    total = sum(map(len, texts))
    length = total - int(total * (1 - share))
    order = permutation(len(texts), config.evaluation.choose_split_seed(config.training.seed), "held out").tolist()
    chosen = {*[index for index in order if len(texts[index]) <= length][: int(share * len(texts))]}
    if sum(len(texts[index]) for index in chosen) < length / 2:
        chosen = {max(range(len(texts)), key=lambda index: len(texts[index]))}
    kept = [text for index, text in enumerate(texts) if index not in chosen]
    held_out = [texts[index] for index in sorted(chosen)]
    is_cut = len(held_out) == 1 and len(held_out[0]) > length
    if is_cut:
        kept.append(held_out[0][:-length])
        held_out = [held_out[0][-length:]]
    return Documents(kept, held_out, documents.report, is_cut=is_cut)


def _report_split(documents: Documents) -> None:
    """Enter what is learned and what is held out, which was chosen after the report was closed, and say it."""
    report = documents.report
    report.train, report.ends_held_out = len(documents.train), int(documents.is_cut)
    report.held_out = len(documents.held_out) - report.ends_held_out
    report.check()
    logger.info("%s", report.describe())


def _train_tokenizer(config: PretrainConfig, documents: Documents) -> PreTrainedTokenizerBase:
    if config.tokenizer.kind == "char":
        return to_pretrained(CharTokenizer.train(documents.train), config.gpt.context)
    size, length = config.tokenizer.vocab_size, sum(map(len, documents.train))
    logger.info("learning a tokenizer of up to %s tokens from %s characters", f"{size:,}", f"{length:,}")
    return to_pretrained(BPETokenizer(size).train(documents.train), config.gpt.context)


def _build_train_windows(
    config: PretrainConfig, documents: Documents, tokenizer: PreTrainedTokenizerBase
) -> TextDataset:
    """Return windows to learn from.

    With `max_steps` a window may start at any token, so no two passes cut the text alike; an epoch is each token once.
    """
    context = config.gpt.context
    stride = 1 if config.training.max_steps else context
    return TextDataset(_encode_documents(documents.train, tokenizer, is_cut=documents.is_cut), context, stride)


def _build_held_out_windows(
    config: PretrainConfig, documents: Documents, tokenizer: PreTrainedTokenizerBase
) -> TextDataset | None:
    """Return windows to evaluate on; None where the text isn't longer than one, or none are wanted."""
    context, bound = config.gpt.context, config.data.max_validation_rows
    tokens = _encode_documents(documents.held_out, tokenizer)
    if len(tokens) <= context or not bound:
        return None
    # Bounded as rows are: windows spread over the whole held-out text, each as long as a training one.
    return TextDataset(tokens, context, max(context, math.ceil(len(tokens) / bound)))


def _encode_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, is_cut: bool = False) -> TokenArray:
    """Return all documents as one run of tokens, each ended by end-of-text but a last one that is cut.

    A single text has no end to learn.
    """
    if not texts:
        return np.empty(0, dtype=np.int32)
    end = [get_eos_id(tokenizer)] if len(texts) > 1 else []
    parts = [ids for text in texts for ids in (*encode_texts(split_at_lines(text), tokenizer), end)]
    return np.concatenate([np.array(ids, dtype=np.int32) for ids in (parts[:-1] if is_cut else parts)])


def split_at_lines(text: str, length: int = 4096) -> list[str]:
    r"""Return `text` in pieces of about `length` characters that become the same tokens as the whole.

    A text of a megabyte takes the tokenizers library four times as long in one piece. The tokenizers of a pretraining
    run never join a line break to a letter after it, so a piece may end at a break between two characters that aren't
    white space.

    >>> split_at_lines("ab\ncd\n\nef\n", length=1)
    ['ab\n', 'cd\n\nef\n']
    """
    cuts = [0]
    for match in _LINE_BREAK.finditer(text):
        if match.end() - cuts[-1] >= length:
            cuts.append(match.end())
    return [text[start:end] for start, end in itertools.pairwise([*cuts, len(text)])]


def _describe_text(
    config: PretrainConfig, documents: Documents, train: TextDataset, held_out: TextDataset | None
) -> str:
    count = len(documents.train)
    known = f"{count_of(count, 'document')}, {len(train.tokens):,} tokens to learn from"
    if held_out:
        return f"{known}, {len(held_out.tokens):,} held out"
    if not config.data.max_validation_rows or not (documents.held_out or config.data.validation_fraction):
        return f"{known}, none held out"
    window = f"no longer than a window of {config.gpt.context} tokens"
    if documents.held_out:
        return f"{known}, none evaluated: the held-out text is {window}"
    share = f"{100 * config.data.validation_fraction:g} %"
    return f"{known}, none held out: {share} of them are {window}. Name other text with data.eval_source (--eval-data)"


def _save_model(run: RunDir, bundle: ModelBundle) -> None:
    assert isinstance(bundle.model, GPTModel), "a pretraining run trains a GPTModel"
    with replaced_folder(run.model) as staging:
        bundle.model.save_pretrained(staging, eos_token_id=bundle.tokenizer.eos_token_id)
        bundle.tokenizer.save_pretrained(staging)
