"""The modules that stand for an adapted model, and for a part of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from jlora.nnx.calls import merged_param, run

OWN = ("base_model", "lora_params", "lora_rngs", "lora_types", "lora_fallback", "lora_settings", "lora_deterministic")
OF_PARTS = ("lora_whole", "lora_steps")
ON_THE_HOST = (
    "jlora.nnx: a call of an adapted model is traced, as under jax.jit. A method that needs values on the host, such "
    "as a loop of decoding that asks for int(token), runs unbound, Model.generate(model, ...), or on "
    "jlora.nnx.merge(model)."
)


class _Seen(nnx.Module):
    """What is seen of a model through its adapters: calls and methods run with them, attributes are the model's own."""

    def _whole(self) -> Adapted:
        raise NotImplementedError

    def _steps(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def _plain(self) -> Any:
        """The part of the model that is seen, without adapters."""
        return _part_of(self._whole().base_model, self._steps())

    def _run(self, fn: Callable[..., Any], args: Any = (), kwargs: Any = None) -> Any:
        steps, whole = self._steps(), self._whole()
        on_part = lambda model, *args, **kwargs: fn(_part_of(model, steps), *args, **kwargs)
        try:
            return _with_parts(whole, run(whole, on_part, args, kwargs or {}))
        except jax.errors.JAXTypeError as error:
            error.add_note(ON_THE_HOST)
            raise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(lambda part, *args, **kwargs: part(*args, **kwargs), args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_pytree__", "__")) or name in (*OWN, *OF_PARTS):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        plain = self._plain()
        found = inspect.getattr_static(type(plain), name, None)
        if isinstance(found, property):
            return self._run(lambda part: getattr(part, name))
        value = getattr(plain, name)
        if not inspect.ismethod(value) or value.__self__ is not plain:
            return self._seen(value)

        def method(*args: Any, **kwargs: Any) -> Any:
            return self._run(lambda part, *args, **kwargs: getattr(part, name)(*args, **kwargs), args, kwargs)

        method.__name__, method.__doc__ = name, value.__doc__
        return method

    def __getitem__(self, key: Any) -> Any:
        return self._run(lambda part: part[key]) if _is_custom(self._plain()) else self._seen(self._plain()[key])

    def __len__(self) -> int:
        return len(self._plain())

    def __bool__(self) -> bool:
        return bool(self._plain())

    def __iter__(self) -> Iterator[Any]:
        return iter([self._seen(x) for x in self._plain()])

    def _seen(self, value: Any) -> Any:
        return (
            merged_param(self._whole(), value) if isinstance(value, nnx.Variable) else _with_parts(self._whole(), value)
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._plain())})

    def __delattr__(self, name: str) -> None:
        delattr(self._plain(), name)


