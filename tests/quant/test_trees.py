"""Trees on quantised bases: merged, started, read from files, saved, trained, with every variant."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import qwix
from flax import nnx

import jlora
from jlora.quant import Error
from jlora.variants import VARIANTS
from tests.support import error, randomised, same_bits

SPEC = jlora.LoraSpec(rank=4, alpha=4)


def noise(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def params(dtype=jnp.float32):
    up = {"kernel": noise(128, 32, dtype=dtype), "bias": noise(32, dtype=dtype)}
    return {"up": up, "down": {"kernel": noise(32, 16, dtype=dtype, seed=1)}, "norm": {"scale": jnp.ones(16, dtype)}}


def forward(p, x):
    x = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    return (x @ p["down"]["kernel"]) * p["norm"]["scale"]


def loss(p, x):
    return (jlora.apply(forward)(p, x) ** 2).mean()


def quantised(dtype="nf4", **settings):
    return jlora.quant.quantize(params(), dtype, **settings)


def distance(tree, plain, name="up"):
    return float(np.linalg.norm(np.asarray(tree[name]["kernel"]) - np.asarray(plain[name]["kernel"])))


def folded(tree):
    return jax.jit(lambda tree: jlora.merge(tree, dtype=jnp.float32))(tree)


X = noise(8, 128, seed=2)


# ------------------------------------------------------------------------------- merging


def test_merging_is_refused_without_a_type():
    tree = jlora.wrap(quantised(), SPEC)
    with pytest.raises(ValueError, match=r"merge: the base of down/kernel is quantised, to 5.0 bits .*requantize"):
        jlora.merge(tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_merging_to_a_dense_type(dtype):
    """All that is quantised becomes dense, adapted or not; what was dense stays as it is."""
    tree = randomised(jlora.wrap(quantised(), jlora.LoraSpec(targets="up", rank=4, alpha=4)))
    merged = jlora.merge(tree, dtype=dtype)
    kernel, node = jlora.quant.dequantize(quantised())["up"]["kernel"], tree["up"]["kernel"]
    expected = (kernel + node.lora_a @ node.lora_b).astype(dtype)
    assert merged["up"]["kernel"].dtype == merged["down"]["kernel"].dtype == dtype
    assert error(merged["up"]["kernel"], expected) <= (1e-6 if dtype == jnp.float32 else 1e-2)
    assert merged["up"]["bias"].dtype == jnp.float32


def test_an_adapter_that_is_still_zero_is_no_loss():
    """Rounding the numbers of the base to 16 bits loses nothing of an update."""
    merged = jlora.merge(jlora.wrap(quantised(), SPEC), dtype=jnp.bfloat16)
    assert same_bits(merged["up"]["kernel"], jlora.quant.dequantize(quantised(), dtype=jnp.bfloat16)["up"]["kernel"])


def test_types_that_are_no_result():
    tree = jlora.wrap(quantised(), SPEC)
    for dtype in ("nf4", jnp.int4):
        with pytest.raises(ValueError, match=r"merge: dtype must be a floating type, found .*requantize"):
            jlora.merge(tree, dtype=dtype)
    with pytest.raises(TypeError, match=r"some are quantised; jlora.quant.dequantize"):
        jlora.merge(quantised(), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"fold_and_restart: the base of down/kernel is quantised"):
        jlora.fold_and_restart(tree)


def test_merging_abstract_trees():
    tree = jlora.wrap(jlora.quant.quantize(jax.eval_shape(params)), SPEC)
    merged = jlora.merge(tree, dtype=jnp.bfloat16)
    assert merged["up"]["kernel"] == jax.ShapeDtypeStruct((128, 32), jnp.bfloat16)


def test_requantising_tells_what_is_lost():
    """A small update is mostly lost in 4 bits, a large one is not; leaves that are not adapted keep their codes."""
    small, large = (randomised(jlora.wrap(quantised(), jlora.LoraSpec(targets="up", rank=4)), s) for s in (0.01, 2.0))
    (tree, told), (_, much) = jlora.quant.requantize(small), jlora.quant.requantize(large)
    assert isinstance(tree["up"]["kernel"], qwix.QArray) and {*told} == {"up/kernel"}
    assert same_bits(tree["down"], quantised()["down"])
    exact = jlora.merge(small, dtype=jnp.float32)
    lost = distance(jlora.quant.dequantize(tree), exact)
    assert told["up/kernel"].weight == pytest.approx(lost / float(jnp.linalg.norm(exact["up"]["kernel"])), rel=1e-4)
    assert told["up/kernel"].update > 1 > 0.2 > much["up/kernel"].update


def test_requantising_without_an_update():
    tree, told = jlora.quant.requantize(jlora.wrap(quantised(), SPEC))
    assert told["up/kernel"] == Error(pytest.approx(0, abs=1e-6), float("inf"))
    assert same_bits(tree["up"]["kernel"].qvalue, quantised()["up"]["kernel"].qvalue)


def test_requantising_dense_neighbours():
    """A tree of which a part is quantised, and a leaf trained in full."""
    part = jlora.quant.quantize(params(), targets="up")
    tree = randomised(jlora.wrap(part, jlora.LoraSpec(rank=4, train="norm/*")))
    merged, told = jlora.quant.requantize(tree)
    assert {*told} == {"up/kernel"}
    assert error(merged["down"]["kernel"], jlora.merge(tree, dtype=jnp.float32)["down"]["kernel"]) <= 1e-6
    assert same_bits(merged["norm"]["scale"], tree["norm"]["scale"].base)


# ------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("start", [jlora.quant.loftq, jlora.quant.qpissa])
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_starts_are_nearer_to_the_kernel(start, dtype):
    plain, tree = params(), jlora.wrap(quantised(dtype), jlora.LoraSpec(rank=8))
    far = lambda tree: distance(folded(tree), plain)
    once, often = start(tree, plain), start(tree, plain, iterations=5)
    assert far(once) < 0.95 * far(tree)
    assert far(often) < far(once)
    assert jlora.quant.bits(often) == jlora.quant.bits(tree)


def test_loftq_is_the_best_update_of_its_rank():
    """What is left of W - Q has the singular values behind the first r."""
    plain, tree = params(), jlora.wrap(quantised(), jlora.LoraSpec(rank=8))
    rest = plain["up"]["kernel"] - jlora.quant.dequantize(quantised())["up"]["kernel"]
    values = jnp.linalg.svd(rest, compute_uv=False)
    found = distance(jlora.merge(jlora.quant.loftq(tree, plain), dtype=jnp.float32), plain)
    assert found == pytest.approx(float(jnp.linalg.norm(values[8:])), rel=1e-4)
    assert same_bits(jlora.unwrap(jlora.quant.loftq(tree, plain)), quantised())


def test_qpissa_trains_the_principal_part():
    plain, tree = params(), jlora.wrap(quantised(), jlora.LoraSpec(rank=8, alpha=8))
    node = jlora.quant.qpissa(tree, plain)["up"]["kernel"]
    values = jnp.linalg.svd(node.lora_a @ node.lora_b, compute_uv=False)[:8]
    assert error(values, jnp.linalg.svd(plain["up"]["kernel"], compute_uv=False)[:8]) <= 1e-4


def test_qera_is_the_best_update_for_the_outputs():
    """What is left of X (W - Q) has the singular values behind the first r, but for the damping; the base stays."""
    plain, tree = params(), jlora.wrap(quantised(), jlora.LoraSpec(rank=8))
    width = plain["up"]["kernel"].shape[0]
    x = noise(256, width) * jnp.geomspace(0.1, 10, width)
    weight = lambda tree: jlora.merge(tree, dtype=jnp.float32)["up"]["kernel"]
    left = lambda tree: float(jnp.linalg.norm(x @ (weight(tree) - plain["up"]["kernel"])))
    found = jlora.quant.qera(forward, tree, plain, [x[:100], x[100:]])
    lost = plain["up"]["kernel"] - jlora.quant.dequantize(quantised())["up"]["kernel"]
    assert left(found) == pytest.approx(
        float(jnp.linalg.norm(jnp.linalg.svd(x @ lost, compute_uv=False)[8:])), rel=0.01
    )
    assert left(found) < 0.8 * left(jlora.quant.loftq(tree, plain))
    assert same_bits(jlora.unwrap(found), quantised())


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_qera_measures_each_place_of_a_stack(layers):
    """With two in axes, and some of the layers."""
    kernel, axes = noise(3, 4, 16, 48), {"kernel": jlora.Axes((1, 2), 3, 0)}
    base = jlora.quant.quantize({"kernel": kernel}, targets="kernel", axes=axes)
    tree = jlora.wrap(base, jlora.LoraSpec(targets="kernel", rank=4, axes=axes, layers=layers))
    x = noise(3, 200, 4, 16) * jnp.geomspace(0.1, 10, 64).reshape(4, 16)
    fn = lambda p, x: jnp.einsum("ltab,labo->lto", x, p["kernel"])
    lost = lambda tree: {"kernel": jlora.merge(tree, dtype=jnp.float32)["kernel"] - kernel}
    left = lambda tree: jnp.linalg.norm(fn(lost(tree), x), axis=(1, 2))
    found, loftq = jlora.quant.qera(fn, tree, {"kernel": kernel}, [x]), jlora.quant.loftq(tree, {"kernel": kernel})
    assert (left(found) < 0.9 * left(loftq)).tolist() == [layers is None or i in layers for i in range(3)]


@pytest.mark.slow
def test_qera_of_kernels_one_by_one_and_of_tables(monkeypatch):
    """A table has no inputs: its update is loftq's. Columns of A are as long as LoRA's."""
    plain = {"up": noise(64, 48), "down": noise(48, 64), "table": noise(32, 64)}
    fn = lambda p, ids: p["table"][ids] @ p["up"] @ p["down"]
    base = jlora.quant.quantize(plain, targets=list(plain), axes={"*": jlora.Axes(0, 1)})
    tree = jlora.wrap(base, jlora.LoraSpec(targets=list(plain), rank=4))
    batches = [jnp.arange(20), jnp.arange(12, 32)]
    found = jlora.quant.qera(fn, tree, plain, batches)
    monkeypatch.setattr("jlora.quant.start.AT_ONCE", 1)
    alone = jlora.quant.qera(fn, tree, plain, batches)
    assert error(jlora.partition(alone)[0], jlora.partition(found)[0]) <= 1e-4
    loftq = jlora.quant.loftq(tree, plain)
    update = lambda node: node.lora_a @ node.lora_b
    assert error(update(found["table"]), update(loftq["table"])) <= 1e-4
    assert error(update(found["up"]), update(loftq["up"])) > 0.1
    lengths = jnp.linalg.norm(found["up"].lora_a, axis=0)
    assert error(lengths, jnp.full(4, 3**-0.5)) <= 1e-5


def test_starts_keep_a_base_that_others_have_made():
    """Of kernels that were rounded first, as a published base in 4 bits is: the factors make good that too."""
    plain = params()
    base = jlora.quant.quantize(jax.tree.map(lambda x: jnp.round(4 * x) / 4, plain))
    tree = jlora.wrap(base, jlora.LoraSpec(rank=8))
    for found in (jlora.quant.loftq(tree, plain), jlora.quant.qera(forward, tree, plain, [noise(256, 128)])):
        assert same_bits(jlora.unwrap(found), base)
        assert distance(jlora.merge(found, dtype=jnp.float32), plain) < distance(
            jlora.merge(tree, dtype=jnp.float32), plain
        )


def test_qera_is_placed_as_the_base():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))
    plain = placed(params())
    plain["up"]["kernel"] = placed(plain["up"]["kernel"], "model")
    tree = jlora.wrap(jlora.quant.quantize(plain), SPEC)
    found = jlora.quant.qera(forward, tree, plain, [noise(256, 128)])
    alike = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), found, tree)
    assert all(jax.tree.leaves(alike))
    alone = jlora.quant.qera(forward, jlora.wrap(quantised(), SPEC), params(), [noise(256, 128)])
    update = lambda tree: tree["up"]["kernel"].lora_a @ tree["up"]["kernel"].lora_b
    assert error(update(found), update(alone)) <= 1e-3


def test_qera_refuses():
    tree = jlora.wrap(quantised(), SPEC)
    with pytest.raises(ValueError, match="qera: batches is empty"):
        jlora.quant.qera(forward, tree, params(), [])
    with pytest.raises(TypeError, match=r"qera: batches is an array of shape .*\[batch\]"):
        jlora.quant.qera(forward, tree, params(), X)
    with pytest.raises(ValueError, match=r"qera takes the tree first, .* LoraParam on a dense base"):
        jlora.quant.qera(forward, jlora.wrap(params(), SPEC), params(), [X])


def test_starts_of_stacks_layers_and_approximately():
    kernel = np.asarray(noise(4, 64, 32))
    axes = {"kernel": jlora.Axes(1, 2, 0)}
    base = jlora.quant.quantize({"kernel": kernel}, targets="kernel", axes=axes)
    for layers, start in ((None, jlora.quant.loftq), ((1, 3), jlora.quant.qpissa)):
        tree = jlora.wrap(base, jlora.LoraSpec(targets="kernel", axes=axes, rank=8, layers=layers))
        far = lambda tree: np.linalg.norm(np.asarray(folded(tree)["kernel"]) - kernel, axis=(1, 2))
        nearer = far(start(tree, {"kernel": kernel}, niter=8)) < 0.97 * far(tree)
        assert nearer.tolist() == [layers is None or i in layers for i in range(4)]


def test_starts_that_are_refused():
    tree = jlora.wrap(quantised(), SPEC)
    with pytest.raises(ValueError, match="loftq: iterations must be 1 or more, found 0"):
        jlora.quant.loftq(tree, params(), iterations=0)
    with pytest.raises(
        ValueError, match=r"qpissa: params must have the kernel down/kernel of shape \(32, 16\) .* missing"
    ):
        jlora.quant.qpissa(tree, {"up": params()["up"]})
    with pytest.raises(ValueError, match=r"loftq: params must .* there it is a QArray"):
        jlora.quant.loftq(tree, quantised())
    with pytest.raises(ValueError, match=r"loftq takes the tree first, .*; the first has LoraParam on a dense base"):
        jlora.quant.loftq(jlora.wrap(params(), SPEC), params())


def test_starts_need_values_and_the_plain_tree():
    plan = jlora.wrap(jlora.quant.quantize(jax.eval_shape(params)), SPEC)
    with pytest.raises(ValueError, match=r"loftq: .* is a plan, without values; fill it first"):
        jlora.quant.loftq(plan, params())
    tree = jlora.wrap(quantised(), SPEC)
    with pytest.raises(ValueError, match="there it is a LoraParam"):
        jlora.quant.loftq(tree, tree)
    with pytest.raises(ValueError, match=r"is missing \(nearest: .*params/down/kernel"):
        jlora.quant.loftq(tree, {"params": params()})
    with pytest.raises(ValueError, match="the first has DoraParam on a quantised base"):
        jlora.quant.loftq(jlora.wrap(quantised(), jlora.LoraSpec(variant="dora", rank=2)), params())


# ------------------------------------------------------------------------------- reading


def test_filling_a_plan_leaf_by_leaf():
    plain, plan = params(), jlora.quant.quantize(jax.eval_shape(params), double_quant=True)
    asked = []

    def read(path, leaf):
        asked.append((path, leaf.shape, leaf.dtype))
        module, name = path.split("/")
        return np.asarray(plain[module][name])

    assert same_bits(jlora.quant.fill(plan, read), quantised(double_quant=True))
    assert ("up/kernel", (128, 32), jnp.float32) in asked and len(asked) == 4
    with pytest.raises(
        ValueError, match=r"fill: read gave an array of shape \(2,\) for down/kernel; the plan has shape \(32, 16\)"
    ):
        jlora.quant.fill(plan, lambda path, leaf: np.zeros(2))
    with pytest.raises(ValueError, match="fill: read gave a NoneType for"):
        jlora.quant.fill(plan, lambda path, leaf: None)
    with pytest.raises(TypeError, match="fill takes the plan first"):
        jlora.quant.fill(read, plan)
    with pytest.raises(TypeError, match="fill: down/kernel is wrapped; fill the plan first"):
        jlora.quant.fill(jlora.wrap(plan, SPEC), read)


def test_filling_a_plan_from_safetensors(tmp_path):
    jlora.peft.to_safetensors(params(), tmp_path, names=NAMES)
    plan = jlora.quant.quantize(jax.eval_shape(params), "int8")
    found = jlora.peft.from_safetensors(tmp_path, like=plan, names=NAMES)
    assert same_bits(found, quantised("int8"))


NAMES = [("up", "up/kernel"), ("down", "down/kernel"), ("norm", "norm/scale")]


def test_filling_a_plan_from_orbax(tmp_path):
    """A leaf at a time is read of a checkpoint of the dense tree."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "dense", params())
        plan = jlora.quant.quantize(jax.eval_shape(params))

        def read(path, leaf):
            module, name = path.split("/")
            item = {module: {name: leaf}}
            restore = ocp.args.PyTreeRestore(
                item, ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
            )
            return checkpointer.restore(tmp_path / "dense", restore)[module][name]

        assert same_bits(jlora.quant.fill(plan, read), quantised())


