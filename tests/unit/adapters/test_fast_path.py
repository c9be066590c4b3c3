"""The fast path gives the numbers of plain transformers and peft, in every family and part by part, then goes."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.testing import assert_close

import smolora.adapters.fast_path
from smolora.adapters.attach import attach_adapter
from smolora.adapters.fast_path import fast_path
from smolora.adapters.lora_product import why_not_fast
from smolora.config import FullConfig, LoRAConfig, PromptTuningConfig, SpeedConfig, TrainingConfig
from smolora.data.collate import collate_packed
from smolora.data.token_dataset import TokenDataset, build_example
from smolora.models.fused_ops import TORCH_KERNELS
from smolora.models.liger import load_kernels
from smolora.models.loading import load_model
from smolora.models.rows import Rows
from smolora.training.activations import recomputed_activations
from smolora.training.trainer import Trainer
from tests.packed_runs import LENGTHS, adapted, assert_same, run, run_fast
from tests.tiny import PACKABLE_FAMILIES, random_input_ids, save_tiny_model, tiny_bundle

ALL_OFF = SpeedConfig(row_attention=False, fused_lora=False, fused_blocks=False, packed_weights=False)
WIDE = {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "initializer_range": 0.15}
ON_ATTENTION = LoRAConfig(lora_dropout=0.0, target_modules="attention_only")
PARTS = ("row_attention", "fused_lora", "fused_blocks", "packed_weights")


@pytest.mark.parametrize("family", PACKABLE_FAMILIES)
def test_logits_and_gradients_are_the_plain_ones(family, tmp_path):
    bundle = adapted(family, tmp_path)
    expected = run(bundle, by_rows=False)
    found = run_fast(bundle)
    assert "fused LoRA" in found[2].used
    assert_same(found, expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_switched_off_alone(family, part, tmp_path):
    bundle = adapted(family, tmp_path)
    assert_same(run_fast(bundle, SpeedConfig(**{part: False})), run(bundle, by_rows=False))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2"])
def test_in_bfloat16_logits_and_gradients_are_as_near_to_float32_as_those_of_plain_code(family, tmp_path):
    exact, exact_gradients = run(adapted(family, tmp_path / "exact"), by_rows=False)
    bundle = adapted(family, tmp_path / "half", dtype=torch.bfloat16)
    plain, plain_gradients = run(bundle, by_rows=False)
    fast, fast_gradients, _ = run_fast(bundle)
    assert (fast - exact).square().mean() < 1.5 * (plain - exact).square().mean()

    def error(found):
        return sum(
            (found[name] - right).square().sum() / right.square().sum() for name, right in exact_gradients.items()
        )

    assert error(fast_gradients) < 1.5 * error(plain_gradients)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_is_left_behind(family, tmp_path):
    bundle = adapted(family, tmp_path)
    before = run(bundle, by_rows=False)
    implementation = bundle.model.config._attn_implementation
    run_fast(bundle)
    after = run(bundle, by_rows=False)
    assert torch.equal(before[0], after[0])
    assert bundle.model.config._attn_implementation == implementation
    assert not [name for name, module in bundle.model.named_modules() if "forward" in vars(module)]


def test_with_every_part_off_nothing_is_replaced(tmp_path):
    *_, parts = run_fast(adapted("llama", tmp_path), ALL_OFF)
    assert parts.used == []


@pytest.mark.parametrize("targets", ["attention_only", "mlp_only", ("q_proj",), ("k_proj", "down_proj")])
def test_layers_without_an_adapter_join_the_others(targets, tmp_path):
    bundle = adapted("llama", tmp_path, config=LoRAConfig(lora_dropout=0.0, target_modules=targets))
    assert_same(run_fast(bundle), run(bundle, by_rows=False))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "bias"), ({"use_rslora": True}, None)],
)
def test_variants_of_lora_are_fast_and_right_or_plain_with_the_reason(extra, reason, tmp_path):
    base = tiny_bundle("qwen2", tmp_path)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **extra)
    bundle = replace(base, model=peft.get_peft_model(base.model, config))
    *found, parts = run_fast(bundle)
    assert_same(found, run(bundle, by_rows=False))
    assert (reason is None) == ("is more than LoRA" not in parts.describe() and "has a bias" not in parts.describe())
    assert reason is None or reason.lower() in parts.describe().lower()


def test_without_lora_what_is_fast_is_not_named_after_it(tmp_path):
    bundle = attach_adapter(tiny_bundle("llama", tmp_path), PromptTuningConfig(num_virtual_tokens=2), seed=0)
    with fast_path(bundle, SpeedConfig(), is_packed=False) as parts:
        assert "linear layers as single functions" in parts.used
        assert "fused LoRA" not in parts.used


def test_a_base_that_will_be_sharded_keeps_plain_linear_layers(tmp_path):
    bundle = adapted("llama", tmp_path)
    with fast_path(bundle, SpeedConfig(), is_packed=True, is_sharded=True) as parts:
        assert parts.used == ["row attention", "fused norms"]
        assert "linear layers, since the base is sharded" in parts.describe()


def test_two_active_adapters_stay_plain(tmp_path):
    base = tiny_bundle("llama", tmp_path)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base.model, config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    bundle = replace(base, model=model)
    *found, parts = run_fast(bundle)
    assert "2 adapters are active, and one is needed" in parts.describe()
    assert_same(found, run(bundle, by_rows=False))


def with_two_adapters(folder):
    """A tiny llama with `default`, which is on, and `second`: on layers of both, and on layers of each alone."""
    config = LoRAConfig(lora_dropout=0.0, target_modules=("q_proj", "k_proj", "up_proj", "down_proj"))
    bundle = adapted("llama", folder, config=config)
    second = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["v_proj", "gate_proj", "down_proj"], init_lora_weights=False
    )
    bundle.model.add_adapter("second", second)
    return bundle


def test_of_two_adapters_the_active_one_is_fast_and_right(tmp_path):
    bundle = with_two_adapters(tmp_path)
    found = {}
    for name in ("default", "second"):
        bundle.model.set_adapter(name)
        *found[name], parts = run_fast(bundle)
        assert parts.left == []
        assert_same(found[name], run(bundle, by_rows=False))
        assert all(f".{name}." in parameter for parameter in found[name][1])
    assert (found["default"][0] - found["second"][0]).abs().max() > 1e-2


def test_an_adapter_that_is_switched_to_inside_the_block_is_fast_and_right(tmp_path, caplog):
    bundle = with_two_adapters(tmp_path)
    expected = {}
    for name in ("second", "default"):
        bundle.model.set_adapter(name)
        expected[name] = run(bundle, by_rows=False)
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        for name in ("default", "second", "default"):
            bundle.model.set_adapter(name)
            assert_same(run(bundle, by_rows=True), expected[name])
    assert not caplog.text


def test_a_scale_that_is_changed_inside_the_block_is_followed(tmp_path):
    bundle = with_two_adapters(tmp_path)
    layers = [module for module in bundle.model.modules() if isinstance(module, LoraLayer)]
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        before = run(bundle, by_rows=True)[0]
        for layer in layers:
            layer.scale_layer(3.0)
        found = run(bundle, by_rows=True)
    assert_same(found, run(bundle, by_rows=False))
    assert (found[0] - before).abs().max() > 1e-2


def test_a_switch_between_forward_and_backward_leaves_the_gradients_of_the_forward_pass(tmp_path):
    bundle = with_two_adapters(tmp_path)
    _, expected = run(bundle, by_rows=False)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    inputs = {"input_ids": random_input_ids(sum(LENGTHS)), "position_ids": positions, "use_cache": False}
    bundle.model.zero_grad()
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        rows = Rows(LENGTHS, torch.device("cpu"))
        first = bundle.model(**inputs, rows=rows).logits
        bundle.model.set_adapter("second")
        with torch.no_grad():
            bundle.model(**inputs, rows=rows)
        for name, parameter in bundle.model.named_parameters():
            parameter.requires_grad_(".default." in name)  # Which the switch took from it.
        first.square().mean().backward()
    found = {name: p.grad for name, p in bundle.model.named_parameters() if p.grad is not None}
    assert_same((first.detach(), found), (first.detach(), expected))


@contextmanager
def switched(model, state):
    if state == "disabled":
        with model.disable_adapter():
            yield
    elif state == "merged":
        model.merge_adapter()
        yield
        model.unmerge_adapter()
    else:
        model.base_model.set_adapter(["default", "second"])
        yield
        model.set_adapter("default")


@pytest.mark.parametrize(
    ("state", "reason"), [("disabled", "switched off"), ("merged", "merged"), ("both on", "2 adapters are active")]
)
def test_while_an_adapter_is_as_no_product_computes_it_layers_are_plain_and_say_why(tmp_path, caplog, state, reason):
    bundle = with_two_adapters(tmp_path) if state == "both on" else adapted("llama", tmp_path)
    inputs = {"input_ids": random_input_ids(20), "use_cache": False}
    before = run(bundle, by_rows=False)
    with torch.no_grad(), switched(bundle.model, state):
        expected = bundle.model(**inputs).logits
    with fast_path(bundle, SpeedConfig(), is_packed=True):
        with torch.no_grad(), switched(bundle.model, state):
            found = bundle.model(**inputs, rows=Rows([20], torch.device("cpu"))).logits
        assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
        bundle.model.set_adapter("default")
        assert_same(run(bundle, by_rows=True), before)
    assert caplog.text.count("layers leave the fast path") == 1
    assert reason in caplog.text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_matrices_get_no_gradient_and_the_backward_pass_stops_at_the_lowest_trained_layer(family, tmp_path):
    bundle = adapted(family, tmp_path)
    for name, parameter in bundle.model.named_parameters():
        parameter.requires_grad_("lora_A" in name and ".1." in name)
    expected = run(bundle, by_rows=False)
    first = next(module for name, module in bundle.model.named_modules() if name.endswith(("layers.0", "h.0")))
    outputs = []
    with first.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)):
        found = run_fast(bundle)
    assert_same(found, expected)
    assert all("lora_A" in name and ".1." in name for name in found[1])
    assert not any(output.requires_grad for output in outputs)


def test_with_recomputed_activations_the_gradients_are_the_same(tmp_path):
    bundle = adapted("llama", tmp_path)
    expected = run(bundle, by_rows=False)
    bundle.model.train()
    with recomputed_activations(bundle.model):
        assert_same(run_fast(bundle), expected)


def test_a_model_whose_probe_differs_stays_plain_and_says_so(tmp_path, caplog):
    bundle = adapted("llama", tmp_path)
    bundle.model.config.rms_norm_eps = 1.0  # The modules keep their own 1e-6: a profile that no longer fits.
    bundle.model.get_base_model().config.rms_norm_eps = 1.0
    expected = run(bundle, by_rows=False)
    *found, parts = run_fast(bundle)
    assert parts.used == []
    assert "logits differ" in caplog.text
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_that_magnify_every_rounding_keep_the_fast_path(tmp_path, dtype):
    bundle = adapted("llama", tmp_path, dtype=dtype, **WIDE)
    with fast_path(bundle, SpeedConfig(), is_packed=True) as parts:
        assert parts.used == ["row attention", "fused blocks", "fused LoRA"]


def test_padded_batches_keep_plain_attention(tmp_path):
    bundle = adapted("opt", tmp_path)
    with fast_path(bundle, SpeedConfig(), is_packed=False) as parts:
        assert "row attention" not in parts.used
        assert "padded" in parts.describe()


def test_a_run_with_dropout_is_the_same_bits_twice(tmp_path):
    draw = torch.Generator().manual_seed(0)
    rows = TokenDataset(
        [build_example(torch.randint(1, 288, (n,), generator=draw).tolist(), [(3, n)]) for n in range(8, 40)]
    )
    config = TrainingConfig(max_steps=6, learning_rate=1e-2)

    def train(folder):
        bundle = attach_adapter(tiny_bundle("llama", folder), LoRAConfig(lora_dropout=0.1), seed=0)
        with fast_path(bundle, SpeedConfig(), is_packed=True):
            Trainer(bundle, rows, config, collate=collate_packed).train()
        return {name: p.detach().clone() for name, p in bundle.model.named_parameters() if p.requires_grad}

    first, second = train(tmp_path / "a"), train(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("part", [SpeedConfig(), SpeedConfig(fused_blocks=False)], ids=["blocks", "interface"])
def test_a_sliding_window_shorter_than_the_rows_is_kept(tmp_path, part):
    bundle = adapted("mistral", tmp_path, sliding_window=8)
    assert_same(run_fast(bundle, part), run(bundle, by_rows=False))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("phimoe", {"sliding_window": 8}),
        ("qwen2_moe", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_a_window_that_only_the_mask_knows_is_kept(family, settings, tmp_path):
    bundle = adapted(family, tmp_path, config=ON_ATTENTION, **settings)
    *found, parts = run_fast(bundle)
    assert "row attention" in parts.used
    assert_same(found, run(bundle, by_rows=False))


def test_attention_in_chunks_is_kept_and_stays_plain(tmp_path):
    bundle = adapted("llama4_text", tmp_path, config=ON_ATTENTION, attention_chunk_size=8)
    *found, parts = run_fast(bundle)
    assert "windows and no chunks, and these are of 8 tokens" in parts.describe()
    assert_same(found, run(bundle, by_rows=False))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("stablelm", "attention, which transformers can't replace in 'stablelm'"),
        ("nemotron", "the model doesn't tell its attention where rows begin"),
        ("granitemoe_swa", "attention by rows takes no mask, no cap on scores and no sinks"),
        ("minicpm3", "attention by rows needs values as wide as keys: 8 and 16 are not"),
    ],
)
def test_where_attention_alone_cannot_go_by_rows_the_other_parts_stay(family, reason, tmp_path, caplog):
    bundle = adapted(family, tmp_path, config=ON_ATTENTION)
    *found, parts = run_fast(bundle)
    assert parts.used == ["fused LoRA"]
    assert reason in parts.describe()
    assert not caplog.text
    assert_same(found, run(bundle, by_rows=False))


@pytest.mark.parametrize("part", [SpeedConfig(), SpeedConfig(fused_blocks=False)], ids=["blocks", "interface"])
def test_attention_dropout_drops_in_training_alone(tmp_path, part):
    bundle = adapted("llama", tmp_path, attention_dropout=0.5)
    assert_same(run_fast(bundle, part), run(bundle, by_rows=False))
    plain = run(bundle, by_rows=False)
    bundle.model.train()
    torch.manual_seed(0)
    dropped = run_fast(bundle, part)
    assert (dropped[0] - plain[0]).abs().max() > 1e-2


def test_an_attention_dropout_of_0_may_be_an_integer(tmp_path):
    bundle = adapted("llama", tmp_path, attention_dropout=0)
    *found, parts = run_fast(bundle)
    assert "fused blocks" in parts.used
    assert_same(found, run(bundle, by_rows=False))


def test_a_merged_adapter_is_not_added_twice(tmp_path):
    bundle = adapted("qwen2", tmp_path)
    bundle.model.merge_adapter()
    for parameter in bundle.model.parameters():
        parameter.requires_grad_(True)
    assert_same(run_fast(bundle), run(bundle, by_rows=False))


@pytest.mark.parametrize("kind", ["biases", "norms"])
def test_what_isnt_a_frozen_base_under_one_adapter_is_plain_and_right(tmp_path, kind):
    bundle = adapted("qwen2", tmp_path)
    for name, parameter in bundle.model.named_parameters():
        is_trained = (kind == "biases" and name.endswith("bias")) or (kind == "norms" and "norm" in name)
        parameter.requires_grad_(parameter.requires_grad or is_trained)
    assert_same(run_fast(bundle), run(bundle, by_rows=False))


def test_norms_that_are_trained_are_plain_and_not_called_fused(tmp_path):
    bundle = attach_adapter(tiny_bundle("llama", tmp_path), FullConfig(), seed=0)
    *_, parts = run_fast(bundle)
    assert parts.used == ["row attention"]
    assert "norms are trained (5 layers)" in parts.left


def test_a_model_that_cannot_be_probed_stays_plain_and_says_why(tmp_path, caplog):
    bundle = adapted("gpt2", tmp_path, n_positions=5)  # The probe reads 7 tokens a row.
    with fast_path(bundle, SpeedConfig(), is_packed=True) as parts:
        assert parts.used == []
        assert "IndexError" in parts.describe()
    assert "the fast path is off" in caplog.text


def test_a_trained_head_is_named_as_what_it_is(tmp_path):
    base = load_model(save_tiny_model("llama", tmp_path), task="classification", labels=("no", "yes"))
    with fast_path(attach_adapter(base, LoRAConfig(), seed=0), SpeedConfig(), is_packed=False) as parts:
        assert "a head that is trained whole (1 layer)" in parts.left


def test_a_linear_layer_with_a_forward_of_its_own_is_left_alone(tmp_path):
    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    assert why_not_fast(Router(4, 4).requires_grad_(False)) == "Router isn't a plain linear layer"
    assert why_not_fast(torch.nn.Linear(4, 4).requires_grad_(False)) is None


def test_recomputed_activations_are_not_kept(tmp_path):
    bundle = adapted("llama", tmp_path)
    bundle.model.train()

    def kept_bytes():
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t)
        lengths = (60, 60)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        rows = Rows(lengths, torch.device("cpu"))
        with hooks:
            output = bundle.model(
                input_ids=random_input_ids(120), position_ids=positions, use_cache=False, rows=rows
            ).logits
        assert output.requires_grad
        return sum(sizes)

    with fast_path(bundle, SpeedConfig(), is_packed=True):
        plain = kept_bytes()
        with recomputed_activations(bundle.model):
            recomputed = kept_bytes()
    assert recomputed < plain / 2


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_with_ligers_kernels_logits_and_gradients_are_the_plain_ones(family, tmp_path, liger_device, monkeypatch):
    monkeypatch.setattr(smolora.adapters.fast_path, "choose_kernels", lambda device, dtype: (load_kernels(), None))
    bundle = adapted(family, tmp_path)
    bundle.model.to(liger_device)
    expected = run(bundle, by_rows=False)
    found = run_fast(bundle)
    assert "fused blocks with Liger's kernels" in found[2].used
    assert_same(found, expected)


def test_why_ligers_kernels_are_left_is_recorded(tmp_path, monkeypatch):
    reason = "Liger's kernels, which aren't installed"
    monkeypatch.setattr(smolora.adapters.fast_path, "choose_kernels", lambda device, dtype: (TORCH_KERNELS, reason))
    with fast_path(adapted("llama", tmp_path), SpeedConfig(), is_packed=True) as parts:
        assert parts.describe().endswith(f"; plain: {reason}")
