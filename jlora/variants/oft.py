"""OFT and BOFT: the kernel's input is rotated by a block-diagonal orthogonal matrix, or a product of them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jlora.interpret.factored import Factored, plain, turned_by
from jlora.interpret.manual import check_size
from jlora.interpret.products import wide
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


class Rotation(AdaptedParam):
    """What OFT and BOFT have in common: all but the options."""

    KINDS = ("dot", "conv")
    SETTINGS = ()
    LARGEST: ClassVar[int]

    oft_q: Any
    axes: Axes
    size: int

    @classmethod
    def create(cls, base: Any, kernel: Kernel, key: jax.Array) -> Any:
        del key
        last = kernel.shape[kernel.axes.in_axis[-1]]
        size, factors = _blocks(kernel, last, cls.LARGEST)
        turned = last if kernel.kind == "conv" else kernel.size("in")
        entries = size * (size - 1) // 2
        shape = kernel.sizes("batch factors blocks entries", factors=factors, blocks=turned // size, entries=entries)
        made: Any = cls
        return made(base, jnp.zeros(shape, kernel.dtype), size=size, **kernel.place)

    @property
    def settings(self) -> dict[str, Any]:
        factors = self.oft_q.shape[len(self.axes.batch_axis)]
        return {"options": {"block_size": self.size, "factors": factors}}

    def identity(self) -> Any:
        turns: Any = self
        return dataclasses.replace(turns, oft_q=jnp.zeros_like(self.oft_q))

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        del key
        batch, ins = self.axes.batch_axis, self.axes.in_axis
        rotations = _cayley(self.everywhere(self.oft_q), self.size)
        factors, blocks = rotations.shape[len(batch) : len(batch) + 2]
        own = ins if blocks * self.size == math.prod(self.shape[axis] for axis in ins) else ins[-1:]
        check_size(name, "the rotation", blocks * self.size, math.prod(self.shape[axis] for axis in own))
        strides = [self.size**i for i in range(factors)]
        sizes = [self.shape[axis] for axis in (*batch, *own)]
        rows = [
            _rows(jnp.take(rotations, i, len(batch)), stride).reshape(*sizes, self.size)
            for i, stride in enumerate(strides)
        ]
        placed = [self.placed(row, (*batch, *own, "size")) for row in rows]
        return turned_by(plain(self.base, name=name), ins[-1], placed, strides)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OftParam(Rotation):
    """``R W`` with R block-diagonal and orthogonal, of the Cayley form ``(I - Q) (I + Q)^-1`` with Q skew-symmetric.

    R acts on the last of the in axes, with blocks of its own for each place of the others; those of a convolution's
    window share them. The option ``block_size`` is the size of a block, by default the largest up to 32 that fits.
    With ``factors`` m > 1, R is the product of m such matrices, the blocks of the i-th made of elements block_size^i
    apart (a butterfly).

    Args:
      base, axes, layers: as in `jlora.LoraParam`.
      oft_q: the entries of Q above the diagonal, of shape (batch..., factors, blocks, size (size - 1) / 2), trained;
        zero at the start.
      size: of a block.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> spec = jlora.LoraSpec(variant="oft", options={"block_size": 4})
      >>> node = jlora.wrap({"kernel": jnp.ones((8, 3))}, spec)["kernel"]
      >>> node.oft_q.shape, node.size  # one factor, 2 blocks of 4 x 4 with 6 entries above the diagonal
      ((1, 2, 6), 4)

    References:
      Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280;
      Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv:2311.06243.
    """

    OPTIONS = {"block_size": None, "factors": 1}
    LARGEST = 32

    base: Any = frozen()
    oft_q: Any = trained("batch factors blocks entries")
    axes: Axes = static()
    size: int = static()
    layers: tuple[int, ...] | None = static(default=None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BoftParam(Rotation):
    """`OftParam` with a butterfly of two factors, R = R_0 R_1, of blocks of up to 4, unless the options say otherwise.

    An axis that no square divides gets one factor. There is no scale of the outputs, which PEFT's BOFT trains besides.

    Args:
      base, axes, layers, oft_q, size: as in `OftParam`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> node = jlora.wrap({"kernel": jnp.ones((16, 3))}, jlora.LoraSpec(variant="boft"))["kernel"]
      >>> node.oft_q.shape, node.size  # two factors, each of 4 blocks
      ((2, 4, 6), 4)

    References:
      Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv:2311.06243.
    """

    OPTIONS = {"block_size": None, "factors": None}
    LARGEST = 4

    base: Any = frozen()
    oft_q: Any = trained("batch factors blocks entries")
    axes: Axes = static()
    size: int = static()
    layers: tuple[int, ...] | None = static(default=None)


def _blocks(kernel: Kernel, last: int, largest: int) -> tuple[int, int]:
    """The size of the blocks and the number of factors: those of the options, or what fits the axis."""
    given, factors = kernel.option("block_size"), kernel.option("factors")
    counts = (2, 1) if factors is None else (factors,)
    are_counts = all(type(n) is int and n >= 1 for n in counts) and (given is None or type(given) is int)
    fitting = [(n, m) for m in counts if are_counts for n in range(last, 1, -1) if last % n**m == 0]
    wanted = [(n, m) for n, m in fitting if n == given or (given is None and n <= largest)]
    if not wanted:
        sizes = sorted({n for n, _ in fitting})[:12]
        expected = f"block_size ** factors must divide the last in axis, {last}: block_size is one of {sizes}"
        kernel.refuse("options", expected, {"block_size": given, "factors": factors})
    return wanted[0]


def _cayley(entries: jax.Array, size: int) -> jax.Array:
    """The orthogonal matrices (..., size, size) of the entries (..., size (size - 1) / 2) above the diagonal of Q."""
    entries = entries.astype(wide(entries.dtype))
    rows, columns = jnp.triu_indices(size, 1)
    upper = jnp.zeros((*entries.shape[:-1], size, size), entries.dtype).at[..., rows, columns].set(entries)
    skew, eye = upper - upper.mT, jnp.eye(size, dtype=entries.dtype)
    return jnp.linalg.solve(eye + skew, eye - skew)


def _rows(blocks: jax.Array, stride: int) -> jax.Array:
    """Row i of R within its block, (..., n, size), of blocks (..., n / size, size, size) of elements `stride` apart."""
    *stack, count, size, _ = blocks.shape
    split = blocks.reshape(*stack, count // stride, stride, size, size)
    return jnp.swapaxes(split, -3, -2).reshape(*stack, count * size, size)