# ------------------------------------------------------------------------------- files


def test_an_adapter_of_peft_goes_onto_a_quantised_base(tmp_path):
    """As bitsandbytes' QLoRA adapters do, which hold nothing of their base."""
    tree = randomised(jlora.wrap(quantised(), SPEC))
    jlora.peft.save(tmp_path, tree, names=NAMES)
    again = jlora.peft.load(tmp_path, quantised(), names=NAMES)
    assert isinstance(again["up"]["kernel"].base, qwix.QArray)
    assert error(jlora.apply(forward)(again, X), jlora.apply(forward)(tree, X)) <= 1e-6
    on_dense = jlora.peft.load(tmp_path, params(), names=NAMES)
    assert same_bits(jlora.partition(on_dense)[0]["up"]["kernel"].lora_a, tree["up"]["kernel"].lora_a)


def test_dora_of_peft_goes_onto_a_quantised_base(tmp_path):
    tree = jlora.wrap(params(), jlora.LoraSpec(rank=4, variant="dora"))
    jlora.peft.save(tmp_path, tree, names=NAMES)
    again = jlora.peft.load(tmp_path, quantised("int8"), names=NAMES)
    norms = jnp.square(jlora.quant.dequantize(quantised("int8"))["up"]["kernel"]).sum(0)
    assert error(again["up"]["kernel"].norm2, norms) <= 1e-5


