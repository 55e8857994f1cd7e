"""Maps from PyTorch's names: their language, and each ready one against its layouts written out in NumPy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.peft import NAMES, Layout
from jlora.peft.names import slots_of
from tests.peft_files.trees import TABLE, adapted, assert_same, flat, lora, merged, nested, noise

ATOL = 3e-6
IN_OUT, CONV = jlora.Axes((0,), (1,)), jlora.Axes((1, 2, 3), (0,))

# -------------------------------------------------------------------------------- the language


def places(shapes, *entries, stacked=None):
    """The map's places: (path, index) by name."""
    found = slots_of(shapes, entries, stacked or {})
    return {name: [(slot.path, slot.index) for slot in slots] for name, slots in found.items()}


def test_a_field_is_what_it_matches():
    shapes = {"layers_0/q/kernel": (4, 4), "layers_11/k/kernel": (4, 4), "layers_x/other/q/kernel": (4, 4)}
    assert places(shapes, ("l.{i}.{p}_proj", "layers_{i}/{p}/kernel")) == {
        "l.0.q_proj": [("layers_0/q/kernel", (None, None))],
        "l.11.k_proj": [("layers_11/k/kernel", (None, None))],
    }


def test_an_index_is_a_place_on_a_stacked_axis():
    shapes = {"q/kernel": (2, 3, 4)}
    assert places(shapes, ("l.{i}.q", "q/kernel[{i}]")) == {
        f"l.{i}.q": [("q/kernel", (i, None, None))] for i in range(2)
    }
    assert places(shapes, ("l.{i}.q", "q/kernel[:, {i}]")) == {
        f"l.{i}.q": [("q/kernel", (None, i, None))] for i in range(3)
    }
    assert places(shapes, ("l.{i}.{j}", "q/kernel[{j}, {i}]"))["l.2.1"] == [("q/kernel", (1, 2, None))]
    assert places(shapes, ("v", "q/kernel[1]")) == {"v": [("q/kernel", (1, None, None))]}
    assert places(shapes, ("v", "q/kernel[:,:,3]")) == {"v": [("q/kernel", (None, None, 3))]}


def test_an_index_alone_is_on_the_axis_of_the_layers():
    stacked = {"q/kernel": 1}
    assert places({"q/kernel": (4, 2, 3)}, ("l.{i}", "q/kernel[{i}]"), stacked=stacked) == {
        f"l.{i}": [("q/kernel", (None, i, None))] for i in range(2)
    }


def test_a_field_of_path_and_index_is_one():
    shapes = {"stage_0/kernel": (2, 3), "stage_1/kernel": (2, 3)}
    assert places(shapes, ("l.{i}", "stage_{i}/kernel[{i}]")) == {
        "l.0": [("stage_0/kernel", (0, None))],
        "l.1": [("stage_1/kernel", (1, None))],
    }
    assert set(places({"a/a/kernel": (1, 2), "a/b/kernel": (1, 2)}, ("{x}", "{x}/{x}/kernel"))) == {"a"}


def test_what_is_not_there_is_passed_over():
    shapes = {"q/kernel": (2, 3)}
    entries = ("a", "q/kernel[5]"), ("b", "q/kernel[:, :, {i}]"), ("b.{i}", "other/kernel[{i}]"), ("c", "q/kernel")
    entries = tuple(e for e in entries if e[0] != "b")
    assert places(shapes, *entries) == {"c": [("q/kernel", (None, None))]}


def test_alternatives_and_collections():
    shapes = {"params/h/0/w": (2, 2), "params/h_1/w": (2, 2), "x/h/2/w": (2, 2)}
    assert set(places(shapes, ("l.{i}", "(h/|h_){i}/(w|kernel)"))) == {"l.0", "l.1"}
    assert set(places({"q/w": (2, 2)}, ("q", "(model/|)q/(w|kernel)"))) == {"q"}


def test_the_bias_beside_goes_along():
    shapes = {"q/kernel": (4, 2, 2), "q/bias": (2, 2), "norm/scale": (4,), "norm/bias": (4,), "moe/w1": (2, 4, 4)}
    found = places(shapes, ("attn.q", "q/kernel"), ("norm", "norm/scale"), ("experts.up", "moe/w1"))
    assert {name: at[0][0] for name, at in found.items()} == {
        "attn.q": "q/kernel", "attn.q.bias": "q/bias", "norm": "norm/scale", "norm.bias": "norm/bias",
        "experts.up": "moe/w1",
    }  # fmt: skip


def test_a_bias_may_be_named_by_itself():
    found = places({"q/kernel": (4, 4), "q_bias": (4,)}, ("q.weight", "q/kernel"), ("q.bias", "q_bias"))
    assert found == {"q": [("q/kernel", (None, None))], "q.bias": [("q_bias", (None,))]}


def test_the_first_entry_has_the_leaf():
    found = places({"q/kernel": (4, 4)}, ("first", "q/kernel"), ("second", "(q|k)/kernel"))
    assert set(found) == {"first"}


