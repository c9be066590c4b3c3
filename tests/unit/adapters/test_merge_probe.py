from __future__ import annotations

import pytest
import torch

from smolora.adapters.changes import find_changes
from smolora.adapters.merge import merge_adapter
from smolora.adapters.merge_probe import LogitProof, Widened, probe_adapter, verify_merged
from smolora.adapters.merged_weights import Update
from smolora.errors import ModelError
from smolora.models.loading import load_model
from tests.tiny import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_computed_in_float32_and_stays_as_it_is(save_pair, family, dtype):
    base, adapter = save_pair(family, base={"dtype": dtype}, r=4, lora_alpha=8)
    narrow, probe = probe_adapter(load_model(base), adapter)
    _, expected = probe_adapter(load_model(base, dtype=torch.float32), adapter)
    assert probe.effect > 0.1
    assert narrow.dtype == dtype
    # Gemma rounds a constant of its own to the weights' type (3e-4 here); computing in that type costs 100 times that.
    torch.testing.assert_close(probe.logits, expected.logits, atol=1e-3, rtol=0)


def test_a_model_that_asks_for_the_type_of_its_weights_hears_float32():
    weight = torch.ones(2, 2, dtype=torch.bfloat16)
    with Widened():
        assert torch.ones(1).to(weight.dtype).dtype == weight.dtype == (weight @ weight).dtype == torch.float32
        assert weight.shape == (2, 2)
    assert weight.dtype == torch.bfloat16


def test_a_merged_model_that_is_not_the_adapter_s_is_noticed(save_pair):
    base, adapter = save_pair(r=4, lora_alpha=8)
    _, probe = probe_adapter(load_model(base), adapter)
    with pytest.raises(ModelError, match="the merged model isn't the adapter's"):
        verify_merged(load_model(base), probe, [torch.float32])


def test_a_merged_model_is_the_adapter_s_up_to_rounding(save_pair, tmp_path):
    base, adapter = save_pair(r=4, lora_alpha=8)
    merge_adapter(adapter, tmp_path / "out")
    _, probe = probe_adapter(load_model(base), adapter)
    difference, tolerance = verify_merged(load_model(tmp_path / "out"), probe, [torch.float32])
    assert 0 <= difference <= tolerance < 1e-3


def test_a_row_of_an_embedding_that_no_token_of_the_probe_reads_is_proved_too(save_peft_pair):
    base, adapter = save_peft_pair(target_modules=["embed_tokens"])
    bundle = load_model(base)
    weight = bundle.model.get_input_embeddings().weight.detach()
    adapted, probe = probe_adapter(bundle, adapter)
    name = "model.embed_tokens.weight"
    update = Update(find_changes(adapted.model)[name])
    unread = next(token for token in range(len(weight)) if token not in probe.input_ids)
    merged = update.apply(weight)
    LogitProof(probe, torch.float32).check(name, update, weight, merged)
    merged[unread] = weight[unread]
    with pytest.raises(ModelError, match=r"embed_tokens\.weight merged isn't base and adapter"):
        LogitProof(probe, torch.float32).check(name, update, weight, merged)
