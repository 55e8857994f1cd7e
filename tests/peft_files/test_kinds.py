"""Adapters of convolutions, biases of updates, factors that started from the kernel: written, read, compared."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jlora
from tests.optim.support import noisy
from tests.peft_files.trees import LINEAR, assert_same, flat, lora, merged, nested, noise

CONV = jlora.Axes((1, 2, 3), (0,))  # PyTorch's (out, in, height, width)


def save(directory, state, **axes):
    """A PyTorch model's tree with random factors at the modules whose axes are given; it, and its state."""
    nodes = {name: lora(x, axes=axes[key]) if (key := name.split(".")[-2]) in axes else x for name, x in state.items()}
    tree = nested(nodes)
    jlora.peft.save(directory, tree)
    return tree


@pytest.mark.parametrize("is_flax, channels", [(False, 4), (True, 4), (True, 1)])
def test_convolutions(is_flax, channels, tmp_path):
    """Onto PyTorch's own layout and onto Flax's (height, width, in, out); PEFT's A keeps the window.

    Of one channel alone, sizes would allow that its axis is an out axis too.
    """
    state = {"conv.weight": noise(6, channels, 3, 2), "head.weight": noise(5, 6)}
    expected = merged(save(tmp_path, state, conv=CONV))
    if not is_flax:
        assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected)
        return
    params = {
        "conv": {"kernel": state["conv.weight"].transpose(2, 3, 1, 0)},
        "head": {"kernel": state["head.weight"].T},
    }
    names = [("conv", "conv/kernel"), ("head", "head/kernel")]
    found = merged(jlora.peft.load(tmp_path, params, names=names))
    np.testing.assert_allclose(found["conv.kernel"], expected["conv.weight"].transpose(2, 3, 1, 0), atol=1e-5)
    again = tmp_path / "again"
    jlora.peft.save(again, jlora.peft.load(tmp_path, params, names=names), names=names)
    assert_same(merged(jlora.peft.load(again, nested(state))), expected)


def test_the_bias_of_an_update(tmp_path):
    state = {f"{name}.{leaf}": noise(*shape) for name in ("q_proj", "v_proj")
             for leaf, shape in (("weight", (6, 8)), ("bias", (6,)))}  # fmt: skip
    axes = dict.fromkeys(("q_proj", "v_proj"), LINEAR)
    spec = jlora.LoraSpec(targets=["q_proj", "v_proj"], rank=2, alpha=6, lora_bias=True, axes=axes)
    tree = noisy(nested(state), spec)
    jlora.peft.save(tmp_path, tree)
    again = jlora.peft.load(tmp_path, nested(state))
    node = again["q_proj"]["bias"]
    assert node.scale == 3 and node.base.shape == node.lora_bias.shape == (6,)
    assert_same(merged(again), merged(tree))


def test_factors_whose_start_was_taken_out_of_the_base(tmp_path):
    """PEFT's PiSSA files without conversion: W + s (A B - A_0 B_0), A_0 and B_0 the principal part of W."""
    state = {"q_proj.weight": noise(6, 8), "v_proj.weight": noise(6, 8)}
    tree = save(tmp_path, state, q_proj=LINEAR)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    found = merged(jlora.peft.load(tmp_path, nested(state)))["q_proj.weight"]
    u, s, vt = np.linalg.svd(state["q_proj.weight"])
    principal = (u[:, :2] * s[:2]) @ vt[:2]
    np.testing.assert_allclose(found, merged(tree)["q_proj.weight"] - principal, atol=1e-5)


