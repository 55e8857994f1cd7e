"""Adapters of other tools, and PEFT's pickles: the weights that they give are those of their formulas."""

import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from tests.peft_files.pickles import DTYPES, FORMATS, written
from tests.peft_files.trees import assert_same, flat, lora, merged, nested, noise

TEXT = {
    "model.embed_tokens.weight": noise(11, 6), "model.layers.0.self_attn.q_proj.weight": noise(8, 6),
    "model.layers.1.self_attn.q_proj.weight": noise(8, 6), "model.layers.1.mlp.up_proj.weight": noise(10, 6),
    "model.norm.weight": noise(6),
}  # fmt: skip
UNET = {
    "down_blocks.0.attentions.1.attn1.to_q.weight": noise(6, 4),
    "down_blocks.0.attentions.1.attn1.to_out.0.weight": noise(4, 6),
    "down_blocks.0.resnets.0.conv1.weight": noise(5, 4, 3, 3),
    "down_blocks.0.resnets.0.conv_shortcut.weight": noise(5, 4, 1, 1),
    "down_blocks.0.resnets.0.conv1.bias": noise(5),
    "mid_block.proj_in.weight": noise(4, 4),
}  # fmt: skip
QUERY, OUT, CONV, SHORTCUT, _, SQUARE = (name.removesuffix(".weight") for name in UNET)
ENCODER = {
    "text_model.encoder.layers.0.self_attn.q_proj.weight": noise(6, 4),
    "text_model.encoder.layers.0.mlp.fc1.weight": noise(8, 4),
}


def tree(weights):
    return jax.device_put(nested(weights))


def flax(weights):
    """The same weights as Flax has them, with a list of the names' pairs."""
    leaves = {"bias": "bias", "weight": "kernel"}
    turned = lambda x: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    of = lambda name: name.rpartition(".")[0].replace(".", "_") + "/" + leaves[name.rpartition(".")[2]]
    names = [(name.removesuffix(".weight"), of(name)) for name in weights if not name.endswith("bias")]
    made: dict = {}
    for name, x in weights.items():
        module, leaf = of(name).split("/")
        made.setdefault(module, {})[leaf] = turned(x)
    return jax.device_put(made), names, {name: of(name).replace("/", ".") for name in weights}, turned


def check(path, weights, deltas, **given):
    """Loads onto a tree with PyTorch's names and onto Flax's; the merged weights are the base's with the deltas."""
    wanted = {name: x + deltas.get(name.removesuffix(".weight"), 0.0) for name, x in weights.items()}
    assert_same(merged(jlora.peft.load(path, tree(weights), **given)), wanted)
    params, names, places, turned = flax(weights)
    found = merged(jlora.peft.load(path, params, names=names, **given))
    assert_same(found, {places[name]: turned(x) for name, x in wanted.items()})


def refused(path, match, weights=UNET, error=ValueError, **given):
    with pytest.raises(error, match=match) as info:
        jlora.peft.load(path, tree(weights), **given)
    assert info.type is error and len(str(info.value)) < 1000
    return str(info.value)


# -------------------------------------------------------------------------------- adapter_model.bin


def peft_files(directory, dtype=np.float32):
    """An adapter that this library wrote, and its tensors."""
    kernels = {name: lora(x) for name, x in TEXT.items() if x.ndim == 2 and "embed" not in name}
    jlora.peft.save(directory, nested({**tree_of(TEXT), **kernels}))
    weights = directory / "adapter_model.safetensors"
    tensors = {name: x.astype(dtype) for name, x in load_file(weights).items()}
    save_file(tensors, weights)
    return tensors


def tree_of(weights):
    return {name: jax.device_put(x) for name, x in weights.items()}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pickle_of_pefts_is_read_as_the_safetensors_are(tmp_path, format, dtype):
    tensors = peft_files(tmp_path, DTYPES[dtype])
    wanted = merged(jlora.peft.load(tmp_path, tree(TEXT)))
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(written(tensors, format))
    assert_same(merged(jlora.peft.load(tmp_path, tree(TEXT))), wanted, atol=0)


def test_safetensors_are_read_where_both_are_there(tmp_path):
    peft_files(tmp_path)
    wanted = merged(jlora.peft.load(tmp_path, tree(TEXT)))
    (tmp_path / "adapter_model.bin").write_bytes(b"nothing")
    assert_same(merged(jlora.peft.load(tmp_path, tree(TEXT))), wanted, atol=0)


