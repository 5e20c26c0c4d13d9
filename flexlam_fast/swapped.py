"""The class that :mod:`flexlam_fast.accelerate` gives to an object of somebody else's, and what it changes."""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NamedTuple

from torch import nn


class Change(NamedTuple):
    """An attribute of a module, and its value before and after."""

    module: nn.Module
    name: str
    before: Any
    after: Any


class Plan(NamedTuple):
    """What a swapped class knows.

    ``asked`` is the backend that every call asks for: with ``auto``, a module that moves to another device goes on
    there. ``backend`` is what that was when it was swapped. ``levels`` are those of a quantizer.
    """

    original: type[nn.Module]
    asked: str
    backend: str
    levels: tuple[int, ...] = ()


class Swapped(nn.Module):
    """Stands in front of the original among the bases of a swapped class, with methods that take their place.

    All it knows on top is a class attribute, so that the object itself holds nothing new.
    """

    plan: ClassVar[Plan]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As the original class, so that whoever loads it needs no flexlam_fast. The form of protocol 1 goes with every
        # protocol; that of the later ones is refused for a class that is not the object's own.
        how: Any = super().__reduce_ex__(1)
        return how[0], tuple(self.plan.original if arg is type(self) else arg for arg in how[1]), *how[2:]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)  # a copy in this process stays accelerated
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin
