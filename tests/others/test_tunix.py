"""`google-tunix`'s models (NNX): small ones of its own classes, against the LoRA of Qwix, which Tunix trains with."""

import dataclasses
import functools
import importlib
import re
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx

import jlora
from tests.others import support
from tests.others.support import RANK
from tests.support import error

pytest.importorskip("tunix")
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "jax.experimental.shard_map is deprecated", DeprecationWarning)
    llama3, qwen3, gemma3 = (importlib.import_module(f"tunix.models.{x}.model") for x in ("llama3", "qwen3", "gemma3"))

OLD_NAMES = [
    "'sharding' is deprecated, use 'out_sharding'",
    "'.value' access is now deprecated",
    "jax.interpreters.pxla",
    "'VariableState' was removed",
    r"The 'm.iter_modules\(\)' method is deprecated",
]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}:DeprecationWarning") for text in OLD_NAMES]
VOCABULARY, BATCH, LENGTH, LAYERS, GROUPS, HEAD = 512, 2, 64, 2, 2, 64
SIZES = {
    "num_layers": LAYERS,
    "embed_dim": 256,
    "hidden_dim": 512,
    "num_heads": 4,
    "head_dim": HEAD,
    "num_kv_heads": GROUPS,
}
MLP = {"mlp/gate_proj/kernel": "io", "mlp/up_proj/kernel": "io", "mlp/down_proj/kernel": "io"}
ATTENTION = {"attn/q_proj/w": "ioo", "attn/k_proj/w": "ioo", "attn/v_proj/w": "ioo", "attn/o_proj/w": "iio"}
EINSUMS = {"attn/q_einsum/w": "oio", "attn/kv_einsum/w": "ooio", "attn/attn_vec_einsum/w": "iio"}
EXPERTS = {"mlp/gate_proj": "bio", "mlp/up_proj": "bio", "mlp/down_proj": "bio"}
TOKENS = support.tokens_of(VOCABULARY, BATCH, LENGTH)
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH), TOKENS.shape)
MASK = POSITIONS[:, :, None] >= POSITIONS[:, None]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model's class, its settings, the kernels of a layer, the ready map of its names, and what is left out."""

    build: Any
    config: Any
    layer: dict[str, str]
    names: str
    exclude: tuple[str, ...] = ()

    @functools.cached_property
    def split(self):
        """The graph, and parameters with numbers."""
        graph, shapes = nnx.split(nnx.eval_shape(lambda: self.build(self.config, rngs=nnx.Rngs(0))))
        return graph, support.filled(shapes)

    @functools.cached_property
    def tree(self):
        return support.wrapped(self.predict, self.split[1], TOKENS, exclude=self.exclude)

    def step(self, state, tokens, positions, cache, mask):
        return nnx.merge(self.split[0], state)(tokens, positions, cache, mask)

    def predict(self, state, tokens):
        length = tokens.shape[1]
        return self.step(state, tokens, POSITIONS[:, :length], None, MASK[:, :length, :length])[0]

    def loss(self, state, tokens):
        return support.cross_entropy(self.predict(state, tokens), tokens)


LLAMA = llama3.ModelConfig(vocab_size=VOCABULARY, rope_theta=10_000, norm_eps=1e-5, **SIZES)
QWEN = qwen3.ModelConfig(vocab_size=VOCABULARY, rope_theta=10_000, norm_eps=1e-6, use_tied_embedding=True, **SIZES)
MIXED = dataclasses.replace(QWEN, num_experts=4, num_experts_per_tok=2)
GEMMA = gemma3.ModelConfig(num_embed=VOCABULARY, sliding_window_size=24, param_dtype=jnp.float32, **SIZES)
FAMILIES = {
    "llama3": Family(llama3.Llama3, LLAMA, ATTENTION | MLP, "tunix"),
    "qwen3": Family(qwen3.Qwen3, QWEN, ATTENTION | MLP, "tunix"),
    "qwen3_experts": Family(qwen3.Qwen3, MIXED, ATTENTION | EXPERTS, "tunix", ("router",)),
    "gemma3": Family(gemma3.Gemma3, GEMMA, EINSUMS | MLP, "tunix-gemma"),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
dense_families = pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma3"])


@every_family
def test_kernels_are_found(family):
    kernels = {path: axes for i in range(LAYERS) for path, axes in support.under(f"layers/{i}", family.layer).items()}
    support.check_kernels(family.tree, kernels)


@every_family
def test_nothing_is_dense(family):
    support.check_all_factored(family.predict, family.tree, TOKENS)


@every_family
def test_training(family):
    support.check_training(family.loss, family.tree, TOKENS)


@every_family
def test_generation(family):
    size = 32
    shape = (BATCH, size, GROUPS, HEAD)
    layer = {"k": jnp.zeros(shape), "v": jnp.zeros(shape), "end_index": jnp.zeros(BATCH, jnp.int32)}
    cache = {f"layer_{i}": layer for i in range(LAYERS)}
    support.check_generation(family.predict, family.step, cache, family.tree, TOKENS[:, :16], size)


@dense_families
def test_it_costs_no_more_than_qwix(name):
    family = FAMILIES[name]
    modules = "|".join({path.split("/")[1] for path in family.layer})
    provider = qwix.LoraProvider(module_path=f".*({modules})", rank=RANK, alpha=RANK)
    model = nnx.merge(*family.split)
    adapted = qwix.apply_lora_to_model(model, provider, TOKENS, POSITIONS, None, MASK, rngs=nnx.Rngs(1))
    graph, lora, rest = nnx.split(adapted, nnx.LoRAParam, ...)

    def their_loss(lora, rest, tokens):
        return support.cross_entropy(nnx.merge(graph, lora, rest)(tokens, POSITIONS, None, MASK)[0], tokens)

    name_of = lambda path: re.sub("_lora_", "/", path)
    support.check_against(their_loss, lora, rest, name_of, family.loss, family.tree, TOKENS)


@every_family
def test_adapter_files(family, tmp_path):
    support.check_files(tmp_path, family.tree, family.names)


@dense_families
def test_the_module_itself(name):
    """`jlora.nnx.wrap` of the model: its call is that of the tree, and NNX's own loop trains it."""
    family = FAMILIES[name]
    spec = jlora.LoraSpec(rank=RANK, exclude=family.exclude)
    model = nnx.merge(*family.split)
    sites = jlora.nnx.sites(model, TOKENS, POSITIONS, None, MASK)
    adapted = jlora.nnx.wrap(model, spec, sites=sites, fallback="error")
    optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss = lambda model: support.cross_entropy(model(tokens, POSITIONS, None, MASK)[0], tokens)
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    first, last = [float(step(adapted, optimizer, TOKENS)) for _ in range(4)][::3]
    np.testing.assert_allclose(first, family.loss(family.split[1], TOKENS), rtol=1e-5)
    assert last < first
    logits = lambda model: model(TOKENS, POSITIONS, None, MASK)[0]
    tree = jlora.nnx.tree(adapted)
    assert error(logits(adapted), jlora.apply(family.predict)(tree, TOKENS)) <= 1e-5
    assert error(logits(adapted), logits(jlora.nnx.merge(adapted))) <= 1e-4
