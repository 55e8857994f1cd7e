"""Starts from data against PEFT itself: EVA's ranks and directions, CorDA's parts of the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

torch = pytest.importorskip("torch", reason="the oracle needs torch and peft")
peft = pytest.importorskip("peft")
from tests.support import error  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {"first": (8, 12), "second": (12, 10), "third": (10, 6)}


class Chain(torch.nn.Module):
    """Three linear layers, so that inputs with their opposites have a mean of zero everywhere."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, (n, m) in SIZES.items():
            setattr(self, name, torch.nn.Linear(n, m, bias=False))

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def chain(params, x):
    for name in SIZES:
        x = x @ params[name]["kernel"]
    return x


def params_of(model):
    return {name: {"kernel": jnp.asarray(getattr(model, name).weight.detach().numpy().T)} for name in SIZES}


@pytest.fixture
def data():
    x = np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32) * np.float32(0.55) ** np.arange(8)
    return np.concatenate([x, -x]).astype(np.float32)


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0, 4.0])
def test_eva(data, rho):
    model = Chain()
    params = params_of(model)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=list(SIZES), init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho)
    )
    adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(
        adapted,
        [torch.from_numpy(data)] * 3,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    theirs = {
        name.split(".")[2]: module.lora_A["default"].weight.detach().numpy()
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }
    tree = jlora.wrap(params, jlora.LoraSpec(targets="*", rank=2, alpha=4))
    ours = jlora.init.eva(chain, tree, [data], passes=12, rho=rho)
    assert {name for name in SIZES if hasattr(ours[name]["kernel"], "lora_a")} == set(theirs)
    for name, rows in theirs.items():
        columns = np.asarray(ours[name]["kernel"].lora_a)
        assert columns.shape == rows.T.shape
        np.testing.assert_allclose(abs(rows @ columns), np.eye(len(rows)), atol=5e-3)
        assert ours[name]["kernel"].scale == 2.0


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda(data, mode):
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model = Chain()
    params = params_of(model)
    config = peft.LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=list(SIZES),
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
    )
    with torch.no_grad():
        preprocess_corda(model, config, run_model=lambda: model(torch.from_numpy(data)))
    adapted = peft.get_peft_model(model, config)
    tree = jlora.wrap(params, jlora.LoraSpec(targets="*", rank=2, alpha=6))
    ours = jax.jit(lambda tree, x: jlora.init.corda(chain, tree, [x], mode=mode))(tree, data)
    assert error(jlora.apply(chain)(ours, data), chain(params, data)) < 1e-6
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, x)["default"].weight.detach().numpy() for x in ("lora_A", "lora_B"))
            node = ours[name.split(".")[2]]["kernel"]
            assert error(node.lora_a @ node.lora_b, (b @ a).T) < 1e-4
            ratio = np.linalg.norm(node.lora_a, axis=0) / np.linalg.norm(a, axis=1)
            np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)  # PEFT scales C otherwise: one factor for all
