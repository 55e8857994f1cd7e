"""PEFT's rules for names of modules, as patterns of `jlora.targets.patterns.matcher` that begin with ``module:``.

The rules are those of ``check_target_module_exists`` (peft/tuners/tuners_utils.py), ``get_pattern_key`` and
``_set_trainable`` (peft/utils/other.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jlora.targets.patterns import ANY, MAX_PATTERN, MODULE

_LITERAL = re.compile(r"[\w.-]+")
_EMBEDDINGS = "embed_tokens|embed|embeddings?|embedder|token_embed(?:der|dings?)?|tok_embeddings|word_embeddings|wte"

EMBEDDING = rf"{MODULE}(?:.*\.)?(?:{_EMBEDDINGS}|shared)"


def matching(expression: str) -> str:
    """Modules whose whole name a regular expression matches: what a string means as a target."""
    return MODULE + expression


def named(names: Iterable[str]) -> tuple[str, ...]:
    """Modules of these names, or whose names end with a dot and one of them: what a list means as targets."""
    return tuple(rf"{MODULE}(?:.*\.)?(?:{group})" for group in _groups(names))


def ending(names: Iterable[str]) -> tuple[str, ...]:
    """Modules whose names end with one of these, be it within a word: IA3's feedforward modules, tables of tokens."""
    return tuple(rf"{MODULE}.*(?:{group})" for group in _groups(names))


def within(names: Iterable[str]) -> tuple[str, ...]:
    """What lies in modules whose names end with one of these, be it within a word: ``modules_to_save``."""
    return tuple(rf"{MODULE}.*(?:{group})(?:\..*)?" for group in _groups(names))


def below(parts: Iterable[str]) -> tuple[str, ...]:
    """Modules that are one of these or lie in one, wherever it is, where a model has such."""
    return tuple(rf"{ANY}(?:.*\.)?(?:{group})(?:\..*)?" for group in _groups(parts))


def parameters(names: Iterable[str]) -> tuple[str, ...]:
    """Leaves of these dotted names, or whose names end with a dot and one of them: ``target_parameters``."""
    slashed = [name.replace(".", "/") for name in names]
    return tuple(rf"re:(?:.*/)?(?:{group})" for group in _groups(slashed))


def overrides(ranks: Mapping[str, Any], alphas: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``rank_pattern`` and ``alpha_pattern`` as one mapping, of which the first pattern that matches counts.

    In PEFT the first key of each that matches counts on its own. So the pairs come first, in the order of both, then
    the keys by themselves. A pair that no name can match is left out.

    Example:
      >>> list(overrides({"q": 4}, {"v": 8, "l.q": 16}))
      ['module:(?=(?:.*\\\\.)?(?:q)$)(?:.*\\\\.)?(?:l.q)', 'module:(?:.*\\\\.)?(?:q)', 'module:(?:.*\\\\.)?(?:v)', \
'module:(?:.*\\\\.)?(?:l.q)']
    """
    pairs = [(r, a) for r in ranks for a in alphas if _may_meet(r, a)]
    return (
        {_key(r, a): {"rank": ranks[r], "alpha": alphas[a]} for r, a in pairs}
        | {_key(r): {"rank": rank} for r, rank in ranks.items() if r not in alphas}
        | {_key(a): {"alpha": alpha} for a, alpha in alphas.items() if a not in ranks}
    )


def _key(key: str, other: str | None = None) -> str:
    """Modules whose names end with a dot and what a key matches, and with what another matches."""
    if other in (None, key):
        return rf"{MODULE}(?:.*\.)?(?:{key})"
    return rf"{MODULE}(?=(?:.*\.)?(?:{key})$)(?:.*\.)?(?:{other})"


def _may_meet(a: str, b: str) -> bool:
    """Whether one name may match both keys; False only for plain names, in which a dot is any character."""
    if not _LITERAL.fullmatch(a) or not _LITERAL.fullmatch(b):
        return True
    short, long = sorted((a, b), key=len)
    extra = len(long) - len(short)
    is_end = all(x == y or "." in (x, y) for x, y in zip(short, long[extra:], strict=True))
    return is_end and (extra == 0 or long[extra - 1] == ".")


def _groups(names: Iterable[str]) -> Iterator[str]:
    """The names as alternatives of a regular expression: one, or more of them where it would be too long."""
    group = ""
    for name in dict.fromkeys(map(re.escape, names)):
        joined = f"{group}|{name}" if group else name
        if group and len(joined) > MAX_PATTERN - 50:
            yield group
            joined = name
        group = joined
    if group:
        yield group
