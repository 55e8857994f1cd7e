"""What is asked of a model that others wrote, with a spec that knows nothing of it but `jlora.sites`.

Its linear kernels are found, with their axes; in training and in generation none of their uses is dense; the result is
that of merged kernels; and the gradient of the adapters costs no more than with the LoRA that the model's library has.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import tree_map_with_path

import jlora
from jlora.nodes.node import is_node
from jlora.targets.paths import flatten
from tests.optim.support import noisy
from tests.support import compiled, flops, temporaries

RANK, TOLERANCE = 8, 2e-5


def under(prefix: str, kernels: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}/{path}": letters for path, letters in kernels.items()}


def axes_of(letters: str) -> jlora.Axes:
    """`i`n, `o`ut or `b`atch, a letter for each axis of a kernel."""
    return jlora.Axes(*(tuple(i for i, letter in enumerate(letters) if letter == role) for role in "iob"))


def filled(shapes: Any) -> Any:
    """Numbers for every leaf: noise for the kernels (of width 256), values near one for the scales of norms."""
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> jax.Array:
        is_scale = leaf.ndim == 1 or "scale" in joined(path)
        return jax.device_put((rng.standard_normal(leaf.shape) / 16 + is_scale).astype(leaf.dtype))

    return tree_map_with_path(fill, shapes)


def tokens_of(vocabulary: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(1, vocabulary, size=shape), jnp.int32)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def wrapped(fn: Callable, params: Any, *args: Any, **settings: Any) -> Any:
    """Adapters on all linear kernels, with random numbers in A and B, at scale 1."""
    spec = jlora.LoraSpec(rank=RANK, alpha=RANK, **settings)
    return noisy(params, spec, std=0.05, sites=jlora.sites(fn, params, *args))


def nodes_of(tree: Any) -> dict[str, Any]:
    paths, leaves, _ = flatten(tree, is_node)
    return {path: leaf for path, leaf in zip(paths, leaves, strict=True) if is_node(leaf)}


def check_kernels(tree: Any, kernels: dict[str, str]) -> None:
    """Just these are adapted, along these axes, and the summary tells."""
    assert {path: node.axes for path, node in nodes_of(tree).items()} == {k: axes_of(v) for k, v in kernels.items()}
    rows = jlora.summary(tree).rows
    assert [row[0] for row in rows] == list(nodes_of(tree))
    assert {row[2:5] for row in rows} == {("lora", str(RANK), "1")}


def check_all_factored(fn: Callable, tree: Any, *args: Any) -> None:
    table = jlora.explain(fn, tree, *args)
    assert {use.path for use in table.uses} == nodes_of(tree).keys()
    assert f"{len(table.uses)} uses: {len(table.uses)} factored, 0 dense" in str(table)


def check_training(loss: Callable, tree: Any, *args: Any) -> None:
    """The loss and the adapters' gradients, compiled, with every use factored, are those of the merged kernels."""
    ours, theirs = jlora.apply(loss, fallback="error"), lambda tree, *args: loss(jlora.merge(tree), *args)
    found, expected = jax.jit(lambda *args: [jlora.value_and_grad(fn)(*args) for fn in (ours, theirs)])(tree, *args)
    check_close(found[0], expected[0])
    check_close(factors_of(found[1]), factors_of(expected[1]))


def check_values(fn: Callable, tree: Any, *args: Any) -> None:
    """What the function makes of its inputs, with every use factored, is what it makes of the merged kernels."""
    ours = jlora.apply(fn, fallback="error")
    check_close(*jax.jit(lambda tree, *args: (ours(tree, *args), fn(jlora.merge(tree), *args)))(tree, *args))