def test_merged_weights_are_written(tmp_path):
    """To dense safetensors, each layer of a stack by itself."""
    tree = randomised(jlora.wrap(quantised(), SPEC))
    jlora.peft.to_safetensors(tree, tmp_path, names=NAMES)
    found = jlora.peft.from_safetensors(tmp_path, like=jax.eval_shape(params), names=NAMES)
    assert error(found, jlora.merge(tree, dtype=jnp.float32)) <= 1e-6

    axes = {"kernel": jlora.Axes(1, 2, 0)}
    stack = jlora.quant.quantize({"kernel": noise(3, 64, 16)}, targets="kernel", axes=axes)
    tree = randomised(jlora.wrap(stack, jlora.LoraSpec(targets="kernel", axes=axes, rank=2)))
    names = [("layers.{i}", "kernel[{i}]")]
    jlora.peft.to_safetensors(tree, tmp_path / "stack", names=names)
    found = jlora.peft.from_safetensors(tmp_path / "stack", like={"kernel": jnp.zeros((3, 64, 16))}, names=names)
    assert error(found, jlora.merge(tree, dtype=jnp.float32)) <= 1e-6


def test_checkpoints_know_their_quantised_base(tmp_path):
    tree = randomised(jlora.wrap(quantised(), SPEC))
    jlora.checkpoint.save(tmp_path / "adapter", tree)
    assert same_bits(jlora.checkpoint.load(tmp_path / "adapter", quantised()), tree)
    for other in (params(), quantised("int4")):
        with pytest.raises(ValueError, match=r"is (dense|int4) here, and nf4 in the base that .* was trained on"):
            jlora.checkpoint.load(tmp_path / "adapter", other)


