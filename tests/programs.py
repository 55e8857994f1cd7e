"""Small JAX programs, one idea each, over which the laws of the library are tested.

A program is an ordinary function of parameters that knows nothing of LoRA. It is written as

    @program({"w": "6i 10o"}, (5, 6))
    def dot_rhs(p, x):
        return x @ p["w"]

where each axis of a kernel is its size and its role (`i`n, `o`ut or `b`atch), parameters without roles are
plain, and each further argument is an array, or a shape to be filled with normal noise.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name


@dataclasses.dataclass(frozen=True)
class Program:
    """A function, its inputs, and the truth about how it uses its kernels.

    Attributes:
        name: unique name.
        fn: `fn(params, *args)`, differentiable in the float leaves of params.
        params: pytree of float32 arrays.
        args: the other inputs.
        axes: path of each kernel to adapt -> (in_axis, out_axis, batch_axis), each a tuple of axes. Every use
            of the kernel agrees with it, unless `agree` is False.
        kind: path -> "dot", "embedding", "conv", "ragged_dot" or "other"; where `factored` is not True, a walk that
            cannot follow the kernel may say "other", and no axes.
        factored: True: no dense fallback is needed; False: one is expected.
        reverse: reverse-mode differentiation works.
        agree: False: a kernel is used in more than one way, and `axes` hold its lookup, or else its first use.
        tolerance: absolute and relative error to grant to another order of rounding.
    """

    name: str
    fn: Callable
    params: Any
    args: tuple
    axes: dict[str, tuple]
    kind: dict[str, str]
    factored: bool = True
    reverse: bool = True
    agree: bool = True
    tolerance: float = 2e-5


PROGRAMS: list[Program] = []


def program(leaves: dict[str, str], *args, kind="dot", **facts):
    """Registers the decorated function as a program; `kind` is one word, or a dict of exceptions to "dot"."""

    def register(fn):
        rng = np.random.default_rng(list(fn.__name__.encode()))
        kernels = [path for path, text in leaves.items() if "i" in text or "o" in text]
        kinds = kind if isinstance(kind, dict) else dict.fromkeys(kernels, kind)
        PROGRAMS.append(
            Program(
                name=fn.__name__,
                fn=fn,
                params=nest({path: noise(rng, shape_of(text)) for path, text in leaves.items()}),
                args=tuple(noise(rng, arg) if isinstance(arg, tuple) else arg for arg in args),
                axes={path: roles_of(leaves[path]) for path in kernels},
                kind={path: kinds.get(path, "dot") for path in kernels},
                **facts,
            )
        )
        return fn

    return register


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(int(axis.rstrip("iob")) for axis in text.split())


def roles_of(text: str) -> tuple[tuple[int, ...], ...]:
    axes = text.split()
    return tuple(tuple(i for i, axis in enumerate(axes) if axis.endswith(role)) for role in "iob")


def noise(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray((0.5 * rng.standard_normal(shape)).astype(np.float32))


def nest(leaves: dict[str, Any]) -> Any:
    """{"a/0/b": x} as {"a": [{"b": x}]}."""
    if "" in leaves:
        return leaves[""]
    heads = dict.fromkeys(path.partition("/")[0] for path in leaves)
    children = {head: nest(_under(leaves, head)) for head in heads}
    return list(children.values()) if all(head.isdigit() for head in heads) else children


def _under(leaves: dict[str, Any], head: str) -> dict[str, Any]:
    split = {path: path.partition("/") for path in leaves}
    return {split[path][2]: leaf for path, leaf in leaves.items() if split[path][0] == head}


def ints(*values) -> jax.Array:
    return jnp.asarray(np.array(values, np.int32))


# -------------------------------------------------------------------------------- dot_general


@program({"w": "6i 10o"}, (5, 6))
def dot_rhs(p, x):
    return x @ p["w"]


@program({"w": "10o 6i"}, (6, 5))
def dot_lhs(p, x):
    return p["w"] @ x


@program({"w": "6i 10o"}, (6, 5))
def dot_lhs_contracting_first(p, x):
    return lax.dot_general(p["w"], x, (((0,), (0,)), ((), ())))


@program({"w": "6i 10o"}, (6, 5))
def dot_x_transposed(p, x):
    return x.T @ p["w"]


@program({"w": "6i 10o"}, (6, 5))
def dot_contracting_first_of_x(p, x):
    return lax.dot_general(x, p["w"], (((0,), (0,)), ((), ())))


@program({"w": "6i 10o"}, (6,))
def dot_vector(p, x):
    return x @ p["w"]


@program({"w": "10o 6i"}, (6,))
def dot_lhs_vector(p, x):
    return p["w"] @ x


@program({"w": "6i 10o"}, (2, 5, 6))
def dot_3d(p, x):
    return x @ p["w"]


@program({"w": "6i 10o"}, (2, 4, 5, 6))
def dot_4d(p, x):
    return jnp.dot(x, p["w"])


@program({"w": "10o 6i"}, (5, 6))
def dot_inner(p, x):
    return jnp.inner(x, p["w"])


@program({"w": "1i 6i 10o", "v": "10i 4o 1o"}, (5, 1, 6))
def dot_axes_of_size_one(p, x):
    return jnp.tensordot(jnp.tanh(jnp.tensordot(x, p["w"], 2)), p["v"], 1)


@program({"w": "6i 10o", "b": "10"}, (5, 6))
def dense_with_bias(p, x):
    return x @ p["w"] + p["b"]


@program({"w": "6i 10o"}, (5, 6), tolerance=5e-2)
def preferred_element_type(p, x):
    low = [v.astype(jnp.bfloat16) for v in (x, p["w"])]
    return lax.dot_general(*low, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


@program({"w": "6i 10o"}, (5, 6))
def precision_highest(p, x):
    return jnp.matmul(x, p["w"], precision=lax.Precision.HIGHEST)


@program({"w": "6i 10o"}, (5, 6), tolerance=5e-2)
def bfloat16_compute(p, x):
    return (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32)


@program({"w": "4i 6i 10o"}, (5, 4, 6))
def contract_two(p, x):
    return jnp.tensordot(x, p["w"], 2)


@program({"w": "4i 6i 10o"}, (5, 6, 4))
def contract_two_swapped(p, x):
    return lax.dot_general(x, p["w"], (((1, 2), (1, 0)), ((), ())))


@program({"w": "4i 5i 6i 7o"}, (3, 4, 5, 6))
def contract_three(p, x):
    return jnp.einsum("nabc,abcf->nf", x, p["w"])


@program({"w": "4i 7o 6i"}, (5, 4, 6))
def contract_around_out(p, x):
    return jnp.einsum("nac,afc->nf", x, p["w"])


@program({"w": "4o 5i 7o 6i"}, (3, 5, 6))
def contract_interleaved(p, x):
    return jnp.einsum("nac,eafc->nfe", x, p["w"])


@program({"q": "12i 4o 5o", "k": "12i 4o 5o", "v": "12i 4o 5o", "o": "4i 5i 12o"}, (2, 7, 12))
def attention(p, x):
    q, k, v = (jnp.einsum("bsd,dhk->bshk", x, p[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k))
    return jnp.einsum("bqhk,hkd->bqd", jnp.einsum("bhqs,bshk->bqhk", weights, v), p["o"])


@program({"w": "4o 6i 10o"}, (2, 5, 6))
def einsum_out_in_out(p, x):
    return jnp.einsum("bsd,hdk->bhsk", x, p["w"])


@program({"kv": "2o 4o 6i 5o"}, (3, 7, 6))
def einsum_key_value(p, x):
    k, v = jnp.einsum("bsd,ckdh->cbskh", x, p["kv"])
    return k * jnp.tanh(v)


# The path of contractions takes y first.
@program({"w": "6o 10i"}, (4, 6), (4, 10))
def einsum_bilinear(p, x, y):
    return jnp.einsum("bd,df,bf->b", x, p["w"], y)


@program({"w": "3b 6i 10o"}, (3, 5, 6))
def batch_experts(p, x):
    return jnp.einsum("ecd,edf->ecf", x, p["w"])


@program({"w": "3b 5i 7o"}, (4, 3, 5))
def batch_heads(p, x):
    return jnp.einsum("bhd,hde->bhe", x, p["w"])


@program({"w": "6i 10o 3b"}, (5, 6, 3))
def batch_last(p, x):
    return jnp.einsum("cde,dfe->efc", x, p["w"])


@program({"w": "3b 4b 6i 10o"}, (3, 4, 5, 6))
def batch_two_axes(p, x):
    return x @ p["w"]


@program({"w": "3b 10o 6i"}, (3, 6, 5))
def batch_lhs(p, x):
    return jnp.matmul(p["w"], x)


@program({"w": "3b 4i 6i 5o 7o"}, (8, 3, 6, 4))
def batch_and_pairs(p, x):
    return jnp.einsum("nebd,edbfg->gnef", x, p["w"])


# As used here, the axis of the experts is produced by "td,edf->tef" and contracted by "tef,efd->td".
@program({"up": "3o 6i 10o", "down": "3i 10i 6o", "router": "6i 3o"}, (5, 6))
def experts_by_mask(p, x):
    gate = jax.nn.softmax(x @ p["router"])
    hidden = jax.nn.silu(jnp.einsum("td,edf->tef", x, p["up"])) * gate[:, :, None]
    return jnp.einsum("tef,efd->td", hidden, p["down"])


@program({"w": "3i 6o 10o"}, (3,), (5, 6))
def kernels_mixed_by_weights(p, gate, x):
    return x @ jnp.einsum("e,edf->df", gate, p["w"])


@program({"w": "6i 10o"}, (5, 6))
def same_kernel_twice(p, x):
    return x @ p["w"] + jnp.sin(2 * x) @ p["w"]


@program({"w": "6i 10o"}, (5, 6), agree=False)
def both_ways(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


@program({"a": "8o 6i", "b": "6i 10o"}, (5, 8), factored=False)
def product_of_kernels(p, x):
    return x @ (p["a"] @ p["b"])


@program({"w": "6o 10i"}, (5, 6), factored=False)
def gram_matrix(p, x):
    return x @ (p["w"] @ p["w"].T)


@program({"w": "6i 10o", "unused": "7i 9o"}, (5, 6), kind={"unused": "other"})
def never_used(p, x):
    return x @ p["w"]


@program({"layers/0/w": "6i 10o", "layers/1/w": "10i 7o", "head/out/kernel": "7i 4o"}, (5, 6))
def nested_paths(p, x):
    for layer in p["layers"]:
        x = jnp.tanh(x @ layer["w"])
    return x @ p["head"]["out"]["kernel"]


@program({"w": "6i 10o"}, {"x": jnp.ones((5, 6)), "mask": ints(1, 0, 1, 1, 0)}, 0.5)
def inputs_in_a_dict_and_outputs_too(p, batch, scale):
    y = scale * (batch["x"] @ p["w"])
    return y.sum(), {"logits": y, "kept": batch["mask"].sum(), "nothing": None, "prediction": y.argmax(-1)}


@program({"w": "6i 10o"}, (5, 6), jax.random.key(3))
def dropout_with_key(p, x, key):
    y = x @ p["w"]
    return jnp.where(jax.random.bernoulli(key, 0.7, y.shape), y / 0.7, 0.0)


@program({"w": "6i 10o"}, (5, 6))
def callback_on_activations(p, x):
    y = x @ p["w"]
    jax.debug.callback(_ignore, y)
    return y


def _ignore(_):
    pass


# -------------------------------------------------------------------------------- views before use


@program({"w": "10o 6i"}, (5, 6))
def view_transpose(p, x):
    return x @ p["w"].T


@program({"w": "4o 10o 6i"}, (5, 6))
def view_transpose_3d(p, x):
    return jnp.tensordot(x, jnp.transpose(p["w"], (2, 0, 1)), 1)


@program({"w": "6i 10o"}, (5, 6), tolerance=5e-2)
def view_cast_there_and_back(p, x):
    return x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32)


@program({"w": "6i 4o 5o"}, (3, 6))
def view_merge_out(p, x):
    return x @ p["w"].reshape(6, 20)


@program({"w": "4i 5i 6o"}, (3, 20))
def view_merge_in(p, x):
    return x @ p["w"].reshape(20, 6)


@program({"w": "2b 3b 6i 10o"}, (6, 5, 6))
def view_merge_batch(p, x):
    return x @ p["w"].reshape(6, 6, 10)


@program({"w": "20i 6o"}, (3, 4, 5))
def view_split_in(p, x):
    return jnp.einsum("nhk,hkf->nf", x, p["w"].reshape(4, 5, 6))


@program({"w": "16i 60o"}, (7, 16))
def view_split_out_and_slice(p, x):
    kernel = p["w"].reshape(16, 3, 4, 5)
    q, k, v = (jnp.einsum("sd,dhk->shk", x, kernel[:, i]) for i in range(3))
    return jnp.einsum("hqs,shk->qhk", jax.nn.softmax(jnp.einsum("qhk,shk->hqs", q, k)), v)


@program({"w": "6i 10o"}, (5, 6), factored=False)
def view_ravel_and_back(p, x):
    return x @ p["w"].reshape(-1).reshape(6, 10)


@program({"w": "1b 6i 10o"}, (5, 6))
def view_squeeze(p, x):
    return x @ jnp.squeeze(p["w"], 0)


@program({"w": "6i 10o"}, (1, 5, 6))
def view_expand_dims(p, x):
    return lax.dot_general(x, jnp.expand_dims(p["w"], 0), (((2,), (1,)), ((0,), (0,))))


@program({"w": "6i 10o"}, (3, 5, 6))
def view_broadcast_over_batch(p, x):
    return jnp.einsum("bsd,bdf->bsf", x, jnp.broadcast_to(p["w"], (3, 6, 10)))


@program({"w": "6i 10o"}, (5, 6))
def view_slice_out(p, x):
    return x @ p["w"][:, 2:9]


@program({"w": "8i 10o"}, (5, 4))
def view_slice_in(p, x):
    return x @ p["w"][3:7]


@program({"w": "8i 10o"}, (5, 4))
def view_slice_strided(p, x):
    return x @ p["w"][::2, 1:10:3]


@program({"w": "6i 16o"}, (5, 6))
def view_split_out(p, x):
    gate, value, rest = jnp.split(p["w"], (5, 10), axis=1)
    return jax.nn.silu(x @ gate) * (x @ value), x @ rest


@program({"w": "4o 6i 10o"}, (5, 6))
def view_moveaxis(p, x):
    return jnp.tensordot(x, jnp.moveaxis(p["w"], 0, -1), 1)


@program({"w": "6i 10o"}, (5, 6))
def view_swap_twice(p, x):
    return x @ jnp.swapaxes(p["w"].T.reshape(2, 5, 6), 1, 2).transpose(1, 0, 2).reshape(6, 10)


@program({"w": "6i 10o"}, (5, 6))
def view_times_number(p, x):
    return x @ (0.3 * p["w"])


@program({"w": "6i 10o"}, (5, 6))
def view_negated(p, x):
    return x @ -p["w"]


@program({"w": "6i 10o", "norm": ""}, (5, 6))
def view_divided_by_scalar_array(p, x):
    return x @ (p["w"] / (1.5 + p["norm"]))


@program({"w": "6i 10o"}, (5, 6))
def view_copy(p, x):
    return x @ jnp.copy(p["w"])


@program({"w": "6i 10o"}, (5, 6))
def view_reversed(p, x):
    return x @ jnp.flip(p["w"], 1) + jnp.flip(x, 1) @ lax.rev(p["w"], (0,))


@program({"w": "6i 10o", "scale": "10"}, (5, 6))
def view_times_column_scale(p, x):
    return x @ (p["w"] * p["scale"])


@program({"w": "6i 10o"}, (5, 6), factored=False)
def view_padded(p, x):
    return x @ jnp.pad(p["w"], ((0, 0), (0, 4)))


@program({"w": "6i 10o"}, (5, 6), factored=False)
def view_padded_with_ones(p, x):
    return jnp.pad(x, ((0, 0), (1, 1))) @ lax.pad(p["w"], jnp.float32(1), ((1, 1, 0), (0, 2, 0)))


@program({"w": "6i 10o"}, (5, 6))
def view_rolled(p, x):
    return x @ jnp.roll(p["w"], 3, axis=1)


@program({"w": "6i 4o 5o"}, (7, 6))
def view_repeated_heads(p, x):
    return jnp.einsum("sd,dhk->shk", x, jnp.repeat(p["w"], 2, axis=1))


@program({"w": "6i 10o 4o"}, (5, 6), factored=False)
def view_summed_over_out(p, x):
    return jnp.einsum("bd,dfg->bf", x, p["w"])


@program({"gate": "6i 10o", "up": "6i 7o"}, (5, 6))
def view_concatenated_out(p, x):
    gate, up = jnp.split(x @ jnp.concatenate([p["gate"], p["up"]], axis=1), (10,), axis=1)
    return jnp.tanh(gate), up


@program({"x": "6i 10o", "h": "4i 10o"}, (5, 6), (5, 4))
def view_concatenated_in(p, x, h):
    return jnp.concatenate([x, h], axis=1) @ jnp.concatenate([p["x"], p["h"]], axis=0)


@program({"w": "6i 10o", "extra": "6 3"}, (5, 6))
def view_concatenated_with_plain(p, x):
    return x @ jnp.concatenate([p["extra"], p["w"]], axis=1)


@program(
    {f"layers/{i}/{name}": axes for i in range(3) for name, axes in {"up": "6i 10o", "down": "10i 6o"}.items()},
    (5, 6),
)
def view_stacked_then_scanned(p, x):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *p["layers"])
    return lax.scan(_residual, x, stacked)[0]


def _residual(x, layer):
    return x + jnp.tanh(x @ layer["up"]) @ layer["down"], None


@program({"w": "3b 6i 10o"}, (5, 6))
def index_static(p, x):
    return x @ p["w"][1]


@program({"w": "6i 3b 10o"}, (5, 6))
def index_static_middle(p, x):
    return x @ p["w"][:, -1]


@program({"w": "3b 6i 10o"}, (5, 6))
def index_unrolled(p, x):
    return [x @ p["w"][i] for i in range(3)]


@program({"w": "3b 6i 10o"}, (5, 6), ints(2)[0])
def index_dynamic(p, x, i):
    return x @ lax.dynamic_index_in_dim(p["w"], i, 0, keepdims=False)


@program({"w": "3b 6i 10o"}, (5, 6), ints(1)[0])
def index_traced(p, x, i):
    return x @ p["w"][i]


@program({"w": "3b 6i 10o"}, (2, 5, 6), ints(1)[0])
def dynamic_slice_of_stack(p, x, i):
    return x @ lax.dynamic_slice_in_dim(p["w"], i, 2, 0)


@program({"w": "6i 10o"}, (5, 6), ints(3)[0])
def dynamic_slice_of_columns(p, x, i):
    return x @ lax.dynamic_slice(p["w"], (jnp.int32(0), i), (6, 4))


@program({"w": "8i 10o"}, (5, 3), ints(4)[0])
def dynamic_slice_of_rows(p, x, i):
    return x @ lax.dynamic_slice_in_dim(p["w"], i, 3, 0)


@program({"w": "6i 10o"}, (5, 6), ints(7, 2, 2))
def take_columns(p, x, columns):
    return x @ p["w"][:, columns]


@program({"w": "6i 10o"}, (5, 6))
def optimization_barrier(p, x):
    kernel, x = lax.optimization_barrier((p["w"], x))
    return x @ kernel


@program({"w": "6i 10o", "v": "10i 7o"}, (5, 6))
def stop_gradient_of_kernel(p, x):
    return (x @ lax.stop_gradient(p["w"])) @ p["v"]


# -------------------------------------------------------------------------------- lookups


@program({"e": "11i 6o"}, ints(4)[0], kind="embedding")
def embedding_0d(p, token):
    return jnp.take(p["e"], token, axis=0)


# A dynamic_slice and a squeeze, as the choice of a layer from a stack would be.
@program({"e": "11i 6o"}, ints(4)[0], kind="embedding", factored=False)
def embedding_0d_by_slice(p, token):
    return p["e"][token]


@program({"e": "11i 6o"}, ints(3, 0, 10, 3), kind="embedding")
def embedding_1d(p, tokens):
    return p["e"][tokens]


@program({"e": "11i 6o"}, ints([3, 0, 10], [-1, 7, 7]), kind="embedding")
def embedding_2d(p, tokens):
    return p["e"][tokens]


@program({"e": "11i 4o 5o"}, ints(3, 0, 10), kind="embedding")
def embedding_two_out_axes(p, tokens):
    return jnp.take(p["e"], tokens, axis=0)


@program({"e": "6o 11i"}, ints(3, 0, 10), kind="embedding")
def embedding_of_columns(p, tokens):
    return jnp.take(p["e"], tokens, axis=1)


@program({"e": "11i 6o"}, ints(3, 0, 15, -2), kind="embedding")
def embedding_clip(p, tokens):
    return jnp.take(p["e"], tokens, axis=0, mode="clip")


@program({"e": "11i 6o"}, ints(3, 0, 15, 2), kind="embedding")
def embedding_fill_zero(p, tokens):
    return jnp.take(p["e"], tokens, axis=0, mode="fill", fill_value=0)


@program({"e": "11i 6o"}, ints(3, 0, 15, 2), kind="embedding")
def embedding_fill_value(p, tokens):
    return p["e"].at[tokens].get(mode="fill", fill_value=0.5)


@program({"e": "11i 6o"}, ints(3, 0, 10), kind="embedding", tolerance=5e-2)
def embedding_bfloat16(p, tokens):
    return 2 * p["e"].astype(jnp.bfloat16)[tokens].astype(jnp.float32)


@program({"e": "11i 6o", "w": "6i 10o"}, ints([3, 0], [10, 2]), kind={"e": "embedding"})
def embedding_then_dense(p, tokens):
    return p["e"][tokens] @ p["w"]


@program({"e": "11i 6o", "w": "6i 6o"}, ints([3, 0], [10, 2]), kind={"e": "embedding"}, agree=False)
def embedding_tied(p, tokens):
    hidden = jnp.tanh(jnp.take(p["e"], tokens, axis=0) @ p["w"])
    return hidden @ p["e"].T


@program({"e": "11i 6o", "position": "9i 6o"}, ints(3, 0, 10, 1), kind="embedding")
def embedding_with_positions(p, tokens):
    return p["e"][tokens] + p["position"][jnp.arange(tokens.size)]


@program({"e": "11i 6o"}, ints(3, 0, 10))
def embedding_one_hot(p, tokens):
    return jax.nn.one_hot(tokens, 11) @ p["e"]


@program({"e": "2b 11i 6o"}, ints([3, 0, 10], [1, 1, 2]), kind="embedding")
def embedding_under_vmap(p, tokens):
    return jax.vmap(lambda table, row: table[row])(p["e"], tokens)


@program({"w": "3b 6i 10o"}, (5, 6), ints(2, 0, 1, 1, 2))
def experts_by_token(p, x, expert):
    return jnp.einsum("td,tdf->tf", x, p["w"][expert])


# -------------------------------------------------------------------------------- loops

LAYERS = {"layers/up": "3b 6i 10o", "layers/down": "3b 10i 6o"}


@program({"w": "6i 10o", "v": "10i 6o"}, (5, 6))
def scan_constant(p, x):
    return lax.scan(lambda x, _: _residual(x, {"up": p["w"], "down": p["v"]}), x, length=3)[0]


@program({"w": "6i 10o"}, (4, 5, 6))
def scan_constant_over_sequence(p, x):
    return lax.scan(lambda total, x: (total + x.sum(), total * (x @ p["w"])), 0.0, x)


@program(LAYERS, (5, 6))
def scan_stacked(p, x):
    return lax.scan(_residual, x, p["layers"])[0]


@program({"layers/up": "6i 3b 10o", "layers/down": "10i 3b 6o"}, (5, 6))
def scan_stacked_at_one(p, x):
    return lax.scan(_residual, x, jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p["layers"]))[0]


@program({"layers/up": "6i 10o 3b", "layers/down": "10i 6o 3b"}, (5, 6))
def scan_stacked_last(p, x):
    return lax.scan(_residual, x, jax.tree.map(lambda w: jnp.moveaxis(w, -1, 0), p["layers"]))[0]


@program({"layers/up": "2b 3b 6i 10o", "layers/down": "2b 3b 10i 6o"}, (5, 6))
def scan_nested(p, x):
    return lax.scan(lambda x, block: lax.scan(_residual, x, block), x, p["layers"])[0]


@program({"outer": "3b 6i 6o", "inner": "6i 6o"}, (5, 6))
def scan_in_scan_with_constant(p, x):
    def inner(x, _):
        return jnp.tanh(x @ p["inner"]), x.sum()

    def outer(x, w):
        return lax.scan(inner, x @ w, length=2)

    return lax.scan(outer, x, p["outer"])


@program(LAYERS, (5, 6))
def scan_reversed(p, x):
    return lax.scan(_residual, x, p["layers"], reverse=True)[0]


@program({"layers/up": "4b 6i 10o", "layers/down": "4b 10i 6o"}, (5, 6))
def scan_unrolled_by_two(p, x):
    return lax.scan(_residual, x, p["layers"], unroll=2)[0]


@program({"w": "6i 6o"}, (5, 6))
def scan_kernel_in_carry(p, x):
    return lax.scan(lambda carry, _: ((jnp.tanh(carry[0] @ carry[1]), carry[1]), None), (x, p["w"]), length=3)[0][0]


@program({"a": "6i 6o", "b": "6i 6o"}, (5, 6), factored=False)
def scan_kernels_swapped_in_carry(p, x):
    def body(carry, _):
        x, a, b = carry
        return (jnp.tanh(x @ a), b, a), None

    return lax.scan(body, (x, p["a"], p["b"]), length=3)[0][0]


@program({"w": "6i 10o"}, (4, 5, 6), factored=False)
def scan_fast_weights(p, xs):
    def body(w, x):
        y = jnp.tanh(x @ w)
        return w + 0.1 * x.T @ y, y

    return lax.scan(body, p["w"], xs)[1]


@program(LAYERS, (5, 6))
def scan_of_checkpointed(p, x):
    return lax.scan(jax.checkpoint(_residual, prevent_cse=False), x, p["layers"])[0]


@program(LAYERS, (5, 6))
def scan_with_cond_inside(p, x):
    def body(carry, layer):
        x, i = carry
        x = lax.cond(i % 2 == 0, lambda: _residual(x, layer)[0], lambda: x)
        return (x, i + 1), None

    return lax.scan(body, (x, jnp.int32(0)), p["layers"])[0][0]


@program({"w": "6i 6o"}, (5, 6), reverse=False)
def while_constant(p, x):
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (jnp.int32(0), x))[1]


@program({"w": "6i 6o"}, (5, 6), reverse=False)
def while_kernel_in_carry(p, x):
    def body(carry):
        i, x, w = carry
        return i + 1, jnp.tanh(x @ w), w

    return lax.while_loop(lambda carry: carry[0] < 3, body, (jnp.int32(0), x, p["w"]))[1]


@program({"w": "6i 6o"}, (5, 6), reverse=False)
def while_kernel_in_condition(p, x):
    def far(carry):
        return (carry[0] < 6) & (jnp.abs(carry[1] @ p["w"]).sum() > 0.01)

    return lax.while_loop(far, lambda carry: (carry[0] + 1, 0.5 * carry[1]), (jnp.int32(0), x))[1]


@program(LAYERS, (5, 6))
def fori_static(p, x):
    return lax.fori_loop(0, 3, lambda i, x: _residual(x, jax.tree.map(lambda w: w[i], p["layers"]))[0], x)


@program({"w": "6i 6o"}, (5, 6), ints(3)[0], reverse=False)
def fori_dynamic(p, x, n):
    return lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ p["w"]), x)


@program({"w": "6i 10o"}, (4, 5, 6))
def map_over_inputs(p, x):
    return lax.map(lambda row: jnp.tanh(row @ p["w"]), x)


@program({"w": "3b 6i 10o"}, (5, 6))
def map_over_kernels(p, x):
    return lax.map(lambda w: x @ w, p["w"])


@program({"w": "6i 10o"}, (4, 5, 6))
def map_in_batches(p, x):
    return lax.map(lambda row: jnp.tanh(row @ p["w"]), x, batch_size=2)


@program({"a": "6i 10o", "b": "6i 10o"}, (7, 6))
def associative_scan(p, x):
    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return lax.associative_scan(combine, (jax.nn.sigmoid(x @ p["a"]), x @ p["b"]))[1]


@program({"input": "6i 16o", "hidden": "4i 16o", "bias": "16"}, (7, 5, 6))
def lstm(p, xs):
    def cell(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["input"] + h @ p["hidden"] + p["bias"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    return lax.scan(cell, (jnp.zeros((5, 4)), jnp.zeros((5, 4))), xs)[0]


# -------------------------------------------------------------------------------- branches


@program({"a": "6i 10o", "b": "6i 10o"}, (5, 6), jnp.asarray([True, False]))
def cond_two_kernels(p, x, flags):
    return [lax.cond(flag, lambda x: x @ p["a"], lambda x: jnp.tanh(x @ p["b"]), x) for flag in flags]


@program({"w": "6i 6o"}, (5, 6), jnp.asarray([True, False]))
def cond_kernel_in_one_branch(p, x, flags):
    return [lax.cond(flag, lambda w, x: x @ w, lambda w, x: x, p["w"], x) for flag in flags]


@program({"a": "6i 10o", "b": "6i 10o", "c": "6i 10o"}, (5, 6), ints(1, 2, 0))
def switch_three_kernels(p, x, picks):
    branches = [lambda x, w=p[name]: x @ w for name in "abc"]
    return [lax.switch(pick, branches, x) for pick in picks]


@program({"w": "6i 6o"}, (5, 6), ints(2, 0, 1))
def switch_views_of_one_kernel(p, x, picks):
    branches = [lambda w: jnp.tanh(x @ w), lambda w: x, lambda w: x @ (2.0 * w)]
    return [lax.switch(pick, branches, p["w"]) for pick in picks]


@program({"a": "6i 10o", "b": "6i 10o"}, (5, 6), jnp.asarray([True, False]), factored=False)
def cond_selects_a_kernel(p, x, flags):
    return [x @ lax.cond(flag, lambda: p["a"], lambda: p["b"]) for flag in flags]


# -------------------------------------------------------------------------------- transforms inside


@program({"w": "6i 10o"}, (5, 6))
def jit_inside(p, x):
    return jax.jit(lambda w, x: x @ w)(p["w"], x)


@program({"w": "6i 10o", "v": "10i 7o"}, (5, 6))
def jit_nested(p, x):
    dense = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return jax.jit(lambda p, x: dense(p["v"], dense(p["w"], x)))(p, x)


@program({"a": "6i 6o", "b": "6i 6o", "plain": "6 6"}, (5, 6))
def jit_shared_by_adapted_and_plain(p, x):
    dense = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return dense(p["a"], dense(p["plain"], dense(p["b"], x)))


@program({"w": "10o 6i"}, (5, 6))
def jit_returns_view(p, x):
    return x @ jax.jit(jnp.transpose)(p["w"])


@program({"w": "6i 10o"}, (5, 6))
def jit_returns_view_and_product(p, x):
    y, kernel = jax.jit(lambda w, x: (x @ w, w[:, :4]))(p["w"], x)
    return y.sum() + x @ kernel


@program({"w": "6i 10o"}, (5, 6))
def jit_closes_over_kernel(p, x):
    return jax.jit(lambda x: x @ p["w"])(x)


@program({"w": "6i 10o", "v": "10i 6o"}, (5, 6))
def checkpoint_plain(p, x):
    return jax.checkpoint(_residual)(x, {"up": p["w"], "down": p["v"]})[0]


@program({"w": "6i 10o", "v": "10i 6o"}, (5, 6))
def checkpoint_dots_saveable(p, x):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(_residual, policy=policy)(x, {"up": p["w"], "down": p["v"]})[0]


@program({"w": "6i 10o", "v": "10i 6o"}, (5, 6))
def checkpoint_saves_names(p, x):
    def block(x):
        hidden = checkpoint_name(jnp.tanh(x @ p["w"]), "hidden")
        return x + hidden @ p["v"]

    return jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names("hidden"))(x)


@program({"w": "6i 10o"}, (5, 6))
def checkpoint_name_on_kernel(p, x):
    return x @ checkpoint_name(p["w"], "kernel")


@program({"w": "6i 10o"}, (5, 6))
def vmap_over_inputs(p, x):
    return jax.vmap(lambda row: jnp.tanh(row @ p["w"]))(x)


@program({"w": "3b 6i 10o"}, (3, 5, 6))
def vmap_over_kernels(p, x):
    return jax.vmap(lambda w, x: x @ w)(p["w"], x)


@program({"w": "6i 3b 10o"}, (3, 5, 6))
def vmap_over_kernels_at_one(p, x):
    return jax.vmap(lambda w, x: x @ w, in_axes=(1, 0), out_axes=1)(p["w"], x)


# The batching rule of a dot_general with an unbatched input makes the mapped axis an output.
@program({"w": "3o 6i 10o"}, (5, 6))
def vmap_over_kernels_alone(p, x):
    return jax.vmap(lambda w: x @ w)(p["w"])


@program({"layers/up": "2b 3b 6i 10o", "layers/down": "2b 3b 10i 6o"}, (2, 5, 6))
def vmap_of_scan(p, x):
    return jax.vmap(lambda layers, x: lax.scan(_residual, x, layers)[0])(p["layers"], x)


@program({"w": "6i 10o", "v": "10"}, (5, 6), agree=False)
def grad_inside(p, x):
    return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"]))(x)


@program({"w": "6i 10o"}, (5, 6))
def grad_inside_in_kernel(p, x):
    return jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w) ** 2))(p["w"])


@program({"layers/up": "3b 6i 10o", "layers/down": "3b 10i 6o"}, (5, 6), agree=False)
def grad_inside_of_scan(p, x):
    return jax.grad(lambda x: jnp.sum(lax.scan(_residual, x, p["layers"])[0] ** 2))(x)


@program({"w": "6i 10o", "v": "10"}, (6,), (6,), agree=False)
def hessian_vector_product(p, x, t):
    return jax.jvp(jax.grad(lambda x: jnp.tanh(x @ p["w"]) @ p["v"]), (x,), (t,))[1]


@program({"w": "6i 10o"}, (5, 6), (5, 6))
def jvp_inside(p, x, t):
    return jax.jvp(lambda x: jnp.tanh(x @ p["w"]), (x,), (t,))


@program({"w": "6i 10o"}, (5, 6), (6, 10))
def jvp_inside_in_kernel(p, x, t):
    return jax.jvp(lambda w: jnp.tanh(x @ w), (p["w"],), (t,))


@program({"w": "6i 4o"}, (6,))
def jacobian_inside(p, x):
    return jax.jacfwd(lambda x: jnp.tanh(x @ p["w"]))(x)


@program({"w": "6i 10o", "v": "10"}, (5, 6), agree=False)
def vmap_of_grad(p, x):
    return jax.vmap(jax.grad(lambda row: jnp.tanh(row @ p["w"]) @ p["v"]))(x)


# -------------------------------------------------------------------------------- custom derivatives


@jax.custom_jvp
def _softsign(x):
    return x / (1 + jnp.abs(x))


@_softsign.defjvp
def _softsign_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return _softsign(x), 3.0 * t / (1 + jnp.abs(x)) ** 2


@jax.custom_vjp
def _clipped(x):
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))


@jax.custom_jvp
def _product_jvp(x, w):
    return x @ w


@_product_jvp.defjvp
def _product_jvp_rule(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + 2.0 * (x @ dw)


@jax.custom_vjp
def _product_vjp(x, w):
    return x @ w


_product_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, 2.0 * saved[0].T @ g))


@program({"w": "6i 10o"}, (5, 6))
def custom_jvp_of_activation(p, x):
    return _softsign(x @ p["w"])


@program({"w": "6i 10o"}, (5, 6))
def custom_vjp_of_activation(p, x):
    return _clipped(x @ p["w"]) ** 2


@program({"w": "6i 6o"}, (5, 6))
def custom_vjp_in_scan(p, x):
    return lax.scan(lambda x, _: (_softsign(_clipped(x @ p["w"])), None), x, length=2)[0]


@program({"w": "6i 10o"}, (5, 6), factored=False)
def custom_jvp_of_kernel(p, x):
    return _product_jvp(x, p["w"])


@program({"w": "6i 10o"}, (5, 6), factored=False)
def custom_vjp_of_kernel(p, x):
    return _product_vjp(x, p["w"])


# -------------------------------------------------------------------------------- dense by nature


@program({"w": "6i 10o"}, (5, 6), factored=False)
def penalty(p, x):
    return x @ p["w"], jnp.sum(p["w"] ** 2)


@program({"w": "6i 10o"}, (5, 6), factored=False)
def kernel_returned(p, x):
    return x @ p["w"], p["w"]


@program({"w": "6i 10o"}, (5, 6), kind="other", factored=False)
def kernel_sorted(p, x):
    return x @ jnp.sort(p["w"], axis=1)


@program({"w": "6i 10o"}, (5, 6), kind="other", factored=False)
def kernel_cumsum(p, x):
    return x @ jnp.cumsum(p["w"], axis=0)


@program({"w": "6i 10o"}, (5, 6), kind="other", factored=False)
def kernel_masked(p, x):
    return x @ jnp.triu(p["w"])


@program({"w": "6i 10o", "g": "10"}, (5, 6), factored=False)
def kernel_normalised(p, x):
    return x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))


@program({"w": "6i 10o"}, (5, 6), kind="other", factored=False)
def kernel_squashed(p, x):
    return x @ jnp.tanh(p["w"])


@program({"w": "6i 10o"}, (5, 6), kind="other", factored=False)
def kernel_added_to_activations(p, x):
    return x[:, :, None] + p["w"]


@program({"position": "9i 6o"}, (5, 6), kind="other", factored=False)
def kernel_rows_added_to_activations(p, x):
    return x + p["position"][:5]


@program({"w": "6i 10o"}, (5, 6))
def kernel_after_inner_step(p, x):
    def loss(w):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    return x @ (p["w"] - 0.1 * jax.grad(loss)(p["w"]))


# -------------------------------------------------------------------------------- convolutions, ragged_dot


@program({"w": "3i 4i 6o"}, (2, 9, 4), kind="conv")
def conv_1d(p, x):
    return lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@program({"w": "3i 2i 4i 6o"}, (2, 9, 8, 4), kind="conv")
def conv_2d(p, x):
    return lax.conv_general_dilated(
        x, p["w"], (2, 1), "VALID", rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@program({"w": "6o 4i 3i 2i"}, (2, 4, 9, 8), kind="conv")
def conv_2d_channels_first(p, x):
    return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))


@program({"w": "3b 6i 10o"}, (7, 6), ints(2, 0, 5), kind="ragged_dot")
def ragged_experts(p, x, sizes):
    return lax.ragged_dot(x, p["w"], sizes)


@program({"up": "3b 6i 10o", "down": "3b 10i 6o"}, (7, 6), ints(2, 4, 1), kind="ragged_dot")
def ragged_mlp(p, x, sizes):
    hidden = jax.nn.silu(lax.ragged_dot(x, p["up"], sizes))
    return x + lax.ragged_dot(hidden, p["down"], sizes)


@program({"w": "3b 6i 10o"}, (5, 6))
def index_unpacked(p, x):
    first, second, _ = p["w"]
    return jnp.tanh(x @ first) + x @ second