def test_parts_of_one_module_are_two_leaves():
    found = slots_of(
        {"gate/kernel": (4, 3), "up/kernel": (4, 3)}, [("gu[0/2]", "gate/kernel"), ("gu[1/2]", "up/kernel")]
    )
    assert [(slot.path, slot.part) for slot in found["gu"]] == [("gate/kernel", (0, 2)), ("up/kernel", (1, 2))]


@pytest.mark.parametrize(
    "entry, match",
    [
        ("a", "an entry is"),
        (("a",), "an entry is"),
        (("a", "b", "c", "d"), "an entry is"),
        (("a", 3), "an entry is"),
        (3, "an entry is"),
        (("a", "b", "in out"), "must be a jlora.peft.Layout"),
        (("a[2/2]", "q/kernel"), "parts count from 0"),
        (("l.{i}", "q/kernel"), "on one side only"),
        (("l", "{i}/kernel"), "on one side only"),
        (("l", "q/kernel[{i}]"), "on one side only"),
        (("l.{i}", "q/kernel[i]"), "an index is"),
        (("l.{i}", "q/kernel[{i}][0]"), "an index is"),
        (("l", "q/kernel[-1]"), "an index is"),
        (("l", "q/kernel[0:2]"), "an index is"),
        (("a", "nothing/kernel"), "no path of the map is one of the tree's"),
    ],
)
def test_entries_that_are_none_are_refused(entry, match):
    with pytest.raises(ValueError, match=match):
        places({"q/kernel": (4, 4)}, entry)


def test_maps_that_are_none_are_refused(tmp_path):
    jlora.peft.save(tmp_path, adapted({"q.weight": noise(4, 3)}))
    params = {"q": {"kernel": jnp.zeros((3, 4))}}
    for names, match in [
        ("no-such", "there is no map 'no-such'; there are llama"),
        (3, "a list of pairs"),
        ([], "no path"),
    ]:
        with pytest.raises(ValueError, match=match):
            jlora.peft.load(tmp_path, params, names=names)
    with pytest.raises(ValueError, match="would be both a/kernel and b/kernel"):
        slots_of({"a/kernel": (3, 4), "b/kernel": (3, 4)}, [("q", "(a|b)/kernel")])


def moved(tmp_path, state, tree, names, **kwargs):
    """A random adapter of a PyTorch model put onto another tree: merged there, and there and back again."""
    theirs = adapted(state)
    jlora.peft.save(tmp_path / "theirs", theirs)
    ours = jlora.peft.load(tmp_path / "theirs", nested(tree(state)), names=names, **kwargs)
    assert_same(merged(ours), tree(merged(theirs)), ATOL)
    jlora.peft.save(tmp_path / "ours", ours, names=names)
    again = jlora.peft.load(tmp_path / "ours", nested(state))
    assert_same(merged(again), merged(theirs), ATOL)
    return ours


def test_dims_tell_the_axes(tmp_path):
    tree = lambda state: {"q.w": state["q.weight"].reshape(2, 2, 4).transpose(0, 2, 1)}
    moved(tmp_path, {"q.weight": noise(4, 4)}, tree, [("q", "q/w", Layout("out in out"))])


def test_axes_that_nothing_tells_are_asked_for(tmp_path):
    tree = lambda state: {"q.w": state["q.weight"].reshape(2, 2, 4).transpose(0, 2, 1)}
    with pytest.raises(ValueError, match=r"do not tell its axes: .* or .*Layout"):
        moved(tmp_path, {"q.weight": noise(4, 4)}, tree, [("q", "q/w")])
    with pytest.raises(ValueError, match="which do not fit q/w of shape"):
        moved(tmp_path / "2", {"q.weight": noise(4, 4)}, tree, [("q", "q/w", Layout("in out"))])


def test_sites_tell_the_axes(tmp_path):
    tree = lambda state: {"q.w": state["q.weight"].reshape(2, 2, 4).transpose(0, 2, 1)}
    state = {"q.weight": noise(4, 4)}
    fn = lambda params, x: jnp.einsum("bd,hdk->bhk", x, params["q"]["w"])
    sites = jlora.sites(fn, nested(tree(state)), jnp.ones((3, 4)))
    moved(tmp_path, state, tree, [("q", "q/w")], sites=sites)


def test_sites_tell_the_axis_of_the_layers(tmp_path):
    tree = lambda state: {"q.kernel": np.stack([state[f"l.{i}.q.weight"].T for i in range(2)], 1)}
    state = {f"l.{i}.q.weight": noise(4, 4) for i in range(2)}

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.moveaxis(params["q"]["kernel"], 1, 0))[0]

    sites = jlora.sites(fn, nested(tree(state)), jnp.ones((3, 4)))
    moved(tmp_path, state, tree, [("l.{i}.q", "q/kernel[{i}]")], sites=sites)