# ------------------------------------------------------------------------------- training


def test_a_training_step_and_its_gradient():
    """Adapters train, codes and scales keep their bits; gradients are those on the dense tree of the same numbers."""
    tree = randomised(jlora.wrap(quantised(), jlora.LoraSpec(rank=4, dropout=0.0, train="norm/*", bias="lora_only")))
    dense = jlora.quant.dequantize(tree)
    tx = jlora.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1)), tree)

    @jax.jit
    def step(tree, dense):
        grads = jlora.grad(loss)(tree, X)
        updates, _ = tx.update(grads, tx.init(tree), tree)
        return grads, jlora.grad(loss)(dense, X), optax.apply_updates(tree, updates)

    grads, wanted, after = step(tree, dense)
    assert error(jlora.partition(tree)[0], jlora.partition(dense)[0]) == 0
    assert error(grads, wanted) <= 1e-4
    assert same_bits(jlora.unwrap(after)["up"]["kernel"], quantised()["up"]["kernel"])
    assert error(after["up"]["kernel"].lora_b, tree["up"]["kernel"].lora_b) > 0


def test_forward_and_second_derivatives():
    """Numbers are made in any derivative: reverse over reverse, forward over reverse, forward."""
    tree = randomised(jlora.wrap(quantised(), SPEC))
    dense = jlora.quant.dequantize(tree)
    direction = noise(8, 128, seed=3)

    def derivatives(tree):
        value = lambda x: loss(tree, x)
        forward = jax.jvp(value, (X,), (direction,))
        forward_of_reverse = jax.jvp(jax.grad(value), (X,), (direction,))
        return forward, forward_of_reverse, jax.grad(lambda x: (jax.grad(value)(x) ** 2).sum())(X)

    for found, expected in zip(*jax.jit(lambda *trees: [*map(derivatives, trees)])(tree, dense), strict=True):
        assert error(found, expected) <= 2e-4


