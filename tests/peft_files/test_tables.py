"""Whole tables beside an adapter: copies of the base are compared, trained ones taken, larger ones asked about."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from jlora.__main__ import main
from tests.peft_files.trees import assert_same, flat, lora, merged, nested, noise

D, OLD, NEW = 6, 10, 13
Q, TABLE, HEAD = "model.layers.0.q_proj", "model.embed_tokens", "lm_head"
PREFIX = "base_model.model."
STATE = {f"{Q}.weight": noise(D, D + 1), f"{TABLE}.weight": noise(NEW, D), f"{HEAD}.weight": noise(NEW, D)}
BASE = STATE | {f"{name}.weight": STATE[f"{name}.weight"][:OLD] for name in (TABLE, HEAD)}
TIED = {name: x for name, x in STATE.items() if HEAD not in name}


def saved(directory, tensors: dict[str, np.ndarray], **settings: Any) -> Any:
    """A file with an update of one kernel and other tensors beside; what the kernel becomes."""
    tree = nested(STATE | {f"{Q}.weight": lora(STATE[f"{Q}.weight"])})
    jlora.peft.save(directory, tree)
    weights, config = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    arrays = safetensors.numpy.load_file(weights) | {PREFIX + name: x for name, x in tensors.items()}
    safetensors.numpy.save_file(arrays, weights, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return merged(tree)[f"{Q}.weight"]


def trained(seed: float = 1) -> dict[str, np.ndarray]:
    return {f"{name}.weight": STATE[f"{name}.weight"] + seed for name in (TABLE, HEAD)}


COPIES = {f"{name}.weight": STATE[f"{name}.weight"] for name in (TABLE, HEAD)}


@pytest.mark.parametrize("is_tied", [False, True])
def test_copies_of_the_base_are_no_matter(is_tied, tmp_path):
    copies = dict.fromkeys(COPIES, STATE[f"{TABLE}.weight"]) if is_tied else COPIES
    state = TIED if is_tied else STATE
    expected = saved(tmp_path, copies)
    found = merged(jlora.peft.load(tmp_path, nested(state)))
    assert_same(found, state | {f"{Q}.weight": expected}, 1e-6)


@pytest.mark.parametrize("name", [TABLE, HEAD, Q])
@pytest.mark.parametrize("by", [1.0, np.nan])
def test_a_copy_that_differs_is_refused(name, by, tmp_path):
    wrong = STATE[f"{name}.weight"].copy()
    wrong[0, 0] += by
    saved(tmp_path, {f"{name}.base_layer.weight" if name == Q else f"{name}.weight": wrong})
    with pytest.raises(ValueError, match=f"copy of {name} that differs .* would overwrite the base"):
        jlora.peft.load(tmp_path, nested(STATE))


def test_a_copy_of_what_is_not_there_is_refused(tmp_path):
    saved(tmp_path, {"model.norm.weight": noise(D)})
    with pytest.raises(ValueError, match=r"a whole tensor model.norm.weight, which would overwrite the base"):
        jlora.peft.load(tmp_path, nested(STATE))


def test_echoes_of_saved_modules(tmp_path):
    """PEFT writes them so where it saves the tables besides; two that differ have no one reading."""
    own = trained()
    echoes = {name.replace(".weight", ".modules_to_save.weight"): x for name, x in own.items()}
    originals = {name.replace(".weight", ".original_module.weight"): x for name, x in COPIES.items()}
    saved(tmp_path, own | echoes | originals, modules_to_save=["embed_tokens", "lm_head"])
    found = flat(jlora.peft.load(tmp_path, nested(STATE)))
    assert all(np.array_equal(found[name].base, x) for name, x in own.items())
    for wrong, told in [
        (own | trained(2) | {name: x + 1 for name, x in echoes.items()}, "two copies of .* that differ"),
        (own | {name: x + 1 for name, x in originals.items()}, "a copy of .* that differs"),
        (echoes, "a second copy of .*, but not .* itself"),
    ]:
        saved(tmp_path, wrong, modules_to_save=["embed_tokens", "lm_head"])
        with pytest.raises(ValueError, match=told):
            jlora.peft.load(tmp_path, nested(STATE))


@pytest.mark.parametrize("named", ["embed_tokens", "model.embed_tokens", "lm_head"])
def test_a_tied_table_may_be_saved_under_either_name(named, tmp_path):
    own = STATE[f"{TABLE}.weight"] + 1
    both = {f"{TABLE}.weight": own, f"{HEAD}.weight": own}
    saved(tmp_path, both, modules_to_save=[named, "model.embed_tokens"], ensure_weight_tying=True)
    found = flat(jlora.peft.load(tmp_path, nested(TIED)))[f"{TABLE}.weight"]
    np.testing.assert_array_equal(found.base, own)


@pytest.mark.parametrize("task, is_refused", [("CAUSAL_LM", True), ("SEQ_CLS", False), (None, False)])
def test_a_table_that_is_changed_without_its_head(task, is_refused, tmp_path):
    """In a language model whose one leaf is both, that is another function; a model may have no head, too."""
    own = {f"{TABLE}.weight": STATE[f"{TABLE}.weight"] + 1}
    saved(tmp_path, own, modules_to_save=["embed_tokens"], task_type=task)
    if is_refused:
        with pytest.raises(ValueError, match="as a table and leaves the head, lm_head, as it was"):
            jlora.peft.load(tmp_path, nested(TIED))
    else:
        jlora.peft.load(tmp_path, nested(TIED))
    jlora.peft.load(tmp_path, nested(STATE))  # which has both


def flax(state: dict[str, np.ndarray]) -> dict[str, Any]:
    """The same as a Flax tree, whose head's kernel is (in, out)."""
    names = {f"{Q}.weight": f"{Q}.kernel", f"{TABLE}.weight": f"{TABLE}.embedding", f"{HEAD}.weight": f"{HEAD}.kernel"}
    return nested({names[n]: x if n.startswith(TABLE) else np.ascontiguousarray(x.T) for n, x in state.items()})


