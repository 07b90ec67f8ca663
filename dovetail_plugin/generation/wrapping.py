"""Wraps functions of other libraries so that this can be undone, whoever else wraps the same functions.

A wrapper passes calls on while it is switched on and is transparent otherwise, so a wrapper that somebody else has
wrapped in turn can stay where it is. What is in effect is read from the functions themselves, not from a list kept
here: it survives a reload of this package, and it notices when another library has put back what it had found.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

MARK = "__dovetail__"
"""Attribute of our wrappers: their `Switch`."""

MOST_FUNCTIONS = 200
"""Functions that are looked at behind one place."""

Place = tuple[Any, str]
"""A class or module, and the name of a function in it."""


class Switch:
    """Turns a wrapper off without removing it.

    Attributes:
        owner: class of drafts that the wrapper serves; each imported copy of the package has its own.
        place: what it wraps.
        on: whether it does anything.
        wrapper: the function itself, because `functools.wraps` copies our mark to wrappers of others.
    """

    def __init__(self, owner: type, place: Place) -> None:
        self.owner, self.place, self.on = owner, place, True
        self.wrapper: Callable[..., Any] | None = None

    @property
    def is_stale(self) -> bool:
        """Whether the module of the owner was imported again, so that its classes are no longer those of the module."""
        return getattr(sys.modules.get(self.owner.__module__), self.owner.__qualname__, None) is not self.owner


def install(place: Place, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], owner: type) -> None:
    """Wrap the function at a place, unless a wrapper of this owner is in effect there.

    Wrappers that are off, and those of copies of the package that were imported again, are removed where they are
    outermost.

    Args:
        place: what to wrap.
        wrap: takes the original and returns what is called in its place, with the same arguments.
        owner: see `Switch`.
    """
    for switch in _switches(place):
        switch.on = switch.on and not switch.is_stale
    _peel(place)
    if in_effect(place, owner):
        return
    holder, name = _holder(place), place[1]
    original = getattr(holder, name)
    for earlier in _installed:  # behind somebody's wrapper in which it cannot be found
        earlier.on = earlier.on and (earlier.owner, earlier.place) != (owner, place)
    replaced, switch = wrap(original), Switch(owner, place)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return (replaced if switch.on else original)(*args, **kwargs)

    setattr(wrapper, MARK, switch)
    switch.wrapper = wrapper
    setattr(holder, name, wrapper)
    _installed.append(switch)


def uninstall(place: Place, owner: type) -> None:
    """Switch off an owner's wrappers at a place, and remove them unless somebody has wrapped them in turn."""
    for switch in _switches(place):
        switch.on = switch.on and switch.owner is not owner
    _peel(place)


def switch_off(owner: type) -> None:
    """Switch off the wrappers that this copy of the package has installed, also where they cannot be found again."""
    for switch in _installed:
        switch.on = switch.on and switch.owner is not owner
    _installed[:] = [switch for switch in _installed if switch.on]


def in_effect(place: Place, owner: type) -> bool:
    """Return whether calls at a place go through a wrapper of this owner."""
    return any(switch.on and switch.owner is owner for switch in _switches(place))


def is_outdated(kind: type, owner: type) -> bool:
    """Return whether a class derives from the class that had an owner's name before its module was imported again."""
    return any(
        (base.__module__, base.__qualname__) == (owner.__module__, owner.__qualname__) and base is not owner
        for base in kind.__mro__
    )


_installed: list[Switch] = []


def _holder(place: Place) -> Any:
    """Return the class or module that defines the function: a mixin's base, for example."""
    owner, name = place
    return next((base for base in getattr(owner, "__mro__", ()) if name in vars(base)), owner)


def _peel(place: Place) -> None:
    """Put back what outermost wrappers have wrapped if they are off."""
    holder, name = _holder(place), place[1]
    while (switch := _switch_of(getattr(holder, name))) is not None and not switch.on:
        setattr(holder, name, getattr(holder, name).__wrapped__)


def _switches(place: Place) -> list[Switch]:
    switches = (_switch_of(function) for function in _behind(getattr(*place)))
    return [switch for switch in switches if switch is not None and switch.place == place]


def _switch_of(function: Any) -> Switch | None:
    switch = getattr(function, MARK, None)
    return switch if switch is not None and switch.wrapper is function else None


def _behind(function: Any) -> Iterator[Any]:
    """Yield a function and those that it may call as its original, outermost first.

    Other wrappers keep their original in `__wrapped__`, a closure, a default, a partial, an attribute or a global.
    """
    waiting, seen = [function], set[int]()
    while waiting and len(seen) < MOST_FUNCTIONS:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [value for value in _referred(current) if callable(value) and not isinstance(value, type)]


def _referred(function: Any) -> list[Any]:
    """Return what a function may call: what it wraps, keeps, is bound to, or names among the globals of its module."""
    attributes = getattr(function, "__dict__", None)
    further = list(attributes.values()) if isinstance(attributes, dict) else []
    if isinstance(function, functools.partial):
        further += [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, types.MethodType):
        further.append(function.__func__)
    elif isinstance(function, types.FunctionType):
        further += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        further += [function.__globals__.get(name) for name in function.__code__.co_names]
        for cell in function.__closure__ or ():
            try:
                further.append(cell.cell_contents)
            except ValueError:  # not filled yet
                continue
    return further