def test_many_adapters_on_one_base():
    """vmap over factors alone, and over a batch of gradients."""
    trainable, frozen = jlora.partition(jlora.wrap(quantised(), SPEC))
    many = jax.tree.map(lambda x: np.stack([x, x + 0.1, x - 0.2]).astype(np.float32), jax.device_get(trainable))
    one = jax.tree.map(lambda x: x[1], many)
    run = lambda part, x: jlora.apply(forward)(jlora.combine(part, frozen), x)

    @jax.jit
    def program(many, one):
        gradient = lambda part, x: jax.grad(lambda part: (run(part, x) ** 2).sum())(part)
        each = jax.vmap(lambda x: gradient(one, x[None]))(X)
        values = jax.vmap(run, in_axes=(0, None))(many, X), run(one, X)
        return values, (jax.tree.map(lambda x: x.sum(0), each), gradient(one, X))

    (found, expected), (summed, at_once) = program(many, one)
    assert error(found[1], expected) <= 1e-5
    assert error(summed, at_once) <= 1e-4


@jax.jit
def on_quantised(start, after):
    """Of a tree right after wrap and of one some way from there: values, beside those on dense numbers."""
    run = lambda tree: jlora.apply(forward, fallback="error")(tree, X)
    plain = lambda tree: forward(tree, X)
    dense = jlora.quant.dequantize(jlora.unwrap(start))
    return (run(start), plain(dense)), (run(after), plain(jlora.merge(after, dtype=jnp.float32)))


