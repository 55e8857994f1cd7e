"""OFT and BOFT: the kernel's input is rotated by a block-diagonal orthogonal matrix, or a product of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora.interpret.factored import Factored, Stride, gained, plain, steps, turned_by
from jlora.interpret.manual import check_size
from jlora.interpret.products import wide
from jlora.nodes.axes import Axes
from jlora.nodes.fields import frozen, static, trained
from jlora.nodes.form import Form
from jlora.nodes.kernel import Kernel
from jlora.nodes.node import AdaptedParam


class _OftForm(Form):
    """The entries of Q, block by block. PEFT's default is a series, of Q with the other sign than in the exact form."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        entries, blocks = fields["oft_q"], fields["oft_q"].shape[0]
        size = round((1 + math.sqrt(1 + 8 * entries.shape[1])) / 2)
        if size * (size - 1) // 2 != entries.shape[1]:
            raise ValueError(f"peft.load: OFT's {entries.shape} are no entries above the diagonal of {blocks} blocks")
        return {"oft_q": entries[None], "size": size, "terms": _terms(spec.options)}

    def write(self, fields: dict[str, np.ndarray], node: Any) -> dict[str, np.ndarray]:
        if len(fields["oft_q"]) > 1:
            raise ValueError(
                f"peft.save: OFT with {len(fields['oft_q'])} factors is none of PEFT's, which has one; merge it"
            )
        return {"oft_q": fields["oft_q"][0]}

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        blocks, entries = tensors["oft_R.weight"].shape
        return blocks * round((1 + math.sqrt(1 + 8 * entries)) / 2), None

    def settings_of(self, node: Any) -> dict[str, Any]:
        series = {} if node.terms is None else {"num_cayley_neumann_terms": node.terms}
        blocks = node.oft_q.shape[-2]
        return {"r": blocks, "oft_block_size": node.size, "use_cayley_neumann": node.terms is not None, **series}

    def together(self, settings: Mapping[str, dict[str, Any]]) -> Mapping[str, dict[str, Any]]:
        """Either the size of a block is the same for all modules, or their number is; the other is 0."""
        counts = {of["r"] for of in settings.values()}
        unsaid = (
            "oft_block_size"
            if len(counts) == 1 and len({of["oft_block_size"] for of in settings.values()}) > 1
            else "r"
        )
        return {name: of | {unsaid: 0} for name, of in settings.items()}


class _BoftForm(Form):
    """Whole matrices whose antisymmetric part is Q, and output scales; the last factor comes first."""

    def read(self, fields: dict[str, np.ndarray], spec: Any) -> dict[str, Any]:
        del spec
        whole = fields["boft_r"]
        size = whole.shape[-1]
        rows, columns = np.triu_indices(size, 1)
        entries = (0.5 * (whole - whole.swapaxes(-1, -2)))[..., rows, columns]
        return {"oft_q": entries, "boft_s": fields["boft_s"], "size": size, "butterfly": "halves"}

    def write(self, fields: dict[str, np.ndarray], node: Any) -> dict[str, np.ndarray]:
        entries, size = fields["oft_q"], node.size
        if len(entries) > 1 and node.butterfly != "halves":
            raise ValueError(
                "peft.save: PEFT's BOFT has another butterfly; wrap with options={'butterfly': 'halves'}, or merge it"
            )
        rows, columns = np.triu_indices(size, 1)
        upper = np.zeros((*entries.shape[:-1], size, size), np.float32)
        upper[..., rows, columns] = entries
        ones = np.ones(math.prod(node.shape[axis] for axis in node.axes.out_axis), np.float32)
        return {"boft_r": upper - upper.swapaxes(-1, -2), "boft_s": fields.get("boft_s", ones)}

    def sizes(self, tensors: Mapping[str, Any]) -> tuple[int | None, int | None]:
        _, blocks, size, _ = tensors["boft_R"].shape
        return blocks * size, tensors["boft_s"].shape[0]

    def settings_of(self, node: Any) -> dict[str, Any]:
        factors = node.oft_q.shape[len(node.axes.batch_axis)]
        return {"boft_block_size": node.size, "boft_block_num": 0, "boft_n_butterfly_factor": factors}


