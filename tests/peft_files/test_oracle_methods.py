"""The files of PEFT's other methods against PEFT itself: merged weights, logits both ways, and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

torch = pytest.importorskip("torch", reason="the oracle needs torch, peft and transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from tests.optim.support import noisy  # noqa: E402
from tests.peft_files.test_oracle import base_state, flat, nested  # noqa: E402
from tests.peft_files.torch_models import inputs, llama, merged_weights  # noqa: E402
from tests.peft_files.trees import LINEAR  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

T = ["q_proj", "k_proj", "down_proj"]
OFT = {"r": 0, "oft_block_size": 4}
BOTH = {"decompose_factor": 4, "decompose_both": True}
DRAWN = {"save_projection": False, "projection_prng_key": 5}
METHODS = {
    "loha": ("LoHaConfig", {"r": 2, "alpha": 3, "rank_pattern": {"k_proj": 3}}),
    "lokr": ("LoKrConfig", {"r": 2, "alpha": 3, "decompose_factor": 4}),
    "lokr, roots": ("LoKrConfig", {"r": 2, "alpha": 3}),
    "lokr, whole": ("LoKrConfig", {"r": 8, "alpha": 3, "decompose_factor": 2}),
    "lokr, both": ("LoKrConfig", {"r": 1, "alpha": 3, **BOTH}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "up_proj"]}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "lora_alpha": 7, "total_step": 10}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"]}),
    "oft": ("OFTConfig", OFT | {"use_cayley_neumann": False}),
    "oft, series": ("OFTConfig", OFT),
    "oft, by number": ("OFTConfig", {"r": 2, "oft_block_size": 0, "num_cayley_neumann_terms": 3}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "miss": ("MissConfig", {"r": 4}),
    "miss, of a rest": ("MissConfig", {"r": 5}),
    "miss, mini": ("MissConfig", {"r": 4, "init_weights": "mini", "mini_r": 4}),
    "hra": ("HRAConfig", {"r": 4}),
    "hra, orthogonal": ("HRAConfig", {"r": 3, "apply_GS": True}),
    "road_1": ("RoadConfig", {"group_size": 8}),
    "road_2": ("RoadConfig", {"group_size": 4, "variant": "road_2"}),
    "road_4": ("RoadConfig", {"group_size": 8, "variant": "road_4"}),
    "c3a": ("C3AConfig", {"block_size": 4, "block_size_pattern": {"down_proj": 8}}),
    "gralora": ("GraloraConfig", {"r": 4, "alpha": 6}),
    "gralora, hybrid": ("GraloraConfig", {"r": 8, "gralora_k": 4, "hybrid_r": 3}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 40, "scaling": 9.0, "n_frequency_pattern": {"k_proj": 20}}),
    "waveft": ("WaveFTConfig", {"n_frequency": 40, "scaling": 3.0, "n_frequency_pattern": {"k_proj": 20}}),
    "waveft, entries": ("WaveFTConfig", {"n_frequency": 40, "scaling": 3.0, "use_idwt": False, "random_loc_seed": 5}),
    "shira": ("ShiraConfig", {"r": 2}),
    "randlora": ("RandLoraConfig", {"r": 4, "randlora_alpha": 6, "target_modules": [*T, "up_proj"]}),
    "randlora, sparse": ("RandLoraConfig", {"r": 3, "randlora_alpha": 6, "sparse": True}),
    "pvera": ("PveraConfig", {"r": 4, "target_modules": ["q_proj", "up_proj"]}),
    "vera, drawn": ("VeraConfig", {"r": 4, "target_modules": ["q_proj", "up_proj"], **DRAWN}),
    "pvera, drawn": ("PveraConfig", {"r": 4, "target_modules": ["down_proj", "up_proj"], **DRAWN}),
    "hira": ("HiraConfig", {"r": 4, "rank_pattern": {"k_proj": 3}}),
    "delora": ("DeloraConfig", {"r": 4, "rank_pattern": {"k_proj": 3}, "lambda_pattern": {"k_proj": 5}}),
}


@functools.cache
def adapted(name):
    """PEFT's model with trained-looking values, and the weights of its base."""
    kind, settings = METHODS[name]
    torch.manual_seed(0)
    base = llama()
    state = base_state(base)
    model = peft.get_peft_model(base, getattr(peft, kind)(**{"target_modules": T} | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval(), state


def logits(model):
    with torch.no_grad():
        return model(**inputs(model)).logits.numpy()


@pytest.mark.parametrize("name", METHODS)
def test_files_both_ways(name, tmp_path):
    model, state = adapted(name)
    model.save_pretrained(tmp_path / "theirs")
    tree = jlora.peft.load(tmp_path / "theirs", nested(state))
    jlora.peft.save(tmp_path / "ours", tree)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(again), logits(model), atol=2e-5)
    wanted = merged_weights(again)
    for weight, value in flat(jlora.merge(tree)).items():
        np.testing.assert_allclose(value, wanted[weight], atol=2e-6, rtol=1e-5, err_msg=weight)


@pytest.mark.parametrize("variant", ["vera", "pvera", "randlora"])
def test_kernels_of_several_sizes_share_their_bases(variant, tmp_path):
    names = ["q_proj", "down_proj", "up_proj"]
    spec = jlora.LoraSpec(variant=variant, rank=4, targets=names, axes=dict.fromkeys(names, LINEAR))
    base = llama()
    tree = noisy(nested(base_state(base)), spec)
    jlora.peft.save(tmp_path, tree)
    wanted = merged_weights(peft.PeftModel.from_pretrained(base, tmp_path))
    for weight, value in flat(jlora.merge(tree)).items():
        np.testing.assert_allclose(value, wanted[weight], atol=2e-6, rtol=1e-5, err_msg=weight)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_autograd(name, tmp_path):
    """Of a sum of the outputs of one layer: PEFT's are read as what a step along them changes."""
    model, state = adapted(name)
    module = next(name for name, part in model.named_modules() if hasattr(part, "base_layer"))
    layer = model.get_submodule(module)
    x, c = torch.randn(5, layer.base_layer.in_features), torch.randn(5, layer.base_layer.out_features)
    model.save_pretrained(tmp_path / "before")
    tree = jlora.peft.load(tmp_path / "before", nested(state))
    model.zero_grad()
    (layer(x) * c).sum().backward()
    values = {n: p.detach().clone() for n, p in layer.named_parameters()}
    with torch.no_grad():
        for p in layer.parameters():
            p -= p.grad if p.grad is not None and p.requires_grad else 0
    model.save_pretrained(tmp_path / "after")
    after = jlora.peft.load(tmp_path / "after", nested(state))
    with torch.no_grad():
        for n, p in layer.named_parameters():
            p.copy_(values[n])
    path = module.removeprefix("base_model.model.").split(".")
    of = lambda tree: functools.reduce(lambda part, key: part[key], [*path, "weight"], tree)
    loss = lambda node: (jlora.apply(lambda w: jnp.asarray(x) @ w["w"].T)({"w": node}) * jnp.asarray(c.numpy())).sum()
    found = jax.jit(jlora.grad(loss))(of(tree))
    one, other, grads = (jax.tree.leaves(jlora.partition({"w": node})[0]) for node in (of(tree), of(after), found))
    assert any(np.abs(grad).max() > 1e-3 for grad in grads)
    for i, (before, now, grad) in enumerate(zip(one, other, grads, strict=True)):
        halved = 2 if name == "boft" and i == 0 else 1  # PEFT has each entry of Q twice, and moves both by half
        wanted = halved * (np.asarray(before, np.float64) - np.asarray(now, np.float64))
        np.testing.assert_allclose(grad, wanted, atol=2e-5 * max(np.abs(wanted).max(), 1), rtol=0)
