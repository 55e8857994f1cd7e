"""What trains beside the adapters: gradients of other arguments, leaves that are named, arguments of `update`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.optim.support import noisy
from tests.support import error, same_bits

RNG = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
X = normal(5, 6)
MODEL = {"dense": {"kernel": normal(6, 4), "bias": normal(4)}, "head": normal(4, 3)}


def forward(tree, x):
    model = tree["model"]
    x = jnp.concatenate([tree["prompt"], x])
    return jnp.square(jnp.tanh(x @ model["dense"]["kernel"] + model["dense"]["bias"]) @ model["head"]).mean()


def tree_of():
    model = noisy(MODEL, jlora.LoraSpec(rank=2, targets="kernel", train="head"))
    return {"model": model, "prompt": normal(2, 6)}


TREE = tree_of()
loss = lambda tree, x: jlora.apply(forward, train="prompt")(tree, x)
plain_loss = lambda tree, x: jlora.apply(forward)(tree, x)


def by_hand(tree, x):
    """The gradient of the merged tree's function in the prompt and in the inputs."""
    merged = {"model": jlora.merge(tree["model"])}
    return jax.grad(lambda prompt, x: forward(merged | {"prompt": prompt}, x), argnums=(0, 1))(tree["prompt"], x)


def test_gradients_of_other_arguments():
    grads, of_x = jlora.grad(plain_loss, argnums=(0, 1))(TREE, X)
    assert error(of_x, by_hand(TREE, X)[1]) <= 1e-5
    assert jax.tree.all(jax.tree.map(same_bits, grads, jlora.grad(plain_loss)(TREE, X)))
    swapped = lambda x, tree: plain_loss(tree, x)
    value, (of_x, grads) = jlora.value_and_grad(swapped, argnums=(0, -1))(X, TREE)
    assert same_bits(value, plain_loss(TREE, X)) and error(of_x, by_hand(TREE, X)[1]) <= 1e-5
    assert jax.tree.structure(grads) == jax.tree.structure(jlora.grad(plain_loss)(TREE, X))
    alone = jlora.grad(swapped, argnums=1)(X, TREE)
    assert jax.tree.all(jax.tree.map(same_bits, alone, grads))


def test_auxiliary_results_come_as_those_of_jax():
    with_aux = lambda tree, x: (plain_loss(tree, x), {"n": x.shape[0]})
    grads, aux = jlora.grad(with_aux, has_aux=True, argnums=(0, 1))(TREE, X)
    assert aux == {"n": 5} and len(grads) == 2
    (value, aux), (_, of_x) = jlora.value_and_grad(with_aux, has_aux=True, argnums=(0, 1))(TREE, X)
    assert same_bits(value, plain_loss(TREE, X)) and aux == {"n": 5} and of_x.shape == X.shape


@pytest.mark.parametrize("argnums", [2, -3, (0, 5), True])
def test_arguments_that_are_not_there(argnums):
    with pytest.raises(TypeError, match=r"argnums has .*, and there are 2 positional arguments"):
        jlora.grad(plain_loss, argnums=argnums)(TREE, X)


def test_an_argument_that_is_not_wrapped():
    with pytest.raises(TypeError, match=r"no leaf of the arguments \(1,\) is wrapped"):
        jlora.grad(plain_loss, argnums=(1,))(TREE, X)


def test_a_named_leaf_trains_and_others_stay():
    grads = jlora.grad(loss, train="prompt")(TREE, X)
    assert error(grads["prompt"], by_hand(TREE, X)[0]) <= 1e-5
    assert grads["model"]["dense"]["bias"] is None
    told = jlora.grad(plain_loss, train="prompt")(TREE, X)  # `apply` need not be told
    assert same_bits(told["prompt"], grads["prompt"])
    assert not jax.grad(lambda prompt: plain_loss(TREE | {"prompt": prompt}, X))(TREE["prompt"]).any()  # nor is it now
    trainable, frozen = jlora.partition(TREE, train=["prompt"])
    assert trainable["prompt"] is TREE["prompt"] and frozen["prompt"] is None
    assert jax.tree.structure(jlora.combine(trainable, frozen)) == jax.tree.structure(TREE)
    assert jlora.labels(TREE, train="prompt")["prompt"] == "trainable"
    tx = jlora.optimizer(optax.adamw(0.1), TREE, train="prompt")
    updates, _ = tx.update(grads, tx.init(TREE), TREE)
    after = optax.apply_updates(TREE, updates)
    assert same_bits(after["model"]["dense"]["bias"], TREE["model"]["dense"]["bias"])
    assert same_bits(after["model"]["dense"]["kernel"].base, TREE["model"]["dense"]["kernel"].base)
    half = optax.adamw(0.1)
    expected = half.update(grads, half.init(trainable), trainable)[0]
    assert error(updates["prompt"], expected["prompt"]) <= 1e-6
    assert loss(optax.apply_updates(TREE, updates), X) < loss(TREE, X)


@pytest.mark.parametrize(
    "train, told",
    [
        ("promt", r"matches no leaf\. Nearest: prompt"),
        ("kernel", "names model/dense/kernel, of which"),
        ("count", "int32"),
    ],
)
def test_names_that_name_nothing_that_can_train(train, told):
    tree = TREE | {"count": jnp.zeros((), jnp.int32)}
    for call in (lambda: jlora.partition(tree, train=train), lambda: jlora.apply(forward, train=train)(tree, X)):
        with pytest.raises(ValueError, match=told):
            call()


