"""Shards the frozen base of a run over its processes (FSDP2): each keeps a part of every layer, and has a layer whole
only while it computes with it.

What is trained stays whole in every process. So gradients, optimiser, phases and checkpoints are those of any run, and
a process differs in one thing: it can't run the model alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import distributed, nn

from smolora.adapters.attach import is_adapted, plain_model
from smolora.data.collate import Batch
from smolora.errors import ConfigError
from smolora.models.bundle import ModelBundle
from smolora.training.processes import Processes

logger = logging.getLogger(__name__)


def require_shardable(bundle: ModelBundle, processes: Processes) -> None:
    """Raise where the processes are to shard a base that isn't frozen, or not in numbers that can be split.

    Raises:
        ConfigError: So it is.
    """
    if not processes.is_sharding:
        return
    advice = "or leave FSDP out, and every process holds the whole model."
    if not is_adapted(bundle):
        raise ConfigError(
            "FSDP shards a frozen base, and here all of the model is trained. Train an adapter "
            f"(adapter.method=lora), {advice}"
        )
    if bundle.quantization != "none":
        raise ConfigError(f"FSDP can't shard a base in {bundle.quantization}. Set model.quantization=none, {advice}")


@contextmanager
def sharded_base(bundle: ModelBundle, trained: Collection[nn.Parameter], processes: Processes) -> Iterator[None]:
    """Keep a part of the base's layers inside the block, where the processes are to shard it; all come and go together.

    Embeddings, head, norms and biases stay whole, and so does what is trained. After an error the base stays sharded.

    Args:
        bundle: An adapted model.
        trained: All that the run will ever train, frozen at the moment or not.
        processes: Those that share the run.

    Raises:
        ConfigError: The base can't be sharded.
        FailedElsewhere: Another process failed.
    """
    require_shardable(bundle, processes)
    if not processes.is_sharding:
        yield
        return
    group = processes.open_group()
    before, after = _shard(bundle, trained, group)
    logger.info("the base is sharded: this process keeps %.1f of its layers' %.1f MiB", after / 2**20, before / 2**20)
    with warnings.catch_warnings():
        # A layer whose output is a view, as GPT-2's: the warning is of changing it in place, which no family does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield
    processes.gather()  # One that failed says so here.
    make_whole(bundle, processes)
    distributed.destroy_process_group(group)


def make_whole(bundle: ModelBundle, processes: Processes) -> None:
    """Give every process the whole base back; all call this together."""
    if not processes.is_sharding:
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    for layer in _layers(bundle):
        assert isinstance(layer, FSDPModule), "the base is sharded"
        shards = [parameter.to_local() for parameter in layer.parameters() if isinstance(parameter, DTensor)]
        layer.unshard()
        for shard in shards:  # Never needed again, while they would last as long as the model.
            shard.untyped_storage().resize_(0)
    for stack in _stacks(bundle):
        _forget(stack)


def keep_company(batch: Batch) -> Batch:
    """Return a batch for a pass that counts nothing, made since others make one: the same rows without a target."""
    return replace(batch, targets=batch.targets[:0], num_input_tokens=0)


def _shard(bundle: ModelBundle, trained: Collection[nn.Parameter], group: distributed.ProcessGroup) -> tuple[int, int]:
    """Shard the matrices of every layer that nothing trains; return the layers' bytes before and after."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    before = _count_bytes(bundle)
    mesh = DeviceMesh.from_group(group, bundle.device.type)
    for layer in _layers(bundle):
        parameters = set(layer.parameters())
        kept = {parameter for parameter in parameters if parameter.ndim < 2} | (parameters & set(trained))
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    for stack in _stacks(bundle):  # So that one layer is fetched while another computes.
        fully_shard(stack, mesh=mesh, ignored_params=set(stack.parameters()))
    return before, _count_bytes(bundle)


def _forget(stack: nn.Module) -> None:
    """Take FSDP off again, for which torch has no way: at the next `state_dict()` it would shard again."""
    from torch.distributed.fsdp import FSDPModule

    for module in stack.modules():
        for hooks in [table for name, table in vars(module).items() if name.endswith("_hooks")]:
            for key in [key for key, hook in hooks.items() if _is_of_fsdp(hook)]:
                del hooks[key]
        if isinstance(module, FSDPModule):
            _, module.__class__ = type(module).__bases__  # fully_shard made a class of FSDPModule and its own.


def _is_of_fsdp(hook: object) -> bool:
    return str(hook.__module__).startswith("torch.distributed.fsdp.")


def _count_bytes(bundle: ModelBundle) -> int:
    """Return the bytes of the layers' parameters that this process keeps."""
    from torch.distributed.tensor import DTensor

    parameters = [parameter for layer in _layers(bundle) for parameter in layer.parameters()]
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parameters)


def _layers(bundle: ModelBundle) -> list[nn.Module]:
    return bundle.anatomy.blocks_of(_plain(bundle))


def _stacks(bundle: ModelBundle) -> list[nn.Module]:
    """Return the modules that run the layers one after the other."""
    return [_plain(bundle).get_submodule(path.rpartition(".")[0]) for path in bundle.anatomy.blocks]


def _plain(bundle: ModelBundle) -> nn.Module:
    model: nn.Module | None = plain_model(bundle)
    assert model is not None, "an adapted model is one of transformers'"
    return model
