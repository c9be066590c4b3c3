"""The public surface: exactly these names, each real, and none of them costs anything before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import smolora
from smolora import errors

PROMISED = {
    # The class, and rows
    "SmoLoRA",
    "PEFTTrainer",
    "COMMON_DATASETS",
    "prepare_dataset",
    "load_text_data",
    "DatasetHandler",
    "read_txt_folder",
    "read_jsonl",
    "read_csv",
    "chunk_texts",
    "load_dataset_from_hub",
    "DatasetPipeline",
    "TextClassificationPreprocessor",
    "QuestionAnsweringPreprocessor",
    "TokenClassificationPreprocessor",
    "Seq2SeqPreprocessor",
    "TextCleaningProcessor",
    "DataPreprocessor",
    "get_preprocessor",
    "get_data_collator",
    "TextDataset",
    # The machine
    "DeviceManager",
    "MemoryManager",
    # Configuration
    "LoRAConfig",
    "PEFTConfig",
    "ATTENTION_ONLY",
    "MLP_ONLY",
    "BOTH",
    "ModelConfig",
    "TrainingConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "GPTConfig",
    "TokenizerConfig",
    "PretrainConfig",
    "DynamicLoRAConfig",
    "PhaseConfig",
    "PRESETS",
    # Models
    "ModelRegistry",
    "ModelBundle",
    "load_bundle",
    "GPTModel",
    "TransformerBlock",
    "MultiHeadAttention",
    "FeedForward",
    "CharTokenizer",
    "BPETokenizer",
    "BaseModelWrapper",
    "PEFTModelWrapper",
    "setup_model_with_lora",
    "print_trainable_parameters",
    # Training
    "Trainer",
    "Callback",
    "EarlyStoppingCallback",
    "get_scheduler",
    "AdaptiveLRStrategy",
    "EarlyStoppingStrategy",
    "TrainingStrategy",
    "TensorBoardCallback",
    "TrackioCallback",
    "WandBCallback",
    "MLflowCallback",
    # Seeing inside, and steering
    "measure_gradient_norms",
    "optimize_for_dataset_size",
    "GradientNormCallback",
    "GradientNormLog",
    "GradientMeasuringTrainer",
    "to_trainer_callback",
    "DynamicLoRACallback",
    "create_phased_lora_config",
    "create_layerwise_lora_config",
    # Asking
    "TextGenerator",
    "InferencePipeline",
    "SamplingSettings",
    # Proving it
    "DatasetType",
    "load_and_preprocess_dataset",
    "compute_metrics",
    "MetricsCalculator",
    "get_metrics_calculator",
    "ModelEvaluator",
    "EvaluationResult",
    "evaluate_e2e",
    "evaluate_samsum",
    "evaluate_wikisql",
    "evaluate_multi_nli",
    # Looking at runs
    "plot_training_loss",
    "plot_gradient_norms",
    "plot_layer_heatmap",
    "plot_layer_comparison",
    "plot_gradient_evolution",
    "generate_summary_report",
    # Errors
    "SmoloraError",
    "ConfigError",
    "DataError",
    "FailedElsewhere",
    "ModelError",
    "StorageError",
    "BrokenRunError",
    "FolderInUseError",
    "StoppedBySignal",
}


def test_the_public_names_are_exactly_the_promised_ones():
    assert set(smolora.__all__) == PROMISED
    assert sorted(smolora.__all__) == smolora.__all__


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_every_public_name_resolves(name):
    assert smolora.__dict__.get(name, smolora.__getattr__(name)) is not None
    assert name in dir(smolora)


def test_type_checkers_see_the_same_homes_as_the_interpreter():
    tree = ast.parse(Path(smolora.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == smolora._HOMES


def test_every_error_is_public():
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds <= set(smolora.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'smolora' has no attribute 'SmolLora'"):
        smolora.SmolLora  # noqa: B018


HEAVY = "torch", "transformers", "datasets", "peft", "accelerate", "numpy", "matplotlib"


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import smolora", (*HEAVY, "pydantic", "yaml")),
        ("from smolora import SmoLoRA; SmoLoRA('m', 'd.jsonl')", HEAVY),
        ("import smolora.config, smolora.errors, smolora.records.run_dir", HEAVY),
        ("import smolora.cli", (*HEAVY, "pydantic")),
        (
            "from smolora.cli.app import run; sys.stdout = sys.stderr; run(['--help']); sys.stdout = sys.__stdout__",
            (*HEAVY, "pydantic", "markdown_it", "pygments"),
        ),
        ("import smolora.runtime.console", HEAVY),
        ("import smolora.recipes.prepare", ("torch", "transformers", "datasets", "peft", "accelerate")),
        ("import smolora.recipes.finetune, smolora.recipes.pretrain", ("datasets", "pandas")),
        ("from smolora import generate_summary_report", ("torch", "matplotlib")),
        ("from smolora import plot_training_loss", ("torch", "transformers", "matplotlib.pyplot")),
        ("import smolora.recipes.report", ("torch", "matplotlib")),
        ("from smolora import PEFTTrainer; PEFTTrainer('m').evaluate", HEAVY),
        ("from smolora import COMMON_DATASETS", ("torch", "transformers", "datasets")),
        ("from smolora import compute_metrics", ("torch", "transformers", "datasets")),
        ("from smolora import WandBCallback", ("wandb", "mlflow", "trackio", "tensorboard", "transformers")),
        ("from smolora import get_metrics_calculator", ("torch", "transformers", "datasets")),
    ],
)
def test_importing_loads_nothing_heavy(statement, unwanted):
    loaded = f"print([name for name in {unwanted!r} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; {statement}; {loaded}"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