def test_a_table_and_its_head_swapped(tmp_path):
    """Each has the rows that are its own, whichever is written first."""
    state = {"embed_tokens.weight": noise(10, 8), "lm_head.weight": noise(10, 8)}
    axes = {"embed_tokens": jlora.Axes((0,), (1,)), "lm_head": LINEAR}
    expected = merged(save(tmp_path, state, **axes))
    keys = {*safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")}
    assert {key.rpartition(".lora_")[2] for key in keys if "embed_tokens" in key} == {"embedding_A", "embedding_B"}
    assert {key.rpartition(".lora_")[2] for key in keys if "lm_head" in key} == {"A.weight", "B.weight"}
    assert_same(merged(jlora.peft.load(tmp_path, nested(state))), expected)
    assert np.abs(expected["embed_tokens.weight"] - expected["lm_head.weight"]).max() > 0.1


def test_a_file_of_other_sizes_is_refused(tmp_path):
    save(tmp_path, {"q_proj.weight": noise(6, 8)}, q_proj=LINEAR)
    for shape in ((6, 9), (7, 8)):
        with pytest.raises(ValueError, match=rf"q_proj has factors \(2, 8\) and \(6, 2\), .* of shape \({shape[0]}, "):
            jlora.peft.load(tmp_path, nested({"q_proj.weight": noise(*shape)}))


def test_names_that_the_tree_does_not_have(tmp_path):
    """All are counted, and the nearest of the tree's are told."""
    state = {f"attn.{p}.weight": noise(6, 8) for p in ("q_proj", "k_proj", "v_proj")}
    save(tmp_path, state, q_proj=LINEAR, k_proj=LINEAR)
    tree = nested({"attn.query.weight": noise(6, 8), "attn.k_proj.weight": noise(6, 8)})
    with pytest.raises(ValueError, match=r"has attn\.q_proj, which the tree does not have\. Nearest: attn\.\w+, "):
        jlora.peft.load(tmp_path, tree)
    with pytest.raises(ValueError, match=r"has attn\.\w_proj, and 1 more, which the tree does not have"):
        jlora.peft.load(tmp_path, nested({"attn.query.weight": noise(6, 8), "attn.value.weight": noise(6, 8)}))


def test_stacked_experts_of_a_model(tmp_path):
    """PyTorch's one parameter (experts, out, in) from a leaf (experts, in, out), and back."""
    params = {"experts": {"up": noise(3, 8, 6)}, "head": {"kernel": noise(6, 5)}}
    parameter = jlora.peft.Layout("batch in out", is_parameter=True)
    names = [("experts.up", "experts/up", parameter), ("head", "head/kernel")]
    jlora.peft.to_safetensors(params, tmp_path, names=names)
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(theirs["experts.up"], params["experts"]["up"].swapaxes(1, 2))
    np.testing.assert_array_equal(theirs["head.weight"], params["head"]["kernel"].T)
    shapes = jax.eval_shape(lambda: params)
    again = jlora.peft.from_safetensors(tmp_path, like=shapes, names=names)
    np.testing.assert_array_equal(again["experts"]["up"], params["experts"]["up"])


@pytest.mark.parametrize("sizes", [(6, 5), (6, 6)])
def test_a_module_that_is_saved_whole(sizes, tmp_path):
    """Onto a Flax kernel, square or not: (in, out), where PyTorch has (out, in)."""
    outs, ins = sizes
    state = {"q_proj.weight": noise(6, 8), "head.weight": noise(outs, ins), "head.bias": noise(outs)}
    tree = nested(state | {"q_proj.weight": lora(state["q_proj.weight"])})
    tree["head"] = {name: jlora.TrainableParam(jnp.asarray(noise(*x.shape))) for name, x in tree["head"].items()}
    jlora.peft.save(tmp_path, tree)
    kernels = {"q_proj": {"kernel": state["q_proj.weight"].T}}
    params = kernels | {"head": {"kernel": state["head.weight"].T, "bias": state["head.bias"]}}
    names = [("q_proj", "q_proj/kernel"), ("head", "head/kernel")]
    found = jlora.peft.load(tmp_path, params, names=names)
    np.testing.assert_array_equal(found["head"]["kernel"].base, np.asarray(tree["head"]["weight"].base).T)
    np.testing.assert_array_equal(found["head"]["bias"].base, tree["head"]["bias"].base)
    wrong = kernels | {"head": {"kernel": noise(ins + 1, outs), "bias": state["head.bias"]}}
    told = rf"head of shape \({outs}, {ins}\) does not fit head/kernel of shape \({ins + 1}, {outs}\); the map"
    with pytest.raises(ValueError, match=told):
        jlora.peft.load(tmp_path, wrong, names=names)


@pytest.mark.parametrize("is_flax", [False, True])
def test_convolutions_of_a_model(is_flax, tmp_path):
    """PyTorch's (out, in, height, width) from a leaf like it, or from Flax's (height, width, in, out), and back."""
    weight, head = noise(6, 4, 3, 2), noise(5, 6)
    params, names = {"conv": {"weight": weight}, "head": {"weight": head}}, None
    if is_flax:
        params = {"conv": {"kernel": weight.transpose(2, 3, 1, 0)}, "head": {"kernel": head.T}}
        names = [("conv", "conv/kernel"), ("head", "head/kernel")]
    jlora.peft.to_safetensors(params, tmp_path, names=names)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "model.safetensors")["conv.weight"], weight)
    again = jlora.peft.from_safetensors(tmp_path, like=jax.eval_shape(lambda: params), names=names)
    assert_same(flat(again), flat(params), atol=0)
