"""Adapters of PEFT's on Flax models: its logits and gradients; and Flax-trained adapters in PEFT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.peft.collect import collect

torch = pytest.importorskip("torch", reason="the oracle needs torch, peft and transformers")
pytest.importorskip("peft")
pytest.importorskip("transformers")
from peft import PeftModel  # noqa: E402
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from jlora.examples import fetch, minilm, smollm2  # noqa: E402
from tests.peft_files.torch_models import LINEAR, SMALL, Case, llama  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

TINY_LLAMA = smollm2.SmolLM2(vocab=50, width=16, heads=4, kv_heads=2, hidden=24, layers=3)
TINY_BERT = minilm.MiniLM(vocab=50, width=16, heads=4, hidden=24, layers=3)


def tied_llama():
    return llama(True, rope_parameters={"rope_theta": smollm2.ROPE_BASE, "rope_type": "default"}, rms_norm_eps=1e-5)


def bert_model():
    small = SMALL | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**small, vocab_size=50), add_pooling_layer=False)


LLAMAS = {
    "plain": {"r": 4, "target_modules": LINEAR},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "rslora": {"r": 4, "use_rslora": True, "lora_alpha": 3, "target_modules": LINEAR},
    "dora": {"r": 4, "use_dora": True, "target_modules": LINEAR},
    "patterns": {"r": 4, "target_modules": LINEAR, "rank_pattern": {r"layers\.[01]\.self_attn.q_proj": 2}},
    "layers": {"r": 2, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "tied": {"r": 2, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "norms": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["model.norm", "input_layernorm"]},
    "tokens": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 1, 40]},
    "pissa": {"r": 2, "target_modules": LINEAR, "init_lora_weights": "pissa"},
}
BERTS = {
    "plain": {"r": 2, "target_modules": ["query", "dense"]},
    "bias": {"r": 2, "target_modules": ["query", "value"], "bias": "lora_only"},
    "bias-all": {"r": 2, "target_modules": ["query", "value"], "bias": "all"},
    "lora-bias": {"r": 2, "target_modules": ["query"], "lora_bias": True},
    "dora": {"r": 2, "target_modules": ["query", "word_embeddings"], "use_dora": True},
}


@dataclasses.dataclass(frozen=True)
class Port:
    """A model in PyTorch, and its Flax module, the parameters of that, its map and its outputs."""

    make: object
    module: object
    params: object
    names: str

    def theirs(self, model, ids):
        output = model(input_ids=torch.tensor(ids))
        return output.logits if hasattr(output, "logits") else output.last_hidden_state.mean(1)

    def ours(self, tree, ids):
        given = (ids,) if self.names == "llama" else (ids, np.ones(ids.shape, bool))
        return jlora.apply(self.module.apply)({"params": tree}, *given)


PORTS = {
    "llama": Port(tied_llama, TINY_LLAMA, lambda state: smollm2.params_from_llama(state, 3), "llama"),
    "bert": Port(bert_model, TINY_BERT, lambda state: minilm.params_from_bert(state, 3), "bert"),
}
ALL = [("llama", name, LLAMAS[name]) for name in LLAMAS] + [("bert", name, BERTS[name]) for name in BERTS]
IDS = np.random.default_rng(0).integers(1, 50, (2, 7)).astype(np.int32)


def made(kind, settings, tmp_path):
    """PEFT's model, the Flax tree with its adapter, and the port."""
    port = PORTS[kind]
    case = Case(port.make, settings)
    torch.manual_seed(0)
    base = {name: value.detach().numpy().copy() for name, value in case.model().state_dict().items()}
    model = case.make().eval()
    model.save_pretrained(tmp_path / "theirs")
    params = jax.tree.map(jnp.asarray, port.params(base))
    return port, case, model, jlora.peft.load(tmp_path / "theirs", params, names=port.names)


@pytest.mark.parametrize(("kind", "name", "settings"), ALL, ids=[f"{k}-{n}" for k, n, _ in ALL])
def test_outputs_and_gradients_are_those_of_peft(kind, name, settings, tmp_path):
    port, _, model, tree = made(kind, settings, tmp_path)
    theirs = port.theirs(model, IDS)
    np.testing.assert_allclose(port.ours(tree, IDS), theirs.detach().numpy(), atol=2e-5)
    if name in ("tied", "pissa", "patterns"):
        return  # other arrays than PEFT's: one for a tied pair, starts beside the factors, a ratio of scales within B
    weights = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.tensor(weights)).sum().backward()
    grads = jax.grad(lambda tree: (port.ours(tree, IDS) * weights).sum(), allow_int=True)(tree)
    trainable, _ = jlora.partition(jax.tree.map(lambda g, _: g, grads, tree))
    ours = collect(jlora.combine(trainable, jlora.partition(tree)[1]), port.names).adapter
    wanted = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    seen = 0
    for module, update in ours.updates.items():
        arrays = {
            "lora_A.default.weight": update.a,
            "lora_B.default.weight": update.b,
            "lora_B.default.bias": update.bias,
            "lora_embedding_A.default": update.a,
            "lora_embedding_B.default": update.b,
            "lora_magnitude_vector.default.weight": update.magnitude,
        }
        for part, array in arrays.items():
            if (key := f"base_model.model.{module}.{part}") in wanted:
                scale = max(1.0, np.abs(wanted[key]).max())
                np.testing.assert_allclose(array / scale, wanted[key] / scale, atol=2e-5, err_msg=key)
                seen += 1
    assert seen == sum("lora_" in key for key in wanted)


