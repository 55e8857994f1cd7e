"""What a JSON file of a checkpoint says, read together with its place there: so what is wrong with it is named."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

_NOTHING: Any = object()
_MEND = ". Put the file back as jlora.checkpoint wrote it, or load another checkpoint"
_DEEPEST, _DIMS, _LARGEST = 32, 64, 2**63  # levels of a setting; axes of an array (NumPy's limit), and their sizes
_TYPE = re.compile(r"(u?int|b?float|complex|bool)[a-z0-9_]*")
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxlong = 2, 60, 40


@dataclasses.dataclass(frozen=True)
class Told:
    """A value in a JSON file, not yet looked at: each reader below returns what it asks for, or refuses the value.

    Args:
      file: the path of the file, or the call that is about to write it.
      value: of any JSON type.
      place: the keys on the way to the value.
      mend: how a message ends.
    """

    file: Any
    value: Any
    place: tuple[str, ...] = ()
    mend: str = ""

    def refused(self, expected: str, kind: type[ValueError] = ValueError) -> ValueError:
        """The error that says what was expected here."""
        place = ".".join(map(named, self.place)) or "the top level"
        found = "nothing" if self.value is _NOTHING else _SHOWN.repr(self.value)[:120]
        return kind(f"{self.file}: {place}: expected {expected}, found {found}{self.mend}")

    def at(self, key: str) -> Told:
        """The value under a key, which need not be there."""
        if not isinstance(self.value, dict):
            raise self.refused("an object")
        return self._under(key, self.value.get(key, _NOTHING))

    def _under(self, key: str, value: Any) -> Told:
        return dataclasses.replace(self, value=value, place=(*self.place, key))

    def entries(self) -> dict[str, Told]:
        """Of an object: what is under each of its keys, whichever they are."""
        if not isinstance(self.value, dict):
            raise self.refused("an object")
        return {key: self._under(key, value) for key, value in self.value.items()}

    def parts(self, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Told]:
        """Of an object: what is under these keys, and there are no others."""
        found, known = self.entries(), [*needed, *optional]
        for name in needed:
            if name not in found:
                raise self.at(name).refused("an entry, which is always there")
        for name in found:
            if name not in known:
                raise found[name].refused(f"none but {', '.join(known) or 'nothing'} beside it")
        return found

    def text(self) -> str:
        if not isinstance(self.value, str):
            raise self.refused("a string")
        return self.value

    def word(self) -> str:
        """A name: letters, digits and underscores."""
        if not isinstance(self.value, str) or not self.value.isidentifier() or len(self.value) > 200:
            raise self.refused("a name")
        return self.value

    def number(self, is_finite: bool = True) -> float:
        kind = "a finite number" if is_finite else "a number"
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            raise self.refused(kind)
        try:
            is_fine = math.isfinite(self.value) or not is_finite
        except OverflowError as error:  # an integer that no float is
            raise self.refused(kind) from error
        if not is_fine:
            raise self.refused(kind)
        return self.value

    def wholes(self) -> tuple[int, ...]:
        """A list of whole numbers from 0 on."""
        is_whole = lambda x: type(x) is int and 0 <= x < _LARGEST
        if not isinstance(self.value, list) or not all(map(is_whole, self.value)):
            raise self.refused("a list of whole numbers from 0 on")
        return tuple(self.value)

    def shape(self) -> tuple[int, ...]:
        """The shape of an array."""
        if isinstance(self.value, list) and len(self.value) > _DIMS:
            raise self.refused(f"a shape of at most {_DIMS} axes")
        return self.wholes()

    def form(self, optional: Sequence[str] = ()) -> dict[str, Told]:
        """What is said of an array: a shape, and a type that need be none that is known here."""
        parts = self.parts(("shape", "dtype"), optional)
        parts["shape"].shape()
        parts["dtype"].text()
        return parts

    def dtype(self) -> np.dtype:
        """The type of an array of numbers."""
        known = isinstance(self.value, str) and _TYPE.fullmatch(self.value)
        try:
            return jnp.dtype(self.value if known else "none")
        except TypeError as error:
            raise self.refused("the name of a type of numbers, such as float32") from error

    def setting(self) -> Any:
        """Any JSON, with tuples for lists: so it can be part of a tree's structure."""
        return _tupled(self, self.value)


def _tupled(told: Told, value: Any, level: int = 0) -> Any:
    if level > _DEEPEST:
        raise told.refused(f"a setting of at most {_DEEPEST} levels")
    if isinstance(value, list):
        return tuple([_tupled(told, x, level + 1) for x in value])
    return {k: _tupled(told, x, level + 1) for k, x in value.items()} if isinstance(value, dict) else value


def named(key: str) -> str:
    """A key as messages show it."""
    return key if key.isprintable() and 0 < len(key) <= 200 else _SHOWN.repr(key)


def parsed(file: Any, text: bytes) -> Told:
    """A file's text.

    Raises:
      ValueError: if it is no JSON, has a key twice, or is nested too deeply.
    """
    try:
        return Told(file, json.loads(text, object_pairs_hook=unique), mend=_MEND)
    except RecursionError as error:
        raise ValueError(f"{file} is damaged: it is nested deeper than can be read{_MEND}") from error
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}{_MEND}") from error


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, each of whose keys is there once: the hook for `json.loads`."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"an object has the key {named(twice)} twice, where each is expected once")
    return found
