"""PEFT's rules for names of modules, as patterns of `jlora.targets.patterns.matcher` that begin with ``module:``.

The rules are those of ``check_target_module_exists`` (peft/tuners/tuners_utils.py), ``get_pattern_key`` and
``_set_trainable`` (peft/utils/other.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jlora.targets.patterns import ANY, MAX_PATTERN, MODULE

_LITERAL = re.compile(r"\^?(?:[\w.-]|\\[.-])+")
MAX_PAIRS, MAX_OVERRIDES = 4_000_000, 5000  # that are compared, and that are kept: each is a regular expression
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

    Raises:
      ValueError: if there are more of them than can be told apart in a moment.

    Example:
      >>> list(overrides({"q": 4}, {"v": 8, "l.q": 16}))
      ['module:(?=(?:.*\\\\.)?(?:q)$)(?:.*\\\\.)?(?:l.q)', 'module:(?:.*\\\\.)?(?:q)', 'module:(?:.*\\\\.)?(?:v)', \
'module:(?:.*\\\\.)?(?:l.q)']
    """
    pairs = _pairs(ranks, alphas)
    count = len({*ranks} ^ {*alphas}) + (len(ranks) * len(alphas) if pairs is None else len(pairs))
    if pairs is None or count > MAX_OVERRIDES:
        raise ValueError(
            f"rank_pattern has {len(ranks)} patterns and alpha_pattern {len(alphas)}: a module may match one of each, "
            f"which makes {count} cases; at most {MAX_OVERRIDES} are read. Give plain names, or fewer patterns"
        )
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


def _pairs(ranks: Iterable[str], alphas: Iterable[str]) -> list[tuple[str, str]] | None:
    """The keys of both that one name may match; None where there are too many to look at, or to keep."""
    first, second = ({key: _Key.of(key) for key in keys} for keys in (ranks, alphas))
    if len(first) * len(second) > MAX_PAIRS:
        return None
    found: list[tuple[str, str]] = []
    for rank, own in first.items():
        found += [(rank, alpha) for alpha, other in second.items() if rank == alpha or _may_meet(own, other)]
        if len(found) > MAX_OVERRIDES:
            return None
    return found


class _Key(NamedTuple):
    """A key that is a plain name, read from behind.

    Args:
      letters: from the last on; None stands for any, which a dot is.
      is_whole: whether it begins with ``^``.
    """

    letters: list[str | None]
    is_whole: bool

    @classmethod
    def of(cls, key: str) -> _Key | None:
        """None: it is another regular expression."""
        if not _LITERAL.fullmatch(key):
            return None
        letters = [None if x == "." else x[-1] for x in re.findall(r"\\?.", key.removeprefix("^"))]
        return cls(letters[::-1], key.startswith("^"))


def _may_meet(a: _Key | None, b: _Key | None) -> bool:
    """Whether one name may match both keys; False only for plain names."""
    if a is None or b is None:
        return True
    short, long = (a, b) if len(a.letters) <= len(b.letters) else (b, a)
    n = len(short.letters)
    if len(long.letters) > n and (short.is_whole or long.letters[n] not in (None, ".")):
        return False
    return all(x is None or y is None or x == y for x, y in zip(short.letters, long.letters, strict=False))


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
