"""Which leaf of a tree, or which part of it, is which module of a PyTorch model.

A map is an ordered list of pairs (PyTorch's name, path), with a name in braces for what differs: ``{i}`` to ``{n}`` for
numbers, any other for text without a slash:

    ("model.layers.{i}.self_attn.{p}_proj", "layers/attn/{p}/kernel[{i}]")

``[{i}]`` is the place on the axis on which layers are stacked, the first where nothing else is known of the leaf;
``[:, {i}]`` is one on the second axis, and a number is a fixed place.
``(layers_|blocks/)`` in a path is any of these. A name of a module means its weight, and its bias is the leaf ``bias``
beside; a name that ends with ``.bias``, or one of stacked experts, means that parameter. ``[0/2]`` behind a name is the
first half of its outputs. A third entry is a `Layout`.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

_FIELD = re.compile(r"\{(\w+)\}")
_VARIABLE = re.compile(r"(\{\w+\}|\([\w|/]*\))")
_PART = re.compile(r"(.*)\[(\d+)/(\d+)\]")
_INDEX = re.compile(r"(.*?)\[([^\]]*)\]")
FLAX = ("kernel", "embedding", "scale")
WEIGHTS = ("weight", *FLAX)
NUMBERS = tuple("ijklmn")
HEAD, TABLES = "lm_head", ("embed_tokens", "wte")  # a language model's output layer, and the tables that may be it


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf, or the part of it that an index names, lies where its sizes and the node's axes do not tell.

    Args:
      dims: a word for each axis: ``in``, ``out`` or ``batch``, as in ``"out in out"`` of a query kernel
        (heads, features, head_dim).
      rope: the kernel's outputs have the halves of each head interleaved, which PyTorch has one after the other: True
        where the last out axis is the head, or the size of a head.
      scale: what the kernel is PyTorch's times: a number, ``"rsqrt_head"`` (1 / sqrt(size of the last out axis)) or
        ``"sqrt_features"`` (sqrt(size of all out axes)).
      is_parameter: PyTorch's name is the parameter's own, not that of a weight's module; so it is of stacked experts.
      conv1d: PyTorch's weight is (in, out), as that of Transformers' ``Conv1D`` in GPT-2.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> names = [("q_proj", "query/kernel", jlora.peft.Layout("in out out"))]  # (features, heads, head_dim)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     jlora.peft.to_safetensors({"query": {"kernel": jnp.ones((8, 2, 3))}}, directory, names=names)
      ...     theirs = jlora.peft.from_safetensors(directory)
      >>> theirs["q_proj"]["weight"].shape  # (out, in), as in PyTorch
      (6, 8)
    """

    dims: str | None = None
    rope: bool | int = False
    scale: float | str = 1.0
    is_parameter: bool = False
    conv1d: bool = False


Entry = tuple[str, str] | tuple[str, str, Layout]