def assert_as_on_dense_numbers(tree):
    (found, expected), (found_later, expected_later) = on_quantised(tree, randomised(tree, 0.1))
    assert error(found, expected) <= 1e-5
    assert error(found_later, expected_later) <= 1e-4


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[] if v in ("lora", "dora", "oft") else pytest.mark.slow) for v in VARIANTS]
)
def test_every_variant(variant):
    assert_as_on_dense_numbers(jlora.wrap(quantised("int8"), jlora.LoraSpec(variant=variant, rank=2)))


# The last two are as slow, and have nothing more of a quantised base.
INITS = [
    "pissa",
    "olora",
    "milora",
    *(pytest.param(i, marks=pytest.mark.slow) for i in ("pissa_niter_4", "orthogonal")),
]


@pytest.mark.parametrize("init", INITS)
def test_every_start(init):
    assert_as_on_dense_numbers(jlora.wrap(quantised("int8"), jlora.LoraSpec(init=init, rank=2)))


def test_starts_from_data():
    tree = jlora.wrap(quantised(), SPEC)
    for started in (
        jlora.init.eva(forward, tree, [X]),
        jlora.init.lora_ga(lambda p, x: (forward(p, x) ** 2).mean(), tree, [X]),
    ):
        assert same_bits(jlora.unwrap(started), quantised())
        assert error(started["up"]["kernel"].lora_a, tree["up"]["kernel"].lora_a) > 0.1


