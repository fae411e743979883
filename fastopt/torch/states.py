"""`States` and `State`: what `Optimizer.state` holds, dicts that report when an entry is replaced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastopt.torch.memory import device_of


class Mark:
    """Whether somebody has replaced an entry of a state since it was last read."""

    __slots__ = ("changed",)

    def __init__(self) -> None:
        self.changed = False


def _reporting(name: str) -> Callable[..., Any]:
    """A method of dict that reports the change."""
    method = getattr(dict, name)

    def changing(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.mark.changed = True
        return method(self, *args, **kwargs)

    changing.__name__ = name
    return changing


CHANGING = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")


class State(dict[str, Any]):
    """The state of one parameter: a dict of tensors, which are views of flat buffers."""

    def __init__(self, *args: Any, mark: Mark | None = None):
        super().__init__(*args)
        self.mark = Mark() if mark is None else mark

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class States(defaultdict[Any, Any]):
    """The states of all parameters."""

    def __init__(self, entries: Mapping[Any, Any], mark: Mark):
        super().__init__(None)
        self.mark = mark
        for key, entry in entries.items():
            dict.__setitem__(self, key, State(entry, mark=mark) if isinstance(entry, Mapping) else entry)

    def __missing__(self, key: Any) -> State:
        entry = State(mark=self.mark)
        dict.__setitem__(self, key, entry)
        return entry

    def show(self, key: Any, entry: Mapping[str, Any]) -> None:
        """Put tensors of ours into the state of a parameter, without a report."""
        own = self[key]
        if not isinstance(own, State):
            own = State(own, mark=self.mark)
            dict.__setitem__(self, key, own)
        dict.update(own, entry)

    def plain(self) -> dict[Any, Any]:
        """The same as ordinary dicts, to be saved."""
        return {key: dict(entry) if isinstance(entry, State) else entry for key, entry in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self.plain(),)


for _kind in (State, States):
    for _name in CHANGING:
        setattr(_kind, _name, _reporting(_name))


def one_buffer(tensors: Sequence[Any], like: Sequence[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor | None:
    """The buffer of which all these tensors are views, if they lie in it as those of `like` lie in `buffer`; else None.

    A state that was unpickled, deep-copied or moved to shared memory is used where it is, so that it stays shared.
    """
    first = tensors[0] if tensors else None
    if not isinstance(first, torch.Tensor):
        return None
    storage = first.untyped_storage()
    if storage.nbytes() < buffer.numel() * buffer.itemsize or storage.data_ptr() % 64:
        return None
    for tensor, own in zip(tensors, like, strict=True):
        if (
            not isinstance(tensor, torch.Tensor)
            or tensor.dtype is not own.dtype
            or device_of(tensor) != device_of(own)
            or tensor.shape != own.shape
            or tensor.stride() != own.stride()
            or tensor.storage_offset() != own.storage_offset()
            or tensor.untyped_storage().data_ptr() != storage.data_ptr()
        ):
            return None
    empty = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
    return empty.set_(storage, 0, buffer.shape, buffer.stride())