class Slot(NamedTuple):
    """A place in a tree.

    Args:
      path: of the leaf.
      index: for each of its axes a place on it, or None for the whole axis.
      layout: of what is left.
      part: which of how many equal parts of PyTorch's outputs it is; None: the whole.
      is_native: whether the leaf lies as PyTorch's parameter does.
    """

    path: str
    index: tuple[int | None, ...]
    layout: Layout = Layout()
    part: tuple[int, int] | None = None
    is_native: bool = False

    @property
    def place(self) -> tuple[Any, ...]:
        """The slot as an index of its leaf."""
        return tuple(slice(None) if at is None else at for at in self.index)

    @property
    def fixed(self) -> tuple[int, ...]:
        """The axes of the leaf on which it is a part."""
        return tuple(axis for axis, at in enumerate(self.index) if at is not None)

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the axes that it has whole."""
        return tuple(n for n, at in zip(shape, self.index, strict=True) if at is None)


Shapes = Mapping[str, tuple[int, ...]]


def slots_of(
    shapes: Shapes, names: Iterable[Entry] | None, stacked: Mapping[str, int] = MappingProxyType({})
) -> dict[str, list[Slot]]:
    """The places of each of PyTorch's modules and parameters in a tree.

    Args:
      shapes: of the leaves, by path.
      names: the map; None where the tree has PyTorch's names.
      stacked: the axis on which layers are stacked, of the leaves of which it is known.

    Returns:
      By the name of the module, of the parameter where it is no weight.

    Raises:
      ValueError: if a pattern is no such pair, or none of them is of this tree.
    """
    if names is None:
        return _same(shapes)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"names: expected a list of pairs, or one of jlora.peft.NAMES, found {names!r}")
    names = list(names)
    found: dict[str, list[Slot]] = collections.defaultdict(list)
    taken: set[tuple[str, tuple[int | None, ...]]] = set()
    for rule in (rule for entry in names for rule in _rules(entry)):
        for name, slot in rule(shapes, stacked):
            if (slot.path, slot.index) not in taken:
                taken.add((slot.path, slot.index))
                _check_single(name, slot, found[name])
                found[name].append(slot)
    if not found:
        raise ValueError(
            f"names: no path of the map is one of the tree's, which are such as {sorted(shapes)[:3]}; write a list "
            'of pairs such as ("model.layers.{i}.self_attn.q_proj", "layers_{i}/attn/query/kernel")'
        )
    return dict(found)


def _check_single(name: str, slot: Slot, others: Sequence[Slot]) -> None:
    for other in others:
        if slot.part is None or other.part is None or slot.part == other.part:
            raise ValueError(f"names: {name} would be both {other.path} and {slot.path}; the map must tell which")


def _same(shapes: Shapes) -> dict[str, list[Slot]]:
    found: dict[str, list[Slot]] = {}
    for path, shape in shapes.items():
        name, is_native = _named(path), re.split("[/.]", path)[-1] not in FLAX
        if name in found:  # a second weight of a module goes by its own name
            name, is_native = path.removeprefix("params/").replace("/", "."), True
        found[name] = [Slot(path, (None,) * len(shape), is_native=is_native)]
    return found


def _named(path: str) -> str:
    """The name of a leaf that has PyTorch's: the module's for its weight."""
    name = path.removeprefix("params/").replace("/", ".")
    module, _, leaf = name.rpartition(".")
    return module if leaf in WEIGHTS and module else name


Rule = Callable[[Shapes, Mapping[str, int]], Iterator[tuple[str, Slot]]]


def _rules(entry: Entry) -> list[Rule]:
    """The rules of an entry: for the leaf that it names, and for the bias beside."""
    if (
        not isinstance(entry, (tuple, list))
        or len(entry) not in (2, 3)
        or not all(isinstance(x, str) for x in entry[:2])
    ):
        raise ValueError(f"names: an entry is (PyTorch's name, path) or (name, path, Layout), found {entry!r}")
    torch, template = entry[0], entry[1]
    layout = entry[2] if len(entry) == 3 else Layout()
    if not isinstance(layout, Layout):
        raise ValueError(f"names: the third of {entry!r} must be a jlora.peft.Layout")
    match = _PART.fullmatch(torch)
    torch, part = (match[1], (int(match[2]), int(match[3]))) if match else (torch, None)
    if part and not 0 <= part[0] < part[1]:
        raise ValueError(f"names: {entry[0]!r} is part {part[0]} of {part[1]}; parts count from 0")
    path, index = _split(template)
    unknown = {*_FIELD.findall(torch)} ^ {*_FIELD.findall(path), *_FIELD.findall(",".join(index))}
    if unknown:
        raise ValueError(f"names: {entry!r} has {{{min(unknown)}}} on one side only")
    rules = [_rule(torch.removesuffix(".weight"), path, index, layout, part)]
    module, _, leaf = path.rpartition("/")
    is_weight = not {*leaf.strip("()").split("|")}.isdisjoint((*WEIGHTS, "w")) and module.count("(") == module.count(
        ")"
    )
    if torch.rpartition(".")[2] not in ("bias", "weight") and is_weight:
        beside = f"{module}/bias".lstrip("/")
        rules.append(_rule(f"{torch}.bias", beside, index, dataclasses.replace(layout, dims=None), part))
    return rules


def _split(template: str) -> tuple[str, list[str]]:
    match = _INDEX.fullmatch(template)
    path, index = (match[1], [item.strip() for item in match[2].split(",")]) if match else (template, [])
    wrong = [item for item in index if not (item == ":" or item.isdigit() or _FIELD.fullmatch(item))]
    if wrong or "[" in path:
        raise ValueError(f"names: in {template!r} an index is :, a number or a name in braces, as in kernel[:, {{i}}]")
    return path, index


def _rule(torch: str, path: str, index: Sequence[str], layout: Layout, part: tuple[int, int] | None) -> Rule:
    pattern = _pattern(path)

    def found(shapes: Shapes, stacked: Mapping[str, int]) -> Iterator[tuple[str, Slot]]:
        for leaf, shape in shapes.items():
            match = pattern.fullmatch(leaf)
            at = [":"] * stacked.get(leaf, 0) + [*index] if len(index) == 1 else index
            if not match or len(at) > len(shape):
                continue
            given = match.groupdict()
            for own, fixed in _places(at, shape, given):
                name = _FIELD.sub(lambda m, all=given | own: all[m[1]], torch)
                yield name, Slot(leaf, (*fixed, *[None] * (len(shape) - len(fixed))), layout, part)

    return found


def _places(
    index: Sequence[str], shape: Sequence[int], given: Mapping[str, str]
) -> Iterator[tuple[dict[str, str], tuple[int | None, ...]]]:
    """The places that an index may mean: what each of its names is there, and the place on each axis."""
    choices = [_choices(item, n, given) for item, n in zip(index, shape, strict=False)]
    for fixed in itertools.product(*choices):
        yield {item[1:-1]: str(at) for item, at in zip(index, fixed, strict=True) if item[0] == "{"}, fixed


def _choices(item: str, size: int, given: Mapping[str, str]) -> Sequence[int | None]:
    if item == ":":
        return [None]
    if item[0] != "{":
        return [int(item)] if int(item) < size else []
    return [at for at in range(size) if given.get(item[1:-1], str(at)) == str(at)]


def _pattern(template: str) -> re.Pattern[str]:
    """A path's template as a regular expression; the tree may have all in a collection of parameters."""
    seen: set[str] = set()

    def compiled(text: str) -> str:
        if text.startswith("("):
            return f"(?:{'|'.join(map(re.escape, text[1:-1].split('|')))})"
        name = text[1:-1]
        again = name in seen
        seen.add(name)
        return f"(?P={name})" if again else rf"(?P<{name}>{'[0-9]+' if name in NUMBERS else '[^/]+?'})"

    pieces = _VARIABLE.split(template)
    body = "".join(compiled(x) if _VARIABLE.fullmatch(x) else re.escape(x) for x in pieces)
    return re.compile(rf"(?:params/)*{body}")