LAYOUTS = {"torch": nested, "flax": flax, "jax": lambda state: jax.device_put(nested(state))}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["copies", "trained"])
def test_a_tree_gets_the_adapters_vocabulary(layout, kind, tmp_path):
    own = COPIES if kind == "copies" else trained()
    saved(tmp_path, own, **({} if kind == "copies" else {"modules_to_save": ["embed_tokens", "lm_head"]}))
    before, after = LAYOUTS[layout](BASE), LAYOUTS[layout](STATE)
    with pytest.raises(ValueError, match=r"13 rows of lm_head, but lm_head/\w+ of shape .* has 10: .*resize_tables"):
        jlora.peft.load(tmp_path, before)
    larger = jlora.peft.resize_tables(before, tmp_path)
    assert jax.tree.map(lambda x: (type(x), x.shape, x.dtype), larger) == jax.tree.map(
        lambda x: (type(x), x.shape, x.dtype), after
    )
    if kind == "copies":
        assert_same(flat(larger), flat(after), 0)
    loaded = jlora.peft.load(tmp_path, larger)
    assert_same(merged(loaded), merged(jlora.peft.load(tmp_path, after)), 1e-6)
    abstract = jax.eval_shape(lambda: before)
    assert jax.eval_shape(lambda: after) == jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), jlora.peft.resize_tables(abstract, tmp_path)
    )


def test_a_tree_with_more_rows_is_cut(tmp_path):
    small = {name: x[:OLD] for name, x in COPIES.items()}
    saved(tmp_path, small)
    assert_same(flat(jlora.peft.resize_tables(nested(STATE), tmp_path)), BASE, 0)


@pytest.mark.parametrize("ids, is_enough", [([10, 11, 12], True), ([12], False)])
def test_rows_that_are_trained_need_no_values(ids, is_enough, tmp_path):
    state = {name: x for name, x in STATE.items() if HEAD not in name}
    base = {name: x for name, x in BASE.items() if HEAD not in name}
    delta = {f"{TABLE}.token_adapter.trainable_tokens_delta": noise(len(ids), D)}
    saved(tmp_path, delta, trainable_token_indices=ids)
    with pytest.raises(ValueError, match=r"at least 13 rows of model.embed_tokens"):
        jlora.peft.load(tmp_path, nested(base))
    if not is_enough:
        with pytest.raises(ValueError, match=r"no values of rows 10 to 12 of model.embed_tokens"):
            jlora.peft.resize_tables(nested(base), tmp_path)
        return
    found = merged(jlora.peft.load(tmp_path, jlora.peft.resize_tables(nested(base), tmp_path)))
    assert_same(found, merged(jlora.peft.load(tmp_path, nested(state))), 1e-6)


