"""Networks on images and grids: at the start, differentiated, conditioned."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from helpers import assert_close, finite_difference, max_abs, without_type_checks

import flowdiffrax as fd
from flowdiffrax.nn import _layers as layers
from flowdiffrax.nn import _magnitude as magnitude

SHAPE = (4, 4, 2)
# With one attending block each, at the bottom; tests have to compile them.
LEVELS = {"channels": 8, "multipliers": (1, 2), "num_blocks": 1, "num_heads": 2}
KINDS = {
    "UNet": functools.partial(fd.nn.UNet, SHAPE, **LEVELS),
    "MagnitudePreservingUNet": functools.partial(
        fd.nn.MagnitudePreservingUNet, SHAPE, **LEVELS
    ),
    "DiT": functools.partial(fd.nn.DiT, SHAPE, 2, 16, 2, num_heads=2),
    # Their condition is a vector: the two numbers of `ARGS`.
    "DilatedResNet": functools.partial(
        fd.nn.DilatedResNet, SHAPE, 6, 2, dilations=(1, 3), args_size=2
    ),
    "FNO": functools.partial(fd.nn.FNO, SHAPE, 8, 1, 2, args_size=2),
}
IMAGES = ["UNet", pytest.param("MagnitudePreservingUNet", marks=pytest.mark.slow), "DiT"]
GRIDS = ["DilatedResNet", "FNO"]
every_network = pytest.mark.parametrize("kind", IMAGES + GRIDS)
every_image_network = pytest.mark.parametrize("kind", IMAGES)

S, T = jnp.asarray(0.2), jnp.asarray(0.9)
X = jr.normal(jr.key(5), SHAPE)
ARGS = fd.velocities.GuidanceArgs(jnp.asarray(1), jnp.asarray(2.5))


@functools.cache
def fresh(kind, **kwargs):
    """A network with all inputs that there are, at its start."""
    options = {} if kind in GRIDS else {"num_classes": 3, "guidance": True}
    return KINDS[kind](**{"key": jr.key(0), **options, **kwargs})


@functools.cache
def shaken(kind, **kwargs):
    """The network somewhere else, where nothing is zero."""
    net = eqx.filter_eval_shape(functools.partial(fresh.__wrapped__, kind, **kwargs))
    rng = np.random.default_rng(1)

    def draw(leaf):
        value = 0.2 * rng.standard_normal(leaf.shape)
        return jnp.asarray(value + (leaf.ndim == 0), leaf.dtype)

    is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
    return jtu.tree_map(lambda leaf: draw(leaf) if is_shape(leaf) else leaf, net)


def smaller(kind, make=shaken, **kwargs):
    """Half as deep, for what takes long to compile."""
    levels = {"multipliers": (1,)} if kind.endswith("UNet") else {}
    return make(kind, **levels, **kwargs)


def cast(tree, dtype):
    return jtu.tree_map(lambda leaf: leaf.astype(dtype), tree)


@eqx.filter_jit
def value(net, s, t, x, args=ARGS):
    return net(s, t, x, args)


@eqx.filter_jit
def pushed(net, inputs, direction):
    """The output, and its derivative along a direction of (s, t, x)."""
    return jax.jvp(lambda *inputs: net(*inputs, ARGS), inputs, direction)


@eqx.filter_jit
def gradient(net):
    """Of a loss with a derivative in time in it, over two labels."""

    def loss(net, label):
        args = fd.velocities.GuidanceArgs(label, ARGS.scale)
        end = lambda t: net(S, t, X, args)
        v, dv = jax.jvp(end, (T,), (jnp.ones_like(T),))
        return jnp.mean((v + 0.7 * dv - jnp.sin(3 * X)) ** 2)

    mean = lambda net: jnp.mean(jax.vmap(loss, (None, 0))(net, jnp.asarray([1, 3])))
    return eqx.filter_grad(mean)(net)


def equations(jaxpr):
    """Those of a jaxpr, and of all within."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jtu.tree_leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


# --- at the start ---------------------------------------------------------------------


