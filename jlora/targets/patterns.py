"""Patterns that select leaves by their paths."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable

import regex

from jlora.targets.paths import module_of

_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE, "a": re.ASCII}
MATCH_SECONDS = 1.0
MAX_PATTERN = 2000
MAX_COUNTS = 100_000  # a repetition is expanded when it is compiled, before any limit of time
MODULE, ANY = "module:", "module?:"
_COUNTS = re.compile(r"\{(?:\d*,)?0*([1-9]\d*)")
_REGEX_ONLY = re.compile(r"[()|^$\\+]|\.\*|\[\^")

Pattern = str | re.Pattern[str]
Matcher = Callable[[str], str | None]


@functools.lru_cache(maxsize=1 << 14)  # more than a spec has
def matcher(pattern: Pattern) -> Matcher:
    """Compiles a pattern to a function of a path that says what it matched: ``"leaf"``, ``"module"`` or None.

    A glob matches the end of a path, name by name: ``*`` and ``?`` within a name, ``**`` over any number of names.
    ``query`` and ``attention/query`` so match every leaf within each module of that name, ``query/kernel`` a leaf.
    A pattern that begins with ``re:``, is compiled by ``re.compile``, or has a character that only a regular
    expression uses (``( ) | ^ $ + \\`` or ``.*``), is one, and must match the whole path of a leaf or of a module.
    One that begins with ``module:`` is a regular expression for the dotted name of the module that holds the leaf, as
    PEFT and PyTorch write it: ``module:(?:.*\\.)?query`` for ``layers.0.query`` of ``layers/0/query/kernel``.
    With ``module?:`` there may be none.

    Raises:
      ValueError: if the pattern is empty, too long, or no valid regular expression.
    """
    text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
    if not text or len(text) > MAX_PATTERN:
        raise ValueError(f"a pattern has between 1 and {MAX_PATTERN} characters, found {len(text)}: {text[:60]!r}")
    if is_of_modules(pattern):
        return _dotted(text)
    return _regex(pattern) if is_regex(pattern) else _glob(text)


def text_of(pattern: Pattern) -> str:
    """A pattern as a string that means the same: flags of a compiled one are written into it."""
    if isinstance(pattern, str):
        return pattern
    flags = "".join(letter for letter, flag in _FLAGS.items() if pattern.flags & flag)
    return f"re:(?{flags}){pattern.pattern}" if flags else f"re:{pattern.pattern}"


def is_regex(pattern: Pattern) -> bool:
    """Whether a pattern is read as a regular expression (else it is a glob)."""
    return (
        isinstance(pattern, re.Pattern) or pattern.startswith(("re:", MODULE, ANY)) or bool(_REGEX_ONLY.search(pattern))
    )


def is_of_modules(pattern: Pattern) -> bool:
    """Whether a pattern is for the dotted names of modules."""
    return isinstance(pattern, str) and pattern.startswith((MODULE, ANY))


def may_match_nothing(pattern: Pattern) -> bool:
    """Whether a pattern is of what some models have, and others have not."""
    return isinstance(pattern, str) and pattern.startswith(ANY)


def _regex(pattern: Pattern) -> Matcher:
    full = _fullmatch(text_of(pattern).removeprefix("re:"))

    def match(path: str) -> str | None:
        if full(path):
            return "leaf"
        modules = itertools.accumulate(path.split("/")[:-1], "{}/{}".format)
        return "module" if any(map(full, modules)) else None

    return match


def _dotted(text: str) -> Matcher:
    full = _fullmatch(text.removeprefix(MODULE).removeprefix(ANY))

    def match(path: str) -> str | None:
        module = module_of(path).replace("/", ".")
        return "module" if module and full(module) else None

    return match


def _fullmatch(text: str) -> Callable[[str], bool]:
    if math.prod(int(count[:9]) for count in _COUNTS.findall(text)) > MAX_COUNTS:
        raise ValueError(
            f"{text[:200]!r} is no valid regular expression here: its counts multiply to over {MAX_COUNTS}"
        )
    try:
        compiled = regex.compile(text)
    except (regex.error, RecursionError) as error:
        raise ValueError(f"{text!r} is no valid regular expression: {error}") from None

    def full(path: str) -> bool:
        try:
            return compiled.fullmatch(path, timeout=MATCH_SECONDS) is not None
        except (TimeoutError, MemoryError):
            raise ValueError(
                f"the regular expression {text!r} took over {MATCH_SECONDS:g} s on the path {path!r}: "
                "nested repetitions make it exponential; simplify it or write a glob"
            ) from None

    return full


def _glob(text: str) -> Matcher:
    names = ["**", *text.strip("/").split("/")]
    wanted = [name for i, name in enumerate(names) if not (name == "**" == names[i - 1] and i)]

    def match(path: str) -> str | None:
        found = None
        reached = {0}  # how many names of the pattern are matched so far: as an automaton, linear in both lengths
        for depth, name in enumerate(names := path.split("/"), 1):
            places = [i for i in _skip(reached, wanted) if i < len(wanted)]
            stay = {i for i in places if wanted[i] == "**"}
            reached = stay | {i + 1 for i in places if fnmatch.fnmatchcase(name, wanted[i])}
            if len(wanted) in _skip(reached, wanted):
                found = "leaf" if depth == len(names) else "module"
        return found

    return match


def _skip(reached: set[int], wanted: list[str]) -> set[int]:
    skipped = set(reached)
    for i in sorted(reached):
        while i < len(wanted) and wanted[i] == "**":
            i += 1
            skipped.add(i)
    return skipped


def nearest(pattern: Pattern, paths: Iterable[str], count: int = 3) -> list[str]:
    """The paths (of leaves and of modules) whose ends look most like `pattern`."""
    wanted = _words(text_of(pattern)).lower()
    depth = wanted.count("/") + 1
    candidates = dict.fromkeys(name for path in paths for name in (path, module_of(path)) if name)
    best: dict[str, tuple[float, str]] = {}
    for name in candidates:
        tail = "/".join(name.lower().split("/")[-depth:])
        best.setdefault(tail, (_likeness(wanted, tail), name))
    close = sorted((found for found in best.values() if found[0] >= 0.3), key=lambda found: -found[0])
    return [name for _, name in close[:count]] or list(candidates)[:count]


def _words(text: str) -> str:
    """A pattern without what only regular expressions have."""
    is_dotted = is_of_modules(text)
    text = re.sub(
        r"\(\?\w+\)|\.[*+]|[\\^$*+?()|]", "", text.removeprefix("re:").removeprefix(MODULE).removeprefix(ANY)
    ).strip("/.")
    return text.replace(".", "/") if is_dotted else text


def _likeness(wanted: str, path: str) -> float:
    """From 0 to 1: of name and name from the end, on the average."""
    names = wanted.split("/")
    pairs = zip(reversed(names), reversed(path.split("/")), strict=False)
    return sum(itertools.starmap(_of_names, pairs)) / len(names)


def _of_names(wanted: str, name: str) -> float:
    """High for a name that is the beginning of the other up to a word's end, as ``q`` of ``q_proj``."""
    short, long = sorted((wanted, name), key=len)
    is_word = bool(short) and re.match(re.escape(short) + r"(?:[_.\d-]|$)", long) is not None
    return max(difflib.SequenceMatcher(None, wanted, name).ratio(), 0.8 * is_word)
