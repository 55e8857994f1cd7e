"""Law 7 for every variant: what stands beside a base lies as it does, and computes what one device does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.variants import VARIANTS
from tests.support import error
from tests.variants.cases import CASES, KINDS, Case, moved, noise, spec_of

SIZES = {"fsdp": 2, "tensor": 4}
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of(mode):
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(MODES[mode],) * len(SIZES))


def base_specs(params):
    return jax.tree.map(lambda x: base_spec(x.shape), params)


def base_spec(shape):
    """The last axes that can be are sharded, the very last over "tensor"."""
    names, spec = ["fsdp", "tensor"], [None] * len(shape)
    for axis in reversed(range(len(shape))):
        if names and shape[axis] % SIZES[names[-1]] == 0:
            spec[axis] = names.pop()
    return P(*spec)


def placed(mesh, params):
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, base_specs(params))


# A covering array: each of these kinds meets both modes, wrap under jit and without, and two uses.
PLACED = ("lora", "dora", "loha", "oft", "lora+pissa", "lora+layers")
PLACES = ("dense", "stacked", "multi_axis")


def placed_cases():
    for i, kind in enumerate(sorted(KINDS, key=lambda kind: kind not in PLACED)):
        marks, modes = ([], [*MODES]) if kind in PLACED else ([pytest.mark.slow], [[*MODES][i % 2]])
        for j, mode in enumerate(modes):
            use = "stacked" if kind == "lora+layers" else PLACES[(i + j) % 3]
            yield pytest.param(kind, use, mode, (i + j) % 2 == 0, id=f"{kind}-{use}-{mode}", marks=marks)


@pytest.mark.parametrize("kind, use, mode, is_jitted", [*placed_cases()])
def test_wrap_places(kind, use, mode, is_jitted):
    """Values are those of one device."""
    case, mesh = CASES[use], mesh_of(mode)
    wrap = lambda params: jlora.wrap(params, spec_of(kind, case), sites=case.sites)
    expected, params = wrap(case.params), placed(mesh, case.params)
    with jax.set_mesh(mesh):
        found = (jax.jit(wrap) if is_jitted else wrap)(params)
        assert error(found, expected) <= 1e-5
        assert_placed(found, jlora.sharding.shardings(found, mesh, base_specs(case.params)))


def assert_placed(tree, wanted):
    for (path, x), place in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), f"{jax.tree_util.keystr(path)}: {x.sharding}, not {place}"


@dataclasses.dataclass(frozen=True)
class Engine:
    """How a model says where things lie: each of the three ways to write it."""

    mode: str

    def whole(self, weight, axis):
        """A kernel of one layer, gathered over "fsdp" on one axis."""
        if self.mode == "explicit":
            spec = [*jax.typeof(weight).sharding.spec]
            spec[axis] = None
            return jax.sharding.reshard(weight, P(*spec))
        return lax.all_gather(weight, "fsdp", axis=axis, tiled=True) if self.mode == "manual" else weight

    def split(self, eq, x, weight, *spec):
        """Columns: nothing is summed over devices."""
        return jnp.einsum(eq, x, weight, **({"out_sharding": P(*spec)} if self.mode == "explicit" else {}))

    def summed(self, eq, x, weight, *spec):
        """Rows: the parts of "tensor" are summed."""
        y = self.split(eq, x, weight, *spec)
        return lax.psum(y, "tensor") if self.mode == "manual" else y


def mlp(on, p, x):
    h = jnp.tanh(on.split("td,df->tf", x, on.whole(p["up"], 0), "fsdp", "tensor"))
    return on.summed("tf,fd->td", h, on.whole(p["down"], 1), "fsdp", None)


def layers(on, p, x):
    return lax.scan(lambda x, w: (x + mlp(on, w, x), None), x, p)[0]


def heads(on, p, x):
    h = jnp.tanh(on.split("td,dhk->thk", x, on.whole(p["up"], 0), "fsdp", "tensor", None))
    return on.summed("thk,hkd->td", h, on.whole(p["down"], 2), "fsdp", None)


UP, DOWN = ("fsdp", "tensor"), ("tensor", "fsdp")
MODELS = {
    "mlp": (mlp, {"up": (8, 16), "down": (16, 8)}, {"up": P(*UP), "down": P(*DOWN)}),
    "layers": (layers, {"up": (3, 8, 16), "down": (3, 16, 8)}, {"up": P(None, *UP), "down": P(None, *DOWN)}),
    "heads": (heads, {"up": (8, 4, 4), "down": (4, 4, 8)}, {"up": P(*UP, None), "down": P("tensor", None, "fsdp")}),
}
ROWS = P("fsdp", None)


def on_mesh(mode, mesh, model, specs):
    """The model on a mesh: a function of the wrapped tree and the whole x."""
    manual = mode.startswith("manual")
    fn = functools.partial(model, Engine("manual" if manual else mode))
    mapped = lambda fn, specs: jax.shard_map(fn, mesh=mesh, in_specs=(specs, ROWS), out_specs=ROWS)
    if mode == "manual, apply outside":
        fn = mapped(fn, specs)
    run = jlora.apply(fn, fallback="error")
    if mode == "manual, apply inside":
        return lambda tree, x: mapped(run, jlora.sharding.specs(tree, specs))(tree, x)
    return run


WHOLE = ("hra", "road", "c3a", "gralora", "fourierft", "waveft", "shira", "randlora")
# A rotation, or a Kronecker product, is of the whole kernel.
REFUSED = {(kind, "manual, apply inside") for kind in ("oft", "boft", "lokr", *WHOLE)}


WAYS = ("auto", "explicit", "manual, apply inside", "manual, apply outside")


def applied_cases():
    """Each kind in each way, each model too, both with gradients and without; slow: what has the parts of the first."""
    first = ("lora", "dora", "oft", "lora+layers")
    for i, kind in enumerate(first):
        for j, way in enumerate(WAYS):
            yield kind, "layers" if kind == "lora+layers" else ("mlp", "heads")[(i + j) % 2], way, (i + j // 2) % 2 == 0
    left = [(kind, "mlp") for kind in (*VARIANTS, "own", "ia3+in", "dora+pissa") if kind not in first]
    for kind in WHOLE:
        yield pytest.param(kind, "mlp", "explicit", True, marks=pytest.mark.slow)
    for i, (kind, name) in enumerate([*left, ("dora", "layers"), ("oft", "layers")]):
        way = WAYS[2] if (kind, WAYS[2]) in REFUSED else WAYS[i % 4]
        yield pytest.param(kind, name, way, name == "mlp", marks=pytest.mark.slow)


def steps(run, has_gradient=True):
    """The values of a function of a tree and x, and the gradients of the tree if they are wanted."""

    def both(p, x):
        if not has_gradient:
            return run(p, x), None
        (_, y), grads = jlora.value_and_grad(lambda p, x: (jnp.sin(y := run(p, x)).sum(), y), has_aux=True)(p, x)
        return y, grads

    return jax.jit(both)


@functools.cache
def on_one_device(kind, name):
    """The wrapped tree, x, and what a step gives."""
    model, shapes, _ = MODELS[name]
    params = {key: noise(*shape) for key, shape in shapes.items()}
    case = Case(functools.partial(model, Engine("auto")), params, (noise(4, 8),))
    tree = moved(jlora.wrap(case.params, spec_of(kind, case), sites=case.sites))
    return tree, *case.args, steps(jlora.apply(case.fn))(tree, *case.args)


@pytest.mark.parametrize("kind, name, mode, has_gradient", [*applied_cases()])
def test_apply_on_a_mesh(kind, name, mode, has_gradient):
    """Values and gradients are those of one device, and nothing is computed densely."""
    model, _, specs = MODELS[name]
    mesh = mesh_of("explicit" if mode == "explicit" else "auto")
    tree, x, (expected, expected_grads) = on_one_device(kind, name)
    with jax.set_mesh(mesh):
        there = jax.device_put(tree, jlora.sharding.shardings(tree, mesh, specs))
        x = jax.device_put(x, NamedSharding(mesh, ROWS))
        step = steps(on_mesh(mode, mesh, model, specs), has_gradient)
        if (kind, mode) in REFUSED:
            with pytest.raises(ValueError, match=r"put jlora\.apply around the shard_map"):
                step(there, x)
            return
        found, grads = step(there, x)
    assert error(found, expected) <= 2e-5
    if has_gradient:
        assert error(grads, expected_grads) <= 1e-4


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_shards_that_cut_a_block(kind):
    """Computed densely, and said so."""
    case = Case(lambda p, x: x @ p["w"], {"w": noise(8, 4)}, (noise(4, 8),))
    mesh = mesh_of("auto")
    row_parallel = lambda w, x: lax.psum(x @ w, "tensor")  # 2 of 8 rows a device
    product = jax.shard_map(row_parallel, mesh=mesh, in_specs=(P("tensor"), P(None, "tensor")), out_specs=P())
    tree = moved(jlora.wrap(case.params, spec_of(kind, case, options=BLOCKS[kind]), sites=case.sites))
    on_shards = jlora.apply(lambda p, x: product(p["w"], x))
    with pytest.warns(jlora.DenseFallbackWarning, match="the shards cut the blocks"):
        found, here = jax.jit(lambda *args: (on_shards(*args), jlora.apply(case.fn)(*args)))(tree, *case.args)
    assert error(found, here) <= 2e-5


def test_shards_that_cut_the_groups_of_outputs():
    """On explicit axes they are brought together for it."""
    case = Case(lambda p, x: x @ p["w"], {"w": noise(8, 16)}, (noise(4, 8),))
    tree = moved(jlora.wrap(case.params, spec_of("road", case, options={"group_size": 16}), sites=case.sites))
    mesh, specs = mesh_of("explicit"), {"w": P("fsdp", "tensor")}
    expected = steps(jlora.apply(case.fn))(tree, *case.args)
    gathered = lambda p, x: x @ jax.sharding.reshard(p["w"], P(None, "tensor"))
    with jax.set_mesh(mesh):
        there = jax.device_put(tree, jlora.sharding.shardings(tree, mesh, specs))
        x = jax.device_put(*case.args, NamedSharding(mesh, P(None, None)))
        assert error(steps(jlora.apply(gathered, fallback="error"))(there, x), expected) <= 1e-4


BLOCKS = {"oft": {"block_size": 4}, "boft": {"block_size": 2, "factors": 2}}


@pytest.mark.parametrize("check_vma, expected", [(False, "check_vma"), (True, "keep the rows of the table whole")])
def test_rows_of_a_split_table(check_vma, expected):
    table = {"table": noise(8, 4)}
    sites = jlora.sites(lambda p, i: p["table"][i], table, jnp.arange(3))
    tree = jlora.wrap(
        table, jlora.LoraSpec(targets=lambda path, leaf: False, train_tokens={"table": [1, 6]}), sites=sites
    )
    specs, fn = jlora.sharding.specs(tree, P("tensor")), jlora.apply(lambda p, x: x @ p["table"])
    run = jax.shard_map(
        fn, mesh=mesh_of("auto"), in_specs=(specs, P(None, "tensor")), out_specs=P(), check_vma=check_vma
    )
    with pytest.raises(ValueError, match=expected):
        run(tree, noise(3, 8))


def test_dora_needs_to_know_how_it_is_split():
    tree = jlora.wrap({"w": noise(8, 4)}, jlora.LoraSpec(targets="w", rank=2, variant="dora", axes={"w": ((0,), (1,))}))
    specs, mesh = jlora.sharding.specs(tree, {"w": P("tensor")}), mesh_of("auto")
    fn = jlora.apply(lambda p, x: lax.psum(x @ p["w"], "tensor"))
    run = jax.shard_map(fn, mesh=mesh, in_specs=(specs, P(None, "tensor")), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match="DoRA's norm needs to know how the kernel is split"):
        run(tree, noise(3, 8))


@pytest.mark.parametrize("spec", [P("tensor"), P(None, "tensor"), P(("fsdp", "tensor"))], ids=str)
@pytest.mark.parametrize("axes", ["auto", "explicit"])
@pytest.mark.parametrize("kind", ["lora", "dora", "oft", "boft"])
def test_what_merge_returns_lies_where_the_base_lies(kind, axes, spec):
    """Also where the shards cut the blocks of a rotation, and as nothing but a change of the kernel it turns."""
    mesh, options = mesh_of(axes), {"oft": {"block_size": 16}, "boft": {"block_size": 4, "factors": 2}}.get(kind, {})
    case = Case(lambda p, x: x @ p["w"], {"w": noise(32, 16)}, (noise(4, 32),))
    tree = moved(jlora.wrap(case.params, spec_of(kind, case, options=options), sites=case.sites))
    expected = jlora.merge(tree)["w"]
    with jax.set_mesh(mesh):
        base = jax.device_put(tree["w"].base, NamedSharding(mesh, spec))
        placed = {"w": dataclasses.replace(tree["w"], base=base)}
        for merged in (jlora.merge(placed), jax.jit(jlora.merge)(placed)):
            assert merged["w"].sharding.is_equivalent_to(base.sharding, 2)
            assert error(merged["w"], expected) <= 2e-6
