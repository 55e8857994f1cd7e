"""`weighted`, and ``jlora blend``, against PEFT's ``add_weighted_adapter``; runs where torch and peft are installed."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.adapters import combine, pruning, weighted
from jlora.adapters import files as blend
from jlora.adapters.combine import METHODS
from jlora.adapters.weighted import keys_of
from jlora.cli import main

torch = pytest.importorskip("torch", reason="the oracle needs torch and peft")
peft = pytest.importorskip("peft")
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.utils import merge_utils  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

EVERY = ["emb", "fc1", "fc2", "conv", "point"]
SETTINGS = {
    "one": {"r": 2, "lora_alpha": 3, "target_modules": EVERY},
    "two": {"r": 2, "lora_alpha": 8, "target_modules": ["emb", "fc1", "conv"]},
    "three": {"r": 2, "lora_alpha": 1, "target_modules": EVERY[1:], "use_rslora": True},
    "large": {"r": 3, "lora_alpha": 5, "target_modules": EVERY[1:], "rank_pattern": {"fc2": 1}},
}
WEIGHTS = {"positive": (0.7, 0.3, 0.5), "negative": (0.7, -0.4, -1.5)}
SEED = 3


class Small(torch.nn.Module):
    """A table, two linear layers and two convolutions."""

    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(9, 6)
        self.fc1, self.fc2 = torch.nn.Linear(6, 8), torch.nn.Linear(8, 5)
        self.conv, self.point = torch.nn.Conv2d(1, 4, (3, 2)), torch.nn.Conv2d(4, 3, 1)

    def forward(self, ids, image):
        return self.fc2(torch.tanh(self.fc1(self.emb(ids)))), self.point(torch.tanh(self.conv(image)))


def small():
    torch.manual_seed(0)
    return Small()


@functools.cache
def base():
    return {name: x.detach().numpy().copy() for name, x in small().state_dict().items()}


def nested(state):
    tree: dict = {}
    for name, x in state.items():
        module, _, leaf = name.rpartition(".")
        tree.setdefault(module, {})[leaf] = jnp.asarray(x)
    return tree


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """PEFT's adapters, with values in all that trains."""
    directory = tmp_path_factory.mktemp("adapters")
    theirs().save_pretrained(directory)
    return directory


def theirs():
    """PEFT's model with all adapters."""
    model = None
    for name, settings in SETTINGS.items():
        config = peft.LoraConfig(**settings)
        model = (
            peft.get_peft_model(small(), config, name) if model is None else (model.add_adapter(name, config), model)[1]
        )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.copy_(torch.randn_like(x) * 0.4)
    return model


def outputs(model):
    torch.manual_seed(2)
    given = torch.arange(9), torch.randn(2, 1, 6, 5)
    with torch.no_grad():
        return [x.numpy() for x in model.eval()(*given)]


def masks(model, names, recipe, keys) -> Iterator[np.ndarray]:
    """What jlora draws, in the order in which PEFT asks for it, as PEFT lays it out."""
    for module, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        there = [i for i, name in enumerate(names) if name in {**layer.lora_A, **layer.lora_embedding_A}]
        key = keys(module.removeprefix("base_model.model."), layer)
        for part in (combine.UPDATE,) if recipe.endswith("svd") else (combine.A, combine.B):
            for i in there:
                yield functools.partial(_mask, combine.part_key(key, i, part), part, bool(layer.lora_embedding_A))


def _mask(key, part, is_table, tensor, density):
    """For a tensor of PEFT's: A is (r, in...), B (out, r), an update (out, in...), or of a table (in, out)."""
    shape = tensor.shape[0], tensor.numel() // tensor.shape[0]
    if part == combine.UPDATE and is_table:
        mask = pruning.drawn(key, shape, density)
    else:
        mask = pruning.drawn(key, shape[::-1], density).T
    return torch.tensor(np.asarray(mask)).reshape(tensor.shape)


def draws(monkeypatch, model, names, method, keys):
    """PEFT draws what jlora draws."""
    queue = masks(model, names, method, keys)

    def prune(tensor, density, rescale):
        assert rescale
        return tensor * next(queue)(tensor, density) / density

    monkeypatch.setattr(merge_utils, "random_pruning", prune)
    return queue


