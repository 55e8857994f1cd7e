"""``jlora blend``: adapters' files combined as trees are, without a base."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapters import weighted
from jlora.cli import main
from jlora.peft.read import read
from tests.optim.support import noisy

AXES = {
    "q_proj": jlora.Axes(1, 0),
    "up_proj": jlora.Axes(1, 0),
    "embed_tokens": jlora.Axes(0, 1),
    "patch": jlora.Axes((1, 2, 3), 0),
    "experts": jlora.Axes(2, 1, 0),
}
TARGETS = (*AXES,)
SPECS = {
    "one": {"rank": 2, "alpha": 3},
    "other": {"rank": 2, "alpha": 8, "targets": TARGETS[1:], "dropout": 0.5},
    "larger": {"rank": 3, "alpha": 3, "targets": TARGETS[:2]},
    "dora": {"rank": 2, "variant": "dora", "targets": "q_proj"},
    "full": {"rank": 2, "targets": "q_proj", "train": ("norm",)},
}
WEIGHTS = (0.7, -1.5)


@functools.cache
def model():
    rng = np.random.default_rng(0)
    normal = lambda *shape: {"weight": rng.normal(size=shape).astype(np.float32)}
    layer = lambda: {"attn": {"q_proj": normal(8, 8)}, "mlp": {"up_proj": normal(12, 8)}, "norm": normal(8)}
    layers = {str(i): layer() for i in range(2)}
    layers["1"]["mlp"]["experts"] = {"down_proj": rng.normal(size=(3, 8, 6)).astype(np.float32)}
    inner = {"embed_tokens": normal(20, 8), "patch": normal(8, 3, 2, 2), "layers": layers}
    return jax.device_put({"model": inner, "lm_head": normal(20, 8)})


def axes_of(targets):
    return {target: AXES[target] for target in ([targets] if isinstance(targets, str) else targets)}


@functools.cache
def tree(name):
    settings = {"targets": TARGETS} | SPECS[name]
    made = noisy(model(), jlora.LoraSpec(**settings, axes=axes_of(settings["targets"])), std=0.5)
    trainable, frozen = jlora.partition(made)
    moved = jax.tree.map(
        lambda x: x + 0.1 * len(name) * jnp.cos(jnp.arange(x.size) * len(name)).reshape(x.shape), trainable
    )
    return jlora.combine(moved, frozen)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for name in SPECS:
        jlora.peft.save(folder / name, tree(name), base_model="me/tiny")
    jlora.checkpoint.save(folder / "orbax", tree("other"))
    return folder


@pytest.fixture
def home(written, tmp_path, monkeypatch):
    home = shutil.copytree(written, tmp_path / "home")
    monkeypatch.chdir(home)
    return home


def blend(*arguments):
    return main(["blend", *map(str, arguments)])


def assert_blended(expected):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), jlora.merge(jlora.peft.load("out", model())),
        jlora.merge(expected),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties", "magnitude_prune_svd"])
def test_files_are_combined_as_trees_are(home, method):
    """Linear layers, a table, a convolution and stacked experts, some of them in one adapter alone."""
    settings = {} if method in ("linear", "cat", "svd") else {"density": 0.6}
    more = [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert blend("other", "one", "out", "--weights", *WEIGHTS, "--method", method, *more) == 0
    assert_blended(weighted([tree("other"), tree("one")], WEIGHTS, method, **settings))


def test_the_settings_are_those_of_plain_lora(home, capsys):
    assert blend("one", "larger", "out", "--weights", 1, 2, "--method", "cat") == 0
    assert capsys.readouterr().out == "out has 2 adapters in one: 7 updates of rank 2 to 5\n"
    told = json.loads((home / "out" / "adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["base_model_name_or_path"]) == (5, 5, "me/tiny")
    assert set(told["rank_pattern"].values()) == set(told["alpha_pattern"].values()) == {2}
    assert "model.layers.0.attn.q_proj" in told["target_modules"] and told["target_parameters"]
    assert {update.scale for update in read(home / "out").updates.values()} == {1}
    assert_blended(weighted([tree("one"), tree("larger")], [1, 2], "cat"))
    assert blend("one", "one", "out", "--weights", 1, 2, "--force") == 0
    told = json.loads((home / "out" / "adapter_config.json").read_text())
    assert "q_proj" in told["target_modules"]


def test_dare_draws_by_seed_and_is_right_on_average(home):
    arguments = ["larger", "larger", "out", "--weights", 1, 1, "--method", "dare_linear_svd", "--density", 0.5]
    arguments += ["--svd-rank", 8, "--force"]
    delta = lambda directory: (lambda u: u.scale * u.b @ u.a)(read(directory).updates["model.layers.0.attn.q_proj"])
    found = []
    for seed in range(40):
        assert blend(*arguments, "--seed", seed) == 0
        found.append(delta("out"))
    wanted = 2 * delta("larger")
    kept = found[0] / wanted
    np.testing.assert_allclose(kept, np.round(kept), atol=1e-3)
    assert {*np.round(kept).ravel()} == {0, 1, 2}  # of the two adapters' values either is kept, twice as large, or not
    assert blend(*arguments, "--seed", 0) == 0 and np.array_equal(delta("out"), found[0])
    assert not np.array_equal(found[0], found[1])
    assert np.abs(np.mean(found, 0) - wanted).mean() < 0.2 * np.abs(wanted).mean()


def test_an_orbax_adapter_is_combined_too(home):
    assert blend("one", "orbax", "out", "--weights", 1, 2, "--method", "svd", "--svd-rank", 4) == 0
    assert_blended(weighted([tree("one"), tree("other")], [1, 2], "svd", svd_rank=4))


def test_settings_that_disagree_are_said_anew(home, capsys):
    jlora.peft.save("elsewhere", tree("one"), base_model="me/other", task_type="CAUSAL_LM")
    assert blend("one", "elsewhere", "out", "--weights", 1, 2) == 2
    assert "'me/tiny' in one and 'me/other' in elsewhere" in capsys.readouterr().err
    assert blend("one", "elsewhere", "out", "--weights", 1, 2, "--base-model", "me/tiny") == 0
    told = json.loads((home / "out" / "adapter_config.json").read_text())
    assert (told["base_model_name_or_path"], told["task_type"]) == ("me/tiny", "CAUSAL_LM")


def test_what_lies_at_out_is_kept(home, capsys):
    assert blend("one", "other", "larger", "--weights", 1, 2) == 2
    assert "larger is there already; --force replaces it" in capsys.readouterr().err
    assert blend("one", "other", "one/out", "--weights", 1, 2) == 2
    assert "can't hold the result" in capsys.readouterr().err


def test_a_table_without_a_head_keeps_it_so(home):
    """An update of a table is no update of the head, which files do not tell of."""
    table = noisy(model(), jlora.LoraSpec(targets="embed_tokens", rank=2, axes=axes_of("embed_tokens")))
    jlora.peft.save("table", table)
    assert blend("table", "table", "out", "--weights", 1, 2) == 0
    assert set(read("out").updates) == {"model.embed_tokens"}
    assert main(["convert", "table", "again", "--to", "peft"]) == 0
    assert set(read("again").updates) == {"model.embed_tokens"}
    tied = noisy(
        {"model": model()["model"]}, jlora.LoraSpec(targets="embed_tokens", rank=2, axes=axes_of("embed_tokens"))
    )
    jlora.checkpoint.save("tied", tied)
    assert blend("tied", "tied", "both", "--weights", 1, 2) == 0
    assert set(read("both").updates) == {"model.embed_tokens", "lm_head"}


REFUSED = {
    "weights": (["one", "other", "out", "--weights", 1], "expected 2 weights"),
    "density": (["one", "other", "out", "--weights", 1, 1, "--method", "ties"], "needs density"),
    "ranks": (["one", "larger", "out", "--weights", 1, 1], "those of model.layers.0.attn.q_proj have 2, 3"),
    "dora": (["one", "dora", "out", "--weights", 1, 1], "dora has DoRA's magnitudes"),
    "in full": (["one", "full", "out", "--weights", 1, 1], "full has parameters trained in full"),
    "pissa": (["one", "pissa", "out", "--weights", 1, 1], "pissa started from pissa"),
    "other model": (["one", "wide", "out", "--weights", 1, 1], "linear 8 -> 8 in one and linear 9 -> 8 in wide"),
    "tied": (["one", "tied", "out", "--weights", 1, 1], "tied has an update of model.embed_tokens, which is the head"),
    "nowhere": (["one", "nowhere", "out", "--weights", 1, 1], "nowhere"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(home, arguments, message, capsys):
    if "pissa" in arguments:
        config = json.loads((home / "one" / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
        (shutil.copytree("one", "pissa") and home / "pissa" / "adapter_config.json").write_text(json.dumps(config))
    if "wide" in arguments:
        wide = {"model": {"layers": {"0": {"attn": {"q_proj": {"weight": jnp.ones((8, 9))}}}}}}
        jlora.peft.save("wide", noisy(wide, jlora.LoraSpec(targets="q_proj", rank=2, axes=axes_of("q_proj"))))
    if "tied" in arguments:
        tied = {"model": {"embed_tokens": model()["model"]["embed_tokens"]}}
        jlora.checkpoint.save(
            "tied", noisy(tied, jlora.LoraSpec(targets="embed_tokens", rank=2, axes=axes_of("embed_tokens")))
        )
    assert blend(*arguments) == 2
    told = capsys.readouterr().err
    assert message in told and told.startswith("jlora blend: ") and told.count("\n") == 1, told
    assert not (home / "out").exists()
