from __future__ import annotations

import os
import threading
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from smolora.adapters import merged_weights
from smolora.adapters.changes import LowRank
from smolora.adapters.merged_weights import Update, match_updates, write_merged_file
from smolora.errors import ModelError
from smolora.models.weight_files import read_stored_tensors

MIB = 1 << 20


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def update_of(inputs, outputs, *, scaling=0.5, is_transposed=False):
    return Update(LowRank(draw(2, inputs, seed=1), draw(outputs, 2, seed=2), scaling), is_transposed)


def unchecked(*_):
    """Take a merged tensor as it is."""


def test_an_update_is_scaling_times_b_a():
    weight, update = draw(3, 5), update_of(5, 3)
    expected = weight + 0.5 * torch.einsum("or,ri->oi", update.change.b, update.change.a)
    torch.testing.assert_close(update.apply(weight), expected)


def test_a_transposed_weight_gets_the_transposed_update():
    weight, update = draw(4, 4), update_of(4, 4)
    transposed = Update(update.change, is_transposed=True)
    # A product across rounds otherwise than one along, on some processors.
    torch.testing.assert_close(transposed.apply(weight.T.contiguous()), update.apply(weight).T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_weight_is_added_to_in_float32_and_rounded_once(dtype):
    weight, update = draw(8, 8, dtype=dtype), update_of(8, 8, scaling=1e-2)
    merged = update.apply(weight)
    assert merged.dtype == dtype
    assert torch.equal(merged, (weight.float() + 1e-2 * (update.change.b @ update.change.a)).to(dtype))


def test_a_merged_file_differs_in_the_updated_tensors_only(tmp_path):
    tensors = {"a.weight": draw(6, 4), "b.weight": draw(3, 3, dtype=torch.bfloat16), "steps": torch.tensor(7)}
    save_file(tensors, tmp_path / "in", metadata={"format": "pt"})
    update = update_of(4, 6)
    write_merged_file(tmp_path / "in", tmp_path / "out", {"a.weight": update}, unchecked)
    merged = load_file(tmp_path / "out")
    assert torch.equal(merged["a.weight"], update.apply(tensors["a.weight"]))
    assert torch.equal(merged["b.weight"], tensors["b.weight"])
    assert torch.equal(merged["steps"], tensors["steps"])
    header = 8 + int.from_bytes((tmp_path / "in").read_bytes()[:8], "little")
    assert (tmp_path / "in").read_bytes()[:header] == (tmp_path / "out").read_bytes()[:header]


def test_a_tensor_can_go_under_a_second_name_behind_all_others(tmp_path):
    tensors = {"a.weight": draw(6, 4, dtype=torch.bfloat16), "b.weight": draw(3, 3)}
    save_file(tensors, tmp_path / "in", metadata={"format": "pt"})
    first, update = read_stored_tensors(tmp_path / "in")[0], update_of(4, 6)
    shared = next(tensor for tensor in read_stored_tensors(tmp_path / "in") if tensor.name == "a.weight")
    matched = match_updates({"h.weight": update}, read_stored_tensors(tmp_path / "in"), {"h.weight": "a.weight"})
    assert matched == {"h.weight": (update, shared)}
    write_merged_file(tmp_path / "in", tmp_path / "out", {"h.weight": update}, unchecked, {"h.weight": shared})
    merged = load_file(tmp_path / "out")
    assert merged.keys() == {"a.weight", "b.weight", "h.weight"}
    assert torch.equal(merged["h.weight"], update.apply(tensors["a.weight"]))
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())
    assert read_stored_tensors(tmp_path / "out")[0].name == first.name
    assert read_stored_tensors(tmp_path / "out")[-1].name == "h.weight"


def test_the_bytes_of_a_tensor_are_copied_once_on_their_way(tmp_path):
    names = [f"{number}.weight" for number in range(32)]
    save_file({name: torch.zeros(512, 512) for name in names}, tmp_path / "in")
    updates = {name: update_of(512, 512) for name in names[::2]}
    tracemalloc.start()
    write_merged_file(tmp_path / "in", tmp_path / "out", updates, unchecked)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out").stat().st_size > 32 * MIB
    assert peak < 5 * MIB  # Tensors are of one MiB each, and never Python's bytes as a whole.


def test_what_was_written_is_read_back_for_the_check(tmp_path):
    weight, update, seen = draw(6, 4, dtype=torch.bfloat16), update_of(4, 6), []
    save_file({"a.weight": weight, "b.weight": draw(3, 3)}, tmp_path / "in")
    write_merged_file(tmp_path / "in", tmp_path / "out", {"a.weight": update}, lambda *values: seen.append(values))
    [(name, checked, base, merged)] = seen
    assert (name, checked) == ("a.weight", update)
    assert torch.equal(base, weight)
    assert torch.equal(merged, load_file(tmp_path / "out")["a.weight"])


