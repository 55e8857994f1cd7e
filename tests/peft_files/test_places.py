"""Where an adapter goes whose names are not the tree's: to the one place that is meant, or nowhere."""

import itertools
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

import jlora
from jlora.nodes.node import is_node
from jlora.targets.paths import flatten
from tests.support import randomised

AXES = {"*": jlora.Axes((1,), (0,))}


def model(*names, layers=(0,), head=""):
    """A tree of PyTorch's names: each of `names` in each of some layers."""
    tree = {}
    for layer, name in itertools.product(layers, names):
        at = tree
        for part in f"{head}layers.{layer}.{name}".split("."):
            at = at.setdefault(part, {})
        at["weight"] = jnp.full((4, 4), float(layer + 1))
    return tree


def merged_into(*trees):
    joined = {}
    for tree in trees:
        for key, value in tree.items():
            joined[key] = merged_into(joined[key], value) if key in joined else value
    return joined


def saved(directory, tree, targets):
    jlora.peft.save(directory, randomised(jlora.wrap(tree, jlora.LoraSpec(targets=targets, rank=2, axes=AXES))))
    return directory


def adapted(tree):
    paths, leaves, _ = flatten(tree, is_node)
    return [path for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)]


WRAPPED = [
    ("", "model."),
    ("model.", ""),
    ("bert.", ""),
    ("", "roberta."),
    ("model.", "transformer."),
    ("model.language_model.", "language_model.model."),
    ("base_model.model.", "model."),
]


@pytest.mark.parametrize("theirs, ours", WRAPPED)
def test_wrappers_come_and_go(theirs, ours, tmp_path):
    theirs, ours = (model("self_attn.q_proj", layers=range(3), head=head) for head in (theirs, ours))
    files = saved(tmp_path / "a", theirs, ["q_proj"])
    assert [path.partition("layers")[2] for path in adapted(jlora.peft.load(files, ours))] == [
        f"/{layer}/self_attn/q_proj/weight" for layer in range(3)
    ]


@pytest.mark.parametrize("layer", [3, 5])
def test_a_layers_number_never_changes(layer, tmp_path):
    """An adapter of one layer of a deep model is not put onto another of a shallow one."""
    files = saved(tmp_path / "a", model("self_attn.q_proj", layers=range(6)), [f"layers/{layer}/self_attn/q_proj"])
    for head in ("", "model."):
        with pytest.raises(ValueError, match=rf"layers\.{layer}\.self_attn\.q_proj"):
            jlora.peft.load(files, model("self_attn.q_proj", layers=range(3), head=head))
    with pytest.raises(ValueError, match=r"Its layers\.N\.self_attn\.q_proj are those of N = 0 to 2\."):
        jlora.peft.load(files, model("self_attn.q_proj", layers=range(3)))
    (path,) = adapted(jlora.peft.load(files, model("self_attn.q_proj", layers=range(6), head="model.")))
    assert path == f"model/layers/{layer}/self_attn/q_proj/weight"


TOWERS = merged_into(model("q_proj", head="text_model."), model("q_proj", head="vision_model."))


def test_one_tower_is_not_taken_for_another(tmp_path):
    files = saved(tmp_path / "a", model("q_proj", head="text_model."), ["q_proj"])
    with pytest.raises(ValueError, match=r"text_model.layers.0.q_proj"):
        jlora.peft.load(files, model("q_proj", head="vision_model."))
    assert adapted(jlora.peft.load(files, TOWERS, prefix="text_model")) == ["text_model/layers/0/q_proj/weight"]
    other = jlora.peft.load(files, TOWERS, prefix="vision_model")  # said, it is done
    assert adapted(other) == ["vision_model/layers/0/q_proj/weight"]


def test_an_adapter_that_fits_several_towers_asks_which(tmp_path):
    files = saved(tmp_path / "a", model("q_proj"), ["q_proj"])
    with pytest.raises(
        ValueError, match=r"one below 'text_model' and below 'vision_model'. Say .* prefix='text_model'"
    ):
        jlora.peft.load(files, TOWERS)
    for prefix in ("text_model", "vision_model", "vision_model."):
        tree = jlora.peft.load(files, TOWERS, prefix=prefix)
        assert adapted(tree) == [f"{prefix.rstrip('.')}/layers/0/q_proj/weight"]
    with pytest.raises(
        ValueError, match=r"prefix='audio' begins no name of the tree; they begin with text_model, vision"
    ):
        jlora.peft.load(files, TOWERS, prefix="audio")


def test_an_adapter_that_fits_within_several_wrappers_asks_which(tmp_path):
    files = saved(tmp_path / "a", model("q_proj"), ["q_proj"])
    both = merged_into(model("q_proj", head="model."), model("q_proj", head="transformer."))
    with pytest.raises(ValueError, match=r"below 'model' and below 'transformer'"):
        jlora.peft.load(files, both)


@pytest.mark.parametrize("pair", [("encoder.", "decoder."), ("text_model.", "vision_model."), ("stage1.", "stage2.")])
def test_no_name_is_exchanged_for_another(pair, tmp_path):
    files = saved(tmp_path / "a", model("SelfAttention.q", head=pair[0]), ["q"])
    with pytest.raises(ValueError, match=pair[0].rstrip(".")):
        jlora.peft.load(files, model("SelfAttention.q", head=pair[1]))


def test_a_part_of_a_model_is_said(tmp_path):
    files = saved(tmp_path / "a", model("q_proj", head="text_model."), ["q_proj"])
    part = model("q_proj")
    with pytest.raises(ValueError, match=r"without 'text_model' before it.*prefix=''"):
        jlora.peft.load(files, part)
    assert adapted(jlora.peft.load(files, part, prefix="")) == ["layers/0/q_proj/weight"]


@pytest.mark.slow
def test_the_place_does_not_change_with_the_hash_seed(tmp_path):
    files = saved(tmp_path / "a", model("q_proj", layers=range(3)), ["q_proj"])
    code = (
        "import jlora; from tests.peft_files.test_places import *\n"
        f"print(adapted(jlora.peft.load({str(files)!r}, model('q_proj', layers=range(3), head='model.'))))"
    )
    run = lambda seed: subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
    )
    assert len({run(seed).stdout for seed in "012"}) == 1


def test_an_adapter_of_one_tower_alone_is_told_the_way(tmp_path):
    """Its settings name modules of the other tower too, of which its file has nothing."""
    files = saved(tmp_path / "a", model("q_proj", head="vision_model."), ["q_proj"])
    with pytest.raises(ValueError, match=r"if it is of a part of the model alone, prefix='vision_model' says so"):
        jlora.peft.load(files, TOWERS)
    tree = jlora.peft.load(files, TOWERS, prefix="vision_model")
    assert adapted(tree) == ["vision_model/layers/0/q_proj/weight"]
