"""Changes to a model that are taken back whatever happens: attributes of its modules, and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

_HOOK_FLAGS = ("with_kwargs", "always_called")


class Changes:
    """What was changed. What undoes a change is noted before it is made: an interrupt finds all or nothing."""

    def __init__(self):
        self._made: list[_Attribute | _Hook] = []

    def set(self, owner: object, name: str, value: object) -> None:
        """Change an attribute of one instance."""
        self._made.append(_Attribute(owner, name, vars(owner).get(name, _Missing)))
        setattr(owner, name, value)

    def hook(self, module: nn.Module, kind: str, function, **options) -> None:
        """Register a hook, ``forward_pre`` or ``forward``."""
        self._made.append(_Hook(module, kind, function))
        getattr(module, f"register_{kind}_hook")(function, **options)

    def undo(self) -> None:
        """Take everything back, the last first; harmless where something is back already."""
        while self._made:
            self._made[-1].undo()
            self._made.pop()


@contextmanager
def passing_changes() -> Iterator[Changes]:
    """Changes that are taken back at the end, an interrupt of the taking back included."""
    changes = Changes()
    try:
        yield changes
        changes.undo()
    except BaseException:  # out of memory, Ctrl-C
        changes.undo()
        raise


class _Missing:
    """What an attribute was before that was not there; a class, as copies and pickles of it are itself."""


@dataclass(frozen=True)
class _Attribute:
    owner: object
    name: str
    before: object

    def undo(self) -> None:
        if self.before is not _Missing:
            setattr(self.owner, self.name, self.before)
        elif self.name in vars(self.owner):
            delattr(self.owner, self.name)


@dataclass(frozen=True)
class _Hook:
    module: nn.Module
    kind: str
    function: object

    def undo(self) -> None:
        hooks = getattr(self.module, f"_{self.kind}_hooks")
        flags = [getattr(self.module, f"_{self.kind}_hooks_{name}", {}) for name in _HOOK_FLAGS]
        for number in [number for number, function in hooks.items() if function is self.function]:
            for of_module in (*flags, hooks):  # by the last it is found again after an interrupt
                of_module.pop(number, None)
