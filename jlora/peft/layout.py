"""Arrays as PyTorch lays them out, and as a part of a leaf: which axes are in, which out, in which order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jlora.nodes.axes import Axes
from jlora.peft.adapter import CONV, EMBEDDING, EXPERTS, LINEAR, Update
from jlora.peft.names import WEIGHTS, Layout, Slot
from jlora.targets.conventions import KERNELS, is_conv, is_table

Words = tuple[str, ...]
_SCALES = {"rsqrt_head": lambda outs: 1 / math.sqrt(outs[-1]), "sqrt_features": lambda outs: math.sqrt(math.prod(outs))}


class Part(NamedTuple):
    """A part of a leaf that is one of PyTorch's modules.

    Args:
      words: ``in``, ``out`` or ``batch`` for each of its axes.
      sizes: of them.
      layout: of the slot.
    """

    words: Words
    sizes: tuple[int, ...]
    layout: Layout = Layout()

    def of(self, word: str) -> tuple[int, ...]:
        """The sizes of the axes of one group."""
        return tuple(n for w, n in zip(self.words, self.sizes, strict=True) if w == word)

    @property
    def is_channel_last(self) -> bool:
        return self.words[-1] == "out"

    @property
    def is_conv1d(self) -> bool:
        """Whether PyTorch's weight is (in, out)."""
        return self.layout.conv1d and "batch" not in self.words

    @property
    def factor(self) -> float:
        """What the leaf is PyTorch's times."""
        scale = self.layout.scale
        return _SCALES[scale](self.of("out")) if isinstance(scale, str) else float(scale)


def kind_of(name: str, path: str, words: Words, axes: Axes | None = None) -> str:
    """What a module is by the axes of its part of the leaf, and by its name where those do not tell."""
    if "batch" in words:
        return EXPERTS
    if _is_conv(path, words, axes):
        return CONV
    is_named = is_table(path) or (is_embedding(name) and path.rpartition("/")[2] not in KERNELS)
    is_looked_up = is_named if axes is None or axes.lookup is None else axes.lookup
    return EMBEDDING if words == ("in", "out") and is_looked_up else LINEAR


def _is_conv(path: str, words: Words, axes: Axes | None) -> bool:
    """Whether a kernel is a convolution's: with two in axes it may be a linear layer's, of heads."""
    if words.count("out") != 1 or words.count("in") < 2:
        return False
    if words.count("in") > 2:
        return True
    return (axes is not None and axes.conv) or words[0] == "out" or is_conv(path, len(words))


def is_embedding(name: str) -> bool:
    """Whether PyTorch's module is a table of embeddings, by its name."""
    return is_table(f"{name.replace('.', '/')}/weight")


def words_of(slot: Slot, axes: Axes) -> Words:
    """The words of a part of a leaf whose axes are known."""
    group = {axis: word for word in ("in", "out", "batch") for axis in getattr(axes, f"{word}_axis")}
    return tuple(group[axis] for axis, at in enumerate(slot.index) if at is None)


