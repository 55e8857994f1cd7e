"""Writers that are killed: at each of their calls to the file system, or at a random moment.

    python -m tests.kills save merge model --random 100

Each writer runs in a process of its own, which is killed; what is there then must load as the last whole state, and the
next call must leave what a run without a kill leaves, and no other file. Prints a line for each kind.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jlora import checkpoint, peft
from jlora.__main__ import main as command
from jlora.checkpoint import steps
from jlora.peft.card import CARD, is_own
from tests.peft_files.trees import flat, lora, merged, nested

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")


def in_child(action: Callable[[], Any], home: str = "", at: int | None = None, seconds: float | None = None) -> bool:
    """Runs an action in a process of its own; whether it came to its end.

    Args:
      action: the writer.
      home: the directory whose files count.
      at: the call to the file system at which it is killed; None: not so.
      seconds: the time after which it is killed; None: not so.
    """
    if (child := os.fork()) == 0:
        seen = [0]

        def killer(event: str, given: Any) -> None:
            is_ours = event in EVENTS and (str(given[0]).startswith(home) or not str(given[0]).startswith("/"))
            if is_ours and not str(given[0]).endswith(".pyc"):
                if seen[0] == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen[0] += 1

        try:
            if at is not None:
                sys.addaudithook(killer)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                code = action() or 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.__stdout__, flush=True)
            code = 1
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not (os.WIFEXITED(status) and os.WEXITSTATUS(status)), "the writer failed"
    return os.WIFEXITED(status)


def files(directory: Path) -> set[str]:
    """All files below a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def weights(seed: int, outs: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"layers.{i}.q_proj.weight": rng.normal(size=(outs, 5)).astype(np.float32) for i in range(3)}


def adapter(seed: int, scale: float) -> Any:
    base = weights(0)
    tree = {name: lora(x, scale=scale) for name, x in base.items()}
    rng = np.random.default_rng(seed)
    fields = ("lora_a", "lora_b")
    return nested(
        {n: type(x)(x.base, *(rng.normal(size=getattr(x, f).shape).astype(np.float32) for f in fields), x.axes, scale)
         for n, x in tree.items()}
    )  # fmt: skip


class Save:
    """`jlora.peft.save` over an older adapter of another scale."""

    def __init__(self, home: Path) -> None:
        self.at, self.old, self.new = home / "adapter", adapter(1, 0.5), adapter(2, 4.0)
        self.base_model = "me/new"

    def prepare(self) -> None:
        peft.save(self.at, self.old, base_model="me/old")

    def write(self) -> None:
        peft.save(self.at, self.new, base_model=self.base_model)

    def check(self) -> None:
        """Either state is there, bit for bit."""
        found = flat(peft.load(self.at, nested(weights(0))))
        same = lambda tree: all(_same(found[name], x) for name, x in flat(tree).items())
        assert same(self.old) or same(self.new), "neither the old adapter nor the new one"
        assert is_own(self.at / CARD), "a part of a card"

    def check_end(self) -> None:
        found = flat(peft.load(self.at, nested(weights(0))))
        assert all(_same(found[name], x) for name, x in flat(self.new).items()), "not the new adapter"
        assert files(self.at) == {"adapter_config.json", "adapter_model.safetensors", CARD}, files(self.at)
        assert f"base_model: {json.dumps(self.base_model)}" in (self.at / CARD).read_text(), "not the new card"

    again = write