def test_a_merged_tensor_that_reads_back_as_something_else_is_what_the_check_gets(tmp_path, monkeypatch):
    target, update, read, seen = tmp_path / "out", update_of(4, 6), merged_weights._read, []
    save_file({"a.weight": draw(6, 4)}, tmp_path / "in")

    def read_what_was_damaged(reader, tensor):
        if tensor.file == target:
            with target.open("r+b") as file:
                file.seek(tensor.end - 4)
                file.write(bytes(4))
        return read(reader, tensor)

    monkeypatch.setattr(merged_weights, "_read", read_what_was_damaged)
    write_merged_file(tmp_path / "in", target, {"a.weight": update}, lambda *values: seen.append(values))
    [(_, _, base, merged)] = seen
    assert merged[-1, -1] == 0 != update.apply(base)[-1, -1]


def test_two_tensors_are_merged_side_by_side(tmp_path):
    both = threading.Barrier(2, timeout=60)
    save_file({"a.weight": draw(6, 4), "b.weight": draw(6, 4)}, tmp_path / "in")
    updates = dict.fromkeys(("a.weight", "b.weight"), update_of(4, 6))
    write_merged_file(tmp_path / "in", tmp_path / "out", updates, lambda *_: both.wait())


def test_a_base_that_is_cut_meanwhile_ends_the_merge(tmp_path):
    source = tmp_path / "in"
    save_file({"a.weight": draw(6, 4), "b.weight": draw(6, 4), "c.weight": draw(3, 3)}, source)

    class Cutting:
        def apply(self, weight):
            os.truncate(source, source.stat().st_size - 1)
            return weight

    updates = {"a.weight": Update(Cutting()), "b.weight": Update(Cutting()), "c.weight": update_of(3, 3)}
    with pytest.raises(ModelError, match=r"c\.weight ends before its last byte"):
        write_merged_file(source, tmp_path / "out", updates, unchecked)


def test_a_check_that_raises_ends_the_merge_soon(tmp_path):
    names = [f"{number:02}.weight" for number in range(60)]
    save_file({name: draw(4, 4) for name in names}, tmp_path / "in")
    checked = []

    def refuse_the_first(name, *_):
        checked.append(name)
        time.sleep(0.01)
        if name == names[0]:
            raise ModelError(name)

    with pytest.raises(ModelError, match=r"00\.weight"):
        write_merged_file(tmp_path / "in", tmp_path / "out", dict.fromkeys(names, update_of(4, 4)), refuse_the_first)
    assert len(checked) < 30


def test_a_copied_tensor_that_reads_back_as_something_else_ends_the_merge(tmp_path, monkeypatch):
    source, target, compare = tmp_path / "in", tmp_path / "out", merged_weights._compare
    save_file({"a.weight": draw(6, 4), "b.weight": draw(3, 3)}, source)

    def compare_what_was_damaged(base, tensor, reader, place):
        with target.open("r+b") as file:
            file.seek(place.end - 1)
            file.write(bytes([source.read_bytes()[tensor.end - 1] ^ 1]))
        compare(base, tensor, reader, place)

    monkeypatch.setattr(merged_weights, "_compare", compare_what_was_damaged)
    with pytest.raises(ModelError, match=r"b\.weight was copied, and reads back as something else"):
        write_merged_file(source, target, {"a.weight": update_of(4, 6)}, unchecked)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_both_threads_share_those_of_torch_and_give_them_back(tmp_path, num_threads):
    def refuse(*_):
        counts.append(torch.get_num_threads())
        raise ModelError("no")

    save_file({"a.weight": draw(6, 4)}, tmp_path / "in")
    counts, before = [], torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with pytest.raises(ModelError, match="no"):
            write_merged_file(tmp_path / "in", tmp_path / "out", {"a.weight": update_of(4, 6)}, refuse)
        assert counts == [max(1, num_threads // 2)]
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)


def test_an_update_finds_its_tensor_also_without_the_first_part_of_its_name(tmp_path):
    save_file({"h.0.c_attn.weight": draw(4, 4), "h.10.c_attn.weight": draw(4, 4)}, tmp_path / "in")
    stored = read_stored_tensors(tmp_path / "in")
    assert list(match_updates({"transformer.h.0.c_attn.weight": update_of(4, 4)}, stored)) == ["h.0.c_attn.weight"]
    with pytest.raises(ModelError, match=r"hold no transformer\.h\.1\.c_attn\.weight"):
        match_updates({"transformer.h.1.c_attn.weight": update_of(4, 4)}, stored)


def test_a_quantised_tensor_is_refused(tmp_path):
    save_file({"a.weight": torch.zeros(4, 4, dtype=torch.uint8)}, tmp_path / "in")
    with pytest.raises(ModelError, match="stored as U8"):
        match_updates({"a.weight": update_of(4, 4)}, read_stored_tensors(tmp_path / "in"))