@every_network
def test_starts_as_the_identity(kind):
    # Jitted inside, so that other tests need not compile it again.
    flow_map = fd.FlowMap(functools.partial(value, smaller(kind, fresh)))
    assert_close(flow_map(S, T, X, ARGS), X, 0, 0)


@every_network
def test_arguments_keep_their_kind(kind):
    # An array in a static field, such as `data.std()`, would break `jit`.
    with without_type_checks():
        net = shaken(kind, scale=np.float32(2), max_frequency=np.float32(0.5))
    assert all(isinstance(leaf, jax.Array) for leaf in jtu.tree_leaves(net))
    assert hash(jtu.tree_structure(net)) == hash(jtu.tree_structure(net))


@pytest.mark.parametrize("kind", ["UNet", "MagnitudePreservingUNet"])
@pytest.mark.slow
def test_blocks_differ(kind):
    first, second = (block.first.weight for block in smaller(kind, fresh).up[:2])
    assert max_abs(jtu.tree_map(lambda a, b: a - b, first, second)) > 0


def test_blocks_of_a_transformer_differ():
    weight = fresh("DiT").blocks.hidden.weight
    assert max_abs(weight[0] - weight[1]) > 0


# The counts, of the networks in the papers: 54.67 and 124.3 million in arXiv:2505.18825,
# where gaps have no learned gain; 130 and 675 in arXiv:2212.09748, of one time.
@pytest.mark.parametrize(
    "millions, make",
    [
        (54.67, lambda key: edm2((32, 32, 3), 128, attention=(16,), key=key)),
        (
            124.26,
            lambda key: edm2(
                (64, 64, 3), 128, (1, 2, 3, 4), 3, attention=(16, 8), key=key
            ),
        ),
        (130.31, lambda key: dit((32, 32, 4), key=key)),
        (674.82, lambda key: dit((32, 32, 4), 2, 1152, 28, num_heads=16, key=key)),
    ],
)
def test_sizes_of_papers(millions, make):
    net = eqx.filter_eval_shape(make, jr.key(0))
    count = sum(leaf.size for leaf in jtu.tree_leaves(net) if hasattr(leaf, "size"))
    assert round(count / 1e6, 2) == millions


def test_size_of_hidden_layers():
    shapes = lambda **settings: (
        eqx.filter_eval_shape(
            lambda key: KINDS["DiT"](**settings, key=key), jr.key(0)
        ).blocks.hidden.weight.shape
    )
    assert shapes(ratio=3) == (2, 16, 48) and shapes() == (2, 16, 64)


@pytest.mark.parametrize(
    "kind", [fd.nn.TwoTimeEmbedding, fd.nn.MagnitudePreservingEmbedding]
)
def test_number_of_features(kind):
    make = lambda **settings: kind(8, **settings, key=jr.key(0))
    weights = lambda net: {leaf.size for leaf in jtu.tree_leaves((net.start, net.gap))}
    assert weights(make()) <= {64, 8} and 160 in weights(make(num_features=19))
    assert make(two_times=False).gap is None and make().gap is not None


edm2 = fd.nn.MagnitudePreservingUNet
dit = functools.partial(fd.nn.DiT, num_classes=1000, two_times=False)


# --- derivatives ----------------------------------------------------------------------


@every_network
def test_forward_mode(kind):
    net, inputs = shaken(kind), (S, T, X)
    of_inputs = lambda inputs: value(net, *inputs)
    for index in range(3):
        direction = [jnp.zeros_like(value) for value in inputs]
        direction[index] = jnp.cos(1 + inputs[index])
        expected = finite_difference(of_inputs, inputs, tuple(direction))
        assert max_abs(expected) > 1e-3
        _, tangent = pushed(net, inputs, tuple(direction))
        assert_close(tangent, expected, 1e-8, 1e-6)


