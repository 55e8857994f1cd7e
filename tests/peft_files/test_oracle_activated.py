"""Activated LoRA against PEFT itself: files both ways, logits with and without the invocation, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

torch = pytest.importorskip("torch", reason="the oracle needs torch, peft and transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from jlora.examples.smollm2 import EPSILON, ROPE_BASE, SmolLM2, params_from_llama  # noqa: E402
from tests.peft_files.torch_models import llama  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = [7, 3]
LIKE_SMOLLM2 = {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE}, "rms_norm_eps": EPSILON}
IDS = np.array([[1, 2, 7, 3, 9, 4, 5, 6], [7, 3, 8, 1, 7, 3, 2, 7], [5, 7, 4, 3, 7, 7, 2, 2], [1, 5, 6, 2, 9, 8, 7, 3]])


def models(tmp_path):
    torch.manual_seed(0)
    model = llama(**LIKE_SMOLLM2)
    config = model.config
    state = {name: x.detach().numpy().copy() for name, x in model.state_dict().items()}
    ours = SmolLM2(
        vocab=config.vocab_size, width=config.hidden_size, heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads, hidden=config.intermediate_size, layers=config.num_hidden_layers,
        tied=False,
    )  # fmt: skip
    params = jax.device_put(params_from_llama(state, config.num_hidden_layers, tied=False))
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM",
        alora_invocation_tokens=TOKENS, init_lora_weights=False,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "theirs")
    return adapted, ours, params


def logits_of(model, tree, ids=IDS):
    return jax.jit(jlora.adapters.activated(lambda p, ids: model.apply({"params": p}, ids)))(
        tree, jlora.adapters.invoked(ids, TOKENS), ids
    )


def test_files_and_logits(tmp_path):
    adapted, model, params = models(tmp_path)
    with torch.no_grad():
        theirs = adapted(input_ids=torch.from_numpy(IDS)).logits.numpy()
    with pytest.raises(ValueError, match=r"is activated \(aLoRA\): .* the last \[7, 3\] .*invocation_tokens=\[7, 3\]"):
        jlora.peft.load(tmp_path / "theirs", params, names="llama")
    tree = jlora.peft.load(tmp_path / "theirs", params, names="llama", invocation_tokens=TOKENS)
    np.testing.assert_allclose(logits_of(model, tree), theirs, atol=2e-5)
    with torch.no_grad(), adapted.disable_adapter():
        base = adapted(input_ids=torch.from_numpy(IDS)).logits.numpy()
    assert np.abs(theirs - base)[2].max() == 0 < np.abs(theirs - base)[0, 2:].max()  # what the case is for

    jlora.peft.save(tmp_path / "ours", tree, names="llama", invocation_tokens=TOKENS)
    torch.manual_seed(0)
    fresh = llama(**LIKE_SMOLLM2)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours")
    assert again.peft_config["default"].alora_invocation_tokens == TOKENS
    with torch.no_grad():
        np.testing.assert_allclose(again(input_ids=torch.from_numpy(IDS)).logits.numpy(), theirs, atol=2e-5)


def test_gradients(tmp_path):
    adapted, model, params = models(tmp_path)
    tree = jlora.peft.load(tmp_path / "theirs", params, names="llama", invocation_tokens=TOKENS)

    def loss(tree):
        logits = logits_of(model, tree)[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(IDS)[:, 1:]).mean()

    grads = jlora.grad(loss)(tree)
    adapted.train()
    given = torch.from_numpy(IDS)
    logits = adapted(input_ids=given).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), given[:, 1:].flatten()).backward()
    names = {"q_proj": ("self_attn", "attention"), "down_proj": ("mlp", "mlp")}
    for name, (part, module) in names.items():
        node = grads["layers"][module][name]["kernel"]
        for i, layer in enumerate(adapted.base_model.model.model.layers):
            lora = getattr(getattr(layer, part), name)
            for ours, theirs in ((node.lora_a[i], lora.lora_A), (node.lora_b[i], lora.lora_B)):
                wanted = theirs["default"].weight.grad.numpy().T
                np.testing.assert_allclose(ours, wanted, atol=2e-5 * np.abs(wanted).max())