def mixed(names, weights, method, **settings):
    """PEFT's model, the mix active, and the difference that it makes to each weight."""
    model = theirs()
    model.add_weighted_adapter(names, list(weights), "mix", combination_type=method, **settings)
    model.set_adapter("mix")
    layers = [(name, x) for name, x in model.named_modules() if isinstance(x, LoraLayer)]
    of = lambda layer: layer.get_delta_weight("mix").detach().numpy()
    return model, {name.removeprefix("base_model.model.") + ".weight": of(layer) for name, layer in layers}


def deltas(tree):
    merged = jlora.merge(tree)
    return {name: np.asarray(merged[module][leaf]) - x for name, x in base().items()
            for module, _, leaf in [name.rpartition(".")]}  # fmt: skip


def assert_deltas(found, wanted):
    for name, x in found.items():
        np.testing.assert_allclose(x, wanted.get(name, 0), atol=1e-5, err_msg=name)


def cases():
    for method in METHODS:
        names = ("one", "two", "large" if method == "cat" or method.endswith("svd") else "three")
        prunes = {} if method in ("linear", "cat", "svd") else {"density": 0.55}
        for sign, weights in WEIGHTS.items():
            yield pytest.param(names, weights, method, prunes, id=f"{method}, {sign}")
        if "ties" in method:
            yield pytest.param(
                names, weights, method, prunes | {"majority_sign_method": "frequency"}, id=f"{method}, frequency"
            )
        if method.endswith("svd"):
            yield pytest.param(names, weights, method, prunes | {"svd_rank": 1}, id=f"{method} of rank 1")
    yield pytest.param(("one",), (-0.6,), "linear", {}, id="one alone")


@pytest.mark.parametrize(("names", "weights", "method", "settings"), [*cases()])
def test_trees_and_files_are_combined_as_peft_does(files, names, weights, method, settings, tmp_path, monkeypatch):
    root, model = jax.random.key(SEED), theirs()
    trees = [jlora.peft.load(files / name, nested(base())) for name in names]
    by_tree = lambda name, layer: keys_of(f"{name}/weight", (1,), jlora.Axes(0, 0), None, root)
    by_file = lambda name, layer: blend.keys_of(name, None, root)
    is_random = method.startswith("dare")

    queue = draws(monkeypatch, model, names, method, by_tree)
    _, wanted = mixed(names, weights, method, **settings)
    assert not is_random or next(queue, None) is None
    made = weighted(trees, weights, method, **settings, key=root if is_random else None)
    assert_deltas(deltas(made), wanted)

    more = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    sources, out = [str(files / name) for name in names], str(tmp_path / "out")
    ours = ["--weights", *map(str, weights), "--method", method, *more, "--seed", str(SEED)]
    assert main(["blend", *sources, out, *ours]) == 0
    draws(monkeypatch, model, names, method, by_file)
    model, wanted = mixed(names, weights, method, **settings)
    assert_deltas(deltas(jlora.peft.load(out, nested(base()))), wanted)
    again = peft.PeftModel.from_pretrained(small(), out)
    for x, y in zip(outputs(again), outputs(model), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1, np.abs(y).max()))


def test_what_resize_gives_is_read_by_peft(files, tmp_path):
    tree = jlora.peft.load(files / "large", nested(base()))
    for rank in (2, 4):
        resized = jlora.adapters.resize(tree, rank)
        jlora.peft.save(tmp_path / str(rank), resized)
        model = peft.PeftModel.from_pretrained(small(), tmp_path / str(rank))
        layers = [(name, x) for name, x in model.named_modules() if isinstance(x, LoraLayer)]
        found = {name.removeprefix("base_model.model.") + ".weight": x.get_delta_weight("default").detach().numpy()
                 for name, x in layers}  # fmt: skip
        assert_deltas(deltas(resized), found)
    assert_deltas(deltas(resized), deltas(tree))


def test_what_peft_does_with_less_than_updates_is_refused(files, tmp_path):
    """PEFT combines DoRA's factors, and starts the magnitudes anew: its mix of one adapter is not that adapter."""
    model = peft.get_peft_model(small(), peft.LoraConfig(r=2, target_modules=["fc1"], use_dora=True), "dora")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.copy_(torch.randn_like(x))
    model.save_pretrained(tmp_path)
    alone = outputs(model)
    model.add_weighted_adapter(["dora"], [1.0], "mix", combination_type="linear")
    model.set_adapter("mix")
    assert np.abs(outputs(model)[0] - alone[0]).max() > 0.01
    tree = jlora.peft.load(tmp_path / "dora", nested(base()))
    with pytest.raises(TypeError, match="magnitudes do not add up"):
        weighted([tree, tree], [0.5, 0.5])