class Sizes(NamedTuple):
    """What a module maps to what: the sizes that its part of a leaf must have; None: any."""

    kind: str
    ins: int | None
    outs: int | None
    stacked: tuple[int, ...] = ()

    @classmethod
    def of_update(cls, update: Update, slot: Slot) -> Sizes:
        stacked = (len(update.a),) if update.kind == EXPERTS else ()
        ins = math.prod(update.a.shape[len(stacked) + 1 :])
        return cls(update.kind, ins, update.b.shape[-2] // (slot.part or (0, 1))[1], stacked)

    @classmethod
    def of_weight(cls, name: str, shape: tuple[int, ...], layout: Layout = Layout()) -> Sizes:  # noqa: B008
        """Those of a whole weight as PyTorch keeps it."""
        if len(shape) == 2 and is_embedding(name):
            return cls(EMBEDDING, *shape)
        if len(shape) == 2 and layout.conv1d:
            return cls(LINEAR, *shape)
        if len(shape) == 3:
            return cls(EXPERTS, shape[2], shape[1], shape[:1])
        return cls(CONV if len(shape) == 4 else LINEAR, math.prod(shape[1:]), shape[0])


def fitting(slot: Slot, shape: Sequence[int], sizes: Sizes, in_first: bool | None) -> list[Words]:
    """The words that a part of a leaf may have.

    Args:
      slot: the part.
      shape: of the leaf.
      sizes: of the module.
      in_first: whether its in axes come before its out axes, as in Flax's kernels; None: only the sizes tell.
    """
    left = slot.sizes(shape)
    if slot.layout.dims is not None:
        words = tuple(slot.layout.dims.split())
        return [words] if len(words) == len(left) and is_fitting(words, left, sizes) else []
    every: Iterable[Words] = itertools.product(("in", "out", "batch"), repeat=len(left))
    possible: list[Words] = [words for words in every if is_fitting(words, left, sizes)]
    return _ordered(possible, slot.path.rpartition("/")[2].rpartition(".")[2], sizes.kind, in_first)


def is_fitting(words: Words, left: Sequence[int], sizes: Sizes) -> bool:
    """Whether axes of these sizes, with these words, are those of a module."""
    stacked = tuple(n for w, n in zip(words, left, strict=True) if w == "batch")
    are_there = {"in", "out"} <= {*words}
    pairs = ((_product(words, left, "in"), sizes.ins), (_product(words, left, "out"), sizes.outs))
    return are_there and stacked == sizes.stacked and all(known in (None, found) for found, known in pairs)


def _product(words: Words, sizes: Sequence[int], word: str) -> int:
    return math.prod(n for w, n in zip(words, sizes, strict=True) if w == word)


def _ordered(possible: list[Words], leaf: str, kind: str, in_first: bool | None) -> list[Words]:
    """Those that have their in axes first, or last."""
    if kind == CONV:
        found = [words for words in possible if words.count("out") == 1 and "out" in (words[0], words[-1])]
        return [words for words in found if (words[-1] == "out") == in_first] or found
    if in_first is None or not (leaf in WEIGHTS or kind == EXPERTS):
        return possible
    order = ("batch", "in", "out") if in_first else ("batch", "out", "in")
    return [words for words in possible if list(words) == sorted(words, key=order.index)]


def lora_a(update: Update, part: Part) -> np.ndarray:
    """A as (batch..., in..., r), in float32."""
    a = update.a.astype(np.float32)
    if update.kind == CONV:
        return a.transpose((*range(2, a.ndim), 1, 0) if part.is_channel_last else (*range(1, a.ndim), 0))
    return a.swapaxes(-1, -2).reshape(*part.of("batch"), *part.of("in"), update.rank)


def lora_b(update: Update, slot: Slot, part: Part) -> np.ndarray:
    """B as (batch..., r, out...), in float32."""
    b = _rows(update.b.astype(np.float32), slot, axis=-2)
    return outputs(b.swapaxes(-1, -2).reshape(*part.of("batch"), update.rank, *part.of("out")), part)


def vector(x: np.ndarray, slot: Slot, part: Part) -> np.ndarray:
    """A vector over PyTorch's outputs as (out...), in float32: DoRA's magnitude, a bias of B."""
    return outputs(_rows(x.astype(np.float32), slot, axis=0).reshape(part.of("out")), part)


def _rows(x: np.ndarray, slot: Slot, axis: int) -> np.ndarray:
    return x if slot.part is None else np.split(x, slot.part[1], axis)[slot.part[0]]


def part_of(weight: np.ndarray, slot: Slot) -> np.ndarray:
    """The rows of PyTorch's parameter that are the slot's: of stacked experts, those of each."""
    axis = out_axis(weight.ndim, slot.layout)
    if slot.part is not None and weight.shape[axis] % slot.part[1]:
        raise ValueError(f"peft: {weight.shape} can't be divided into {slot.part[1]} parts, for {slot.path}")
    return _rows(weight, slot, axis)


def out_axis(ndim: int, layout: Layout) -> int:
    """The axis of the outputs in PyTorch's parameter."""
    return 1 if ndim == 3 or (ndim == 2 and layout.conv1d) else 0


def outputs(x: np.ndarray, part: Part) -> np.ndarray:
    """An array whose last axes are PyTorch's outputs, as the leaf has them."""
    return _interleaved(x, part.layout.rope) * np.float32(part.factor)


def _interleaved(x: np.ndarray, rope: bool | int) -> np.ndarray:
    if not rope:
        return x
    halves = x.reshape(*x.shape[:-1], -1, 2, _head(x, rope) // 2)
    return halves.swapaxes(-1, -2).reshape(x.shape)


def torch_outputs(x: np.ndarray, part: Part) -> np.ndarray:
    """The inverse of `outputs`."""
    rope = part.layout.rope
    if rope:
        x = x.reshape(*x.shape[:-1], -1, _head(x, rope) // 2, 2).swapaxes(-1, -2).reshape(x.shape)
    return x / np.float32(part.factor)


def _head(x: np.ndarray, rope: bool | int) -> int:
    return x.shape[-1] if rope is True else rope


def torch_a(a: np.ndarray, kind: str, part: Part) -> np.ndarray:
    """The inverse of `lora_a`, for (batch..., in..., r)."""
    if kind == CONV:
        last = a.ndim - 1
        return a.transpose((last, last - 1, *range(last - 1)) if part.is_channel_last else (last, *range(last)))
    return a.reshape(*part.of("batch"), -1, a.shape[-1]).swapaxes(-1, -2)


def torch_b(b: np.ndarray, part: Part) -> np.ndarray:
    """The inverse of `lora_b` for a whole module, for (batch..., r, out...)."""
    batch = part.of("batch")
    return torch_outputs(b, part).reshape(*batch, b.shape[len(batch)], -1).swapaxes(-1, -2)


def leaf_weight(x: np.ndarray, kind: str, part: Part) -> np.ndarray:
    """A weight as PyTorch keeps it, as the part of the leaf."""
    if len(part.words) == 1:
        return outputs(x.astype(np.float32), part) if part.words == ("out",) else x
    ins, outs, batch = part.of("in"), part.of("out"), part.of("batch")
    x = _matrix(x.astype(np.float32), kind, part).reshape(*batch, *ins, *outs)
    order = _grouped(part)
    return outputs(x, part).transpose([order.index(axis) for axis in range(len(order))])


def _matrix(x: np.ndarray, kind: str, part: Part) -> np.ndarray:
    """PyTorch's weight as (batch..., in, out)."""
    if kind == CONV:
        return x.transpose((*range(2, x.ndim), 1, 0) if part.is_channel_last else (*range(1, x.ndim), 0))
    return x if kind == EMBEDDING or part.is_conv1d else x.swapaxes(-1, -2)


def _grouped(part: Part) -> list[int]:
    """The axes of the leaf's part as (batch..., in..., out...)."""
    return sorted(range(len(part.words)), key=lambda axis: ("batch", "in", "out").index(part.words[axis]))


def torch_weight(x: np.ndarray, kind: str, part: Part) -> np.ndarray:
    """The inverse of `leaf_weight`."""
    if len(part.words) == 1:
        return torch_outputs(x.astype(np.float32), part) if part.words == ("out",) else x
    x = torch_outputs(x.astype(np.float32).transpose(_grouped(part)), part)
    if kind == CONV:
        last = x.ndim - 1
        return x.transpose((last, last - 1, *range(last - 1)) if part.is_channel_last else (last, *range(last)))
    batch, ins, outs = part.of("batch"), part.of("in"), part.of("out")
    x = x.reshape(*batch, math.prod(ins), math.prod(outs))
    return x if kind == EMBEDDING or part.is_conv1d else x.swapaxes(-1, -2)