class Shift(NamedTuple):
    """From an adapter's names to a tree's: another beginning, or none."""

    theirs: str = ""
    ours: str = ""

    def __call__(self, name: str) -> str:
        return self.ours + name.removeprefix(self.theirs)

    def back(self, name: str) -> str:
        return self.theirs + name.removeprefix(self.ours)


def shift(wanted: Iterable[str], known: Iterable[str], prefix: str | None = None) -> Shift:
    """What leads from an adapter's names to a tree's: other wrappers around the same model, or none.

    An adapter of a model with a head names ``bert.encoder...`` what a tree of its encoder alone names ``encoder...``.
    Wrappers alone come and go; no name within the model is exchanged for another, and no number of a layer.

    Args:
      wanted: the adapter's names.
      known: the tree's.
      prefix: what the tree's names have before the adapter's, which may then have a beginning of its own; None: what
        `WRAPPERS` tell.

    Raises:
      ValueError: if the names fit in several places of the tree, or `prefix` is none of its beginnings.
    """
    wanted, known = dict.fromkeys(wanted), {*known}
    if prefix is not None:
        return _told(wanted, known, prefix)
    fits = lambda moves: [move for move in moves if all(move(name) in known for name in wanted)]
    if not wanted or fits([Shift()]):
        return Shift()
    ours, theirs = (_wrappers(names) for names in (sorted(known), wanted))
    found = fits([Shift(off, on) for off in ("", *theirs) for on in ("", *ours)])
    if len(places := {tuple(map(move, wanted)): move for move in found}) > 1:
        _refuse_several(wanted, [move.ours for move in places.values()])
    if not found and (heads := [move.ours for move in fits(Shift(ours=head) for head in _heads(known))]):
        _refuse_several(wanted, heads)
    if not found and (off := next(iter(fits(Shift(theirs=head) for head in _heads(wanted))), None)):
        raise ValueError(
            f"peft.load: the adapter's {next(iter(wanted))} is a name of the tree without {off.theirs[:-1]!r} before "
            "it, which is no known wrapper of a model. If the tree is that part of it, say so: prefix=''"
        )
    return found[0] if found else Shift()


