"""The checkpoints of a training run: a directory for each step."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax

from jlora.checkpoint import adapter, backend, steps
from jlora.checkpoint.adapter import ABOUT, ADAPTER
from jlora.checkpoint.processes import agreed, gather
from jlora.checkpoint.state import STATE, contents_of, restored
from jlora.checkpoint.steps import RUN
from jlora.checkpoint.told import unique
from jlora.nodes.node import AdaptedParam


class Saved(NamedTuple):
    """A step of a run, as `Checkpoints.load` returns it.

    Args:
      step: its number.
      tree: the wrapped tree, on the base that was given.
      state: the state, of the structure that was asked for; None if none was.
      extra: the JSON that was saved beside it; None if there was none.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with jlora.checkpoint.Checkpoints(directory) as checkpoints:
      ...         checkpoints.save(10, jlora.wrap(params, jlora.LoraSpec(rank=2)), extra={"epoch": 1})
      ...     step, tree, state, extra = jlora.checkpoint.Checkpoints(directory).load(params)
      >>> step, tree["kernel"].rank, state, extra
      (10, 2, None, {'epoch': 1})
    """

    step: int
    tree: Any
    state: Any
    extra: Any


class Checkpoints:
    """The last and the best checkpoints of a run, each in a directory of its own: ``run/100``.

    A step is written to a directory beside, which gets its name when all is there: whenever a run is killed, the last
    whole step loads, and nothing else is offered. Where several processes run, all of them make the same calls. A
    step's directory is one of `jlora.checkpoint.load` too.

    Used as a context it waits at its end for what is still being written.

    Args:
      directory: of the run; made if it is not there. One job at a time may save into it.
      keep_last: how many of the last steps are kept; None: all.
      keep_best: how many of the best are kept too.
      metric: which of the metrics says what is best; a step that was saved without metrics never is.
      mode: "min" or "max": whether a smaller or a larger metric is better.
      background: `save` returns before the files are written.

    Raises:
      ValueError: if `keep_last`, `keep_best`, `metric` and `mode` don't fit.

    Warns:
      UserWarning: if a step is not whole; it is passed over.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora, optax
      >>> params = {"kernel": jnp.ones((4, 3))}
      >>> tree = jlora.wrap(params, jlora.LoraSpec(rank=2))
      >>> state = jlora.optimizer(optax.adam(1e-3), tree).init(tree)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     with jlora.checkpoint.Checkpoints(directory, keep_last=2) as checkpoints:
      ...         for step in (10, 20, 30):
      ...             checkpoints.save(step, tree, state=state, extra={"epoch": 0})
      ...     again = jlora.checkpoint.Checkpoints(directory)
      ...     saved = again.load(params, state=state)
      >>> again.steps, saved.step, saved.extra
      ([20, 30], 30, {'epoch': 0})
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int | None = 2,
        keep_best: int = 0,
        metric: str | None = None,
        mode: str = "min",
        background: bool = True,
    ) -> None:
        _check_settings(keep_last, keep_best, metric, mode)
        self.directory = backend.path_of(directory)
        self.keep_last, self.keep_best, self.metric, self.mode = keep_last, keep_best, metric, mode
        self.background = background
        self._metrics: dict[int, dict[str, float]] = {}  # of each whole step
        self._pending: tuple[int, dict[str, float], Callable[[], None]] | None = None
        self._is_writer = False
        found, faults = agreed(lambda: steps.whole_steps(self.directory))
        self._metrics = {int(step): metrics for step, metrics in found.items()}
        for fault in faults:
            warnings.warn(f"{fault}; this step is passed over", UserWarning, stacklevel=2)

    @property
    def steps(self) -> list[int]:
        """The steps that are whole; one that is still being written is not among them until `wait`, or `save`."""
        return sorted(self._metrics)

    @property
    def latest(self) -> int | None:
        """The last whole step."""
        return max(self._metrics, default=None)

    @property
    def best(self) -> int | None:
        """The best whole step by the metric; of equal ones the last."""
        return next(iter(self._by_metric()), None)

    def _by_metric(self) -> list[int]:
        sign = 1 if self.mode == "min" else -1
        score = {step: sign * metrics.get(self.metric or "", math.nan) for step, metrics in self._metrics.items()}
        known = [step for step in score if not math.isnan(score[step])]
        return sorted(known, key=lambda step: (score[step], -step))

    def save(
        self, step: int, tree: Any, *, state: Any = None, extra: Any = None, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Saves a step: waits for the one before, copies the arrays, and has them written in the background.

        Args:
          step: its number, from 0 on.
          tree: a wrapped tree; its adapter is saved, not its base.
          state: any pytree of arrays of numbers, such as an optimizer's state.
          extra: any JSON, the same in all processes: what each has of its own goes through `gather`, as in
            ``extra={"data": gather(iterator.get_state())}``.
          metrics: numbers by name, the same in all processes.

        Raises:
          FileExistsError: if the step is there already.
          TypeError: if nothing in the tree is wrapped, the state is a ``TrainState`` or has something else than
            arrays, a metric is no number, or `extra` is no JSON.
          ValueError: if the step is no number from 0 on, processes give different metrics or extras, or the metrics
            lack the one that says what is best.
          Exception: what went wrong when the step before was written.

        Example:
          >>> import tempfile, jax.numpy as jnp, jlora
          >>> tree = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     with jlora.checkpoint.Checkpoints(directory, keep_last=1, keep_best=1, metric="loss") as checkpoints:
          ...         for step, loss in ((10, 0.5), (20, 0.3), (30, 0.4)):
          ...             checkpoints.save(step, tree, metrics={"loss": loss})
          >>> checkpoints.steps, checkpoints.best, checkpoints.latest  # the best and the last are kept
          ([20, 30], 20, 30)
        """
        self.wait()
        if hasattr(state, "opt_state") and hasattr(state, "params"):
            raise TypeError(
                f"Checkpoints.save: state is a {type(state).__name__}, which has the base too. Give what is not in the "
                "tree: save(step, ts.params, state=ts.opt_state), and after load ts.replace(step=step, params=tree, "
                "opt_state=state)"
            )
        values, told = adapter.contents("Checkpoints.save", tree)
        numbers = {name: _number(name, x) for name, x in (metrics or {}).items()}
        self._check_step(step, numbers, extra)
        state_arrays, state_told = contents_of(state)
        arrays = {ADAPTER: values} | ({STATE: state_arrays} if state_arrays else {})
        texts = {ABOUT: told, RUN: {"metrics": numbers, "extra": extra, "state": state_told}}
        at = self.directory / str(step)
        replace = agreed(lambda: self._prepared(at))
        self._pending = step, numbers, backend.write(at, arrays, texts, replace)
        if not self.background:
            self.wait()

    def _check_step(self, step: int, metrics: Mapping[str, float], extra: Any) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"Checkpoints.save: step must be a number from 0 on, found {step!r}")
        if self.metric and metrics and self.metric not in metrics:
            raise ValueError(f"Checkpoints.save: metrics has no {self.metric!r}; it has {', '.join(metrics)}")
        _check_json(extra)
        at = self.directory / str(step)
        if fault := agreed(lambda: steps.fault(at, step in self._metrics)):
            raise FileExistsError(fault)
        given = gather({"step": step, "metrics": metrics, "extra": extra})
        if any(other != given[0] and str(other) != str(given[0]) for other in given):
            raise ValueError(
                f"Checkpoints.save: processes give different steps, metrics or extras: {given}. What each process has "
                "of its own goes through jlora.checkpoint.gather"
            )

    def _prepared(self, at: Any) -> bool:
        """Makes room for a step; whether something is to be replaced: what an interrupted deletion has left."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._is_writer:
            steps.clean(self.directory)
            self._is_writer = True
        return at.exists()

    def wait(self) -> None:
        """Waits for what is being written, and deletes the steps that are not kept.

        The end of a ``with`` block calls it, and so do `save` and `load`. Where nothing is being written it does
        nothing.

        Raises:
          Exception: what went wrong when the step was written.

        Example:
          >>> import tempfile, jax.numpy as jnp, jlora
          >>> tree = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     checkpoints = jlora.checkpoint.Checkpoints(directory)
          ...     checkpoints.save(10, tree)
          ...     checkpoints.wait()
          >>> checkpoints.steps
          [10]
        """
        if self._pending is None:
            return
        (step, metrics, done), self._pending = self._pending, None
        done()
        self._metrics[step] = metrics
        self._prune(step)

    def _prune(self, written: int) -> None:
        if self.keep_last is None:
            return
        kept = {written, *self.steps[-self.keep_last :], *self._by_metric()[: self.keep_best]}
        for step in {*self.steps} - kept:
            del self._metrics[step]
            if jax.process_index() == 0:
                steps.delete(self.directory / str(step))

    def load(
        self,
        params: Any,
        *,
        state: Any = None,
        step: int | None = None,
        variants: Sequence[type[AdaptedParam]] = (),
        check_base: bool = True,
    ) -> Saved:
        """Loads a step, by default the last whole one.

        Args:
          params: the base, plain; the adapter is placed as it is.
          state: what was saved as `state`, concrete or abstract (`jax.eval_shape` of what makes it): its structure,
            shapes and types. An array that has a sharding here lies there; one that has none lies as the leaf of the
            tree that it belongs to (a moment as its factor), or else whole on each device of the base's mesh.
          step: another step. The last one is passed over for the one before if its files can't be read.
          variants: as in `jlora.checkpoint.load`.
          check_base: as in `jlora.checkpoint.load`.

        Returns:
          The step, the wrapped tree, the state (None if none is asked for) and the extra.

        Raises:
          FileNotFoundError: if there is no such step; `latest` is None where there is none at all.
          ValueError: if the base or the state is another, or the files are damaged.

        Warns:
          UserWarning: if the last step is passed over.

        Example:
          >>> import tempfile, jax.numpy as jnp, jlora
          >>> params = {"kernel": jnp.ones((4, 3))}
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     checkpoints = jlora.checkpoint.Checkpoints(directory)
          ...     for step in (10, 20):
          ...         checkpoints.save(step, jlora.wrap(params, jlora.LoraSpec(rank=2)))
          ...     last, first = checkpoints.load(params), checkpoints.load(params, step=10)
          >>> last.step, first.step
          (20, 10)
        """
        self.wait()
        if step is not None or len(self._metrics) < 2:
            return self._loaded(self.latest if step is None else step, params, state, variants, check_base)
        last, found, fault = self.steps[-1], None, None
        try:
            found = self._loaded(last, params, state, variants, check_base)
        except backend.DamagedError as error:
            fault = str(error)
        if not (faults := [fault for fault in gather(fault) if fault]):
            return found  # type: ignore[return-value]
        warnings.warn(f"{faults[0]}; this step is passed over", UserWarning, stacklevel=2)
        del self._metrics[last]
        return self.load(params, state=state, variants=variants, check_base=check_base)

    def extra(self, step: int | None = None) -> Any:
        """What was saved as `extra` with a step; no array is read.

        Args:
          step: its number; None: the last whole one.

        Returns:
          The JSON that was saved; None if there was none.

        Raises:
          FileNotFoundError: if there is no such step.

        Example:
          >>> import tempfile, jax.numpy as jnp, jlora
          >>> tree = jlora.wrap({"kernel": jnp.ones((4, 3))}, jlora.LoraSpec(rank=2))
          >>> with tempfile.TemporaryDirectory() as directory:
          ...     checkpoints = jlora.checkpoint.Checkpoints(directory)
          ...     checkpoints.save(10, tree, extra={"epoch": 1})
          ...     found = checkpoints.extra()
          >>> found
          {'epoch': 1}
        """
        self.wait()
        return steps.said(self._at(self.latest if step is None else step))["extra"].value

    def _at(self, step: int | None) -> Any:
        """The directory of a whole step."""
        if step is None or step not in self._metrics:
            wanted = "no whole step" if step is None else f"no whole step {step}; it has {self.steps}"
            raise FileNotFoundError(f"Checkpoints: {self.directory} has {wanted}")
        return self.directory / str(step)

    def _loaded(self, step: int | None, params: Any, state: Any, variants: Any, check_base: bool) -> Saved:
        at = self._at(step)
        tree = adapter.load(at, params, variants=variants, check_base=check_base)
        told = steps.said(at)
        return Saved(int(at.name), tree, restored(at, state, told["state"].value, tree), told["extra"].value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


def _number(name: str, x: Any) -> float:
    try:
        return float(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"Checkpoints.save: metrics[{name!r}] must be a number, found {x!r}") from error


def _check_json(extra: Any) -> None:
    try:
        json.loads(json.dumps(extra), object_pairs_hook=unique)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"Checkpoints.save: extra must be JSON: {error}. Give numbers as int(x) or float(x), and arrays in state="
        ) from error


def _check_settings(keep_last: int | None, keep_best: int, metric: str | None, mode: str) -> None:
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"Checkpoints: keep_last must be at least 1, or None for all, found {keep_last}")
    if keep_best < 0 or (keep_best and metric is None):
        raise ValueError(f"Checkpoints: keep_best={keep_best} needs metric=, the name of one of the metrics")
    if mode not in ("min", "max"):
        raise ValueError(f'Checkpoints: mode must be "min" or "max", found {mode!r}')