def test_all_checks_are_those_of_safetensors(tmp_path):
    tensors = peft_files(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    name = next(iter(tensors))
    wrong = {
        "none of PEFT's": {"x" + name: tensors[name]},
        "not the other factor": {key: x for key, x in tensors.items() if key != name},
        "NaN or infinite": tensors | {name: np.full_like(tensors[name], np.nan)},
        "expected are floating numbers": tensors | {name: tensors[name].astype(np.int64)},
    }
    for match, changed in wrong.items():
        (tmp_path / "adapter_model.bin").write_bytes(written(changed))
        assert str(tmp_path) in refused(tmp_path, match, TEXT)


@pytest.mark.parametrize("format", FORMATS)
def test_mutated_pickles_are_refused_or_finite(tmp_path, format):
    tensors = peft_files(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    path, data, rng = tmp_path / "adapter_model.bin", written(tensors, format), np.random.default_rng(0)
    params, shapes, loaded = tree(TEXT), {name: x.shape for name, x in TEXT.items()}, 0
    end = data.rindex(b"lora_B.weight") + 200
    tracemalloc.start()
    try:
        for i in range(200):
            changed = bytearray(data)
            for _ in range(rng.integers(1, 4)):
                changed[rng.integers(end if i % 2 else len(data))] = rng.integers(256)
            path.write_bytes(bytes(changed) if i % 10 else bytes(changed[: rng.integers(len(data))]))
            try:
                found = jlora.peft.load(tmp_path, params)
            except ValueError as error:
                assert type(error) is ValueError and (str(tmp_path) in str(error) or "peft.load" in str(error)), error
                continue
            loaded += 1
            assert {name: x.shape for name, x in flat(found).items()} == shapes
            assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(found))
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert loaded < 150


# -------------------------------------------------------------------------------- MLX-LM


def mlx(directory, tensors, kind="lora", rank=2, scale=3.0, **more):
    directory.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, directory / "adapters.safetensors")
    settings = {
        "fine_tune_type": kind, "num_layers": 16, "model": "mlx-community/tiny", "batch_size": 4, "seed": 0,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0},
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings | more))
    return directory


Q0, Q1, UP, TABLE = (
    f"model.{name}"
    for name in ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.up_proj", "embed_tokens")
)


def mlx_pair(out, ins, name, rank=2):
    return {f"{name}.lora_a": noise(ins, rank), f"{name}.lora_b": noise(rank, out)}


def test_mlx(tmp_path):
    tensors = mlx_pair(8, 6, Q0) | mlx_pair(8, 6, Q1) | mlx_pair(10, 6, UP)
    deltas = {name: 3.0 * (tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]).T for name in (Q0, Q1, UP)}
    check(mlx(tmp_path / "a", tensors), {name: x for name, x in TEXT.items() if "norm" not in name}, deltas)


@pytest.mark.parametrize("change", [{"fine_tune_type": None}, {"num_layers": None, "lora_layers": 4}])
def test_mlx_of_older_versions(tmp_path, change):
    tensors = mlx_pair(8, 6, Q0)
    directory = mlx(tmp_path / "a", tensors)
    path = directory / "adapter_config.json"
    settings = {name: x for name, x in (json.loads(path.read_text()) | change).items() if x is not None}
    path.write_text(json.dumps(settings))
    found = merged(jlora.peft.load(directory, tree(TEXT)))
    delta = 3.0 * (tensors[f"{Q0}.lora_a"] @ tensors[f"{Q0}.lora_b"]).T
    np.testing.assert_allclose(found[f"{Q0}.weight"], TEXT[f"{Q0}.weight"] + delta, atol=1e-5)


def test_mlx_dora(tmp_path):
    m = np.abs(noise(8)) + 1
    tensors = mlx_pair(8, 6, Q0) | {f"{Q0}.m": m}
    whole = TEXT[f"{Q0}.weight"] + 3.0 * (tensors[f"{Q0}.lora_a"] @ tensors[f"{Q0}.lora_b"]).T
    wanted = (m / np.linalg.norm(whole, axis=1))[:, None] * whole
    path = mlx(tmp_path / "a", tensors, "dora")
    check(path, {f"{Q0}.weight": TEXT[f"{Q0}.weight"]}, {Q0: wanted - TEXT[f"{Q0}.weight"]})