class Adapted(_Seen):
    """An NNX model with adapters, as `jlora.nnx.wrap` returns it.

    It is called as the model was, and so are its other methods; submodules are seen through the adapters too
    (`model.encoder(x)`), and attributes that are set are those of the model. A kernel that is read outside of a call
    has its adapter in it. Batch statistics, caches and dropout streams change in a call as they do in one of the model.

    A call is traced, as by `jax.jit`. A method that needs values on the host, such as a loop of decoding that asks for
    ``int(token)``, runs unbound, ``Model.generate(model, ...)``, or on the merged model.

    Attributes:
      base_model: the model; a leaf that is trained in full is an `nnx.LoRAParam` in it.
      lora_params: the adapters by path: `nnx.LoRAParam` variables, and `FrozenParam` ones for what does not train.
      lora_rngs: the stream of the adapters' dropout; None without.
      deterministic: whether the adapters' dropout is off, as `eval` sets it and `train` unsets it; the model's own, if
        it has one, is set with it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> from flax import nnx
      >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2))
      >>> type(model).__name__, type(model.base_model).__name__, model(jnp.ones((5, 4))).shape
      ('Adapted', 'Linear', (5, 3))
    """

    def __init__(self, model: Any, params: Any, *, rngs: Any, types: Any, fallback: str, settings: Mapping[str, Any]):
        self.base_model = model
        self.lora_params = nnx.data(params)
        self.lora_rngs = nnx.data(rngs)
        self.lora_types = nnx.static(tuple(types))
        self.lora_fallback = nnx.static(fallback)
        self.lora_settings = nnx.static(tuple(settings.items()))
        self.lora_deterministic = False

    @property
    def deterministic(self) -> Any:
        """Whether the adapters' dropout is off; the model's own setting of this name where it has one."""
        return getattr(self.base_model, "deterministic", self.lora_deterministic)

    def _whole(self) -> Adapted:
        return self

    def _steps(self) -> tuple[Any, ...]:
        return ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OWN or name.startswith("_pytree__"):
            super().__setattr__(name, value)
        elif name == "deterministic":
            self.lora_deterministic = bool(value)
            if hasattr(self.base_model, name):
                setattr(self.base_model, name, value)
        else:
            setattr(self.base_model, name, value)

    def train(self, **attributes: Any) -> None:
        """Switches the model to training, and the adapters' dropout on.

        Args:
          **attributes: of the model's own ``train``.

        Example:
          >>> import jlora
          >>> from flax import nnx
          >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2, dropout=0.1))
          >>> model.train()
          >>> model.deterministic
          False
        """
        self.base_model.train(**attributes)
        self.lora_deterministic = False

    def eval(self, **attributes: Any) -> None:
        """Switches the model to evaluation, and the adapters' dropout off.

        Args:
          **attributes: of the model's own ``eval``.

        Example:
          >>> import jlora
          >>> from flax import nnx
          >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2, dropout=0.1))
          >>> model.eval()
          >>> model.deterministic
          True
        """
        self.base_model.eval(**attributes)
        self.lora_deterministic = True

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches the adapters' dropout in an `nnx.view`, which calls it.

        Args:
          deterministic: whether it is off; None leaves it as it is.

        Example:
          >>> import jlora
          >>> from flax import nnx
          >>> model = jlora.nnx.wrap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), jlora.LoraSpec(rank=2, dropout=0.1))
          >>> model.set_view(deterministic=True)
          >>> model.deterministic
          True
        """
        self.lora_deterministic = self.lora_deterministic if deterministic is None else deterministic


class Part(_Seen):
    """A submodule of an adapted model, seen through its adapters; or a list or dict of such.

    It is what an attribute of an `Adapted` model is, where the model has a submodule. Its calls run with the adapters.

    Attributes:
      lora_whole: the adapted model.
      lora_steps: the names and numbers that lead to it in the model.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.relu)
      >>> model = jlora.nnx.wrap(model, jlora.LoraSpec(rank=2))
      >>> type(model.layers[0]).__name__, model.layers[0](jnp.ones((5, 4))).shape
      ('Part', (5, 3))
    """

    def __init__(self, whole: Adapted, steps: tuple[Any, ...]):
        self.lora_whole = whole
        self.lora_steps = nnx.static(steps)

    def _whole(self) -> Adapted:
        return self.lora_whole

    def _steps(self) -> tuple[Any, ...]:
        return self.lora_steps

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_PARTS or name.startswith("_pytree__"):
            super().__setattr__(name, value)
        else:
            setattr(self._plain(), name, value)

    def __repr__(self) -> str:
        of = type(self.lora_whole.base_model).__name__
        return f"{'.'.join(map(str, self.lora_steps))} of an adapted {of}: {self._plain()!r}"


def _is_custom(x: Any) -> bool:
    """Whether a module computes its items, where lists, dicts and sequences hold them."""
    return not isinstance(x, (nnx.List, nnx.Dict, nnx.Sequential, nnx.Variable, list, tuple, dict))


def _part_of(model: Any, steps: tuple[Any, ...]) -> Any:
    for step in steps:
        model = getattr(model, step) if isinstance(step, str) and hasattr(model, step) else model[step]
    return model


def _is_module(x: Any) -> bool:
    return isinstance(x, nnx.Module)


def _with_parts(whole: Adapted, value: Any) -> Any:
    """A value with each module of the model in it as a `Part`: called by itself it would run without adapters."""
    if not any(map(_is_module, jax.tree.leaves(value, is_leaf=_is_module))):
        return value
    places = {id(node): path for path, node in nnx.iter_graph(whole.base_model) if _is_module(node)}
    see = lambda x: Part(whole, places[id(x)]) if _is_module(x) and id(x) in places else x
    return jax.tree.map(see, value, is_leaf=_is_module)