@every_network
def test_every_weight_learns(kind):
    grads = gradient(smaller(kind))
    for leaf in jtu.tree_leaves(grads):
        assert max_abs(leaf) > 0
    if kind == "DiT":
        for leaf in jtu.tree_leaves(grads.blocks):
            assert jnp.all(jnp.max(jnp.abs(leaf), range(1, leaf.ndim)) > 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MagnitudePreservingUNet", "DiT"])
@pytest.mark.slow
def test_gradient_of_blocks_computed_again(kind):
    made, expected = gradient(smaller(kind, remat=True)), gradient(smaller(kind))
    assert_close(jtu.tree_leaves(made), jtu.tree_leaves(expected), 1e-12)


@every_image_network
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.slow
def test_every_block_is_computed_again(kind, remat):
    net = shaken(kind, remat=remat)
    jaxpr = jax.make_jaxpr(lambda x: net(S, T, x, ARGS))(X)
    names = [equation.primitive.name for equation in equations(jaxpr.jaxpr)]
    number = sum("remat" in name or "checkpoint" in name for name in names)
    blocks = 1 if kind == "DiT" else len(net.down) + len(net.up)
    assert number == remat * blocks


@every_network
def test_one_convolution_a_batch(kind):
    net, batch = shaken(kind), jnp.stack([X, 2 * X, -X])
    many = jax.vmap(lambda x: net(S, T, x, ARGS))
    found = equations(jax.make_jaxpr(many)(batch).jaxpr)
    convolutions = [
        equation for equation in found if equation.primitive.name.startswith("conv_")
    ]
    assert (kind in ("DiT", "FNO")) == (len(convolutions) == 0)
    for equation in convolutions:
        assert equation.invars[0].aval.shape[0] == 3
        assert equation.params["feature_group_count"] == 1
        assert equation.params["batch_group_count"] == 1
    expected = jnp.stack([value(net, S, T, x) for x in batch])
    assert_close(jax.jit(many)(batch), expected, 1e-12)


@every_network
@pytest.mark.slow
def test_lowers_for_cuda(kind):
    weights, static = eqx.partition(shaken(kind), eqx.is_array)

    def step(weights):
        grads = gradient(eqx.combine(weights, static))
        return jtu.tree_map(lambda weight, grad: weight - 0.1 * grad, weights, grads)

    lowered = jax.jit(step).trace(weights).lower(lowering_platforms=("cuda",))
    assert "custom_call" not in lowered.as_text()


def test_magnitude_preserving_network_in_short():
    # Half as deep: what slow tests ask of the whole one, every day.
    kind, inputs = "MagnitudePreservingUNet", (S, T, X)
    net = smaller(kind)
    along = lambda inputs: value(net, *inputs)
    for index in range(3):
        direction = [jnp.zeros_like(value) for value in inputs]
        direction[index] = jnp.cos(1 + inputs[index])
        expected = finite_difference(along, inputs, tuple(direction))
        assert max_abs(expected) > 1e-3
        assert_close(pushed(net, inputs, tuple(direction))[1], expected, 1e-8, 1e-6)
    for args in (
        fd.velocities.GuidanceArgs(jnp.asarray(0), ARGS.scale),
        ARGS._replace(scale=T),
    ):
        assert max_abs(value(net, S, T, X, args) - value(net, S, T, X)) > 1e-3
    scaled = smaller(kind, scale=2.0)
    assert_close(value(scaled, S, T, 4 * X), 4 * value(net, S, T, X), 1e-9, 1e-9)


# --- places and times -----------------------------------------------------------------


def test_every_place_of_a_transformer_is_its_own():
    # Four equal patches: only their places tell them apart.
    patch = jr.normal(jr.key(2), (2, 2, 2))
    made = value(shaken("DiT"), S, T, jnp.tile(patch, (2, 2, 1)))
    patches = made.reshape(2, 2, 2, 2, 2).swapaxes(1, 2).reshape(4, -1)
    for a in range(4):
        for b in range(a):
            assert max_abs(patches[a] - patches[b]) > 1e-3, (a, b)


def test_patches_are_put_back_where_they_were():
    # With blocks that add nothing, a pixel reaches its own patch alone.
    blocks, rest = eqx.partition(shaken("DiT").blocks, eqx.is_array)
    still = eqx.combine(jtu.tree_map(jnp.zeros_like, blocks), rest)
    net = eqx.tree_at(lambda net: net.blocks, shaken("DiT"), still)
    moved = value(net, S, T, X.at[0, 3, 1].add(1.0)) - value(net, S, T, X)
    touched = jnp.any(moved != 0, axis=2)
    assert touched.tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2


# --- conditions -----------------------------------------------------------------------


@every_network
def test_conditions_matter(kind):
    net = shaken(kind)
    for args in (
        fd.velocities.GuidanceArgs(jnp.asarray(0), ARGS.scale),
        ARGS._replace(scale=T),
    ):
        assert max_abs(value(net, S, T, X, args) - value(net, S, T, X)) > 1e-3


@pytest.mark.parametrize("kind", ["UNet", "MagnitudePreservingUNet"])
def test_no_class_and_no_scale(kind):
    condition = shaken(kind).condition
    null = condition(S, T, None)
    # As by `ConditionDropout`, and as guidance calls the network without a condition.
    for args in (
        3,
        jnp.asarray(3),
        fd.velocities.GuidanceArgs(None, 1.0),
        fd.velocities.GuidanceArgs(3, 1),
    ):
        assert_close(condition(S, T, args), null, 0, 0)
    for args in (0, jnp.asarray(2, jnp.uint8), fd.velocities.GuidanceArgs(None, 0.0)):
        assert max_abs(condition(S, T, args) - null) > 1e-3


@pytest.mark.parametrize("label", [-1, 4])
def test_label_beyond_the_classes(label):
    net = shaken("DiT")
    args = ARGS._replace(condition=jnp.asarray(label))
    assert jnp.all(jnp.isnan(value(net, S, T, X, args)))
    with pytest.raises(ValueError, match=rf"`args` must be in \[0, 3\]; got {label}"):
        net(S, T, X, label)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, lambda key, number: jnp.full(number, 2.0)])