def test_mlx_table(tmp_path):
    tensors = {f"{TABLE}.lora_a": noise(11, 2), f"{TABLE}.lora_b": noise(2, 6)}
    path = mlx(tmp_path / "a", tensors)
    found = merged(jlora.peft.load(path, tree(TEXT)))
    wanted = TEXT[f"{TABLE}.weight"] + 3.0 * tensors[f"{TABLE}.lora_a"] @ tensors[f"{TABLE}.lora_b"]
    np.testing.assert_allclose(found[f"{TABLE}.weight"], wanted, atol=1e-5)


@pytest.mark.parametrize("is_old", [False, True])
def test_mlx_experts(tmp_path, is_old):
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    a, b, weight = noise(3, 2, 6), noise(3, 8, 2), noise(3, 8, 6)
    path = mlx(tmp_path / "a", {f"{name}.lora_a": a.reshape(6, 6) if is_old else a, f"{name}.lora_b": b})
    found = merged(jlora.peft.load(path, tree({f"{name}.weight": weight})))
    np.testing.assert_allclose(found[f"{name}.weight"], weight + 3.0 * b @ a, atol=1e-5)


PAIR = mlx_pair(8, 6, Q0)
MLX_WRONG = {
    "full": (PAIR, {"kind": "full"}, "fine_tune_type is 'full'; lora and dora are read"),
    "whole weights": (PAIR | {f"{Q0}.weight": noise(8, 6)}, {}, "q_proj.weight' is no lora_a, lora_b or m"),
    "no parameters": (PAIR, {"lora_parameters": None}, "must be an object with rank and scale"),
    "no scale": (PAIR, {"lora_parameters": {"rank": 2}}, "the scale in lora_parameters must be"),
    "no rank": (PAIR, {"lora_parameters": {"scale": 2.0}}, "the rank in lora_parameters must be"),
    "dropout": (PAIR, {"lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 1}}, r"dropout .* must be in \[0, 1\)"),
    "alpha": (PAIR, {"lora_parameters": {"rank": 2, "scale": 2.0, "alpha": 16}}, "older versions of MLX-LM multiply"),
    "another rank": (PAIR, {"rank": 3}, "has rank 3, but its factors are"),
    "half": ({f"{Q0}.lora_a": noise(6, 2)}, {}, "not the other factor, lora_b"),
    "m without dora": (PAIR | {f"{Q0}.m": noise(8)}, {}, "has an m, but fine_tune_type is lora"),
    "dora without m": (PAIR, {"kind": "dora"}, "lacks an m, but fine_tune_type is dora"),
    "short m": (PAIR | {f"{Q0}.m": noise(7)}, {"kind": "dora"}, "expected are 8 elements"),
    "dora of a table": (
        mlx_pair(6, 11, TABLE) | {f"{TABLE}.m": noise(11)},
        {"kind": "dora"},
        "a table or experts with",
    ),
    "integers": (PAIR | {f"{Q0}.lora_b": np.ones((2, 8), np.int32)}, {}, "expected are floating numbers"),
    "nan": (PAIR | {f"{Q0}.lora_b": np.full((2, 8), np.nan)}, {}, "NaN or infinite"),
    "turned": ({f"{Q0}.lora_a": noise(2, 6), f"{Q0}.lora_b": noise(8, 2)}, {}, "has rank 2, but its factors are"),
    "another model": (mlx_pair(8, 6, "model.layers.7.q_proj"), {}, "which the tree does not have"),
    "nothing": ({}, {}, "has no tensors of an adapter"),
}


@pytest.mark.parametrize("tensors, settings, match", MLX_WRONG.values(), ids=MLX_WRONG)
def test_what_is_no_adapter_of_mlx(tmp_path, tensors, settings, match):
    refused(mlx(tmp_path / "a", tensors, **settings), match, TEXT)


def test_mlx_beside_pefts(tmp_path):
    """The settings are of one of the two; where they may be of both, or of none, it is refused."""
    path = mlx(tmp_path / "a", PAIR)
    (path / "adapter_model.safetensors").write_bytes((path / "adapters.safetensors").read_bytes())
    assert jlora.peft.load(path, tree(TEXT)) is not None
    refused(path, "has a single adapter", TEXT, component="unet")
    (path / "adapter_config.json").unlink()
    refused(path, "the adapters of several tools, peft and mlx", TEXT)
    (path / "adapter_model.safetensors").unlink()
    refused(path, "which tells the scale", TEXT, FileNotFoundError)
    refused(path / "adapters.safetensors", "a file of MLX-LM's: give its directory", TEXT)


# -------------------------------------------------------------------------------- kohya's scripts


def factors(shape, rank):
    """Down and up, of a linear layer or a convolution, and their product."""
    down = noise(rank, *shape[1:])
    up = noise(shape[0], rank, 1, 1) if len(shape) == 4 else noise(shape[0], rank)
    return down, up, (up.reshape(shape[0], rank) @ down.reshape(rank, -1)).reshape(shape)


def kohya(weights, prefix="lora_unet_", alphas=True, skip=()):
    """Tensors by kohya's names, and the deltas: each module with a rank and an alpha of its own."""
    tensors, deltas = {}, {}
    for i, (name, x) in enumerate(weights.items()):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and x.ndim > 1 and module not in skip:
            rank, alpha = 1 + i % 3, 0.5 + i
            down, up, product = factors(x.shape, rank)
            flat_name = prefix + module.replace(".", "_")
            tensors |= {f"{flat_name}.lora_down.weight": down, f"{flat_name}.lora_up.weight": up}
            if alphas:
                tensors[f"{flat_name}.alpha"] = np.array(alpha, np.float32)
            deltas[module] = (alpha / rank if alphas else 1.0) * product
    return tensors, deltas


def file_of(tmp_path, tensors, metadata=None, name="lora.safetensors"):
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, tmp_path / name, metadata)
    return tmp_path / name


@pytest.mark.parametrize("alphas", [True, False])
def test_kohya(tmp_path, alphas):
    tensors, deltas = kohya(UNET, alphas=alphas, skip=(SQUARE,))
    check(file_of(tmp_path, tensors), UNET, deltas)
    found = merged(jlora.peft.load(tmp_path / "lora.safetensors", tree({f"unet.{n}": x for n, x in UNET.items()}),
                                   prefix="unet"))  # fmt: skip
    wanted = {f"unet.{n}": x + deltas.get(n.removesuffix(".weight"), 0.0) for n, x in UNET.items()}
    assert_same(found, wanted)


def test_kohya_in_half_and_with_whole_alphas(tmp_path):
    tensors, _ = kohya({f"{QUERY}.weight": UNET[f"{QUERY}.weight"]})
    name = "lora_unet_" + QUERY.replace(".", "_")
    tensors[f"{name}.alpha"] = np.array(4)
    half = {key: x.astype(ml_dtypes.bfloat16) if x.ndim else x for key, x in tensors.items()}
    found = merged(jlora.peft.load(file_of(tmp_path, half), tree(UNET)))
    down, up = (half[f"{name}.lora_{side}.weight"].astype(np.float32) for side in ("down", "up"))
    np.testing.assert_allclose(found[f"{QUERY}.weight"], UNET[f"{QUERY}.weight"] + 4 * up @ down, atol=1e-5)


def test_a_component_of_several(tmp_path):
    unet, of_unet = kohya(UNET, skip=(SQUARE,))
    encoder, of_encoder = kohya(ENCODER, "lora_te1_")
    other, _ = kohya(ENCODER, "lora_te2_")
    path = file_of(tmp_path, unet | encoder | other)
    told = refused(path, r"several components, 'text_encoder', 'text_encoder_2', 'unet': say which .* component=")
    assert str(path) in told
    check(path, UNET, of_unet, component="unet")
    check(path, ENCODER, of_encoder, component="text_encoder")
    refused(path, "has no component 'transformer'; it has 'text_encoder', ", component="transformer")
    refused(path, "which is no module of the tree. Nearest: .*another component", component="text_encoder")


def test_underscores_with_several_readings_are_refused(tmp_path):
    weights = {"to_q.proj.weight": noise(4, 4), "to.q_proj.weight": noise(4, 4), "other.weight": noise(4, 4)}
    tensors, _ = kohya({"to_q.proj.weight": weights["to_q.proj.weight"]})
    path = file_of(tmp_path, tensors)
    refused(path, "has to_q_proj, with underscores for dots, which may be to.q_proj or to_q.proj", weights)
    deeper = {f"unet.{name}": x for name, x in weights.items()} | {"unet_2.to_q.proj.weight": noise(4, 4)}
    refused(path, "is one below unet and below unet_2. Say which is meant: prefix='unet'", deeper)


KOHYA_NAME = "lora_unet_" + QUERY.replace(".", "_")
KOHYA_WRONG = {
    "mid": (
        f"{KOHYA_NAME}.lora_mid.weight",
        noise(2, 2, 3, 3),
        r"a Tucker decomposition of a convolution \(lora_mid\)",
    ),
    "loha": (f"{KOHYA_NAME}.hada_w1_a", noise(6, 2), r"is LoHa \(hada_\)"),
    "lokr": (f"{KOHYA_NAME}.lokr_w1", noise(6, 2), r"is LoKr \(lokr_\)"),
    "dora": (f"{KOHYA_NAME}.dora_scale", noise(6, 1), r"is DoRA's magnitudes by LyCORIS \(dora_scale\)"),
    "oft": (f"{KOHYA_NAME}.oft_blocks", noise(2, 2, 2), r"is OFT \(oft_\)"),
    "scalar": (f"{KOHYA_NAME}.scalar", np.array(1.0), "is a trained scalar"),
    "diff": (f"{KOHYA_NAME}.diff", noise(6, 4), "is a whole difference of weights"),
    "other": (f"{KOHYA_NAME}.something", noise(6, 4), "is of no kind that jlora knows"),
    "other start": ("bundle_emb.x.string_to_param", noise(6, 4), "is of no kind that jlora knows"),
    "alpha of zero": (f"{KOHYA_NAME}.alpha", np.array(0.0, np.float32), "must be one number above 0"),
    "alphas": (f"{KOHYA_NAME}.alpha", np.ones(2, np.float32), "must be one number above 0"),
    "infinite alpha": (f"{KOHYA_NAME}.alpha", np.array(np.inf, np.float32), "must be one number above 0"),
    "no numbers": (f"{KOHYA_NAME}.lora_up.weight", np.full((6, 1), np.nan, np.float32), "NaN or infinite"),
    "another rank": (f"{KOHYA_NAME}.lora_up.weight", noise(6, 5), "of ranks 1 and 5"),
    "integers": (f"{KOHYA_NAME}.lora_up.weight", np.ones((6, 1), np.int8), "expected are floating numbers"),
    "another size": (f"{KOHYA_NAME}.lora_down.weight", noise(1, 9), "do not fit"),
    "three axes": (f"{KOHYA_NAME}.lora_down.weight", noise(1, 9, 2), "expected are"),
}


@pytest.mark.parametrize("name, value, match", KOHYA_WRONG.values(), ids=KOHYA_WRONG)
def test_what_kohyas_files_have_besides(tmp_path, name, value, match):
    tensors, _ = kohya({f"{QUERY}.weight": UNET[f"{QUERY}.weight"]})
    refused(file_of(tmp_path, tensors | {name: value}), match)


# -------------------------------------------------------------------------------- diffusers

STYLES = {
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "lora_linear_layer": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


def diffusers(weights, component, style, rank=2, skip=()):
    tensors, deltas, start = {}, {}, f"{component}." if component else ""
    for name, x in weights.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and x.ndim > 1 and module not in skip:
            down, up, deltas[module] = factors(x.shape, rank)
            tensors |= {f"{start}{module}{end}": y for end, y in zip(STYLES[style], (down, up), strict=True)}
    return tensors, deltas


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("component, weights", [("unet", UNET), ("transformer", UNET), ("text_encoder", ENCODER),
                                                ("", UNET)])  # fmt: skip
def test_diffusers(tmp_path, component, weights, style):
    tensors, deltas = diffusers(weights, component, style, skip=(SQUARE,))
    check(file_of(tmp_path, tensors), weights, deltas)


def test_diffusers_alphas_and_components(tmp_path):
    unet, of_unet = diffusers(UNET, "unet", "lora.down", skip=(SQUARE,))
    encoder, of_encoder = diffusers(ENCODER, "text_encoder", "lora_linear_layer", rank=3)
    alphas = {f"unet.{name}.alpha": np.array(5.0, np.float32) for name in of_unet}
    path = file_of(tmp_path, unet | encoder | alphas, name="pytorch_lora_weights.safetensors")
    check(tmp_path, UNET, {name: 2.5 * x for name, x in of_unet.items()}, component="unet")
    check(tmp_path, ENCODER, of_encoder, component="text_encoder")
    refused(tmp_path, "several components, 'text_encoder', 'unet'")
    alphas.popitem()
    path = file_of(tmp_path, unet | alphas)
    refused(path, r"has alphas, but none of .*; add .*\.alpha, a number")


def test_diffusers_settings_in_the_header(tmp_path):
    tensors, deltas = diffusers(UNET, "unet", "lora_A", skip=(SQUARE,))
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0", "conv1", "conv_shortcut"],
                "alpha_pattern": {"to_q": 6}, "use_rslora": False, "peft_type": "LORA"}  # fmt: skip
    header = lambda data: {"lora_adapter_metadata": json.dumps({f"unet.{name}": x for name, x in data.items()})}
    path = file_of(tmp_path, tensors, header(settings))
    check(path, UNET, {name: (3.0 if name == QUERY else 4.0) * x for name, x in deltas.items()})
    whole, _ = diffusers(UNET, "", "lora_A", skip=(SQUARE,))
    path = file_of(tmp_path, {name.removeprefix("unet."): x for name, x in tensors.items()} or whole,
                   {"lora_adapter_metadata": json.dumps(settings)})  # fmt: skip
    check(path, UNET, {name: (3.0 if name == QUERY else 4.0) * x for name, x in deltas.items()})
    wrong = {
        "rank": (settings | {"r": 3}, "has rank 2 and neither .* rank 3"),
        "targets": (settings | {"target_modules": ["to_q"]}, "it is no target"),
        "dora": (settings | {"use_dora": True}, "use_dora=True"),
        "unknown": (settings | {"quantum": 1}, "'lora_adapter_metadata' of its header: .*quantum"),
    }
    for changed, match in wrong.values():
        refused(file_of(tmp_path, tensors, header(changed)), match)
    refused(file_of(tmp_path, tensors, {"lora_adapter_metadata": "no json"}), "no JSON file that can be trusted")
    alphas = {f"unet.{name}.alpha": np.array(5.0, np.float32) for name in deltas}
    refused(file_of(tmp_path, tensors | alphas, header(settings)), "has alphas twice")


def test_diffusers_dora(tmp_path):
    tensors, deltas = diffusers(UNET, "unet", "lora.down", skip=(SQUARE, OUT, CONV, SHORTCUT))
    m = np.abs(noise(6)) + 1
    weight = UNET[f"{QUERY}.weight"]
    whole = weight + deltas[QUERY]
    wanted = (m / np.linalg.norm(whole, axis=1))[:, None] * whole
    path = file_of(tmp_path, tensors | {f"unet.{QUERY}.lora_magnitude_vector": m})
    check(path, {f"{QUERY}.weight": weight}, {QUERY: wanted - weight})


@pytest.mark.parametrize("component", ["unet.", ""])
def test_diffusers_attention_processors(tmp_path, component):
    tensors, deltas = diffusers(UNET, component.strip("."), "lora.down", skip=(SQUARE, CONV, SHORTCUT))
    old = lambda name: name.replace("attn1.to_q.lora.", "attn1.processor.to_q_lora.").replace(
        "attn1.to_out.0.lora.", "attn1.processor.to_out_lora."
    )
    path = file_of(tmp_path, {old(name): x for name, x in tensors.items()})
    assert any("processor" in old(name) for name in tensors)
    check(path, UNET, deltas)


def test_diffusers_in_a_pickle(tmp_path):
    tensors, deltas = diffusers(UNET, "unet", "lora.down", skip=(SQUARE,))
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(written(tensors))
    check(tmp_path, UNET, deltas)


def test_several_ranks_without_alphas_are_refused(tmp_path):
    one, _ = diffusers({f"{QUERY}.weight": UNET[f"{QUERY}.weight"]}, "unet", "lora_A", rank=1)
    two, _ = diffusers({f"{OUT}.weight": UNET[f"{OUT}.weight"]}, "unet", "lora_A", rank=2)
    refused(file_of(tmp_path, one | two), r"several ranks \(such as .*Add the alphas")


def test_files_of_other_kinds_are_told(tmp_path):
    refused(file_of(tmp_path, {"model.layers.0.q_proj.weight": noise(4, 4)}), "has no adapter that is read")
    refused(file_of(tmp_path, {"base_model.model.q_proj.lora_A.weight": noise(2, 4)}), "file of PEFT's: give its dir")
    (tmp_path / "lora.safetensors").write_bytes(b"damaged")
    refused(tmp_path / "lora.safetensors", "no whole safetensors file")
    mixed = diffusers(UNET, "unet", "lora_A")[0] | {"unet.conv_in.weight": noise(4, 4)}
    refused(file_of(tmp_path, mixed), "'unet.conv_in.weight' is of no kind that jlora knows")


def test_a_square_module_is_told_as_in_pefts_files(tmp_path):
    """Nothing of these files says how a square kernel lies; the tree's names do, or the caller."""
    tensors, deltas = kohya({f"{SQUARE}.weight": UNET[f"{SQUARE}.weight"]})
    found = merged(jlora.peft.load(file_of(tmp_path, tensors), tree(UNET)))
    np.testing.assert_allclose(found[f"{SQUARE}.weight"], UNET[f"{SQUARE}.weight"] + deltas[SQUARE], atol=1e-5)
