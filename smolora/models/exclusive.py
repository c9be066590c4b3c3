"""One user of a model at a time: an adapter that is switched, or a forward that is replaced, is so for every thread."""

from __future__ import annotations

from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

_locks: WeakKeyDictionary[nn.Module, Lock] = WeakKeyDictionary()
_making = Lock()


def lock_of(model: nn.Module) -> Lock:
    """Return the lock to hold while anything is put on `model`; it is not re-entrant."""
    with _making:
        return _locks.setdefault(model, Lock())