@pytest.mark.parametrize(("kind", "name", "settings"), ALL, ids=[f"{k}-{n}" for k, n, _ in ALL])
@pytest.mark.parametrize("portable", [False, True], ids=["whole", "portable"])
def test_peft_reads_what_a_flax_tree_has(kind, name, settings, portable, tmp_path):
    port, case, _, tree = made(kind, settings, tmp_path)
    if portable and name not in ("plain", "all-linear", "rslora", "patterns", "layers", "pissa"):
        with pytest.raises(ValueError, match="portable=True"):
            jlora.peft.save(tmp_path / "ours", tree, names=port.names, portable=True)
        return
    jlora.peft.save(tmp_path / "ours", tree, names=port.names, portable=portable)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(case.model(), tmp_path / "ours").eval()
    np.testing.assert_allclose(port.theirs(again, IDS).detach().numpy(), port.ours(tree, IDS), atol=2e-5)


def trained(tree, loss, steps=3):
    """A tree after some steps of SGD with momentum, which moves everything that trains."""
    import optax

    tx = jlora.optimizer(optax.adam(3e-3), tree)
    state, step = tx.init(tree), jax.jit(jlora.value_and_grad(loss))
    for _ in range(steps):
        _, grads = step(tree)
        updates, state = tx.update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree


@pytest.mark.slow
def test_a_minilm_adapter_gives_the_same_vectors_in_peft(tmp_path):
    folder = fetch.fetch(fetch.MINILM)
    state = minilm.load_file(folder / "model.safetensors")
    model, params = minilm.MiniLM(), minilm.load_params(folder)
    texts = minilm.encode(minilm.load_tokenizer(folder, 16), ["a moving film", "dull, and far too long", "I laughed"])
    tree = jlora.wrap(params, jlora.LoraSpec(targets="all-linear", rank=8, variant="dora"))
    forward = lambda tree: jlora.apply(model.apply)({"params": tree}, texts["ids"], texts["mask"])
    target = np.random.default_rng(0).normal(size=(3, model.width))
    tree = trained(tree, lambda tree: ((forward(tree) - target) ** 2).mean())
    jlora.peft.save(tmp_path, tree, names="bert")
    size = {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    base = BertModel(BertConfig(**size), add_pooling_layer=False)
    base.load_state_dict({k: torch.tensor(v) for k, v in state.items()}, strict=False)
    mask = torch.tensor(texts["mask"])
    hidden = PeftModel.from_pretrained(base, tmp_path).eval()(torch.tensor(texts["ids"]), mask).last_hidden_state
    pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    moved = np.abs(forward(tree) - forward(jlora.wrap(params, jlora.LoraSpec(rank=8)))).max()
    assert moved > 1e-2
    np.testing.assert_allclose(pooled.detach().numpy(), forward(tree), atol=2e-5)


@pytest.mark.slow
def test_a_smollm2_adapter_gives_the_same_logits_in_peft(tmp_path):
    folder = fetch.fetch(fetch.SMOLLM2)
    params, model = smollm2.load_params(folder), smollm2.PRETRAINED
    ids = np.asarray(smollm2.load_tokenizer(folder).encode("To be, or not to be, that is the question").ids)[None]
    forward = lambda tree: jlora.apply(model.apply)({"params": tree}, ids)
    sites = jlora.sites(lambda params, ids: model.apply({"params": params}, ids), params, ids)
    tree = jlora.wrap(params, jlora.LoraSpec(targets="all-linear", rank=8), sites=sites)
    before = forward(tree)
    tree = trained(tree, lambda tree: smollm2.next_token_losses(forward(tree), ids).mean(), 2)
    jlora.peft.save(tmp_path, tree, names="llama", portable=True)
    base = LlamaForCausalLM(LlamaConfig(**smollm2.load_config(folder)))
    base.load_state_dict({k: torch.tensor(v) for k, v in smollm2.hf_tensors(folder).items()}, strict=False)
    logits = PeftModel.from_pretrained(base, tmp_path).eval()(torch.tensor(ids)).logits.detach().numpy()
    assert np.abs(forward(tree) - before).max() > 0.1
    np.testing.assert_allclose(logits, forward(tree), atol=5e-4)