@pytest.mark.slow
def test_dropped_conditions(scale):
    images = np.zeros((5, *SHAPE), np.uint8)
    data = fd.images.DeviceImages(images, np.arange(5) % 3)
    batches = fd.data.InterpolantBatches(fd.LinearInterpolant(), data, 8)
    dropped = fd.data.ConditionDropout(batches, null=3, rate=0.5, scale=scale)
    _, args = dropped(jr.key(0))
    condition = shaken("DiT").condition
    vectors = jax.vmap(lambda args: condition(S, T, args))(args)
    labels = args if scale is None else args.condition
    assert set(np.asarray(labels)) >= {1, 3}
    for label, vector in zip(labels, vectors, strict=True):
        single = condition(S, T, None if label == 3 else label)
        if label == 3 or scale is None:
            assert_close(vector, single, 1e-12)
        else:
            assert max_abs(vector - single) > 1e-3


@pytest.mark.parametrize("make", [fd.nn.UNet, fd.nn.MagnitudePreservingUNet])
@pytest.mark.slow
def test_where_blocks_attend(make):
    make = functools.partial(make, (8, 8, 1), 8, (1, 1), 2, attention=(8,))
    net = eqx.filter_eval_shape(lambda key: make(key=key), jr.key(0))
    attends = lambda blocks: [block.attention is not None for block in blocks]
    assert attends(net.down) == [True, True, False, False, False]
    assert attends(net.up) == [True, False, *3 * [False], False, *3 * [True]]


# --- precision ------------------------------------------------------------------------


@every_image_network
def test_low_precision(kind):
    direction = (0 * S, jnp.ones_like(T), 0 * X)
    high, high_dt = pushed(shaken(kind), (S, T, X), direction)
    # Weights of float64, which follow the state.
    inputs, direction = cast(((S, T, X), direction), jnp.float32)
    low, low_dt = pushed(shaken(kind, dtype=jnp.bfloat16), inputs, direction)
    assert low.dtype == low_dt.dtype == jnp.float32
    error = lambda a, b: jnp.linalg.norm(a.astype(b.dtype) - b) / jnp.linalg.norm(b)
    assert 1e-4 < error(low, high) < 0.02
    assert 1e-4 < error(low_dt, high_dt) < 0.02


