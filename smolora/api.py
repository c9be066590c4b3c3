"""The walk as a class, and tuning on rows in memory as another. Each body is a recipe that is there without it too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smolora.config import AdapterConfig, DataConfig, ExperimentConfig, ModelConfig, TrainingConfig
from smolora.errors import ConfigError, ModelError
from smolora.records.run_dir import RunDir

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from smolora.data.memory_rows import MemoryRows
    from smolora.data.preprocessor import DataPreprocessor
    from smolora.generation.text_generator import TextGenerator
    from smolora.models.bundle import ModelBundle
    from smolora.training.callback import Callback
    from smolora.training.strategies import TrainingStrategy


class SmoLoRA:
    """Fine-tunes a language model with LoRA, merges it and asks it.

    Example:
        ```python
        trainer = SmoLoRA("path/or/hub-id", "data.jsonl", output_dir="./out")
        trainer.train()  # 500 steps; the adapter is in out/adapter_checkpoint
        trainer.save()  # the merged model is in out/final_merged
        model, tokenizer = trainer.load_model("./out/final_merged")
        print(trainer.inference("Once upon a time"))
        ```

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
            dataset_name: A txt, csv, jsonl, json, parquet or arrow file, a folder of them, or a hub id. Columns such as
                prompt and completion are recognised.
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
        from smolora.data.memory_rows import as_dataset

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

        Of several processes the main one does, and the others wait for it.

        Raises:
            ModelError: There is no adapter yet.
            ConfigError: The merged model exists already.
        """
        from smolora.recipes.merge import merge
        from smolora.runtime.device import resolve_device
        from smolora.training.processes import run_in_main

        def merge_adapter() -> None:
            if not self.adapter_checkpoint.is_dir():
                raise ModelError(f"there is nothing to save: {self.output_dir} holds no adapter. Call train() first.")
            merge(self.output_dir)

        run_in_main(merge_adapter, resolve_device(self.config.model.device).device)

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


class PEFTTrainer:
    """Tunes a model by any method on any task, on rows in memory or on those that its configuration names.

    Example:
        ```python
        from smolora.config import DoRAConfig

        rows = [{"prompt": "The sky is", "completion": "blue"}, {"prompt": "Snow is", "completion": "white"}]
        trainer = PEFTTrainer(ModelConfig(name_or_path="path/or/hub-id"), DoRAConfig(r=4), output_dir="./tuned")
        trainer.train(rows, rows[:1])  # what is held out may be left out; datasets do as well
        print(trainer.evaluate())
        trainer.save()
        ```

    Attributes:
        config: Every setting of the run. Frozen: assign a changed copy before `train`.
        run: The run's folder.
    """

    def __init__(
        self,
        model: str | ModelConfig | ExperimentConfig,
        adapter: AdapterConfig | None = None,
        training: TrainingConfig | None = None,
        *,
        output_dir: str | Path = "./peft_run",
        strategy: TrainingStrategy | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        """Name what the run is made of; nothing is read before it is needed.

        Args:
            model: The base, and what it is asked (`ModelConfig.task_type`); or a whole configuration.
            adapter: The method. Left out, that of the whole configuration, else LoRA.
            training: The loop. Left out, that of the whole configuration, else the defaults.
            output_dir: Folder of the run.
            strategy: A learning-rate curve and listeners.
            callbacks: Listeners of the loop.
        """
        if isinstance(model, str):
            model = ModelConfig(name_or_path=model)
        config = model if isinstance(model, ExperimentConfig) else ExperimentConfig(model=model)
        given = {"adapter": adapter, "training": training}
        self.config: ExperimentConfig = config.replace(**{name: part for name, part in given.items() if part})
        self.run = RunDir(output_dir)
        self.strategy = strategy
        self.callbacks = tuple(callbacks)
        self._memory: MemoryRows | None = None

    def train(
        self,
        dataset: Dataset | Iterable[Mapping[str, object]] | None = None,
        eval_dataset: Dataset | Iterable[Mapping[str, object]] | None = None,
        preprocessor: DataPreprocessor | None = None,
        *,
        resume: bool = False,
    ) -> RunDir:
        """Tune the model, and return the run's folder with the adapter in it.

        Args:
            dataset: Rows to learn from. Left out, those that `config.data` names.
            eval_dataset: Rows to evaluate on, beside `dataset`. Left out, some of its own are held out.
            preprocessor: One of `get_preprocessor`, or of your own: it encodes the rows, from the columns of its form.
                Left out, the task's own, from the columns that the rows have.
            resume: Go on from the newest checkpoint of an earlier run in `output_dir`.

        Raises:
            ConfigError: `output_dir` holds a run already.
            DataError: Rows are missing, rejected or too long, or don't fit the task.
            ModelError: The model can't be loaded.
            BrokenRunError: The run can't have learned.
        """
        from smolora.data.memory_rows import MemoryRows, as_dataset
        from smolora.recipes.finetune import finetune

        learned, held_out = (None if rows is None else as_dataset(rows) for rows in (dataset, eval_dataset))
        self._memory = MemoryRows(learned, held_out, preprocessor)
        return finetune(
            _name_columns(self.config, preprocessor),
            self.run.path,
            resume=resume,
            callbacks=self.callbacks,
            dataset=learned,
            eval_dataset=held_out,
            preprocessor=preprocessor,
            strategy=self.strategy,
        )

    def evaluate(self, dataset: Dataset | Iterable[Mapping[str, object]] | None = None) -> dict[str, float]:
        """Return the tuned model's loss and the metrics of its task, on `dataset` or on what the run held out.

        A classifier has accuracy and f1, a language model perplexity and token_accuracy. `smolora evaluate` has more.

        Raises:
            ModelError: Nothing was trained.
            DataError: There are no rows to evaluate on.
        """
        from smolora.data.memory_rows import FROM_SOURCES, as_dataset
        from smolora.recipes.measure import measure

        self._require_trained()
        rows = None if dataset is None else as_dataset(dataset)
        memory = self._memory or FROM_SOURCES
        config = _name_columns(self.config, memory.preprocessor)
        return measure(config, self.run.path, memory=memory, dataset=rows)

    def save(self) -> Path:
        """Merge the adapter into the base, check that the merged model answers the same, and return its folder.

        Where all of the model was trained, the run has that folder already. Of several processes the main one merges,
        and the others wait for it.

        Raises:
            ModelError: Nothing was trained, or the base can't take the adapter.
            ConfigError: The merged model exists already.
        """
        from smolora.recipes.merge import merge
        from smolora.runtime.device import resolve_device
        from smolora.training.processes import run_in_main

        def merge_adapter() -> Path:
            self._require_trained()
            return self.run.model if self.run.model.is_dir() else Path(merge(self.run.path).out)

        return run_in_main(merge_adapter, resolve_device(self.config.model.device).device)

    def load(self) -> ModelBundle:
        """Open what was trained, for asking.

        Raises:
            ModelError: Nothing was trained.
        """
        from smolora.adapters.store import open_model

        self._require_trained()
        return open_model(self.run.path, device=self.config.model.device)

    def _require_trained(self) -> None:
        if not (self.run.adapter.is_dir() or self.run.model.is_dir()):
            raise ModelError(f"{self.run.path} holds nothing that was trained. Call train(...) first.")


def _name_columns(config: ExperimentConfig, preprocessor: DataPreprocessor | None) -> ExperimentConfig:
    """Return `config` with the columns of a preprocessor's form, where they have settings and none is set."""
    if preprocessor is None:
        return config
    fields = {f"{role}_field": column for role, column in preprocessor.fmt.columns.items()}
    known = {name: column for name, column in fields.items() if name in DataConfig.model_fields}
    changed: ExperimentConfig = config.replace(
        data=config.data.replace(**{**known, **config.data.model_dump(exclude_unset=True)})
    )
    return changed