def test_apply_takes_the_function_alone():
    with pytest.raises(TypeError, match=r"jlora\.apply\(fn\)\(params, x\)"):
        jlora.apply(forward, TREE, X)


learning = {"learning_rate": 0.05}
ALL = {
    name: getattr(optax, name)(**learning)
    for name in """adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad signum
    optimistic_adam_v2 fromage lamb lars lion
    nadam nadamw novograd optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd sm3 yogi""".split()
    if hasattr(optax, name)
}
ALL |= {
    name: getattr(optax.contrib, name)(**settings)
    for name, settings in {
        "acprop": learning,
        "adopt": learning,
        "madgrad": learning,
        "ademamix": learning,
        "cocob": {},
        "dadapt_adamw": {},
        "dog": {},
        "dowg": {},
        "muon": learning,
        "prodigy": {},
        "schedule_free_adamw": learning,
        "schedule_free_sgd": learning,
        "simplified_ademamix": learning,
        "momo": learning,
        "momo_adam": learning,
        "sophia": learning,
    }.items()
    if hasattr(optax.contrib, name)
}
ALL |= {
    "lbfgs": optax.lbfgs(),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)),
    "polyak_sgd": optax.polyak_sgd(),
    "reduce_on_plateau": optax.chain(optax.adam(0.05), optax.contrib.reduce_on_plateau(patience=1)),
    "mechanic": optax.contrib.mechanize(optax.adamw(0.05)),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adaptive_grad_clip(0.1), optax.sgd(0.1)),
    "by_block": optax.chain(optax.clip_by_block_rms(0.1), optax.add_noise(0.1, 0.5, key=0), optax.sgd(0.1)),
    "lookahead_like": optax.chain(optax.ema(0.9), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
    "if_finite": optax.apply_if_finite(optax.adamw(0.05), 3),
    "multi_steps": optax.MultiSteps(optax.adamw(0.05), 2).gradient_transformation(),
    "noisy_sgd": optax.noisy_sgd(0.05, key=0),
    "sam": optax.contrib.sam(optax.sgd(0.05), optax.chain(optax.contrib.normalize(), optax.sgd(0.01))),
    "sam_opaque": optax.contrib.sam(
        optax.sgd(0.05), optax.chain(optax.contrib.normalize(), optax.sgd(0.01)), opaque_mode=True
    ),
    "split": optax.contrib.split_real_and_imaginary(optax.adam(0.05)),
    "injected": optax.inject_hyperparams(optax.adamw)(**learning),
}


@pytest.mark.parametrize("name", ALL)
def test_every_transformation_of_optax_trains_the_tree_as_it_trains_the_half(name):
    """With the arguments that it asks for: value, grad, value_fn, grad_fn, obj_fn of whole trees, or of halves."""
    half, frozen = jlora.partition(TREE["model"])
    of = lambda model, x=X: forward({"model": model, "prompt": TREE["prompt"]}, x)
    on_tree = lambda tree: jlora.apply(of)(tree)
    on_half = lambda half: on_tree(jlora.combine(half, frozen))

    def steps(tx, params, gradient, value_fn):
        state, tx = tx.init(params), optax.with_extra_args_support(tx)
        for _ in range(2):
            value, grads = gradient(params)
            given = {"value": value, "grad": grads, "value_fn": value_fn}
            if name.startswith("sam"):
                given = {"grad_fn": lambda params, _: gradient(params)[1]} if name == "sam_opaque" else {}
            if name == "sophia":
                given = {"obj_fn": value_fn}
            updates, state = tx.update(grads, state, params, **given)
            params = optax.apply_updates(params, updates)
        return params

    whole = jax.jit(lambda tree: steps(jlora.optimizer(ALL[name], tree), tree, jlora.value_and_grad(on_tree), on_tree))
    alone = jax.jit(lambda half: steps(ALL[name], half, jax.value_and_grad(on_half), on_half))
    ours, theirs = whole(TREE["model"]), alone(half)
    trained, kept = jlora.partition(ours)
    for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-5)
    assert jax.tree.all(jax.tree.map(same_bits, kept, frozen))
    assert error(trained, half) > 0


@pytest.mark.filterwarnings('ignore:"seed" is deprecated:DeprecationWarning')  # optax's own, of what it asks for
def test_gradients_by_example_are_for_the_half():
    half, frozen = jlora.partition(TREE["model"])
    of = lambda half, x: jlora.apply(lambda m: forward({"model": m, "prompt": TREE["prompt"]}, x[None]))(
        jlora.combine(half, frozen)
    )
    by_example = jax.vmap(jax.grad(of), (None, 0))(half, X)
    tx = optax.contrib.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.0, seed=0)
    updates, _ = tx.update(by_example, tx.init(half), half)
    assert jax.tree.structure(optax.apply_updates(half, updates)) == jax.tree.structure(half)
    with pytest.raises(ValueError, match="the gradients do not fit"):
        jlora.optimizer(tx, half).update(by_example, jlora.optimizer(tx, half).init(half), half)