class FirstSave(Save):
    """`jlora.peft.save` where nothing is."""

    def prepare(self) -> None:
        pass

    def check(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            super().check()


def _same(found: Any, expected: Any) -> bool:
    arrays = all(np.array_equal(getattr(found, f), getattr(expected, f)) for f in ("lora_a", "lora_b"))
    return arrays and found.scale == expected.scale


class Merge:
    """`jlora merge` of a model of three files."""

    force: tuple[str, ...] = ()

    def __init__(self, home: Path) -> None:
        self.home, self.out = home, home / "out"

    def prepare(self) -> None:
        peft.to_safetensors(nested(weights(0)), self.home / "base", shard_bytes=150)
        (self.home / "base" / "config.json").write_text("{}")
        peft.save(self.home / "adapter", adapter(1, 0.5))

    def write(self) -> int:
        return command(["merge", *(str(self.home / n) for n in ("base", "adapter", "out")), *self.force])

    again = write

    def check(self) -> None:
        """Nothing is there, or all is."""
        if self.out.exists():
            self.check_whole()

    def check_whole(self) -> None:
        expected = merged(adapter(1, 0.5))
        found = flat(peft.from_safetensors(self.out))
        assert all(np.allclose(found[name], x, atol=1e-6) for name, x in expected.items()), "not the merged model"

    def check_end(self) -> None:
        self.check_whole()
        assert files(self.out) == files(self.home / "base"), files(self.out)
        assert {path.name for path in self.home.iterdir()} == {"base", "adapter", "out"}, [*self.home.iterdir()]


class MergeOver(Merge):
    """The same in place of an earlier result."""

    force = ("--force",)

    def prepare(self) -> None:
        super().prepare()
        peft.to_safetensors(nested(weights(7)), self.out)

    def check(self) -> None:
        """The old model, the new one, or for a moment neither: then the same command goes on."""
        if self.out.exists():
            found, old = flat(peft.from_safetensors(self.out)), weights(7)
            if not all(np.array_equal(found[name], x) for name, x in old.items()):
                self.check_whole()


class Model:
    """`jlora.peft.to_safetensors` over a model of other shards."""

    def __init__(self, home: Path) -> None:
        self.at, self.new = home / "model", weights(2, 7)

    def prepare(self) -> None:
        peft.to_safetensors(nested(weights(1)), self.at, shard_bytes=130)

    def write(self) -> None:
        peft.to_safetensors(nested(self.new), self.at, shard_bytes=300)

    again = write

    def check(self) -> None:
        """The old model or the new one, whole."""
        found = flat(peft.from_safetensors(self.at))
        same = lambda state: all(np.array_equal(found[name], x) for name, x in state.items())
        assert same(weights(1)) or same(self.new), "parts of two models"

    def check_end(self) -> None:
        found = flat(peft.from_safetensors(self.at))
        assert all(np.array_equal(found[name], x) for name, x in self.new.items()), "not the new model"
        assert files(self.at) == {
            "model.safetensors.index.json",
            *(f"model-{i:05}-of-00002.safetensors" for i in (1, 2)),
        }


class SameModel(Model):
    """The same over a model of shards of the same names: one by one they are replaced, and none is a whole."""

    def __init__(self, home: Path) -> None:
        self.at, self.new = home / "model", weights(2)

    def write(self) -> None:
        peft.to_safetensors(nested(self.new), self.at, shard_bytes=130)

    again = write

    def check(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            super().check()

    def check_end(self) -> None:
        found = flat(peft.from_safetensors(self.at))
        assert all(np.array_equal(found[name], x) for name, x in self.new.items()), "not the new model"
        assert len(files(self.at)) == 4, files(self.at)


class Delete:
    """A step of a run that is not kept."""

    def __init__(self, home: Path) -> None:
        self.at = home / "run"

    def prepare(self) -> None:
        with checkpoint.Checkpoints(self.at, keep_last=None) as run:
            for step in (1, 2):
                run.save(step, adapter(step, 0.5))

    def write(self) -> None:
        steps.delete(checkpoint.Checkpoints(self.at).directory / "1")

    def again(self) -> None:
        pass  # the next that saves deletes what is left

    def check(self) -> None:
        """A step that is offered loads."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run = checkpoint.Checkpoints(self.at)
        assert run.steps in ([2], [1, 2]), run.steps
        for step in run.steps:
            found = run.load(nested(weights(0)), step=step).tree
            assert all(_same(flat(found)[name], x) for name, x in flat(adapter(step, 0.5)).items())

    def check_end(self) -> None:
        with checkpoint.Checkpoints(self.at, keep_last=1) as run:
            run.save(3, adapter(3, 0.5))
        assert {path.name for path in self.at.iterdir()} == {"3"}, [*self.at.iterdir()]


WRITERS = {
    "save": Save,
    "first-save": FirstSave,
    "merge": Merge,
    "merge-over": MergeOver,
    "model": Model,
    "same-model": SameModel,
    "delete": Delete,
}
LASTS = {
    "save": 0.025,
    "first-save": 0.025,
    "model": 0.03,
    "same-model": 0.03,
    "merge": 0.8,
    "merge-over": 0.8,
    "delete": 0.02,
}  # seconds, about


def kills(kind: str, count: int | None, rng: random.Random) -> tuple[int, int]:
    """Kills a writer at each of its calls, or `count` times at random; how often, and how often it had ended."""
    done, ended = 0, 0
    while count is None or done < count:
        with tempfile.TemporaryDirectory() as home:
            call: Any = lambda method, home=home: lambda: getattr(WRITERS[kind](Path(home)), method)()
            in_child(call("prepare"))
            how: Any = {"at": done} if count is None else {"seconds": rng.uniform(0, LASTS[kind])}
            is_done = in_child(call("write"), home, **how)
            in_child(call("check"))
            if not is_done:
                in_child(call("again"))
            in_child(call("check_end"))
        ended += is_done
        if count is None and is_done:
            break
        done += 1
    return done, ended


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(WRITERS))
    parser.add_argument("--random", type=int, metavar="N", help="kill at N random moments in place of each call")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*fork.*")  # no child is forked once JAX has threads
    for kind in given.kinds or WRITERS:
        done, ended = kills(kind, given.random, random.Random(0))
        how = "at random moments" if given.random else "at each call to the file system"
        count = done - ended if given.random else done
        print(f"{kind}: killed {count} times {how}, each time the last whole state loads", flush=True)


if __name__ == "__main__":
    main()