@pytest.mark.parametrize("settings", [{"train": "down/*"}, {"train_tokens": {"down": [1]}}])
def test_what_is_quantised_does_not_train(settings):
    with pytest.raises(ValueError, match=r"down/kernel can't train .*since it is quantised; .*exclude="):
        jlora.wrap(quantised(), jlora.LoraSpec(targets="up", **settings))


# ------------------------------------------------------------------------------- around


def test_prepare():
    tree = jlora.wrap(jlora.quant.quantize(params(jnp.bfloat16)), SPEC)
    ready = jlora.quant.prepare(tree)
    assert ready["norm"]["scale"].dtype == ready["up"]["bias"].dtype == jnp.float32
    assert same_bits(ready["up"]["kernel"].base, tree["up"]["kernel"].base)
    plan = jlora.quant.prepare(jax.eval_shape(lambda: params(jnp.bfloat16)))
    assert {x.dtype for x in jax.tree.leaves(plan)} == {jnp.dtype("float32")}


def test_summary_and_explain_and_sites():
    base = quantised()
    tree = jlora.wrap(base, jlora.LoraSpec(targets="up", rank=4))
    text = str(jlora.summary(tree))
    assert re.search(r"trainable 640 of 5,296, 12.08%; 2.5 KiB of 5.\d KiB", text), text
    assert text.endswith("quantised: 2 leaves, 4.56 bits a weight")
    uses = {use.path: use for use in jlora.explain(forward, tree, X).uses}
    assert uses["up/kernel"].factored and uses["down/kernel"].factored
    assert str(jlora.sites(forward, base, X)) == str(jlora.sites(forward, params(), X))


def test_nnx_and_boxes():
    graphdef, state = nnx.split(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    run = lambda state, x: nnx.merge(graphdef, state)(x)
    base = jlora.quant.quantize(state)
    tree = randomised(jlora.wrap(base, SPEC))
    x = noise(5, 64)
    assert error(jlora.apply(run)(base, x), run(jlora.quant.dequantize(base), x)) <= 1e-6
    assert error(jlora.apply(run)(tree, x), run(jlora.merge(tree, dtype=jnp.float32), x)) <= 1e-5

    model = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.normal(), ("in", "out")))
    boxed = jlora.wrap(jlora.quant.quantize(model.init(jax.random.key(0), x)["params"]), SPEC)
    assert isinstance(boxed["kernel"], nn.Partitioned)
    assert jlora.apply(model.apply)({"params": boxed}, x).shape == (5, 8)


def test_a_warning_only_where_an_adapter_is_computed_densely():
    square = lambda p, x: x @ (p["up"]["kernel"] ** 2)
    found = jlora.apply(square, fallback="error")(quantised(), X)
    assert error(found, square(jlora.quant.dequantize(quantised()), X)) <= 1e-5
    with pytest.warns(jlora.DenseFallbackWarning, match="up/kernel"):
        jlora.apply(square)(jlora.wrap(quantised(), SPEC), X)


@pytest.mark.parametrize("start", [jlora.quant.loftq, jlora.quant.qpissa])
def test_the_same_calls_make_the_same_base_again(start):
    again = [start(jlora.wrap(quantised(), SPEC), params(), iterations=3) for _ in range(2)]
    assert same_bits(*again)
    with pytest.raises(TypeError, match=r"requantize takes a tree that jlora.wrap returned"):
        jlora.quant.requantize(quantised())