def test_state_of_float32():
    net, x = shaken("DiT"), X.astype(jnp.float32)
    made = value(net, S, T, x)
    assert made.dtype == jnp.float32
    assert_close(made.astype(float), value(net, S, T, X), 1e-5, 1e-5)


def test_state_of_bfloat16():
    # Computed in float32, and rounded once.
    net, x = shaken("DiT"), X.astype(jnp.bfloat16)
    made, expected = value(net, S, T, x), value(net, S, T, x.astype(float))
    assert made.dtype == jnp.bfloat16
    assert_close(made.astype(float), expected, 1e-5, 2**-8)


@every_image_network
def test_only_products_are_of_bfloat16(kind):
    net = shaken(kind, dtype=jnp.bfloat16)
    inputs = cast((S, T, X), jnp.float32)
    end = lambda t: net(inputs[0], t, inputs[2], ARGS.condition)
    tangent = lambda t: jax.jvp(end, (t,), (jnp.ones_like(t),))
    names = []
    for equation in equations(jax.make_jaxpr(tangent)(inputs[1]).jaxpr):
        dtypes = [getattr(var.aval, "dtype", None) for var in equation.invars]
        if jnp.dtype(jnp.bfloat16) in dtypes:
            names.append(equation.primitive.name)
    assert names.count("conv_general_dilated") + names.count("dot_general") >= 10
    # Inside attention, a sum of two tangents; all else only moves numbers.
    rest = {*names} - {"conv_general_dilated", "dot_general", "add_any"}
    rest -= {
        "convert_element_type",
        "reshape",
        "broadcast_in_dim",
        "transpose",
        "squeeze",
    }
    assert rest <= {"jit", "pjit"}


# --- two times from one ---------------------------------------------------------------


@every_network
def test_two_times_from_one(kind):
    velocity = smaller(kind, two_times=False)
    teacher = value(velocity, T, T, X)
    assert_close(value(velocity, T, S, X), teacher, 0, 0)
    net = fd.nn.two_times(velocity, key=jr.key(3))
    assert jtu.tree_structure(net) == jtu.tree_structure(smaller(kind))
    for t in (S, T):
        assert_close(value(net, t, t, X), value(velocity, t, t, X), 0, 0)
    # Off the diagonal, a map of it makes Euler steps.
    step = fd.FlowMap(functools.partial(value, net))(T, S, X, ARGS)
    assert_close(step, X + (S - T) * teacher, 1e-14)
    # The new part learns: at once, or once its gain has.
    grads = gradient(net).condition.times
    gap = grads.gap if kind != "MagnitudePreservingUNet" else grads.gain
    assert max_abs(gap) > 0


def test_two_times_in_any_tree():
    velocity = cast(shaken("DiT", two_times=False), jnp.float32)
    tree = {"map": fd.FlowMap(velocity), "embedding": embedding(two_times=False), "n": 3}
    made = fd.nn.two_times(tree, key=jr.key(0))
    assert made["map"].net.condition.times.gap.weight.dtype == jnp.float32
    assert made["embedding"].gap is not None and made["n"] == 3
    with pytest.raises(ValueError, match="no embedding of one time"):
        fd.nn.two_times(made, key=jr.key(0))


# --- embeddings -----------------------------------------------------------------------

KINDS_OF_EMBEDDING = [fd.nn.TwoTimeEmbedding, fd.nn.MagnitudePreservingEmbedding]


def embedding(kind=fd.nn.TwoTimeEmbedding, **kwargs):
    return kind(6, 8, **{"key": jr.key(0), **kwargs})


@pytest.mark.parametrize("kind", KINDS_OF_EMBEDDING)
def test_embedding_tells_times_apart(kind):
    embed = embedding(kind)
    start = embed(0.2, 0.9)
    assert start.shape == (6,)
    for s, t in [(0.9, 0.2), (0.2, 0.2), (0.9, 0.9), (0.2, 0.8)]:
        assert max_abs(embed(s, t) - start) > 1e-3
    # The largest frequency is in units of one over time.
    slow = embedding(kind, max_frequency=0.1)
    assert_close(slow(2.0, 9.0), start, 1e-12)