def check_generation(fn: Callable, step: Callable, cache: Any, tree: Any, prompt: jax.Array, size: int) -> None:
    """Greedy tokens through the model's cache: those of the merged kernels, and their logits those without a cache.

    Args:
      fn: ``fn(params, tokens)``, logits.
      step: ``step(params, tokens, positions, cache, mask)``, logits and the next cache; the mask (batch, tokens, size).
      cache: an empty one for `size` tokens.
      tree: the wrapped parameters.
      prompt: (batch, length) tokens.
      size: how many tokens there are in the end.
    """

    def generate(params: Any, prompt: jax.Array, cache: Any) -> Any:
        batch, length = prompt.shape
        call = lambda tokens, positions, cache: step(
            params,
            tokens,
            jnp.broadcast_to(positions, (batch, len(positions))),
            cache,
            jnp.broadcast_to(jnp.arange(size) <= positions[:, None], (batch, len(positions), size)),
        )

        def one(carry: Any, position: jax.Array) -> Any:
            token, cache = carry
            logits, cache = call(token[:, None], position[None], cache)
            return (logits[:, -1].argmax(-1), cache), (token, logits[:, -1])

        logits, cache = call(prompt, jnp.arange(length), cache)
        _, (tokens, rest) = lax.scan(one, (logits[:, -1].argmax(-1), cache), jnp.arange(length, size))
        return jnp.concatenate([prompt, tokens.T], 1), jnp.concatenate([logits, rest.swapaxes(0, 1)], 1)

    check_all_factored(generate, tree, prompt, cache)
    tokens, logits = jax.jit(jlora.apply(generate, fallback="error"))(tree, prompt, cache)
    plain = jax.jit(jlora.merge)(tree)
    expected_tokens, expected = jax.jit(generate)(plain, prompt, cache)
    assert (tokens == expected_tokens).all()
    check_close(logits, expected)
    check_close(logits, jax.jit(fn)(plain, tokens))


def check_against(
    their_loss: Callable, their_lora: Any, their_rest: Any, name: Callable[[str], str], loss: Callable, tree: Any, *args
) -> tuple[float, float]:
    """The same adapters in their LoRA: the same loss, the same gradients, at no less cost.

    Args:
      their_loss: ``their_loss(lora, rest, *args)``.
      their_lora: what of their parameters trains.
      their_rest: the others.
      name: a path of theirs -> the path of the kernel in `tree`, with ``/a`` or ``/b`` behind.
      loss: ``loss(params, *args)``.
      tree: the wrapped parameters.
      *args: the inputs.

    Returns:
      Our FLOPs and our temporary memory over theirs.
    """
    factors = factors_of(tree)
    lora = tree_map_with_path(lambda path, leaf: factors[name(joined(path))].reshape(leaf.shape), their_lora)
    theirs = compiled(jax.value_and_grad(their_loss), lora, their_rest, *args)
    part, rest = jlora.partition(tree)
    our_loss = lambda part, rest, *args: jlora.apply(loss, fallback="error")(jlora.combine(part, rest), *args)
    ours = compiled(jax.value_and_grad(our_loss), part, rest, *args)

    their_value, their_grads = theirs(lora, their_rest, *args)
    value, grads = ours(part, rest, *args)
    leaves = jax.tree_util.tree_leaves_with_path(their_grads)
    named = {name(joined(path)): leaf for path, leaf in leaves}
    found = factors_of(grads)
    check_close(value, their_value)
    check_close(found, {path: named[path].reshape(leaf.shape) for path, leaf in found.items()})
    assert len(named) == len(found)

    ratios = flops(ours) / flops(theirs), temporaries(ours) / temporaries(theirs)
    print(f"FLOPs {ratios[0]:.3f}x, temporary memory {ratios[1]:.3f}x")
    assert ratios[0] <= 1.01
    assert ratios[1] <= 1.05
    return ratios


def check_files(folder: Any, tree: Any, names: str) -> None:
    """PEFT's files and back, by a ready map of names: the same function, maybe by factors for each part of a kernel."""
    jlora.peft.save(folder, tree, names=names, base_model="someone/model")
    again = jlora.peft.load(folder, jlora.unwrap(tree), names=names)
    assert nodes_of(again).keys() == nodes_of(tree).keys()
    merge = jax.jit(jlora.merge)
    check_close(merge(again), merge(tree))


def factors_of(tree: Any) -> dict[str, jax.Array]:
    """A and B of a wrapped tree, or their gradients, as {"path/a": A, "path/b": B}."""
    nodes = nodes_of(tree).items()
    return {f"{path}/{side}": getattr(node, f"lora_{side}") for path, node in nodes for side in "ab"}


def joined(path: Any) -> str:
    """A path of JAX as a string, without the ``value`` of NNX's variables."""
    return re.sub("/value$", "", jax.tree_util.keystr(path, simple=True, separator="/"))


def check_close(found: Any, expected: Any) -> None:
    """Each array within the tolerance of the other's norm."""

    def far(x: jax.Array, y: jax.Array) -> float:
        x, y = (np.asarray(array, np.float64).ravel() for array in (x, y))
        return float(np.linalg.norm(x - y) / np.linalg.norm(y))

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    errors = jax.tree.map(far, found, expected)
    assert max(jax.tree.leaves(errors)) <= TOLERANCE, errors
