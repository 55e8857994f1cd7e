"""Layers beside linear ones against PEFT itself: convolutions in one and three dimensions, PyTorch's own attention."""

import jax.numpy as jnp
import numpy as np
import pytest

import jlora

torch = pytest.importorskip("torch", reason="the oracle needs torch and peft")
pytest.importorskip("peft")
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model  # noqa: E402

from tests.peft_files.test_oracle import flat, nested  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
Model = torch.nn.Module


class Convolutions(Model):
    """A convolution in one dimension, as Whisper's, one in three, as Qwen2-VL's, and a linear layer."""

    given = ((2, 4, 7), (2, 3, 5, 6, 4))

    def __init__(self):
        super().__init__()
        self.sound, self.video = torch.nn.Conv1d(4, 6, 3, padding=1), torch.nn.Conv3d(3, 5, (2, 3, 2))
        self.head = torch.nn.Linear(6, 6)

    def forward(self, x, y):
        return self.head(self.sound(x).transpose(1, 2)), self.video(y)


class Attention(Model):
    """PyTorch's own attention before a linear layer."""

    given = ((2, 3, 8),)

    def __init__(self):
        super().__init__()
        self.attn, self.head = torch.nn.MultiheadAttention(8, 2, batch_first=True), torch.nn.Linear(8, 8)

    def forward(self, x):
        return (self.head(self.attn(x, x, x)[0]),)


class Grouped(Model):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 6, 3, groups=2)


CASES = {
    "convolutions": (Convolutions, LoraConfig(r=2, target_modules=["sound", "video", "head"])),
    "convolutions, DoRA": (Convolutions, LoraConfig(r=2, target_modules=["sound", "video"], use_dora=True)),
    "convolutions, IA3": (Convolutions, IA3Config(target_modules=["video", "head"], feedforward_modules=["head"])),
    "attention": (Attention, LoraConfig(r=2, target_modules=["attn", "head"])),
    "attention, a rank of its own": (
        Attention,
        LoraConfig(r=2, target_modules=["attn", "head"], rank_pattern={"attn": 3}),
    ),
}


def made(name):
    """PEFT's model some way from its start, the state of its base, inputs and what it computes."""
    kind, config = CASES[name]
    torch.manual_seed(0)
    base = kind()
    state = {key: value.detach().numpy().copy() for key, value in base.state_dict().items()}
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        given = [torch.randn(shape) for shape in kind.given]
        return model, state, given, [y.numpy() for y in model(*given)]


def again(name, directory, given):
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(CASES[name][0](), directory)
    with torch.no_grad():
        return [y.numpy() for y in model(*given)]


@pytest.mark.parametrize("name", CASES)
def test_both_ways(name, tmp_path):
    model, state, given, wanted = made(name)
    model.save_pretrained(tmp_path / "theirs")
    tree = jlora.peft.load(tmp_path / "theirs", nested(state))
    jlora.peft.save(tmp_path / "ours", tree)
    for found, expected in zip(again(name, tmp_path / "ours", given), wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
    merged = {key: value.detach().numpy() for key, value in model.merge_and_unload().state_dict().items()}
    for key, value in flat(jlora.merge(tree)).items():
        np.testing.assert_allclose(value, merged[key], atol=2e-6, err_msg=key)


@pytest.mark.parametrize("name", ["convolutions", "convolutions, DoRA"])
def test_onto_flaxs_kernels(name, tmp_path):
    """(window..., in, out), with other names; a kernel of three axes stays a convolution's when it is saved."""
    model, state, given, wanted = made(name)
    model.save_pretrained(tmp_path / "theirs")
    turn = lambda x: x if x.ndim == 1 else np.moveaxis(x, (0, 1), (-1, -2)) if x.ndim > 2 else x.T
    named = lambda key: key.replace("weight", "kernel").split(".")
    params = {}
    for key, value in state.items():
        module, leaf = named(key)
        params.setdefault(f"my_{module}", {})[leaf] = jnp.asarray(turn(value))
    names = [("{p}", "my_{p}/kernel")]
    tree = jlora.peft.load(tmp_path / "theirs", params, names=names)
    jlora.peft.save(tmp_path / "ours", tree, names=names)
    for found, expected in zip(again(name, tmp_path / "ours", given), wanted, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_grouped_convolution_is_refused(tmp_path):
    model = get_peft_model(Grouped(), LoraConfig(r=2, target_modules=["conv"]))
    state = {key.replace("base_model.model.", "").replace("base_layer.", ""): value.detach().numpy()
             for key, value in model.state_dict().items() if "lora" not in key}  # fmt: skip
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"conv is a grouped convolution.*exclude_modules"):
        jlora.peft.load(tmp_path, nested(state))
