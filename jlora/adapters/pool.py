"""`Pool`: adapters for serving that come and go, while the compiled step stays."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import peft
from jlora.adapters.dims import rank_of
from jlora.adapters.room import blank, inserted, of_rank, second, with_room
from jlora.adapters.stack import stack
from jlora.adapters.stacked import StackedParam
from jlora.adapters.trees import are_same
from jlora.interpret.sites import Site
from jlora.nodes.node import TrainableParam, is_node, is_unit
from jlora.spec import LoraSpec
from jlora.targets.paths import flatten_named
from jlora.tree import has_nodes
from jlora.variants.lora import from_start
from jlora.wrap import wrap


class Pool:
    """Adapters on one base, by name, as many as there is room for.

    If there is no room, the least recently used adapter is removed.

    The tree of all has one structure and shape whatever is in it, so that a compiled function of it is never compiled
    again. Its arrays are replaced, never written: a step that runs on an earlier tree is not disturbed. All methods may
    be called from several threads; `put` reads files before it stops the others, so that one thread can load while
    another runs steps.

    Args:
      base: the plain tree, which may be quantised, and placed on a mesh.
      capacity: how many adapters there is room for.
      rank: the largest rank that there is room for. Adapters of a lower rank cost as much.
      spec: a `jlora.LoraSpec` that tells which kernels adapters may have, of which variant, which leaves in full, and
        the type of the factors; its rank, scale and dropout count for nothing. None: all linear layers, LoRA.
      sites: as in `jlora.wrap`.

    Attributes:
      tree: of all adapters now, for `jlora.adapters.batched`; `take` gives it with the numbers that go with it.
      base: the plain tree that was given.
      capacity: how many adapters there is room for.
      rank: the largest rank that there is room for.

    Raises:
      ValueError: if capacity or rank is less than one, or as `jlora.wrap` does.
      TypeError: if the base is wrapped.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> pool = jlora.adapters.Pool(params, capacity=2, rank=4)
      >>> run = jax.jit(jlora.adapters.batched(lambda p, x: x @ p["kernel"]))
      >>> for seed, name in enumerate(("poems", "reviews", "news")):
      ...     pool.put(name, jlora.wrap(params, jlora.LoraSpec(rank=2, seed=seed)))
      >>> list(pool)
      ['reviews', 'news']
      >>> tree, ids = pool.take(["news", None, "reviews"])
      >>> run(tree, ids, jnp.ones((3, 5, 4))).shape
      (3, 5, 3)
    """

    def __init__(
        self,
        base: Any,
        capacity: int,
        rank: int,
        *,
        spec: LoraSpec | None = None,
        sites: Mapping[str, Site] | None = None,
    ) -> None:
        if has_nodes(base):
            raise TypeError("Pool takes the plain base; this tree is wrapped: jlora.unwrap it, and put it by name")
        for what, n in (("capacity", capacity), ("rank", rank)):
            if type(n) is not int or n < 1:
                raise ValueError(f"Pool: {what} must be a whole number from 1 on, found {n!r}")
        spec = LoraSpec(targets="all-linear") if spec is None else spec
        self.base = base
        self.capacity = capacity
        self.rank = rank
        self._blank = blank(wrap(base, of_rank(spec, rank, base, sites), sites=sites))
        self._tree = with_room(self._blank, base, capacity)
        self._slots: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._lock = threading.RLock()

    @property
    def tree(self) -> Any:
        return self._tree

    def put(self, name: str, adapter: Any, **settings: Any) -> None:
        """Takes an adapter in, or another one under the same name; it counts as used now.

        Where the pool is full, the adapter longest unused makes way.

        Args:
          name: by which it is asked for.
          adapter: a wrapped tree on this base, or what `jlora.peft.load` takes: a directory, or ``"org/name"``.
          **settings: of `jlora.peft.load`, such as ``names="llama"``.

        Raises:
          ValueError: if it has a kernel, a variant or a rank for which there is no room, or stands on another base; or
            as `jlora.peft.load` does. The pool is as it was then.
          TypeError: if the name is no string, the adapter is no wrapped tree, or there are settings for a tree.
          OSError: as `jlora.peft.load` does, if there are no such files.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> params = {"kernel": jnp.ones((4, 3))}
          >>> pool = jlora.adapters.Pool(params, capacity=1, rank=4)
          >>> pool.put("poems", jlora.wrap(params, jlora.LoraSpec(rank=2)))
          >>> pool.put("news", jlora.wrap(params, jlora.LoraSpec(rank=3)))
          >>> list(pool), "poems" in pool
          (['news'], False)
        """
        if not isinstance(name, str):
            raise TypeError(f"Pool.put: the name of an adapter is a string, found {name!r}")
        is_file = isinstance(adapter, (str, Path))
        if settings and not is_file:
            raise TypeError(f"Pool.put: {', '.join(settings)} is for files, and {name!r} is a tree")
        tree = peft.load(adapter, self.base, **settings) if is_file else adapter
        arrays = self._fitted(name, tree)
        with self._lock:
            slot = self._slots[name] if name in self._slots else self._free()
            self._tree = inserted(self._tree, slot, arrays)
            self._slots[name] = slot
            self._slots.move_to_end(name)

    def remove(self, name: str) -> None:
        """Takes an adapter out; its place is free for another one.

        Args:
          name: of the adapter.

        Raises:
          KeyError: if there is none of that name.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> params = {"kernel": jnp.ones((4, 3))}
          >>> pool = jlora.adapters.Pool(params, capacity=2, rank=4)
          >>> pool.put("poems", jlora.wrap(params, jlora.LoraSpec(rank=2)))
          >>> pool.remove("poems")
          >>> len(pool)
          0
        """
        with self._lock:
            self._number(name)
            del self._slots[name]

    def ids(self, names: Iterable[str | None]) -> jax.Array:
        """The numbers of adapters in the tree as it is now, for `jlora.adapters.batched`.

        They count as used now. Where other threads put adapters in, `take` gives the numbers with the tree that they
        belong to.

        Args:
          names: one for each row of a batch; None is the base.

        Returns:
          An array of int32, of shape (rows,); -1 is the base.

        Raises:
          KeyError: if there is none of a name.
          TypeError: if `names` is one string.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> params = {"kernel": jnp.ones((4, 3))}
          >>> pool = jlora.adapters.Pool(params, capacity=2, rank=4)
          >>> pool.put("poems", jlora.wrap(params, jlora.LoraSpec(rank=2)))
          >>> pool.ids(["poems", None]).tolist()
          [0, -1]
        """
        return self.take(names)[1]

    def take(self, names: Iterable[str | None]) -> tuple[Any, jax.Array]:
        """The tree of all adapters, and the numbers of some of them in it; they count as used now.

        Args:
          names: one for each row of a batch; None is the base.

        Returns:
          The tree, and an array of int32 of shape (rows,): the first two arguments of what `jlora.adapters.batched`
          makes.

        Raises:
          KeyError: if there is none of a name.
          TypeError: if `names` is one string.

        Example:
          >>> import jax.numpy as jnp, jlora
          >>> params = {"kernel": jnp.ones((4, 3))}
          >>> pool = jlora.adapters.Pool(params, capacity=2, rank=4)
          >>> pool.put("poems", jlora.wrap(params, jlora.LoraSpec(rank=2)))
          >>> tree, ids = pool.take(["poems", None])
          >>> jlora.adapters.batched(lambda p, x: x @ p["kernel"])(tree, ids, jnp.ones((2, 1, 4))).shape
          (2, 1, 3)
        """
        if isinstance(names, str):
            raise TypeError(f"Pool: names are a list, one for each row of a batch, found the string {names!r}")
        with self._lock:
            names = list(names)
            numbers = [-1 if name is None else self._number(name) for name in names]
            for name in names:
                if name is not None:
                    self._slots.move_to_end(name)
            tree = self._tree
        return tree, jnp.asarray(np.asarray(numbers, np.int32))

    def __iter__(self) -> Iterator[str]:
        """The names, that of the adapter longest unused first."""
        with self._lock:
            return iter(list(self._slots))

    def __repr__(self) -> str:
        return f"Pool({', '.join(map(repr, self))}; {len(self)} of {self.capacity}, rank {self.rank})"

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, name: object) -> bool:
        return name in self._slots

    def _number(self, name: str) -> int:
        if name not in self._slots:
            known = ", ".join(map(repr, self._slots)) or "nothing"
            raise KeyError(f"Pool: there is no adapter {name!r}; it holds {known}")
        return self._slots[name]

    def _free(self) -> int:
        """A place that is free, be it by the adapter longest unused."""
        if len(self._slots) == self.capacity:
            return self._slots.popitem(last=False)[1]
        return min({*range(self.capacity)} - {*self._slots.values()})

    def _fitted(self, name: str, tree: Any) -> list[Any]:
        """The arrays of an adapter as they go into the tree: of full rank, of all kernels and layers."""
        if not has_nodes(tree):
            raise TypeError(f"Pool.put: {name!r} is no wrapped tree, nor the path of an adapter")
        room = dict(zip(*flatten_named("Pool.put", self._blank, is_unit)[:2], strict=True))
        paths, leaves, treedef = flatten_named("Pool.put", tree, is_unit)
        fitting = [self._checked(name, path, leaf, room.get(path)) for path, leaf in zip(paths, leaves, strict=True)]
        try:
            both = stack([self._blank, treedef.unflatten(fitting)])
        except ValueError as error:
            raise ValueError(f"Pool.put: {name!r} does not fit: {error}") from error
        return [second(node) for node in jax.tree.leaves(both, is_leaf=is_unit) if isinstance(node, StackedParam)]

    def _checked(self, name: str, path: str, leaf: Any, room: Any) -> Any:
        """A leaf of an adapter, which has room here."""
        base = room.base if is_node(room) and not isinstance(room, TrainableParam) else room
        own = leaf.base if is_node(leaf) else leaf
        if not isinstance(room, TrainableParam) and not isinstance(leaf, TrainableParam) and not are_same(base, own):
            raise ValueError(f"Pool.put: {name!r} stands on another base than this pool's, as at {path}")
        if not is_node(leaf):
            return leaf
        if isinstance(leaf, StackedParam):
            raise ValueError(f"Pool.put: {name!r} is no single adapter: {leaf.advice()}")
        if not is_node(room):
            raise ValueError(
                f"Pool.put: {name!r} adapts {path}, for which there is no room; say so when the pool is made, as in "
                "Pool(..., spec=jlora.LoraSpec(targets=..., train=...))"
            )
        if getattr(leaf, "start", ()):
            lora_a, lora_b = from_start(leaf)
            leaf = dataclasses.replace(leaf, lora_a=lora_a, lora_b=lora_b, start=())
        if type(leaf) is not type(room):
            raise ValueError(
                f"Pool.put: {name!r} has a {type(leaf).__name__} at {path}, and there is room for a "
                f"{type(room).__name__}: make the pool with Pool(..., spec=jlora.LoraSpec(variant=...)), or plain LoRA "
                "of the adapter, by jlora.to_plain_lora(tree) or jlora.peft.low_rank(tree, rank)"
            )
        rank, most = rank_of(leaf) or 0, rank_of(room) or 0
        if rank > most:
            raise ValueError(
                f"Pool.put: {name!r} has rank {rank} at {path}, and there is room for {most}: make the pool with that "
                "rank, or take jlora.adapters.resize(tree, rank)"
            )
        return leaf