# Around a model, by Transformers' models with heads and by other libraries: the same model is there without them.
WRAPPERS = frozenset(
    "model base_model transformer language_model backbone module _orig_mod auto_model pretrained_model bert roberta"
    " albert electra deberta distilbert camembert xlm_roberta mpnet longformer esm vit deit beit swin dinov2 convnext"
    " gpt_neox".split()
)


def _wrappers(names: Iterable[str]) -> list[str]:
    """The beginnings of one to three names that are wrappers, with the dot behind them."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for n in range(1, min(4, len(parts))):
            if parts[n - 1] not in WRAPPERS:
                break
            found[".".join(parts[:n]) + "."] = None
    return list(found)


def _heads(names: Iterable[str]) -> list[str]:
    """The beginnings of names, with the dot behind them: as many names as there are but the last."""
    return sorted(
        {head for name in names for head in itertools.accumulate(f"{part}." for part in name.split(".")[:-1])}
    )


def beginning(prefix: str | None) -> str:
    """A given prefix as the beginning of dotted names, with the dot behind it; empty where there is none."""
    name = (prefix or "").strip("./").replace("/", ".")
    return f"{name}." if name else ""


def _told(wanted: Mapping[str, None], known: set[str], prefix: str) -> Shift:
    """The move to a given beginning: nothing goes off, or a wrapper, or else what the adapter's names begin with."""
    ours = beginning(prefix)
    if not any(name.startswith(ours) for name in known):
        shown = ", ".join(dict.fromkeys(name.partition(".")[0] for name in sorted(known)))
        raise ValueError(f"peft.load: prefix={prefix!r} begins no name of the tree; they begin with {shown}")
    for heads in ([""], _wrappers(wanted), _heads(wanted)):
        found = [Shift(head, ours) for head in heads if all(Shift(head, ours)(name) in known for name in wanted)]
        if len({tuple(map(move, wanted)) for move in found}) == 1:
            return found[0]
    return Shift(ours=ours)


def _refuse_several(wanted: Mapping[str, None], heads: Sequence[str]) -> NoReturn:
    shown = [repr(head.removesuffix(".")) for head in heads]
    raise ValueError(
        f"peft.load: the adapter's {next(iter(wanted))} is not a name of the tree, but is one below "
        f"{' and below '.join(shown[:4])}{' and more' if shown[4:] else ''}. Say which of them is meant: "
        f"{' or '.join(f'prefix={head}' for head in shown[:4])}"
    )


def leaf_shapes(paths: Sequence[str], leaves: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the leaves that have one."""
    return {path: tuple(leaf.shape) for path, leaf in zip(paths, leaves, strict=True) if hasattr(leaf, "shape")}
