"""The walk as one class: fine-tune, merge, load, ask. Each body is a recipe that the command line calls too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.config import DataConfig, ExperimentConfig, ModelConfig, TrainingConfig
from smolora.errors import ConfigError, ModelError
from smolora.records.run_dir import RunDir

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from smolora.generation.text_generator import TextGenerator
    from smolora.training.callback import Callback


class SmoLoRA:
    """Fine-tunes a language model with LoRA, merges it and asks it.

    Example:
        trainer = SmoLoRA("path/or/hub-id", "data.jsonl", output_dir="./out")
        trainer.train()  # 500 steps; the adapter is in out/adapter_checkpoint
        trainer.save()  # the merged model is in out/final_merged
        model, tokenizer = trainer.load_model("./out/final_merged")
        print(trainer.inference("Once upon a time"))

    Attributes:
        config: Every setting of the run. Frozen: assign a changed copy before `train`, such as
            `trainer.config.replace(training=TrainingConfig(max_steps=100))`.
    """

    def __init__(
        self,
        base_model_name: str,
        dataset_name: str,
        text_field: str = "text",
        output_dir: str = "./fine_tuned_model",
    ) -> None:
        """Name what the run is made of; nothing is read before it is needed.

        Args:
            base_model_name: A model folder, a run or a hub id.
            dataset_name: A txt, csv, jsonl, json or parquet file, a folder of them, or a hub id. Columns such as prompt
                and completion are recognised.
            text_field: The column of plain text.
            output_dir: Folder of the run.
        """
        self.dataset_name = dataset_name
        self.text_field = text_field
        self.output_dir = Path(output_dir)
        # "text" is recognised by itself; insisting on it would refuse rows of prompts and completions.
        data = DataConfig(sources=(str(dataset_name),), text_field=None if text_field == "text" else text_field)
        self.config = ExperimentConfig(
            model=ModelConfig(name_or_path=str(base_model_name)), data=data, training=TrainingConfig(max_steps=500)
        )
        self._run = RunDir(self.output_dir)
        self._dataset: Dataset | None = None
        self._replacement: Dataset | None = None
        self._generator: TextGenerator | None = None

    @property
    def adapter_checkpoint(self) -> Path:
        """Where `train` writes the adapter."""
        return self._run.adapter

    @property
    def merged_model_path(self) -> Path:
        """Where `save` writes the merged model."""
        return self._run.merged

    @property
    def dataset(self) -> Dataset:
        """The rows to train on. Assign a `datasets.Dataset`, or a list of dicts, to train on that instead."""
        if self._replacement is not None:
            return self._replacement
        if self._dataset is None:
            from smolora.data.sources import prepare_dataset

            self._dataset = prepare_dataset(self.dataset_name, text_field=self.text_field)
        return self._dataset

    @dataset.setter
    def dataset(self, rows: Dataset | Iterable[Mapping[str, object]]) -> None:
        from smolora.data.sources import as_dataset

        self._replacement = as_dataset(rows)

    def train(self, *, resume: bool = False, callbacks: Sequence[Callback] | None = None) -> None:
        """Fine-tune the base model and write the adapter.

        Args:
            resume: Go on from the newest checkpoint of an earlier run in `output_dir`.
            callbacks: Listeners of the loop. Left out, a progress line on stderr.

        Raises:
            ConfigError: `output_dir` holds a run already.
        """
        from smolora.recipes.finetune import finetune
        from smolora.runtime.console import stderr_console
        from smolora.training.callbacks import ProgressCallback

        if RunDir.is_run(self.output_dir) and not resume:
            raise ConfigError(
                f"{self.output_dir} already holds a run. Continue it with train(resume=True), choose another "
                f"output_dir, or ask what it trained: inference(...) or load_model('{self.output_dir}')."
            )
        listeners = [ProgressCallback(stderr_console())] if callbacks is None else callbacks
        finetune(self.config, self.output_dir, resume=resume, callbacks=listeners, dataset=self._replacement)
        self._generator = None

    def save(self) -> None:
        """Merge the adapter into the base, check that the merged model answers the same, and write it.

        Raises:
            ModelError: There is no adapter yet.
            ConfigError: The merged model exists already.
        """
        if not self.adapter_checkpoint.is_dir():
            raise ModelError(f"there is nothing to save: {self.output_dir} holds no adapter. Call train() first.")
        from smolora.recipes.merge import merge

        merge(self.output_dir)

    def load_model(self, path: str | Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """Open a model folder, an adapter, a run or a hub id, ask it from now on, and return model and tokenizer.

        Raises:
            ModelError: There is no such model.
        """
        from smolora.adapters.store import open_model
        from smolora.generation.text_generator import TextGenerator

        self._generator = TextGenerator(open_model(str(path)))
        return self._generator.bundle.model, self._generator.bundle.tokenizer

    def inference(
        self, prompt: str, max_new_tokens: int = 200, do_sample: bool = True, temperature: float = 1.0
    ) -> str:
        """Return the answer, without the prompt, of the model loaded last, else of what was trained.

        Raises:
            ModelError: Nothing was trained or loaded.
            DataError: The prompt leaves no room in the model's context.
        """
        from smolora.generation.sampling import SamplingSettings

        settings = SamplingSettings(max_new_tokens=max_new_tokens, temperature=temperature if do_sample else 0.0)
        return self._open_generator().generate(prompt, settings=settings)[0]

    def _open_generator(self) -> TextGenerator:
        if self._generator is None:
            if not self.adapter_checkpoint.is_dir():
                raise ModelError(
                    f"there is no model to ask: {self.output_dir} holds no adapter. "
                    "Call train() or load_model(path) first."
                )
            self.load_model(self.output_dir)
        assert self._generator is not None
        return self._generator