def _terms(options: Mapping[str, Any]) -> int | None:
    """How many terms of the series; None: the exact form."""
    return options["terms"] if options["cayley"] == "neumann" else None


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
        extra = cls.extra(kernel)
        turned = last if kernel.kind == "conv" else kernel.size("in")
        entries = size * (size - 1) // 2
        shape = kernel.sizes("batch factors blocks entries", factors=factors, blocks=turned // size, entries=entries)
        made: Any = cls
        return made(base, jnp.zeros(shape, kernel.dtype), size=size, **extra, **kernel.place)

    @classmethod
    def extra(cls, kernel: Kernel) -> dict[str, Any]:
        """The fields beside the entries and their size."""
        raise NotImplementedError

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
        rotations = self.rotations(self.everywhere(self.oft_q))
        factors, blocks = rotations.shape[len(batch) : len(batch) + 2]
        own = ins if blocks * self.size == math.prod(self.shape[axis] for axis in ins) else ins[-1:]
        check_size(name, "the rotation", blocks * self.size, math.prod(self.shape[axis] for axis in own))
        strides = self.strides(factors)
        sizes = [self.shape[axis] for axis in (*batch, *own)]
        rows = [
            _rows(jnp.take(rotations, i, len(batch)), stride).reshape(*sizes, self.size)
            for i, stride in enumerate(strides)
        ]
        placed = [self.placed(row, (*batch, *own, "size")) for row in rows]
        order = slice(None, None, -1 if self.is_last_first else 1)
        return turned_by(plain(self.base, name=name), ins[-1], placed[order], strides[order])

    is_last_first = False

    def strides(self, factors: int) -> list[Stride]:
        """Of each factor, the distance of the elements of a block."""
        return [self.size**i for i in range(factors)]

    def rotations(self, entries: jax.Array) -> jax.Array:
        """The blocks of each factor, (..., size, size), of the entries above the diagonal of Q."""
        return _cayley(entries, self.size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class OftParam(Rotation):
    """``R W`` with R block-diagonal and orthogonal, of the Cayley form ``(I - Q) (I + Q)^-1`` with Q skew-symmetric.

    R acts on the last of the in axes, with blocks of its own for each place of the others; those of a convolution's
    window share them. The option ``block_size`` is the size of a block, by default the largest up to 32 that fits.
    With ``factors`` m > 1, R is the product of m such matrices, the blocks of the i-th made of elements block_size^i
    apart (a butterfly). With the option ``cayley="neumann"``, PEFT's default, R is the series ``I + 2 Q + ... +
    2 Q^(t-2) + Q^(t-1)`` of ``terms`` t, with the other sign of Q: no system is solved, and R is orthogonal for small Q
    alone.

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

    OPTIONS = {"block_size": None, "factors": 1, "cayley": "exact", "terms": 5}
    LARGEST = 32
    FORM = _OftForm("OFT", {"oft_R.weight": "oft_q: blocks entries"}, bias="oft_only")

    base: Any = frozen()
    oft_q: Any = trained("batch factors blocks entries")
    axes: Axes = static()
    size: int = static()
    terms: int | None = static(default=None)
    layers: tuple[int, ...] | None = static(default=None)

    @classmethod
    def extra(cls, kernel: Kernel) -> dict[str, Any]:
        if kernel.option("cayley") not in ("exact", "neumann"):
            kernel.refuse("options['cayley']", "it is 'exact' or 'neumann'", kernel.option("cayley"))
        if type(kernel.option("terms")) is not int or kernel.option("terms") < 2:
            kernel.refuse("options['terms']", "it is an integer of at least 2", kernel.option("terms"))
        return {"terms": _terms(kernel.spec.options)}

    @property
    def settings(self) -> dict[str, Any]:
        form = {} if self.terms is None else {"cayley": "neumann", "terms": self.terms}
        return {"options": super().settings["options"] | form}

    def rotations(self, entries: jax.Array) -> jax.Array:
        return _cayley(entries, self.size) if self.terms is None else _neumann(entries, self.size, self.terms)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BoftParam(Rotation):
    """`OftParam` with a butterfly of two factors, R = R_0 R_1, of blocks of up to 4, unless the options say otherwise.

    An axis that no square divides gets one factor. PEFT's BOFT is that of the options ``butterfly="halves"``, where the
    blocks of the i-th factor are made of two runs of half a block, 2^i runs apart, and the last factor acts first; and
    of ``gain=True``, which trains a scale of the outputs besides.

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

    OPTIONS = {"block_size": None, "factors": None, "butterfly": "powers", "gain": False}
    LARGEST = 4
    FORM = _BoftForm(
        "BOFT", {"boft_R": "boft_r: factors blocks row column", "boft_s": "boft_s: out one"}, bias="boft_only"
    )

    base: Any = frozen()
    oft_q: Any = trained("batch factors blocks entries")
    axes: Axes = static()
    size: int = static()
    layers: tuple[int, ...] | None = static(default=None)
    boft_s: Any = trained("batch out", optional=True, default=())
    butterfly: str = static(default="powers")

    @classmethod
    def extra(cls, kernel: Kernel) -> dict[str, Any]:
        if kernel.option("butterfly") not in ("powers", "halves"):
            kernel.refuse("options['butterfly']", "it is 'powers' or 'halves'", kernel.option("butterfly"))
        if type(kernel.option("gain")) is not bool:
            kernel.refuse("options['gain']", "it is True or False", kernel.option("gain"))
        gain = {"boft_s": jnp.ones(kernel.sizes("batch out"), kernel.dtype)} if kernel.option("gain") else {}
        return {"butterfly": kernel.option("butterfly"), **gain}

    @property
    def settings(self) -> dict[str, Any]:
        form = {} if self.butterfly == "powers" else {"butterfly": self.butterfly}
        gain = {} if isinstance(self.boft_s, tuple) else {"gain": True}
        return {"options": super().settings["options"] | form | gain}

    def identity(self) -> Any:
        node = super().identity()
        return node if isinstance(node.boft_s, tuple) else dataclasses.replace(node, boft_s=jnp.ones_like(node.boft_s))

    @property
    def is_last_first(self) -> bool:
        return self.butterfly == "halves"

    def strides(self, factors: int) -> list[Stride]:
        if self.butterfly == "powers":
            return super().strides(factors)
        return [1 if i == 0 else (2**i, self.size // 2) for i in range(factors)]

    def effective(self, name: str, key: jax.Array | None) -> Factored:
        turned = super().effective(name, key)
        return (
            turned if isinstance(self.boft_s, tuple) else gained(turned, self.beside(self.boft_s, "batch out", fill=1))
        )


def _blocks(kernel: Kernel, last: int, largest: int) -> tuple[int, int]:
    """The size of the blocks and the number of factors: those of the options, or what fits the axis."""
    given, factors = kernel.option("block_size"), kernel.option("factors")
    counts = (2, 1) if factors is None else (factors,)
    are_counts = all(type(n) is int and n >= 1 for n in counts) and (given is None or type(given) is int)
    halves = kernel.spec.options.get("butterfly") == "halves"
    divides = lambda n, m: (last % (n * 2 ** (m - 1)) == 0 and (m == 1 or n % 2 == 0)) if halves else last % n**m == 0
    fitting = [(n, m) for m in counts if are_counts for n in range(last, 1, -1) if divides(n, m)]
    wanted = [(n, m) for n, m in fitting if n == given or (given is None and n <= largest)]
    if not wanted:
        sizes = sorted({n for n, _ in fitting})[:12]
        divisor = "block_size * 2 ** (factors - 1), with an even block_size," if halves else "block_size ** factors"
        expected = f"{divisor} must divide the last in axis, {last}: block_size is one of {sizes}"
        kernel.refuse("options", expected, {"block_size": given, "factors": factors})
    return wanted[0]


def _skew(entries: jax.Array, size: int) -> jax.Array:
    """Q, (..., size, size), of the entries (..., size (size - 1) / 2) above its diagonal."""
    entries = entries.astype(wide(entries.dtype))
    rows, columns = jnp.triu_indices(size, 1)
    upper = jnp.zeros((*entries.shape[:-1], size, size), entries.dtype).at[..., rows, columns].set(entries)
    return upper - upper.mT


def _cayley(entries: jax.Array, size: int) -> jax.Array:
    """The orthogonal matrices of the entries above the diagonal of Q."""
    skew = _skew(entries, size)
    eye = jnp.eye(size, dtype=skew.dtype)
    return jnp.linalg.solve(eye + skew, eye - skew)


def _neumann(entries: jax.Array, size: int, terms: int) -> jax.Array:
    """The series of (I + Q) (I - Q)^-1, cut off: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1); PEFT's of 3 terms has 4."""
    skew = _skew(entries, size)
    eye = jnp.eye(size, dtype=skew.dtype)
    if terms == 2:
        return eye + 2 * skew
    powers = [skew]
    while len(powers) < max(terms, 4) - 1:
        powers.append(powers[-1] @ skew)
    return eye + 2 * sum(powers[:-1]) + powers[-1]


def _rows(blocks: jax.Array, stride: Stride) -> jax.Array:
    """Row i of R within its block, (..., n, size), of blocks (..., n / size, size, size) of elements `stride` apart."""
    *stack, count, size, _ = blocks.shape
    step, run = steps(stride)
    split = blocks.reshape(*stack, count // step, step, size // run, run, size)
    return jnp.swapaxes(split, -4, -3).reshape(*stack, count * size, size)
