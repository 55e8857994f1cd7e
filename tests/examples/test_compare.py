"""The comparison of all variants: equal numbers, the climb to a learning rate, runs that are kept."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jlora.examples import compare
from jlora.variants import VARIANTS

WIDTH = 72  # so that all settings fit
PARTS = {"sentiment": ("query", "key", "value", "output"), "hamlet": ("q_proj", "o_proj")}


def task_of(kind, width=WIDTH, steps=6):
    """A task of square kernels with the names of one of the two: to follow kernels that were changed."""
    rng = np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[0]), jnp.float32)
    params = {
        f"layer_{i}": {"attention": {name: {"kernel": noise(width, width)} for name in PARTS[kind]}}
        for i in range(compare.LAYERS)
    }
    params["head"] = {"kernel": noise(width, 3)}

    def loss(params, batch):
        x = batch["x"]
        for i in range(compare.LAYERS):
            for part in params[f"layer_{i}"]["attention"].values():
                x = jnp.tanh(x @ part["kernel"])
        losses = jnp.square(x @ params["head"]["kernel"] - batch["y"]).mean()
        return losses, losses

    x = [noise(n, width) * math.sqrt(n) for n in (32, 16, 16)]
    sets = tuple({"x": np.asarray(each), "y": np.sin(np.asarray(each[:, :3]))} for each in x)
    return compare.Task(kind, "accuracy", params, "*/attention/*", width, loss, sets, 8, steps)


@pytest.mark.parametrize("kind, width", [("sentiment", 384), ("hamlet", 576)])
def test_all_methods_train_as_many_numbers(kind, width):
    """As LoRA of rank 2 has, to one in a hundred; but IA3, which has no use for more."""
    shape = jax.ShapeDtypeStruct((width, width), jnp.float32)
    layer = {"attention": {name: {"kernel": shape} for name in PARTS[kind]}}
    params = {f"layer_{i}": layer for i in range(compare.LAYERS)}
    kernels = compare.LAYERS * len(PARTS[kind])
    task = compare.Task(kind, "", params, "*/attention/*", width, lambda *_: None, (), 1, 1)
    assert {*compare.methods(width)} == {*VARIANTS, "full"}
    for name in VARIANTS:
        tree = jax.eval_shape(lambda params, name=name: compare.wrapped(
            compare.dataclasses.replace(task, params=params), name, 0), params)  # fmt: skip
        found = compare.numbers(tree) / kernels
        assert found == (width if name == "ia3" else pytest.approx(4 * width, rel=0.0105)), name


@pytest.mark.parametrize("best", [2e-5, 7e-4, 2e-3, 8e-3, 0.2, 5.0])
def test_the_climb_ends_where_the_loss_is_least(best):
    found = compare.climb(lambda rate: abs(math.log(rate / best)))
    reached = min(found, key=found.get)
    assert reached == min((2e-3 * 4.0**k for k in range(-6, 10)), key=lambda rate: abs(math.log(rate / best)))


def test_a_loss_that_is_no_number_is_no_summit():
    found = compare.climb(lambda rate: math.nan if rate > 1e-3 else rate)
    assert math.isinf(found[2e-3]) and compare.LEAST <= min(found, key=found.get) < 4 * compare.LEAST


def test_runs_are_kept_and_not_run_again(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setitem(compare.TASKS, "sentiment", lambda quick, progress: made.append(quick) or task_of("sentiment"))
    ledger = tmp_path / "runs.jsonl"
    rows = compare.compare(ledger, ["sentiment"], ["lora", "full"], quick=True)
    assert made == [True] and len(rows) == 1 + 2 * len(compare.SEEDS)
    assert [json.loads(line) for line in ledger.read_text().splitlines()] == rows
    assert "sentiment, lora: " in capsys.readouterr().out
    again = compare.compare(ledger, ["sentiment"], ["lora"], progress=False)
    assert made == [True] and again == rows[: 1 + len(compare.SEEDS)]
    more = compare.compare(ledger, ["sentiment"], ["lora", "ia3"], progress=False)
    assert len(made) == 2 and [row["method"] for row in more].count("ia3") == 3
    assert not capsys.readouterr().out

    by = {row["method"]: row for row in more}
    assert by["lora"]["numbers"] == 12 * 4 * WIDTH and by["ia3"]["numbers"] == 12 * WIDTH
    assert by["lora"]["accuracy"] < by["base"]["accuracy"]  # here it is the loss
    seeds = [row["accuracy"] for row in rows if row["method"] == "lora"]
    assert len({*seeds}) == 3