@pytest.mark.parametrize("kind", KINDS_OF_EMBEDDING)
def test_times_keep_their_digits(kind):
    embed = cast(embedding(kind), jnp.bfloat16)
    times = jnp.asarray([0.5, 0.50001], jnp.float32)
    low, high = embed(times[0], times[0]), embed(times[0], times[1])
    assert low.dtype == jnp.float32 and max_abs(low - high) > 0
    assert embed(jnp.bfloat16(0.5), jnp.bfloat16(1)).dtype == jnp.float32


def test_features_multiply_derivatives_by_frequencies():
    features = lambda t: fd.nn._embedding.waves(t, 64)
    made, derivative = jax.jvp(features, (T,), (jnp.ones_like(T),))
    frequencies = 10_000 ** (-jnp.arange(32) / 32)
    assert_close(jnp.mean(made**2), 1.0, 1e-12)
    assert_close(jnp.sum(derivative**2), 2 * jnp.sum(frequencies**2), 1e-12)


# --- magnitudes -----------------------------------------------------------------------


def rms(x):
    return float(jnp.sqrt(jnp.mean(x**2)))


def normal(seed, channels=64):
    return jr.normal(jr.key(seed), (16, 16, channels))


def hard_attention():
    # A mean of many values is small; of one value, it is that value.
    heads = layers.unit_rms(normal(0).reshape(1, 256, 64), -1)
    return layers.attend(60 * heads, heads, heads)


