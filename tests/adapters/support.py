"""A small model with all kinds of leaves, and adapters on it that differ in all they may."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

WIDTH, HIDDEN, LAYERS = 8, 12, 3


def forward(params: Any, x: jax.Array) -> jax.Array:
    """Of (rows, tokens, WIDTH): a loop over layers, of which each has two kernels, and a head with a bias."""

    def layer(x: jax.Array, kernels: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ kernels["up"]["kernel"]) @ kernels["down"]["kernel"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def base(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(
        rng.normal(size=shape, scale=shape[-2] ** -0.5 if shape[1:] else 1), jnp.float32
    )
    return {
        "layers": {
            "up": {"kernel": normal(LAYERS, WIDTH, HIDDEN)},
            "down": {"kernel": normal(LAYERS, HIDDEN, WIDTH)},
        },
        "head": {"kernel": normal(WIDTH, 6), "bias": normal(6)},
    }


AXES = {"layers/*/kernel": jlora.Axes((1,), (2,), (0,))}
ALL = ("layers/*/kernel", "head/kernel")


def noisy(tree: Any, seed: int, std: float = 0.3) -> Any:
    """The wrapped tree with normal noise added to all that trains."""
    trainable, frozen = jlora.partition(tree)
    leaves, treedef = jax.tree.flatten(trainable)
    rng = np.random.default_rng(seed)
    noise = [jnp.asarray(rng.normal(scale=std, size=x.shape), x.dtype) for x in leaves]
    return jlora.combine(treedef.unflatten([x + e for x, e in zip(leaves, noise, strict=True)]), frozen)


def adapter(params: Any, seed: int, **settings: Any) -> Any:
    settings = {"targets": ALL, "axes": AXES, "seed": seed} | settings
    axes = {k: v for k, v in settings["axes"].items() if any(k == t for t in settings["targets"])}
    return noisy(jlora.wrap(params, jlora.LoraSpec(**settings | {"axes": axes})), seed)


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"scaling": "rslora"},
    "pissa": {"init": "pissa"},
    **{
        name: {"variant": name} for name in ("dora", "vera", "adalora", "lora_fa", "loha", "lokr", "ia3", "oft", "boft")
    },
    "miss": {"variant": "miss", "rank": 2},
    "hra": {"variant": "hra", "rank": 2},
    "c3a": {"variant": "c3a"},
    "gralora": {"variant": "gralora", "rank": 2},
    "fourierft": {"variant": "fourierft", "options": {"frequencies": 5}},
    "shira": {"variant": "shira", "rank": 1},
    "randlora": {"variant": "randlora", "rank": 2},
    "hira": {"variant": "hira", "rank": 2},
    "delora": {"variant": "delora", "rank": 2},
    "road": {"variant": "road", "options": {"group_size": 2}},
}
WITHOUT_RANK = (
    "ia3",
    "oft",
    "boft",
    "miss",
    "hra",
    "road",
    "c3a",
    "gralora",
    "hira",
    "delora",
    "fourierft",
    "shira",
    "randlora",
)  # or with the same for all
WITHOUT_SUMS = ("oft", "boft", "road", "c3a", "hira", "shira", "fourierft")


def family(params: Any, name: str) -> list[Any]:
    """Three adapters of a variant, of other ranks, scales, targets and layers; the base itself as the fourth."""
    ranks = (1, 3, 2)
    trees = []
    for i, rank in enumerate(ranks):
        settings = dict(VARIANTS[name])
        if name not in WITHOUT_RANK:
            settings |= {"rank": rank} | ({} if name == "vera" or "scaling" in settings else {"alpha": 2 * i + 1})
        settings |= {"targets": ("layers/*/kernel",), "layers": (0, 2)} if i == 1 else {}
        trees.append(adapter(params, seed=i, **settings))
    return [*trees, None]
