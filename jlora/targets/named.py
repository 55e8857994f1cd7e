"""Plain leaves beside a wrapped tree that train too, by their names: a soft prompt, a temperature."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jlora.targets.patterns import Pattern, matcher, nearest

Names = Pattern | Sequence[Pattern]


def named(train: Names, leaves: Mapping[str, Any], adapted: Iterable[str]) -> set[str]:
    """The paths that `train` names.

    Args:
      train: a pattern, or several, as in ``LoraSpec(train=...)``.
      leaves: the plain leaves by path.
      adapted: the paths of what `jlora.wrap` made.

    Raises:
      ValueError: if a pattern names no leaf, or one that is adapted, or one that is not floating.
    """
    found: set[str] = set()
    for pattern in patterns_of(train):
        hits = set(filter(matcher(pattern), leaves))
        if taken := sorted(filter(matcher(pattern), adapted)):
            raise ValueError(f"train={pattern!r} names {taken[0]}, of which jlora.wrap has said what trains")
        if not hits:
            near = ", ".join(nearest(pattern, leaves)) or "none: there is no plain leaf"
            raise ValueError(f"train={pattern!r} matches no leaf. Nearest: {near}")
        found |= hits
    for path in sorted(found):
        dtype = getattr(leaves[path], "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise ValueError(f"train: {path} can't train, since it is {dtype or leaves[path]!r}, not floating")
    return found


def patterns_of(train: Names) -> list[Pattern]:
    """One pattern, or several, as several."""
    return [train] if isinstance(train, (str, re.Pattern)) else list(train)