@pytest.mark.parametrize("rope", [True, 4, 2])
def test_halves_of_heads_are_interleaved(tmp_path, rope):
    head = 4 if rope is True else rope

    def tree(state):
        halves = state["q.weight"].T.reshape(3, 8 // head, 2, head // 2)
        return {
            "q.kernel": np.stack([halves[:, :, 0], halves[:, :, 1]], -1).reshape(3, *((2, 4) if rope is True else (8,)))
        }

    moved(tmp_path, {"q.weight": noise(8, 3)}, tree, [("q", "q/kernel", Layout(rope=rope))])


@pytest.mark.parametrize("scale, factor", [(3.0, 3), (-0.5, -0.5), ("rsqrt_head", 0.5), ("sqrt_features", 8**0.5)])
def test_kernels_may_be_pytorchs_times_a_scale(tmp_path, scale, factor):
    tree = lambda state: {"q.kernel": factor * state["q.weight"].T.reshape(3, 2, 4)}
    moved(tmp_path, {"q.weight": noise(8, 3)}, tree, [("q", "q/kernel", Layout(scale=scale))])


def test_parts_of_modules(tmp_path):
    def tree(state):
        gate, up = np.split(state["gate_up.weight"].T, 2, 1)
        return {"gate.kernel": gate, "up.kernel": up}

    names = [("gate_up[0/2]", "gate/kernel"), ("gate_up[1/2]", "up/kernel")]
    ours = moved(tmp_path, {"gate_up.weight": noise(6, 4)}, tree, names)
    assert ours["gate"]["kernel"].rank == 2
    again = jlora.peft.load(tmp_path / "ours", nested({"gate_up.weight": noise(6, 4)}))
    assert again["gate_up"]["weight"].rank == 2  # A is the same, so they are one


def test_parts_with_factors_of_their_own_are_of_the_sum_of_ranks(tmp_path):
    names = [("gate_up[0/2]", "gate/kernel"), ("gate_up[1/2]", "up/kernel")]
    gate, up = noise(4, 3), noise(4, 3)
    tree = {"gate": {"kernel": lora(gate, axes=IN_OUT)}, "up": {"kernel": lora(up, 1, 3.0, axes=IN_OUT)}}
    jlora.peft.save(tmp_path, tree, names=names)
    again = jlora.peft.load(tmp_path, nested({"gate_up.weight": np.concatenate([gate, up], 1).T}))
    assert again["gate_up"]["weight"].rank == 3
    both = np.concatenate([merged(tree)["gate.kernel"], merged(tree)["up.kernel"]], 1)
    assert_same(merged(again), {"gate_up.weight": both.T}, ATOL)


def test_some_layers_of_a_stack(tmp_path):
    state = {f"l.{i}.q.weight": noise(5, 4) for i in range(4)}
    theirs = nested({name: lora(x) if name[2] in "13" else x for name, x in state.items()})
    jlora.peft.save(tmp_path / "theirs", theirs)
    stack = lambda state: {"q.kernel": np.stack([state[f"l.{i}.q.weight"].T for i in range(4)])}
    names = [("l.{i}.q", "q/kernel[{i}]")]
    ours = jlora.peft.load(tmp_path / "theirs", nested(stack(state)), names=names)
    assert ours["q"]["kernel"].layers == (1, 3)
    assert_same(merged(ours), stack(merged(theirs)), ATOL)
    jlora.peft.save(tmp_path / "ours", ours, names=names)
    again = jlora.peft.load(tmp_path / "ours", nested(state))
    assert {name for name, x in flat(again).items() if isinstance(x, jlora.LoraParam)} == {
        "l.1.q.weight",
        "l.3.q.weight",
    }
    assert_same(merged(again), merged(theirs), ATOL)


def test_leaves_without_a_name_are_told(tmp_path):
    tree = adapted({"a.weight": noise(3, 3), "b.weight": noise(3, 3)})
    with pytest.raises(ValueError, match="names has no name for b/weight, which is adapted"):
        jlora.peft.save(tmp_path, tree, names=[("a", "a/weight", Layout("out in"))])


# -------------------------------------------------------------------------------- PyTorch's models

LAYERS, HEADS, KV, HEAD, F, V, E = 2, 4, 2, 4, 10, 11, 3
EQUAL, OTHER = HEADS * HEAD, 12  # of the model's size: the size of all heads, or another


def decoder(
    size: int, bias: bool = False, head: bool = True, experts: bool = False, qk_norm: bool = False, kv: int = KV
):
    state = {"model.embed_tokens.weight": noise(V, size), "model.norm.weight": noise(size)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj.weight": noise(HEADS * HEAD, size), "self_attn.k_proj.weight": noise(kv * HEAD, size),
            "self_attn.v_proj.weight": noise(kv * HEAD, size), "self_attn.o_proj.weight": noise(size, HEADS * HEAD),
            "input_layernorm.weight": noise(size), "post_attention_layernorm.weight": noise(size),
        }  # fmt: skip
        if bias:
            layer |= {f"self_attn.{p}_proj.bias": noise(n * HEAD) for p, n in (("q", HEADS), ("k", kv), ("v", kv))}
        if qk_norm:
            layer |= {"self_attn.q_norm.weight": noise(HEAD), "self_attn.k_norm.weight": noise(HEAD)}
        if experts:
            layer |= {"mlp.gate.weight": noise(E, size), "mlp.experts.gate_up_proj": noise(E, 2 * F, size)}
            layer |= {"mlp.experts.down_proj": noise(E, size, F)}
        else:
            layer |= {"mlp.gate_proj.weight": noise(F, size), "mlp.up_proj.weight": noise(F, size)}
            layer |= {"mlp.down_proj.weight": noise(size, F)}
        state |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
    return state | ({"lm_head.weight": noise(V, size)} if head else {})


def bert(size: int) -> dict[str, np.ndarray]:
    state = {f"bert.embeddings.{n}_embeddings.weight": noise(V, size) for n in ("word", "position", "token_type")}
    norm = lambda name: {f"{name}.weight": noise(size), f"{name}.bias": noise(size)}
    dense = lambda name, out, ins: {f"{name}.weight": noise(out, ins), f"{name}.bias": noise(out)}
    state |= norm("bert.embeddings.LayerNorm") | dense("bert.pooler.dense", size, size)
    for i in range(LAYERS):
        at = f"bert.encoder.layer.{i}"
        for p in ("query", "key", "value"):
            state |= dense(f"{at}.attention.self.{p}", size, size)
        state |= dense(f"{at}.attention.output.dense", size, size) | norm(f"{at}.attention.output.LayerNorm")
        state |= dense(f"{at}.intermediate.dense", F, size) | dense(f"{at}.output.dense", size, F)
        state |= norm(f"{at}.output.LayerNorm")
    return state


def vit(size: int) -> dict[str, np.ndarray]:
    dense = lambda name, out, ins: {f"{name}.weight": noise(out, ins), f"{name}.bias": noise(out)}
    norm = lambda name: {f"{name}.weight": noise(size), f"{name}.bias": noise(size)}
    patches = "vit.embeddings.patch_embeddings.projection"
    state = {f"{patches}.weight": noise(size, 3, 2, 2), f"{patches}.bias": noise(size)} | norm("vit.layernorm")
    for i in range(LAYERS):
        at = f"vit.layers.{i}"
        for p in "qkv":
            state |= dense(f"{at}.attention.{p}_proj", HEADS * HEAD, size)
        state |= dense(f"{at}.attention.o_proj", size, HEADS * HEAD)
        state |= dense(f"{at}.mlp.fc1", F, size) | dense(f"{at}.mlp.fc2", size, F)
        state |= norm(f"{at}.layernorm_before") | norm(f"{at}.layernorm_after")
    return state | dense("classifier", 5, size)


def gpt2(size: int) -> dict[str, np.ndarray]:
    state = {"transformer.wte.weight": noise(V, size), "transformer.wpe.weight": noise(7, size)}
    dense = lambda name, ins, out: {f"{name}.weight": noise(ins, out), f"{name}.bias": noise(out)}  # Conv1D: (in, out)
    norm = lambda name: {f"{name}.weight": noise(size), f"{name}.bias": noise(size)}
    for i in range(LAYERS):
        at = f"transformer.h.{i}"
        state |= dense(f"{at}.attn.c_attn", size, 3 * size) | dense(f"{at}.attn.c_proj", size, size)
        state |= dense(f"{at}.mlp.c_fc", size, F) | dense(f"{at}.mlp.c_proj", F, size)
        state |= norm(f"{at}.ln_1") | norm(f"{at}.ln_2")
    return state | norm("transformer.ln_f")


# ------------------------------------------------------------------------- the same in JAX, written out


class Of:
    """The parameters of one layer of a state, brought into the layouts of JAX's implementations."""

    def __init__(self, state: Any, prefix: str) -> None:
        self.state = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def __call__(self, name: str) -> np.ndarray:
        """As it is."""
        return self.state[name]

    def turned(self, name: str) -> np.ndarray:
        """(in, out)."""
        return self.state[name].T

    def split_out(self, name: str) -> np.ndarray:
        """(in, heads, head)."""
        w = self.state[name].T
        return w.reshape(w.shape[0], -1, HEAD)

    def split_in(self, name: str) -> np.ndarray:
        """(heads, head, out)."""
        w = self.state[name].T
        return w.reshape(-1, HEAD, w.shape[1])

    def einsum(self, name: str) -> np.ndarray:
        """(heads, in, head)."""
        w = self.state[name]
        return w.reshape(-1, HEAD, w.shape[1]).transpose(0, 2, 1)

    def heads(self, name: str) -> np.ndarray:
        """A bias as (heads, head)."""
        return self.state[name].reshape(-1, HEAD)


def interleaved(x: np.ndarray) -> np.ndarray:
    """MaxText's order for Llama 3.1: the second half of each head between the first."""
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return out


def layers_of(
    state: Any, prefix: str, layer: Callable[[Of], dict], numbered: str, stacked: str, axis: int | None
) -> dict:
    """The layers one by one, or stacked."""
    every = [layer(Of(state, f"{prefix}{i}.")) for i in range(LAYERS)]
    if axis is None:
        return {numbered.format(i=i) + path: x for i, found in enumerate(every) for path, x in found.items()}
    return {stacked + path: np.stack([found[path] for found in every], axis) for path in every[0]}


def flax_llama(state, axis=None, split=False, attn="self_attn", numbered="model/layers/{i}/", root="model/"):
    def layer(of: Of) -> dict:
        proj = "{}_proj" if attn == "self_attn" else "{}"
        full = {"q": "query", "k": "key", "v": "value", "o": "out"}
        named = lambda p: f"{attn}/{proj.format(p if attn == 'self_attn' else full[p])}"
        found = {}
        for p in "qkv":
            found[f"{named(p)}/kernel"] = (of.split_out if split else of.turned)(f"self_attn.{p}_proj.weight")
            if f"self_attn.{p}_proj.bias" in of:
                found[f"{named(p)}/bias"] = (of.heads if split else of)(f"self_attn.{p}_proj.bias")
        found[f"{named('o')}/kernel"] = (of.split_in if split else of.turned)("self_attn.o_proj.weight")
        found |= {f"{n}/weight": of(f"{n}.weight") for n in ("input_layernorm", "post_attention_layernorm")}
        if "mlp.gate.weight" in of:
            return found | experts(of, "moe/", "/kernel" if split else "")
        return found | {f"mlp/{p}_proj/kernel": of.turned(f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")}

    found = layers_of(state, "model.layers.", layer, numbered, f"{root}layers/", axis)
    found[f"{root}embed_tokens/embedding"] = state["model.embed_tokens.weight"]
    found[f"{root}norm/weight"] = state["model.norm.weight"]
    return found | {"lm_head/kernel": state["lm_head.weight"].T}


def experts(of: Of, block: str, leaf: str = "") -> dict:
    """The gate, and the stacked experts: (E, D, F) for both halves of gate_up, (E, F, D)."""
    gate_up = of("mlp.experts.gate_up_proj")
    return {
        f"{block}gate/kernel": of.turned("mlp.gate.weight"),
        f"{block}wi_0{leaf}": gate_up[:, :F].transpose(0, 2, 1),
        f"{block}wi_1{leaf}": gate_up[:, F:].transpose(0, 2, 1),
        f"{block}wo{leaf}": of("mlp.experts.down_proj").transpose(0, 2, 1),
    }


def maxtext(state, scanned, q_scale=1.0, rope=False, block="", table=1.0, norms=True):
    def layer(of: Of) -> dict:
        turn = interleaved if rope else lambda x: x
        att = "self_attention"
        found = {
            f"{att}/query/kernel": turn(of.split_out("self_attn.q_proj.weight")) * np.float32(q_scale),
            f"{att}/key/kernel": turn(of.split_out("self_attn.k_proj.weight")),
            f"{att}/value/kernel": of.split_out("self_attn.v_proj.weight"),
            f"{att}/out/kernel": of.split_in("self_attn.o_proj.weight"),
        }
        for p, name in (("q", "query"), ("k", "key"), ("v", "value")):
            if f"self_attn.{p}_proj.bias" in of:
                found[f"{att}/{name}/bias"] = of.heads(f"self_attn.{p}_proj.bias")
            if f"self_attn.{p}_norm.weight" in of:
                found[f"{att}/{name}_norm/scale"] = of(f"self_attn.{p}_norm.weight")
        if norms:
            found["pre_self_attention_layer_norm/scale"] = of("input_layernorm.weight")
            found["post_self_attention_layer_norm/scale"] = of("post_attention_layernorm.weight")
        if block:
            return found | experts(of, f"{block}/")
        names = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
        return found | {f"mlp/{ours}/kernel": of.turned(f"mlp.{p}_proj.weight") for ours, p in names.items()}

    axis = 1 if scanned and not block else None
    found = layers_of(state, "model.layers.", layer, "decoder/layers_{i}/", "decoder/layers/", axis)
    if scanned and block:  # of experts the layers come second too
        found = layers_of(state, "model.layers.", layer, "", "decoder/layers/", 1)
    found["token_embedder/embedding"] = state["model.embed_tokens.weight"] * np.float32(table)
    if norms:
        found["decoder/decoder_norm/scale"] = state["model.norm.weight"]
    return found | ({"decoder/logits_dense/kernel": state["lm_head.weight"].T} if "lm_head.weight" in state else {})


def maxtext_gemma2(state, scanned):
    """Layer j of MaxText's is 2j and 2j + 1."""

    def half(i: int, kind: str) -> dict:
        of = Of(state, f"model.layers.{i}.")
        att, mlp = f"self_attention_{kind}", f"mlp_{kind}"
        return {
            f"{att}/query/kernel": of.split_out("self_attn.q_proj.weight") / np.float32(HEAD**0.5),
            f"{att}/key/kernel": of.split_out("self_attn.k_proj.weight"),
            f"{att}/value/kernel": of.split_out("self_attn.v_proj.weight"),
            f"{att}/out/kernel": of.split_in("self_attn.o_proj.weight"),
            f"{mlp}/wi_0/kernel": of.turned("mlp.gate_proj.weight"),
            f"{mlp}/wi_1/kernel": of.turned("mlp.up_proj.weight"),
            f"{mlp}/wo/kernel": of.turned("mlp.down_proj.weight"),
        }

    pairs = [half(2 * j, "local") | half(2 * j + 1, "global") for j in range(2)]
    size = state["model.embed_tokens.weight"].shape[1]
    table = {"token_embedder/embedding": state["model.embed_tokens.weight"] * np.float32(size**0.5)}
    if scanned:
        return table | {f"decoder/layers/{path}": np.stack([p[path] for p in pairs], 1) for path in pairs[0]}
    return table | {f"decoder/layers_{j}/{path}": x for j, pair in enumerate(pairs) for path, x in pair.items()}


def gemma(state, turned=False, fused=False, layer_name="layer_{i}/", split=False, w="/w"):
    def layer(of: Of) -> dict:
        q, k, v = (of.einsum(f"self_attn.{p}_proj.weight") for p in "qkv")
        qkv = {"attn/qkv_einsum/w": np.stack([q, k, v])} if fused else {
            "attn/q_einsum/w": q, "attn/kv_einsum/w": np.stack([k, v])}  # fmt: skip
        found = qkv | {
            "attn/attn_vec_einsum/w": of.split_in("self_attn.o_proj.weight"),
            "pre_attention_norm/scale": of("input_layernorm.weight"),
        }
        if split:
            return found | {f"mlp/{p}_proj/kernel": of.turned(f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")}
        gate, up = of("mlp.gate_proj.weight"), of("mlp.up_proj.weight")
        gating = np.stack([gate, up]) if turned else np.stack([gate.T, up.T])
        return found | {f"mlp/gating_einsum{w}": gating, f"mlp/linear{w}": of.turned("mlp.down_proj.weight")}

    found = layers_of(state, "model.layers.", layer, layer_name, "", None)
    found["embedder/input_embedding"] = state["model.embed_tokens.weight"]
    return found | {"final_norm/scale": state["model.norm.weight"]}


def tunix(state):
    def layer(of: Of) -> dict:
        found = {f"attn/{p}_proj/w": of.split_out(f"self_attn.{p}_proj.weight") for p in "qkv"}
        found["attn/o_proj/w"] = of.split_in("self_attn.o_proj.weight")
        found |= {
            f"attn/{p}_norm/w": of(f"self_attn.{p}_norm.weight") for p in "qk" if f"self_attn.{p}_norm.weight" in of
        }
        found |= {f"{n}/w": of(f"{n}.weight") for n in ("input_layernorm", "post_attention_layernorm")}
        if "mlp.gate.weight" not in of:
            return found | {f"mlp/{p}_proj/kernel": of.turned(f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")}
        moe = experts(of, "")
        names = {
            "mlp/router/kernel": "gate/kernel",
            "mlp/gate_proj": "wi_0",
            "mlp/up_proj": "wi_1",
            "mlp/down_proj": "wo",
        }
        return found | {ours: moe[name] for ours, name in names.items()}

    found = layers_of(state, "model.layers.", layer, "layers/{i}/", "", None)
    found["embedder/input_embedding"] = state["model.embed_tokens.weight"]
    return found | {"final_norm/w": state["model.norm.weight"], "lm_head/w": state["lm_head.weight"].T}


def flax_bert(state, axis=None, numbered="encoder/layer/{i}/", names=("attention/self/", "attention/output/dense", "")):
    attention, out, _ = names

    def layer(of: Of) -> dict:
        pairs = [(f"attention.self.{p}", attention + p) for p in ("query", "key", "value")]
        pairs += [("attention.output.dense", out), ("intermediate.dense", "intermediate/dense")]
        pairs += [("output.dense", "output/dense")]
        found = {f"{ours}/kernel": of.turned(f"{name}.weight") for name, ours in pairs}
        found |= {f"{ours}/bias": of(f"{name}.bias") for name, ours in pairs}
        norms = {"attention/output/LayerNorm": "attention.output.LayerNorm", "output/LayerNorm": "output.LayerNorm"}
        return found | {
            f"{ours}/{leaf}": of(f"{name}.{leaf.replace('scale', 'weight')}")
            for ours, name in norms.items()
            for leaf in ("scale", "bias")
        }

    found = layers_of(state, "bert.encoder.layer.", layer, numbered, "encoder/layers/", axis)
    for name in ("word", "position", "token_type"):
        found[f"embeddings/{name}_embeddings/embedding"] = state[f"bert.embeddings.{name}_embeddings.weight"]
    norm = "bert.embeddings.LayerNorm"
    found |= {"embeddings/LayerNorm/scale": state[f"{norm}.weight"], "embeddings/LayerNorm/bias": state[f"{norm}.bias"]}
    dense = "bert.pooler.dense"
    return found | {"pooler/dense/kernel": state[f"{dense}.weight"].T, "pooler/dense/bias": state[f"{dense}.bias"]}


def big_vision(state, axis=None):
    def layer(of: Of) -> dict:
        block = "MultiHeadDotProductAttention_0"
        found = {}
        for p, name in (("q", "query"), ("k", "key"), ("v", "value")):
            found[f"{block}/{name}/kernel"] = of.split_out(f"attention.{p}_proj.weight")
            found[f"{block}/{name}/bias"] = of.heads(f"attention.{p}_proj.bias")
        found |= {
            f"{block}/out/kernel": of.split_in("attention.o_proj.weight"),
            f"{block}/out/bias": of("attention.o_proj.bias"),
        }
        for p, name in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            found |= {
                f"MlpBlock_0/{name}/kernel": of.turned(f"mlp.{p}.weight"),
                f"MlpBlock_0/{name}/bias": of(f"mlp.{p}.bias"),
            }
        for p, name in (("before", "LayerNorm_0"), ("after", "LayerNorm_1")):
            found |= {f"{name}/scale": of(f"layernorm_{p}.weight"), f"{name}/bias": of(f"layernorm_{p}.bias")}
        return found

    root = "Transformer/encoderblock"
    found = layers_of(state, "vit.layers.", layer, root + "_{i}/", root + "/", axis)
    patches = "vit.embeddings.patch_embeddings.projection"
    found |= {
        "embedding/kernel": state[f"{patches}.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state[f"{patches}.bias"],
    }
    found |= {
        f"Transformer/encoder_norm/{n}": state[f"vit.layernorm.{t}"] for n, t in (("scale", "weight"), ("bias", "bias"))
    }
    return found | {"head/kernel": state["classifier.weight"].T, "head/bias": state["classifier.bias"]}


def flax_gpt2(state, turned, axis=None):
    def layer(of: Of) -> dict:
        found = {}
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            path = name.replace(".", "/")
            found[f"{path}/kernel"] = of.turned(f"{name}.weight") if turned else of(f"{name}.weight")
            found[f"{path}/bias"] = of(f"{name}.bias")
        for n in ("ln_1", "ln_2"):
            found |= {f"{n}/scale": of(f"{n}.weight"), f"{n}/bias": of(f"{n}.bias")}
        return found

    found = layers_of(state, "transformer.h.", layer, "transformer/h/{i}/", "transformer/h/", axis)
    found |= {f"transformer/{n}/embedding": state[f"transformer.{n}.weight"] for n in ("wte", "wpe")}
    return found | {
        f"transformer/ln_f/{n}": state[f"transformer.ln_f.{t}"] for n, t in (("scale", "weight"), ("bias", "bias"))
    }


# -------------------------------------------------------------------------------- the ready maps


@dataclasses.dataclass(frozen=True)
class Case:
    """A ready map, a PyTorch model and the same in JAX."""

    names: str
    state: Callable[[int], dict[str, np.ndarray]]
    tree: Callable[[Any], dict[str, np.ndarray]]
    sizes: tuple[int, ...] = (EQUAL, OTHER)
    full: tuple[str, ...] = ()


TABLES = dict.fromkeys("embed_tokens wte wpe word_embeddings position_embeddings token_type_embeddings".split(), TABLE)
AXES = TABLES | {"projection": CONV} | dict.fromkeys(("c_attn", "c_fc", "c_proj"), IN_OUT)
RSQRT = HEAD**-0.5
SHORT = ("attention/", "attention/out", "")
root_of_width = lambda state: state["model.embed_tokens.weight"].shape[1] ** 0.5
biased, moe = lambda size: decoder(size, bias=True), lambda size: decoder(size, experts=True)
tied = lambda size: decoder(size, head=False)
encoder = lambda size: {name.removeprefix("bert."): x for name, x in bert(size).items()}
same_heads = lambda size: decoder(size, head=False, kv=HEADS)
in_pairs = lambda size: {n: x for n, x in decoder(size, head=False).items() if ".2." not in n} | {
    n.replace(".0.", ".2."): noise(*x.shape) for n, x in decoder(size).items() if ".0." in n
} | {n.replace(".0.", ".3."): noise(*x.shape) for n, x in decoder(size).items() if ".0." in n}  # fmt: skip
flax = lambda axis=None, split=False, **kw: lambda s: flax_llama(s, axis, split, **kw)
stacked_attention = {"attn": "attention", "root": "", "numbered": "layers_{i}/"}
CASES = {
    "llama": Case("llama", decoder, flax()),
    "llama, full": Case("llama", decoder, flax(), full=("model.norm.weight", "lm_head.weight")),
    "llama, heads": Case("llama", decoder, flax(split=True, **stacked_attention)),
    "llama, stacked": Case("llama", decoder, flax(0)),
    "mistral": Case("mistral", decoder, flax(0, True, **stacked_attention)),
    "qwen": Case("qwen", biased, flax()),
    "qwen, stacked heads": Case("qwen", biased, flax(0, True, **stacked_attention)),
    "mixtral": Case("mixtral", moe, flax()),
    "mixtral, stacked": Case("mixtral", moe, flax(0, True)),
    "gemma": Case("gemma", tied, gemma),
    "gemma, w": Case("gemma", tied, lambda s: gemma(s, w="")),
    "gemma, qkv": Case("gemma", same_heads, lambda s: gemma(s, fused=True)),
    "gemma3": Case("gemma3", tied, lambda s: gemma(s, turned=True)),
    "gemma, F == D": Case("gemma", tied, gemma, (F,)),
    "gemma3, F == D": Case("gemma3", tied, lambda s: gemma(s, turned=True), (F,)),
    "tunix": Case("tunix", lambda size: decoder(size, qk_norm=True), tunix),
    "tunix, experts": Case("tunix", moe, tunix),
    "tunix-gemma": Case("tunix-gemma", tied, lambda s: gemma(s, layer_name="layers/{i}/", split=True)),
    "bert": Case("bert", encoder, lambda s: flax_bert({f"bert.{name}": x for name, x in s.items()})),
    "bert-classifier": Case("bert-classifier", bert, flax_bert),
    "bert, stacked": Case("bert-classifier", bert, lambda s: flax_bert(s, 0)),
    "bert, short": Case(
        "bert-classifier", bert, lambda s: flax_bert(s, None, "layer_{i}/", ("attention/", "attention/out", ""))
    ),
    "vit": Case("vit", vit, big_vision),
    "vit, stacked": Case("vit", vit, lambda s: big_vision(s, 0)),
    "gpt2": Case("gpt2", gpt2, lambda s: flax_gpt2(s, False)),
    "gpt2, stacked": Case("gpt2", gpt2, lambda s: flax_gpt2(s, False, 0)),
    "transformers-gpt2": Case("transformers-gpt2", gpt2, lambda s: flax_gpt2(s, True)),
}
for name, state, settings in [
    ("llama", decoder, {"q_scale": RSQRT}),
    ("llama3.1", decoder, {"q_scale": RSQRT, "rope": True}),
    ("mistral", decoder, {"q_scale": RSQRT}),
    ("mixtral", moe, {"q_scale": RSQRT, "block": "MoeBlock_0"}),
    ("qwen", lambda size: decoder(size, bias=True, qk_norm=True), {}),
    ("qwen3-moe", moe, {"block": "moe_block"}),
]:
    make = lambda scanned, settings=settings: lambda s: maxtext(s, scanned, **settings)
    CASES[f"maxtext-{name}"] = Case(f"maxtext-{name}", state, make(False))
    CASES[f"maxtext-{name}, scanned"] = Case(f"maxtext-{name}", state, make(True))
for name, scale in [("gemma", RSQRT), ("gemma3", 1.0)]:
    make = lambda scanned, scale=scale: lambda s: maxtext(s, scanned, scale, table=root_of_width(s), norms=False)
    CASES[f"maxtext-{name}"] = Case(f"maxtext-{name}", tied, make(False))
    CASES[f"maxtext-{name}, scanned"] = Case(f"maxtext-{name}", tied, make(True))
CASES["maxtext-gemma2"] = Case("maxtext-gemma2", in_pairs, lambda s: maxtext_gemma2(s, False))
CASES["maxtext-gemma2, scanned"] = Case("maxtext-gemma2", in_pairs, lambda s: maxtext_gemma2(s, True))


def trained(case: Case, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """A PyTorch tree with factors at every kernel, and trained biases beside them."""
    leaves = flat(adapted(state, **AXES))
    beside = {name for name in state if name.endswith(".bias") and state.get(name[:-4] + "weight", name).ndim > 1}
    full = {name: jlora.TrainableParam(jnp.asarray(noise(*state[name].shape))) for name in {*case.full, *beside}}
    return nested(leaves | full)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if size == case.sizes[-1] else pytest.mark.slow)
        for name, case in CASES.items()
        for size in case.sizes
    ],
)
def test_a_ready_map_is_its_layouts(name, size, tmp_path):
    case = CASES[name]
    state = case.state(size)
    tree = lambda state: {path.replace("/", "."): x for path, x in case.tree(state).items()}
    theirs = trained(case, state)
    jlora.peft.save(tmp_path / "theirs", theirs)
    ours = jlora.peft.load(tmp_path / "theirs", nested(tree(state)), names=case.names)
    assert_same(merged(ours), tree(merged(theirs)), ATOL)
    jlora.peft.save(tmp_path / "ours", ours, names=case.names)
    again = jlora.peft.load(tmp_path / "ours", nested(state))
    assert_same(merged(again), merged(theirs), ATOL)


@pytest.mark.parametrize("name", ["mixtral, stacked", "maxtext-qwen3-moe, scanned", "tunix, experts", "llama, stacked"])
def test_a_model_is_read_by_a_ready_map(name, tmp_path):
    case = CASES[name]
    state = case.state(OTHER)
    jlora.peft.to_safetensors(nested(state), tmp_path)
    expected = nested({path.replace("/", "."): x for path, x in case.tree(state).items()})
    found = jlora.peft.from_safetensors(tmp_path, like=expected, names=case.names)
    assert_same(flat(found), flat(expected), ATOL)


def test_there_is_a_case_for_each_ready_map():
    assert {case.names for case in CASES.values()} == {*NAMES}
