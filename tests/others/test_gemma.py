"""Google DeepMind's `gemma` (linen): a small Gemma 3, against the LoRA of its own `gemma.peft`."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from tests.others import support
from tests.others.support import RANK

pytest.importorskip("gemma")
from gemma import gm, peft

VOCABULARY, BATCH, LENGTH, LAYERS, WINDOW = 512, 2, 64, 3, 24
LOCAL, GLOBAL = gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL
CONFIG = gm.nn.config.TransformerConfig(  # Gemma 3's own settings, smaller
    num_embed=VOCABULARY,
    embed_dim=256,
    hidden_dim=512,
    num_heads=4,
    head_dim=64,
    num_kv_heads=2,
    final_logit_softcap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(LOCAL, LOCAL, GLOBAL),
    sliding_window_size=WINDOW,
    transpose_gating_einsum=True,
    use_qk_norm=True,
    local_base_frequency=10_000,
    global_base_frequency=1_000_000,
)
MODEL = gm.nn.Transformer(config=CONFIG, dtype=jnp.float32, tokens="batch.tokens")
TOKENS = support.tokens_of(VOCABULARY, BATCH, LENGTH)
LAYER = {
    "attn/q_einsum/w": "oio",
    "attn/kv_einsum/w": "ooio",
    "attn/attn_vec_einsum/w": "iio",
    "mlp/gating_einsum": "ooi",
    "mlp/linear": "io",
}
KERNELS = {path: axes for i in range(LAYERS) for path, axes in support.under(f"layer_{i}", LAYER).items()}


def predict(params, tokens):
    return MODEL.apply({"params": params}, tokens).logits


def loss(params, tokens):
    return support.cross_entropy(predict(params, tokens), tokens)


@functools.cache
def params():
    return support.filled(jax.eval_shape(lambda: MODEL.init(jax.random.key(0), TOKENS))["params"])


@functools.cache
def tree():
    return support.wrapped(predict, params(), TOKENS)


def test_kernels_are_found():
    support.check_kernels(tree(), KERNELS)


def test_nothing_is_dense():
    support.check_all_factored(predict, tree(), TOKENS)


def test_training():
    support.check_training(loss, tree(), TOKENS)


def test_generation():
    def step(params, tokens, positions, cache, mask):
        out = MODEL.apply({"params": params}, tokens, positions=positions, cache=cache, attention_mask=mask)
        return out.logits, out.cache

    cache = CONFIG.init_cache(BATCH, jnp.float32, cache_length=32)
    support.check_generation(predict, step, cache, tree(), TOKENS[:, :16], 32)


def test_it_costs_no_more_than_gemma_peft():
    model = gm.nn.LoRA(rank=RANK, model=MODEL, dtype=jnp.float32)
    _, lora = peft.split_params(jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS))["params"])

    def their_loss(lora, params, tokens):
        variables = {"params": peft.merge_params(params, lora)}
        return support.cross_entropy(model.apply(variables, tokens).logits, tokens)

    support.check_against(their_loss, lora, params(), of_gemma_peft, loss, tree(), TOKENS)


def of_gemma_peft(path):
    """layer_0/attn/q_einsum/_LoRAEinsum_0/lora/a, layer_0/mlp/_LoRAEinsum_linear/lora/a"""
    return re.sub("_LoRAEinsum_([^/]*)/lora", lambda found: "w" if found[1] == "0" else found[1], path)


def test_adapter_files(tmp_path):
    support.check_files(tmp_path, tree(), "gemma3")