OUTPUTS = {
    "linear": lambda: magnitude.ForcedLinear(64, 96, key=jr.key(2))(normal(0)),
    "convolution": lambda: magnitude.ForcedConv(64, 48, key=jr.key(2))(normal(0))[1:-1],
    "silu": lambda: magnitude.silu(normal(0)),
    "sum": lambda: magnitude.balanced(normal(0), normal(1), 0.3),
    "join": lambda: magnitude.joined(normal(0), normal(1, 32)),
    "norm": lambda: layers.unit_rms(5 * normal(0), -1),
    "table": lambda: magnitude.ForcedWeight(9, 64, key=jr.key(2))(jnp.dtype(float)),
    "attention": hard_attention,
    "embedding": lambda: fd.nn.MagnitudePreservingEmbedding(512, 64, key=jr.key(2))(S, T),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_magnitude_of_a_layer(name):
    # The features of times that an embedding mixes are all much alike.
    tolerance = 0.25 if name == "embedding" else 0.05
    assert abs(rms(OUTPUTS[name]()) - 1) < tolerance


def test_both_parts_of_a_join_count_alike():
    x, y = jnp.ones((2, 2, 96)), jnp.ones((2, 2, 32))
    made = magnitude.joined(x, y)
    assert_close(jnp.sum(made[..., :96] ** 2), jnp.sum(made[..., 96:] ** 2), 1e-12)


@pytest.mark.slow
def test_magnitude_of_a_network():
    net = edm2((16, 16, 3), 16, (1,), 1, scale=0.5, key=jr.key(0))
    net = eqx.tree_at(lambda net: net.last_gain, net, jnp.ones(()))
    v = value(net, S, T, 0.5 * jr.normal(jr.key(1), (16, 16, 3)), None)
    assert 0.4 < rms(v) < 0.6


def test_weights_back_to_their_magnitude():
    net = shaken("MagnitudePreservingUNet")
    longer = jtu.tree_map(lambda leaf: 3 * leaf if leaf.ndim > 0 else leaf, net)
    made = fd.nn.normalise_weights({"net": longer, "step": 3})["net"]
    assert_close(
        made.last.weight.value, fd.nn.normalise_weights(made).last.weight.value, 1e-7
    )
    assert_close(jnp.mean(made.last.weight.value**2, (0, 1, 2)), jnp.ones(2), 1e-7)
    # The outputs are those of the directions, which are the same.
    assert_close(value(made, S, T, X), value(net, S, T, X), 1e-6, 1e-6)
    assert_close(made.last_gain, net.last_gain, 0, 0)
    # An optimiser sees the weights alone.
    weights = eqx.filter(longer, eqx.is_inexact_array)
    assert_close(fd.nn.normalise_weights(weights).first, made.first, 0, 0)


def test_weights_kept_by_an_optimiser():
    # As docs/networks.md has it.
    def to_length(updates, weights):
        new = fd.nn.normalise_weights(optax.apply_updates(weights, updates))
        return jtu.tree_map(lambda new, old: new - old, new, weights)

    optim = optax.chain(optax.sgd(0.5), optax.stateless(to_length))
    layer = magnitude.ForcedLinear(6, 3, key=jr.key(0))
    grads = jtu.tree_map(jnp.cos, layer)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optim.update(grads, optim.init(layer), layer)
        made = optax.apply_updates(layer, updates).weight.value
    moved = layer.weight.value - 0.5 * grads.weight.value
    assert_close(jnp.mean(made**2, 0), jnp.ones(3), 1e-7)
    assert_close(made * jnp.linalg.norm(moved, axis=0)[None] / 6**0.5, moved, 1e-6, 1e-6)


def test_gradients_are_orthogonal_to_the_weights():
    net = smaller("MagnitudePreservingUNet")
    weight, grad = net.last.weight.value, gradient(net).last.weight.value
    along = jnp.sum(weight * grad, (0, 1, 2))
    across = jnp.linalg.norm(weight.reshape(-1, 2), axis=0)
    across = across * jnp.linalg.norm(grad.reshape(-1, 2), axis=0)
    assert max_abs(along / across) < 1e-6


def test_other_networks_have_no_forced_weights():
    net = shaken("UNet")
    assert_close(
        jtu.tree_leaves(fd.nn.normalise_weights(net)), jtu.tree_leaves(net), 0, 0
    )


# --- errors ---------------------------------------------------------------------------


def call(x=X, args=None, kind="UNet", **settings):
    return shaken(kind, **settings)(S, T, x, args)


def make(network, *args, **kwargs):
    return eqx.filter_eval_shape(lambda key: network(*args, **kwargs, key=key), jr.key(0))


LONELY = {"num_classes": 0, "guidance": False}
IMAGE = r"one image of shape \(4, 4, 2\), the channels last; got.*`jax.vmap`"
LABEL = "`args` must be one label, an integer, or `None`; got"


@pytest.mark.parametrize(
    "act, error, match",
    [
        (lambda: call(X[:3]), ValueError, IMAGE),
        (lambda: call(X[None], kind="MagnitudePreservingUNet"), ValueError, IMAGE),
        (lambda: call(X.transpose(2, 0, 1), kind="DiT"), ValueError, IMAGE),
        (lambda: call(jnp.zeros(SHAPE, jnp.uint8)), TypeError, "floating-point"),
        (lambda: call(args=1.0), TypeError, LABEL),
        (lambda: call(args={"label": 1}), TypeError, LABEL + " dict. Pick it"),
        (lambda: call(args=True), TypeError, LABEL),
        (lambda: call(args=fd.velocities.GuidanceArgs(0.5, 1.0)), TypeError, LABEL),
        (
            lambda: call(args=jnp.arange(4)),
            TypeError,
            LABEL + r" int64 .*\(4,\).*`jax.vm",
        ),
        (
            lambda: call(args=fd.velocities.GuidanceArgs(1, jnp.ones(2))),
            ValueError,
            r"`scale` must be a scalar; got shape \(2,\)",
        ),
        (lambda: call(args=1, **LONELY), ValueError, "cannot take int.*`num_classes`"),
        (lambda: call(args=ARGS, **LONELY), ValueError, "`guidance=True`"),
        (lambda: call(args=ARGS, guidance=False), ValueError, "`guidance=True`"),
        (
            lambda: make(fd.nn.UNet, (6, 8, 1), 8, (1, 2, 2)),
            ValueError,
            "multiples of 4; got 6 by 8",
        ),
        (lambda: make(edm2, (8, 8)), ValueError, r"width, channels\); got \(8, 8\)"),
        (
            lambda: make(fd.nn.UNet, (8, 8, 1), 8, (1, 2), attention=(16,)),
            ValueError,
            r"of \[8, 4\]; got \(16,\)",
        ),
        (
            lambda: make(edm2, (8, 8, 1), 8, (1,), num_heads=3),
            ValueError,
            "`num_heads` must divide 8 channels; got 3",
        ),
        (
            lambda: make(fd.nn.DiT, (8, 8, 1), 2, 16, num_heads=0),
            ValueError,
            "`num_heads` must divide 16 channels; got 0",
        ),
        (
            lambda: make(fd.nn.UNet, (8, 8, 1), 0, (1,)),
            ValueError,
            "`channels` must be at least 1",
        ),
        (
            lambda: make(fd.nn.UNet, (8, 8, 1), 8, (1,), 0),
            ValueError,
            "`num_blocks` must be at least 1",
        ),
        (
            lambda: make(edm2, (8, 8, 1), 8, (1,), num_classes=-1),
            ValueError,
            "`num_classes` must be at least 0",
        ),
        (lambda: make(fd.nn.DiT, (8, 8, 1), 0), ValueError, "`patch` must be at least 1"),
        (lambda: make(fd.nn.DiT, (8, 8, 1), 2, 0), ValueError, "`width` must be at lea"),
        (lambda: make(fd.nn.DiT, (8, 8, 1), 2, 8, 0), ValueError, "`depth` must be at "),
        (lambda: fresh("DiT", ratio=0), ValueError, "`ratio` must be at least 1; got 0"),
        (lambda: make(fd.nn.DiT, (8, 8, 1), 2, 6), ValueError, "`width` must be a mult"),
        (lambda: fresh("DiT", dtype=jnp.int32), TypeError, "`dtype` must be a floating"),
        (
            lambda: embedding(max_frequency=0.0),
            ValueError,
            "`max_frequency` must be positive",
        ),
        (
            lambda: embedding(KINDS_OF_EMBEDDING[1], max_frequency=-1.0),
            ValueError,
            "`max_frequency` must be positive",
        ),
    ],
)
def test_refusals(act, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        act()


# --- layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels, groups", [(48, 12), (6, 1), (256, 32)])
def test_group_norm_is_that_of_equinox(channels, groups):
    rng = np.random.default_rng(0)
    factor, shift = jnp.asarray(rng.standard_normal((2, channels)))
    ours = layers.GroupNorm(channels)
    assert ours.num_groups == groups
    ours = eqx.tree_at(lambda norm: (norm.factor, norm.shift), ours, (factor, shift))
    theirs = eqx.nn.GroupNorm(groups, channels)
    theirs = eqx.tree_at(lambda norm: (norm.weight, norm.bias), theirs, (factor, shift))
    x = jnp.asarray(3 + 2 * rng.standard_normal((4, 5, channels)))
    by_theirs = lambda x: jnp.moveaxis(theirs(jnp.moveaxis(x, -1, 0)), 0, -1)
    assert_close(ours(x), by_theirs(x), 1e-12)
    dx = jnp.asarray(rng.standard_normal(x.shape))
    assert_close(jax.jvp(ours, (x,), (dx,))[1], jax.jvp(by_theirs, (x,), (dx,))[1], 1e-12)


def test_attention_is_that_of_jax():
    q, k, v, dq, dk, dv = 3 * jr.normal(jr.key(0), (6, 2, 5, 4))
    # JAX wants (batch, tokens, heads, channels).
    swap = lambda x: jnp.swapaxes(x, 0, 1)[None]

    def by_jax(q, k, v):
        y = jax.nn.dot_product_attention(swap(q), swap(k), swap(v))
        return jnp.swapaxes(y[0], 0, 1)

    with jax.numpy_dtype_promotion("standard"):
        expected = jax.jvp(by_jax, (q, k, v), (dq, dk, dv))
    found = jax.jvp(layers.attend, (q, k, v), (dq, dk, dv))
    # Its softmax is in float32.
    assert_close(found[0], expected[0], 1e-4)
    assert_close(found[1], expected[1], 1e-4)
    # Logits that overflow when they are exponentiated as they are.
    assert jnp.all(jnp.isfinite(layers.attend(1e3 * q, 1e3 * k, v)))
