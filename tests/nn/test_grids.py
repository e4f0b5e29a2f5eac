"""Networks on grids: exact answers, symmetries, boundaries, resolutions, wrong inputs.

What they share with the networks on images is in `test_networks.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from helpers import assert_close, finite_difference, max_abs, without_type_checks

import flowdiffrax as fd
from flowdiffrax.nn import _fno as fno
from flowdiffrax.nn import _layers as layers

S, T, ARGS = jnp.asarray(0.2), jnp.asarray(0.9), jnp.asarray([0.7, -0.4])
GRIDS = {1: (11,), 2: (7, 6), 3: (5, 4, 6)}
KINDS = {
    "DilatedResNet": lambda shape, **settings: fd.nn.DilatedResNet(
        shape, 5, 1, dilations=(1, 2), args_size=2, key=jr.key(0), **settings
    ),
    "FNO": lambda shape, **settings: fd.nn.FNO(
        shape, 5, **{"modes": 1, "args_size": 2, **settings}, depth=2, key=jr.key(0)
    ),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_boundary = pytest.mark.parametrize("boundary", ["periodic", "zero", "reflect"])
every_dimension = pytest.mark.parametrize("num_dims", GRIDS)


def shaken(net):
    """The network with random weights everywhere."""
    leaves, structure = jtu.tree_flatten(net)
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype)
    return jtu.tree_unflatten(structure, [draw(leaf) for leaf in leaves])


def field(*shape):
    return jr.normal(jr.key(5), shape)


@eqx.filter_jit
def value(net, s, t, x, args=ARGS):
    return net(s, t, x, args)


# --- exact answers --------------------------------------------------------------------


def linear_fno(grid, modes, multiplier, boundary="periodic"):
    """An FNO with one channel that is one Fourier multiplier, a function of integers."""
    layer = fno.SpectralConv(1, 1, modes, boundary, key=jr.key(0))
    last = len(modes) - 1
    waves = [
        np.arange(k + 1) if axis == last else np.r_[0 : k + 1, -k:0]
        for axis, k in enumerate(modes)
    ]
    numbers = multiplier(*np.meshgrid(*waves, indexing="ij"))[..., None, None]
    weight = jnp.asarray(np.stack([numbers.real, numbers.imag]))
    assert layer.weight.shape == weight.shape
    return eqx.tree_at(lambda layer: layer.weight, layer, weight)


def trigonometric(*points):
    """A field with waves up to (3, 2) whose phases are all its own."""
    x, y = (*points, np.zeros_like(points[0]))[:2]
    turn = 2 * np.pi
    first = 0.3 + np.sin(turn * x + 0.4) - 0.6 * np.cos(turn * (3 * x - 2 * y) + 1.1)
    return jnp.asarray(first + np.cos(turn * (2 * x + y)) * (len(points) > 1))[..., None]


@pytest.mark.parametrize("sizes", [(16,), (9,), (8, 6), (7, 9)])
def test_advection_is_an_exact_shift(sizes):
    speed = np.asarray([0.37, -0.21])[: len(sizes)]
    modes = (3, 2)[: len(sizes)]
    phase = lambda *k: np.exp(-2j * np.pi * sum(map(np.multiply, k, speed)))
    points = np.meshgrid(*(np.arange(n) / n for n in sizes), indexing="ij")
    layer = linear_fno(sizes, modes, phase, ("periodic",) * len(sizes))
    moved = [x - c for x, c in zip(points, speed, strict=True)]
    assert_close(layer(trigonometric(*points)), trigonometric(*moved), 1e-13)


def test_advection_by_a_whole_network():
    # With the activations linearised: small signals around zero, where GELU is x / 2.
    net = KINDS["FNO"]((16, 1), modes=3)
    shift = np.exp(-2j * np.pi * np.arange(4) * 0.37)
    weight = np.zeros((2, 4, 5, 5))
    weight[0, :, 0, 0], weight[1, :, 0, 0] = shift.real, shift.imag
    net = jtu.tree_map(jnp.zeros_like, net)
    one = lambda old: jnp.zeros_like(old).at[0, 0].set(1.0)
    parts = lambda net: (
        net.layers[0].spectral.weight,
        net.layers[1].linear.weight,
        *(net.first.weight, net.hidden.weight, net.last.weight),
    )
    new = [jnp.asarray(weight), *map(one, parts(net)[1:])]
    net = eqx.tree_at(parts, net, new)
    x, small = np.arange(16) / 16, 1e-6
    made = value(net, S, T, small * trigonometric(x)) / small
    # Two activations halve, and two layers divide by the root of 2.
    assert_close(made, trigonometric(x - 0.37) / 8, 1e-5)


def test_heat_between_insulated_walls_is_exact():
    # A mirrored field has cosines only, with half-integer waves in units of the grid.
    x, heat = np.linspace(0, 1, 9), lambda k: np.exp(-0.05 * k**2) + 0j
    layer = linear_fno((9,), (5,), heat, ("reflect",))
    state = lambda t: sum(
        a * np.exp(-t * k**2) * np.cos(np.pi * k * x)
        for k, a in enumerate((0.2, 1.0, -0.5, 0.3, 0.1, -0.7))
    )[:, None]
    assert_close(layer(jnp.asarray(state(0.0))), state(0.05), 1e-13)


def test_zeros_beyond_the_walls():
    # A quarter of zeros, then as on a circle: on one axis alone.
    sides, x = ("zero", "periodic"), field(8, 6, 3)
    layer = fno.SpectralConv(3, 2, (4, 2), sides, key=jr.key(1))
    circle = fno.SpectralConv(3, 2, (4, 2), ("periodic", "periodic"), key=jr.key(1))
    padded = jnp.concatenate([x, jnp.zeros((2, 6, 3))])
    assert_close(layer(x), circle(padded)[:8], 1e-13)


def test_waves_beyond_the_modes_are_removed():
    x = np.arange(16) / 16
    layer = linear_fno((16,), (3,), lambda k: np.ones_like(k) + 0j, ("periodic",))
    wave = lambda k: jnp.asarray(np.cos(2 * np.pi * k * x))[:, None]
    assert_close(layer(wave(3) + wave(4) + wave(8)), wave(3), 1e-13)


@pytest.mark.parametrize("boundary, mode", [("periodic", "wrap"), ("reflect", "reflect")])
@pytest.mark.parametrize("dilation", [1, 3])
def test_convolution_is_that_of_numpy(boundary, mode, dilation):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((8, 6, 2)), rng.standard_normal((3, 3, 2, 4))
    pad = [(dilation, dilation)] * 2 + [(0, 0)]
    wide = np.pad(x, pad, mode=mode)
    expected = sum(
        wide[i * dilation :, j * dilation :][:8, :6] @ weight[i, j]
        for i in range(3)
        for j in range(3)
    )
    made = layers.convolve(
        jnp.asarray(x), jnp.asarray(weight), None, (boundary, boundary), dilation
    )
    assert_close(made, expected, 1e-12)


@every_boundary
def test_heat_by_convolutions_keeps_to_the_boundary(boundary):
    # The discrete Laplacian of a sine that is zero, or a cosine that is flat, at walls.
    n, points = 9, np.arange(9)
    wave = {
        "periodic": np.cos(2 * np.pi * points / n),
        "zero": np.sin(np.pi * (points + 1) / (n + 1)),
        "reflect": np.cos(np.pi * points / (n - 1)),
    }[boundary]
    angle = {"periodic": 2 * np.pi / n, "zero": np.pi / (n + 1)}
    angle = angle.get(boundary, np.pi / (n - 1))
    stencil = jnp.asarray([1.0, -2.0, 1.0])[:, None, None]
    made = layers.convolve(jnp.asarray(wave)[:, None], stencil, None, (boundary,))
    assert_close(made[:, 0], (2 * np.cos(angle) - 2) * wave, 1e-13)


# --- symmetries and resolutions -------------------------------------------------------


@every_kind
@every_dimension
def test_translations(kind, num_dims):
    grid = GRIDS[num_dims]
    net, x = shaken(KINDS[kind]((*grid, 2))), field(*grid, 2)
    assert value(net, S, T, x).shape == x.shape
    axes, shifts = tuple(range(num_dims)), (2, -1, 1)[:num_dims]
    roll = lambda x: jnp.roll(x, shifts, axes)
    assert max_abs(value(net, S, T, x) - roll(value(net, S, T, x))) > 1e-3
    assert_close(value(net, S, T, roll(x)), roll(value(net, S, T, x)), 1e-12)
    # Walls are where they are, and one axis may have them alone.
    if num_dims == 2:
        net = shaken(KINDS[kind]((*grid, 2), boundary=["zero", "periodic"]))
        along = lambda axis: (
            value(net, S, T, jnp.roll(x, 2, axis))
            - jnp.roll(value(net, S, T, x), 2, axis)
        )
        assert max_abs(along(0)) > 1e-3 and max_abs(along(1)) < 1e-12


@every_kind
def test_boundaries_differ_near_walls(kind):
    x = field(24, 2)
    made = [
        value(shaken(KINDS[kind]((24, 2), boundary=boundary)), S, T, x)
        for boundary in ("periodic", "zero", "reflect")
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        difference = jnp.abs(made[a] - made[b])
        assert max_abs(difference) > 1e-3
        # The field of view: 1 + 1 + 2 + 1 points.
        if kind == "DilatedResNet":
            assert max_abs(difference[5:-5]) == 0 and max_abs(difference[4]) > 0


@pytest.mark.parametrize("boundary", ["periodic", "reflect", ("periodic", "reflect")])
def test_other_resolution(boundary):
    # On a grid four times as fine, the same function of a smooth field.
    sides = (boundary,) if isinstance(boundary, str) else boundary
    points = {
        "periodic": lambda n: np.arange(n) / n,
        "reflect": lambda n: np.linspace(0, 1, n),
    }
    sizes = {"periodic": (32, 128), "reflect": (33, 129)}
    grid = tuple(sizes[side][0] for side in sides)
    net = shaken(KINDS["FNO"]((*grid, 1), boundary=boundary, modes=3))

    def on(fine):
        axes = [points[side](sizes[side][fine]) for side in sides]
        x, *rest = np.meshgrid(*axes, indexing="ij")
        wave = np.cos(2 * np.pi * x) + sum(np.cos(2 * np.pi * y) for y in rest)
        return value(net, S, T, jnp.asarray(0.5 * wave)[..., None])

    coarse, fine = on(0), on(1)[(slice(None, None, 4),) * len(grid)]
    assert max_abs(coarse) > 0.01
    # Mirrored fields of hidden layers have kinks at the walls.
    assert_close(fine, coarse, 1e-4 if "reflect" in sides else 1e-7)


def test_other_grid_of_a_residual_network():
    # Periodic: twice the field on twice the grid is twice the output.
    net, x = shaken(KINDS["DilatedResNet"]((11, 2))), field(11, 2)
    twice = lambda x: jnp.tile(x, (2, 1))
    assert_close(value(net, S, T, twice(x)), twice(value(net, S, T, x)), 1e-12)


# --- derivatives, conditions, precision -----------------------------------------------


@every_kind
@pytest.mark.parametrize(
    "num_dims, boundary", [(1, "reflect"), (2, "zero"), (3, "periodic")]
)
def test_forward_mode_in_times(kind, num_dims, boundary):
    grid = GRIDS[num_dims]
    net = shaken(KINDS[kind]((*grid, 2), boundary=boundary))
    batch = jnp.stack([field(*grid, 2), jnp.cos(field(*grid, 2))])
    starts, ends, args = (
        jnp.stack([S, T]),
        jnp.stack([T, S + 0.1]),
        jnp.stack([ARGS, -ARGS]),
    )
    many = jax.jit(jax.vmap(lambda s, t, x, args: net(s, t, x, args)))
    along = lambda times: many(*times, batch, args)
    for direction in ((1.0, 0.0), (0.0, 1.0), (0.7, -0.3)):
        direction = tuple(jnp.full(2, number) for number in direction)
        expected = finite_difference(along, (starts, ends), direction)
        assert max_abs(expected) > 1e-4
        _, made = jax.jvp(along, ((starts, ends),), (direction,))
        assert_close(made, expected, 1e-8, 1e-6)


@every_kind
def test_each_part_of_the_condition_matters(kind):
    net, x = shaken(KINDS[kind]((11, 2))), field(11, 2)
    others = [(T, T, ARGS), (S, S, ARGS), (T, S, ARGS)]
    others += [(S, T, ARGS.at[index].add(0.5)) for index in range(2)]
    for s, t, args in others:
        assert max_abs(value(net, s, t, x, args) - value(net, S, T, x)) > 1e-3
    # Every channel of every layer is scaled and shifted.
    films = [leaf for leaf in jtu.tree_leaves(net, is_leaf=is_film) if is_film(leaf)]
    assert len(films) == 2
    for film in films:
        made = film(jnp.ones((4, 5)), jnp.ones(10))
        weight, bias = film.linear.weight, film.linear.bias
        factor, shift = np.split(np.sum(weight, 0) + bias, 2)
        assert_close(made, np.tile(1 + factor + shift, (4, 1)), 1e-12)


def is_film(node):
    return isinstance(node, fd.nn._grids.FiLM)


@every_kind
def test_args_that_are_not_an_input(kind):
    x = field(11, 1)
    free = {"DilatedResNet": fd.nn.DilatedResNet, "FNO": fd.nn.FNO}[kind]
    settings = {"dilations": (1,)} if kind == "DilatedResNet" else {"modes": 1}
    net = shaken(free((11, 1), 4, **settings, key=jr.key(0)))
    assert_close(value(net, S, T, x, {"nu": 1.0}), value(net, S, T, x, None), 0, 0)


@every_kind
def test_float32(kind):
    net, x = shaken(KINDS[kind]((11, 2))), field(11, 2)
    low = jtu.tree_map(lambda leaf: leaf.astype(jnp.float32), net)
    for weights in (low, net):
        made = value(weights, 0.2, 0.9, x.astype(jnp.float32), ARGS.astype(jnp.float32))
        assert made.dtype == jnp.float32
        assert_close(made.astype(float), value(net, S, T, x), 1e-4, 1e-4)
    assert value(net, S, T, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@every_kind
def test_scale_is_the_unit_of_inputs_and_outputs(kind):
    plain, scaled = (shaken(KINDS[kind]((11, 2), scale=scale)) for scale in (1.0, 5.0))
    x = field(11, 2)
    assert_close(value(scaled, S, T, 5 * x), 5 * value(plain, S, T, x), 1e-12)


@every_kind
def test_variance_of_hidden_layers_at_the_start(kind):
    make = {"DilatedResNet": fd.nn.DilatedResNet, "FNO": fd.nn.FNO}[kind]
    net, x = make((64, 1), key=jr.key(0)), field(64, 1)
    net = eqx.tree_at(lambda net: net.last.weight, net, replace_fn=jnp.ones_like)
    # The last layer adds up all channels, three points each in a convolution.
    number = net.last.weight.size
    assert 0.1 < float(jnp.std(value(net, S, T, x, None))) / number**0.5 < 3


def test_settings_of_sizes():
    net = fd.nn.FNO((32, 24, 2), 6, (5, 3), 3, key=jr.key(0))
    assert [layer.spectral.weight.shape for layer in net.layers] == [(2, 11, 4, 6, 6)] * 3
    assert repr(net).startswith("FNO((32, 24, 2), boundary='periodic'; ")
    net = fd.nn.DilatedResNet((32, 2), 6, 3, dilations=[1, 5], key=jr.key(0))
    convolutions = [block.convolutions for block in net.blocks]
    assert [[conv.dilation for conv in each] for each in convolutions] == [[1, 5]] * 3


# --- U-Nets on grids ------------------------------------------------------------------


def unet(shape, multipliers=(1, 2), **settings):
    settings = {"args_size": 2, "num_heads": 1, **settings}
    return fd.nn.UNet(shape, 4, multipliers, 1, **settings, key=jr.key(0))


@pytest.mark.parametrize(
    "shape", [(8, 2), pytest.param((4, 2, 4, 1), marks=pytest.mark.slow)]
)
def test_unet_on_a_grid(shape):
    net, x = unet(shape, boundary="periodic"), field(*shape)
    assert_close(value(net, S, T, x), jnp.zeros(shape), 0, 0)
    net = shaken(net)
    # The lower level has every second point.
    roll = lambda x: jnp.roll(x, 2, 0)
    made = value(net, S, T, x)
    assert_close(value(net, S, T, roll(x)), roll(made), 1e-12)
    for s, t, args in ((T, T, ARGS), (S, S, ARGS), (S, T, ARGS.at[1].add(0.5))):
        assert max_abs(value(net, s, t, x, args) - made) > 1e-3
    walls = shaken(unet(shape, boundary="reflect"))
    assert max_abs(value(walls, S, T, x) - made) > 1e-3
    for s, t in ((1.0, 0.0), (0.0, 1.0)):
        of_times = lambda times: value(net, *times, x)
        direction = jnp.asarray(s), jnp.asarray(t)
        expected = finite_difference(of_times, (S, T), direction)
        made_by = jax.jvp(of_times, ((S, T),), (direction,))[1]
        assert_close(made_by, expected, 1e-8, 1e-6)


# --- errors ---------------------------------------------------------------------------


def call(x, kind="FNO", args=ARGS, **settings):
    return KINDS[kind]((12, 2), **settings)(S, T, x, args)


def fno_of(*args, **kwargs):
    return fd.nn.FNO(*args, **kwargs, key=jr.key(0))


def resnet_of(*args, **kwargs):
    return fd.nn.DilatedResNet(*args, **kwargs, key=jr.key(0))


FIELD = r"one field of shape \(n, 2\), the channels last; got "


@pytest.mark.parametrize(
    "act, error, match",
    [
        (
            lambda: call(field(2, 12)),
            ValueError,
            FIELD + r"\(2, 12\).*moveaxis\(x, 0, -1",
        ),
        (lambda: call(field(12, 3)), ValueError, FIELD + r"\(12, 3\)"),
        (lambda: call(field(4, 12, 2)), ValueError, FIELD + r"\(4, 12, 2\).*`jax.vmap`"),
        (lambda: call(field(12)), ValueError, FIELD + r"\(12,\)"),
        (
            lambda: KINDS["DilatedResNet"]((12, 1))(S, T, field(12), ARGS),
            ValueError,
            r"\(n, 1\), the channels last; got \(12,\). Add the axis.*x\[..., None\]",
        ),
        (
            lambda: call(field(6, 2), modes=3),
            ValueError,
            r"`modes` of \(3,\) need more than \[6\] points .*got a grid of \(6,\). Use",
        ),
        (
            lambda: call(field(2, 2), "DilatedResNet"),
            ValueError,
            r"more than 2 points along each axis; got \(2,\)",
        ),
        (lambda: call(field(12, 2), args=jnp.ones(3)), ValueError, r"\(2,\); got \(3,\)"),
        (
            lambda: call(field(12, 2), args={"nu": 1.0, "mu": 2.0}),
            ValueError,
            'got dict. From a dictionary.*args\\["viscosity"\\]',
        ),
        (lambda: call(jnp.zeros((12, 2), int)), TypeError, "floating-point"),
        (lambda: fno_of((8, 1), 4, 4), ValueError, r"more than \[8\] points .*\(8,\)"),
        (
            lambda: fno_of((8, 1), 4, 5, boundary="zero"),
            ValueError,
            r"got a grid of \(8,\), extended to \(10,\). Use fewer modes",
        ),
        (lambda: fno_of((8, 1), 4, 0), ValueError, "`modes` must be at least 1; got 0"),
        (
            lambda: fno_of((8, 1), 4, 2.5),
            TypeError,
            "`modes` must be an integer; got 2.5",
        ),
        (
            lambda: fno_of((8, 8, 1), 4, (1, 2, 3)),
            ValueError,
            r"each of the 2 axes; got \(1",
        ),
        (lambda: fno_of((8, 1), 0, 1), ValueError, "`width` must be at least 1"),
        (lambda: fno_of((8, 1), 4, 1, 0), ValueError, "`depth` must be at least 1"),
        (lambda: fno_of((8,), 4, 1), ValueError, r"example \(128, 1\); got \(8,\)"),
        (lambda: fno_of(8, 4, 1), ValueError, r"example \(128, 1\); got 8"),
        (lambda: fno_of((4, 4, 4, 4, 1), 4, 1), ValueError, "one to three dimensions"),
        (
            lambda: fno_of((8, 1), 4, 1, boundary="dirichlet"),
            ValueError,
            '`boundary` must be one of "periodic", "zero", "reflect".*got \'dirichlet\'',
        ),
        (
            lambda: resnet_of((9, 9, 1), boundary=["zero"]),
            ValueError,
            r"each of the 2 axes; got \['zero'\]",
        ),
        (
            lambda: fno_of((8, 1), 4, 1, args_size=-1),
            ValueError,
            "`args_size` must be at",
        ),
        (lambda: resnet_of((8, 1)), ValueError, "more than 8 points .*`dilations`"),
        (lambda: resnet_of((9, 1), 0), ValueError, "`width` must be at least 1"),
        (lambda: resnet_of((9, 1), 4, 0), ValueError, "`num_blocks` must be at least 1"),
        (
            lambda: resnet_of((9, 1), dilations=(0, 1)),
            ValueError,
            "`dilations` must be at",
        ),
        (
            lambda: resnet_of((9, 1), dilations=(1.5,)),
            TypeError,
            "`dilations` must be an i",
        ),
        (lambda: resnet_of((9, 1), 2.5), TypeError, "`width` must be an integer"),
        (lambda: resnet_of((9, 1), dilations=()), ValueError, "`dilations` is empty"),
        (lambda: unet((8, 1), ()), ValueError, "`multipliers` is empty"),
        (lambda: unet((8, 1), (0, 1)), ValueError, "`multipliers` must be"),
        (lambda: unet((8,)), ValueError, r"got \(8,\). A field has shape \(\*grid, chan"),
        (lambda: unet((8, 1), boundary="open"), ValueError, "`boundary` must be one of"),
        (lambda: unet((6, 8, 7, 1)), ValueError, "multiples of 2; got 6 by 8 by 7"),
        (
            lambda: unet((8, 1))(S, T, field(16, 1), ARGS),
            ValueError,
            r"one field of shape",
        ),
        (lambda: unet((8, 1))(S, T, field(8, 1)), ValueError, r"`args` of shape \(2,\)"),
        (lambda: unet((8, 1), num_classes=3), ValueError, "a label or a vector.*3 and 2"),
        (lambda: fd.nn.FNO((32, 1), key=0), TypeError, "`key` must be a key of JAX"),
    ],
)
def test_refusals(act, error, match):
    with without_type_checks(), pytest.raises(error, match=match):
        act()


@pytest.mark.parametrize("kind", KINDS)
def test_complex_fields_are_refused(kind):
    net, x = KINDS[kind]((11, 2)), field(11, 2)
    with without_type_checks(), pytest.raises(TypeError, match="two channels"):
        net(S, T, jax.lax.complex(x, x))