def test_an_adapter_of_the_same_vocabulary_changes_nothing(tmp_path):
    saved(tmp_path, COPIES)
    assert_same(flat(jlora.peft.resize_tables(nested(STATE), tmp_path)), STATE, 0)


def test_the_command_compares_copies_too(tmp_path, capsys):
    jlora.peft.to_safetensors(nested(STATE), tmp_path / "base")
    jlora.peft.to_safetensors(nested(BASE), tmp_path / "before")
    saved(tmp_path / "right", COPIES)
    saved(tmp_path / "wrong", COPIES | {f"{HEAD}.weight": STATE[f"{HEAD}.weight"] + 1})
    merge = lambda base, adapter: main(
        ["merge", *(str(tmp_path / x) for x in (base, adapter, f"out-{base}-{adapter}"))]
    )
    assert merge("base", "right") == 0
    assert merge("base", "wrong") == 2
    assert "a copy of lm_head that differs" in capsys.readouterr().err
    assert merge("before", "right") == 2
    assert "resize_tables" in capsys.readouterr().err


def test_the_loss_of_a_resized_model_runs(tmp_path):
    """The new rows are used like any others."""
    saved(tmp_path, COPIES)
    tree = jlora.peft.load(tmp_path, jlora.peft.resize_tables(nested(BASE), tmp_path))
    look_up = lambda p: jnp.take(p["model"]["embed_tokens"]["weight"], jnp.array([OLD, NEW - 1]), axis=0).sum()
    assert np.isclose(jlora.apply(look_up)(tree), STATE[f"{TABLE}.weight"][[OLD, NEW - 1]].sum(), atol=1e-5)


def test_trained_rows_of_a_tied_table_may_be_there_twice(tmp_path):
    """As PEFT writes them where it saves the tables besides; of the head the settings name none."""
    rows = noise(2, D)
    twice = {f"{name}.token_adapter.trainable_tokens_delta": rows for name in (TABLE, HEAD)}
    twice |= {f"{name}.token_adapter.base_layer.weight": STATE[f"{TABLE}.weight"] for name in (TABLE, HEAD)}
    saved(tmp_path, twice, trainable_token_indices={"embed_tokens": [1, 3]})
    found = merged(jlora.peft.load(tmp_path, nested(TIED)))[f"{TABLE}.weight"]
    np.testing.assert_allclose(found[[1, 3]], rows, atol=1e-6)
    twice[f"{HEAD}.token_adapter.trainable_tokens_delta"] = rows + 1
    saved(tmp_path, twice, trainable_token_indices={"embed_tokens": [1, 3]})
    with pytest.raises(ValueError, match="for the trained rows of lm_head, but trainable_token_indices names"):
        jlora.peft.load(tmp_path, nested(TIED))


def test_trained_rows_of_a_table_whose_copy_is_the_head(tmp_path):
    """In PEFT they are the head's too: the tree must have the two as one."""
    saved(tmp_path, {f"{TABLE}.token_adapter.trainable_tokens_delta": noise(1, D)}, trainable_token_indices=[2])
    copied = STATE | {f"{HEAD}.weight": STATE[f"{TABLE}.weight"].copy()}
    for tree in (nested(copied), flax(copied)):
        with pytest.raises(ValueError, match="of which the tree's lm_head is a copy"):
            jlora.peft.load(tmp_path, tree)
    for state in (STATE, TIED):
        jlora.peft.load(tmp_path, nested(state))


def test_a_head_that_is_a_copy_of_the_table_grows_with_it(tmp_path):
    """As the head that is asked for where an adapter changes a tied table alone."""
    saved(tmp_path, {f"{TABLE}.weight": STATE[f"{TABLE}.weight"]})
    table = STATE[f"{TABLE}.weight"]
    copied = {**BASE, f"{HEAD}.weight": table[:OLD].copy()}
    for layout in LAYOUTS.values():
        found = jlora.peft.resize_tables(layout(copied), tmp_path)
        assert_same(flat(found), flat(layout(STATE | {f"{HEAD}.weight": table})), 0)
    with pytest.raises(ValueError, match="no values of lm_head, which has as many"):
        jlora.peft.resize_tables(nested(BASE), tmp_path)
