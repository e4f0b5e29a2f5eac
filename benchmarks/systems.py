"""The ODEs of the benchmarks: oscillators, excitable, driven, orbital, stiff, and others.

Each is a vector field, a draw of initial states and parameters, and a time interval, in
the units of its literature.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np


@dataclasses.dataclass(frozen=True)
class System:
    """An ODE with the starts and parameters for which it is to be solved.

    `x0(key)` draws one initial state. `args(key)` draws its parameters, or is `None`.
    `conserved` has a row for each sum over entries that is known to be conserved.
    """

    vector_field: Callable
    x0: Callable
    t1: float
    args: Callable | None = None
    kind: str = ""
    conserved: Any = None

    def problem(self) -> dict[str, Any]:
        """The arguments of `flowdiffrax.learn_solver`."""
        names = dict(vector_field=self.vector_field, x0=self.x0, args=self.args)
        return names | dict(t0=0.0, t1=self.t1)


def _box(low, high):
    # NumPy, since an array of JAX would start it when this file is imported.
    low, high = np.asarray(low, float), np.asarray(high, float)
    return lambda key: jr.uniform(key, low.shape, minval=low, maxval=high)


def _around(base, decades):
    """Each entry of `base` times a power of ten between minus and plus `decades`."""
    base = np.asarray(base, float)
    spread = lambda key: jr.uniform(key, base.shape, minval=-decades, maxval=decades)
    return lambda key: base * 10 ** spread(key)


def van_der_pol(t, x, args):
    return jnp.stack([x[1], args[0] * (1 - x[0] ** 2) * x[1] - x[0]])


def fitzhugh_nagumo(t, x, args):
    a, b, tau, current = args
    v, w = x
    return jnp.stack([v - v**3 / 3 - w + current, (v + a - b * w) / tau])


def hodgkin_huxley(t, x, args):
    """A squid axon; millivolts and milliseconds."""
    v, m, h, n = x
    # x / (1 - exp(-x)), which is 1 at 0.
    ratio = lambda x: jnp.where(jnp.abs(x) < 1e-4, 1 + x / 2, x / -jnp.expm1(-x))
    am, bm = ratio((v + 40) / 10), 4 * jnp.exp(-(v + 65) / 18)
    ah, bh = 0.07 * jnp.exp(-(v + 65) / 20), 1 / (1 + jnp.exp(-(v + 35) / 10))
    an, bn = 0.1 * ratio((v + 55) / 10), 0.125 * jnp.exp(-(v + 65) / 80)
    ions = 120 * m**3 * h * (v - 50) + 36 * n**4 * (v + 77) + 0.3 * (v + 54.387)
    gates = am * (1 - m) - bm * m, ah * (1 - h) - bh * h, an * (1 - n) - bn * n
    return jnp.stack([args[0] - ions, *gates])


def lotka_volterra(t, x, args):
    alpha, beta, gamma, delta = args
    prey, predators = x
    change = alpha * prey - beta * prey * predators
    return jnp.stack([change, delta * prey * predators - gamma * predators])


def rosenzweig_macarthur(t, x, args):
    prey, predators = x
    eaten = prey * predators / (1 + args[1] * prey)
    return jnp.stack([prey * (1 - prey / args[0]) - eaten, eaten - 0.4 * predators])


def seir(t, x, args):
    """Numbers of people in a town of a hundred thousand; days."""
    s, e, i, r = x
    beta, sigma, gamma = args
    infected = beta * s * i / (s + e + i + r)
    return jnp.stack([-infected, infected - sigma * e, sigma * e - gamma * i, gamma * i])


def kepler(t, x, args):
    return jnp.concatenate([x[2:], -x[:2] / jnp.sum(x[:2] ** 2) ** 1.5])


def three_body(t, x, args):
    """Three equal masses in a plane, softened."""
    position, velocity = x.reshape(2, 3, 2)
    gap = position[None] - position[:, None]
    force = gap / (jnp.sum(gap**2, -1, keepdims=True) + 0.05) ** 1.5
    return jnp.concatenate([velocity.ravel(), force.sum(1).ravel()])


def _three_bodies(key):
    keys = jr.split(key, 2)
    corner = 2 * jnp.pi * jnp.arange(3) / 3
    circle = jnp.stack([jnp.cos(corner), jnp.sin(corner)], -1)
    turn = jnp.stack([-jnp.sin(corner), jnp.cos(corner)], -1)
    x = circle + 0.1 * jr.normal(keys[0], (3, 2))
    return jnp.concatenate(
        [x.ravel(), (0.6 * turn + 0.1 * jr.normal(keys[1], (3, 2))).ravel()]
    )


def driven_pendulum(t, x, args):
    drive = args[0] * jnp.cos(args[1] * t)
    return jnp.stack([x[1], -jnp.sin(x[0]) - 0.2 * x[1] + drive])


def duffing(t, x, args):
    return jnp.stack([x[1], x[0] - x[0] ** 3 - 0.3 * x[1] + args[0] * jnp.cos(1.2 * t)])


def lorenz(t, x, args):
    return jnp.stack(
        [10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]]
    )


def lorenz_96(t, x, args):
    return (jnp.roll(x, -1) - jnp.roll(x, 2)) * jnp.roll(x, 1) - x + 8


def chain(t, x, args):
    """Masses joined by springs that harden."""
    position, velocity = jnp.split(x, 2)
    stretch = jnp.diff(position, prepend=0.0, append=0.0)
    return jnp.concatenate([velocity, jnp.diff(stretch + 0.5 * stretch**3)])


def burgers(t, x, args):
    """Burgers' equation with viscosity on a ring of 64 points."""
    dx = 1 / x.size
    flux = jnp.roll(x, -1) ** 2 - jnp.roll(x, 1) ** 2
    return -flux / (4 * dx) + 0.01 * (jnp.roll(x, -1) - 2 * x + jnp.roll(x, 1)) / dx**2


def _waves(key):
    grid = jnp.arange(64) / 64
    amplitude, phase = jr.normal(key, (2, 4))
    angle = 2 * jnp.pi * jnp.arange(1, 5)[:, None] * grid + 3 * phase[:, None]
    return amplitude / jnp.arange(1, 5) @ jnp.sin(angle)


def brusselator(t, x, args):
    u, v = x
    return jnp.stack([args[0] + u**2 * v - (args[1] + 1) * u, args[1] * u - u**2 * v])


def goodwin(t, x, args):
    """Three genes that inhibit each other in a ring; nanomolar and hours."""
    hill = lambda y: 1 / (1 + (y / 100) ** args[1])
    return args[0] * hill(jnp.roll(x, 1)) - 0.5 * x


def robertson(t, x, args):
    first, second, third = 0.04 * x[0], 1e4 * x[1] * x[2], 3e7 * x[1] ** 2
    return jnp.stack([second - first, first - second - third, third])


def _robertson_start(key):
    amount = 10 ** jr.uniform(key, (2,), minval=-0.5, maxval=0.5)
    return jnp.stack([amount[0], 0.0 * amount[0], 0.1 * amount[1]])


def hires(t, x, args):
    """High irradiance response of a plant; minutes (Hairer and Wanner, IV.10)."""
    a, b, c, d, e, f, g, h = x
    r = 280 * f * h
    return jnp.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -r + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            r - 1.81 * g,
            -r + 1.81 * g,
        ]
    )


def oregonator(t, x, args):
    """The Belousov-Zhabotinskii reaction (Hairer and Wanner, IV.10)."""
    first = 77.27 * (x[1] + x[0] * (1 - 8.375e-6 * x[0] - x[1]))
    return jnp.stack([first, (x[2] - (1 + x[0]) * x[1]) / 77.27, 0.161 * (x[0] - x[2])])


# Rates of POLLU's 25 reactions, per minute and parts per million, then the species that
# react and those that form, from 1 to 20 (Hairer and Wanner, IV.10; Verwer 1994).
_POLLU = [
    (0.35, [1], [2, 3]),
    (26.6, [2, 4], [1]),
    (12300.0, [5, 2], [6, 1]),
    (0.00086, [7], [5, 5, 8]),
    (0.00082, [7], [8]),
    (15000.0, [7, 6], [8, 5]),
    (0.00013, [9], [10, 8, 5]),
    (24000.0, [9, 6], [11]),
    (16500.0, [11, 2], [1, 10, 12]),
    (9000.0, [11, 1], [13]),
    (0.022, [13], [11, 1]),
    (12000.0, [10, 2], [14, 1]),
    (1.88, [14], [7, 5]),
    (16300.0, [1, 6], [15]),
    (4.8e6, [3], [4]),
    (0.00035, [4], [16]),
    (0.0175, [4], [3]),
    (1e8, [16], [6, 6]),
    (4.44e11, [16], [3]),
    (1240.0, [17, 6], [18, 5]),
    (2.1, [19], [2]),
    (5.78, [19], [1, 3]),
    (0.0474, [1, 4], [19]),
    (1780.0, [19, 1], [20]),
    (3.12, [20], [19, 1]),
]
# Reactions that need light.
_IS_PHOTOLYSIS = np.isin(np.arange(len(_POLLU)), [0, 3, 4, 6, 15, 16])


class MassAction:
    """The rate equations of elementary reactions.

    `reactions` are a rate constant, the species that react and those that form.
    """

    def __init__(self, reactions, num_species):
        self.constants = [constant for constant, _, _ in reactions]
        self.reactants = [reactants for _, reactants, _ in reactions]
        self.change = [[0.0] * num_species for _ in reactions]
        for row, (_, reactants, products) in zip(self.change, reactions, strict=True):
            for species in reactants:
                row[species] -= 1
            for species in products:
                row[species] += 1

    def __call__(self, t, x, factors):
        rates = jnp.asarray(self.constants, x.dtype) * factors
        # A reaction of one species multiplies by the one that is appended.
        most = max(map(len, self.reactants))
        padded = [row + [x.size] * (most - len(row)) for row in self.reactants]
        terms = jnp.append(x, 1.0)[jnp.array(padded)]
        return (rates * jnp.prod(terms, -1)) @ jnp.asarray(self.change, x.dtype)


_POLLU_MECHANISM = MassAction(
    [(k, [i - 1 for i in a], [i - 1 for i in b]) for k, a, b in _POLLU], 20
)


def pollu(t, x, args):
    """Air pollution; `args` is the brightness of the light."""
    factors = jnp.where(_IS_PHOTOLYSIS, args[0], 1.0).astype(x.dtype)
    return _POLLU_MECHANISM(t, x, factors)


# Nitrogen and sulphur.
_POLLU_ATOMS = np.zeros((2, 20))
_POLLU_ATOMS[0, [0, 1, 12, 14, 18, 19]] = 1, 1, 1, 1, 1, 2
_POLLU_ATOMS[1, [16, 17]] = 1

POLLU_START = np.zeros(20)
POLLU_START[[1, 3, 6, 7, 8, 16]] = 0.2, 0.04, 0.1, 0.3, 0.01, 0.007


def random_mechanism(num_species: int = 60, seed: int = 0) -> System:
    """A closed mechanism of species made of four elements, from 280 to 320 K.

    Species are distinct molecules of one to six atoms, and `conserved` has their numbers
    of atoms. Each step turns one or two molecules into one or two others with the same
    atoms, and goes both ways: the rate constants at 300 K are spread over eight decades,
    and their ratio is that of an equilibrium at which every species is present. `args` is
    the temperature. Three in four species are absent at first.
    """
    rng = np.random.default_rng(seed)
    atoms = _molecules(rng, num_species)
    steps = _balanced_steps(rng, atoms)
    energy = rng.normal(0.0, 1.0, num_species)  # Gibbs', in units of kT
    reactions = []
    for left, right in steps:
        # The two constants differ by `exp(drop)`, and stay in the eight decades mostly.
        drop = energy[left].sum() - energy[right].sum()
        middle = 10 ** rng.uniform(-5.0, 3.0)
        reactions.append((middle * np.exp(drop / 2), left, right))
        reactions.append((middle * np.exp(-drop / 2), right, left))
    mechanism = MassAction(reactions, num_species)
    # Both ways of a step are activated alike, which leaves the equilibrium where it is.
    activation = np.repeat(rng.uniform(0.0, 8000.0, len(steps)), 2)

    def field(t, x, args):
        inverse = 1 / args[0] - 1 / 300
        return mechanism(t, x, jnp.exp(-jnp.asarray(activation, x.dtype) * inverse))

    start = np.zeros(num_species)
    present = rng.choice(num_species, num_species // 4, replace=False)
    start[present] = 10 ** rng.uniform(-1.0, 0.0, len(present))
    return System(
        field,
        _around(start, 0.5),
        30.0,
        _box([280.0], [320.0]),
        "stiff kinetics",
        atoms.T,
    )


def _molecules(rng, num_species):
    """Different numbers of atoms of four elements, in a row for each molecule."""
    numbers = np.array(list(itertools.product(range(4), repeat=4)))
    numbers = numbers[(numbers.sum(1) >= 1) & (numbers.sum(1) <= 6)]
    # The elements themselves keep the four sums apart.
    is_single = numbers.sum(1) == 1
    others = rng.choice(numbers[~is_single], num_species - 4, replace=False)
    return np.concatenate([numbers[is_single], others]).astype(float)


def _balanced_steps(rng, atoms):
    """For each species, one step of any kind, and one in which a molecule splits.

    More are added where something besides the elements would be conserved.
    """
    species = range(len(atoms))
    sides = [[i] for i in species]
    sides += [list(pair) for pair in itertools.combinations_with_replacement(species, 2)]
    same_atoms = collections.defaultdict(list)
    for side in sides:
        same_atoms[tuple(atoms[side].sum(0))].append(side)
    possible = [
        pair
        for group in same_atoms.values()
        for pair in itertools.combinations(group, 2)
        if not set(pair[0]) & set(pair[1])
    ]
    order = [possible[i] for i in rng.permutation(len(possible))]
    splits = [pair for pair in order if len(pair[0]) == 1]
    steps = []
    for i in species:
        for among in (order, splits):
            own = (pair for pair in among if i in pair[0] or i in pair[1])
            steps += itertools.islice(own, 1)
    steps = [pair for i, pair in enumerate(steps) if pair not in steps[:i]]
    for pair in order:
        rank = _rank(steps, len(atoms))
        if rank == len(atoms) - atoms.shape[1]:
            break
        if _rank([*steps, pair], len(atoms)) > rank:
            steps.append(pair)
    return steps


def _rank(steps, num_species):
    """The number of independent changes of the state."""
    change = np.zeros((len(steps), num_species))
    for row, (left, right) in zip(change, steps, strict=True):
        np.add.at(row, left, -1)
        np.add.at(row, right, 1)
    return np.linalg.matrix_rank(change)


SYSTEMS = {
    "van_der_pol": System(
        van_der_pol, _box([-3, -3], [3, 3]), 6.0, _box([0.5], [2.0]), "oscillator"
    ),
    "fitzhugh_nagumo": System(
        fitzhugh_nagumo,
        _box([-2, -1], [2, 1.5]),
        20.0,
        _box([0.5, 0.6, 8, 0.2], [0.9, 1.0, 16, 0.8]),
        "excitable",
    ),
    "hodgkin_huxley": System(
        hodgkin_huxley,
        _box([-75, 0, 0.3, 0.2], [-50, 0.2, 0.7, 0.5]),
        10.0,
        _box([0], [20]),
        "excitable",
    ),
    "lotka_volterra": System(
        lotka_volterra,
        _box([0.5, 0.5], [2, 2]),
        8.0,
        _box([0.5] * 4, [1.5] * 4),
        "predator-prey",
    ),
    "rosenzweig_macarthur": System(
        rosenzweig_macarthur,
        _box([0.2, 0.1], [2, 1.5]),
        20.0,
        _box([1.5, 0.5], [3.0, 1.0]),
        "predator-prey",
    ),
    "seir": System(
        seir,
        _box([5e4, 10, 10, 0], [1e5, 500, 500, 2e4]),
        60.0,
        _box([0.2, 0.1, 0.05], [0.8, 0.4, 0.3]),
        "epidemic",
    ),
    "kepler": System(
        kepler, _box([0.8, -0.2, -0.2, 0.8], [1.2, 0.2, 0.2, 1.2]), 6.0, None, "orbital"
    ),
    "three_body": System(three_body, _three_bodies, 3.0, None, "orbital"),
    "driven_pendulum": System(
        driven_pendulum,
        _box([-2, -1], [2, 1]),
        8.0,
        _box([0.2, 0.8], [0.8, 2.0]),
        "driven",
    ),
    "duffing": System(
        duffing, _box([-1.5, -1], [1.5, 1]), 8.0, _box([0], [0.5]), "driven"
    ),
    "lorenz": System(lorenz, _box([-15, -20, 10], [15, 20, 40]), 1.0, None, "chaotic"),
    "lorenz_96": System(
        lorenz_96,
        lambda key: 3 + 4 * jr.normal(key, (40,)),
        0.4,
        None,
        "high-dimensional",
    ),
    "chain": System(
        chain, lambda key: 0.7 * jr.normal(key, (32,)), 3.0, None, "high-dimensional"
    ),
    "burgers": System(burgers, _waves, 0.2, None, "high-dimensional"),
    "brusselator": System(
        brusselator,
        _box([0.5, 0.5], [3, 4]),
        10.0,
        _box([0.8, 1.5], [1.2, 3]),
        "kinetics",
    ),
    "goodwin": System(
        goodwin,
        lambda key: 10 ** jr.uniform(key, (3,), minval=1.0, maxval=2.5),
        24.0,
        _box([50, 2], [150, 4]),
        "kinetics",
    ),
    "robertson": System(
        robertson, _robertson_start, 1e5, None, "stiff kinetics", np.ones((1, 3))
    ),
    "hires": System(
        hires,
        _around([1.0, 0, 0, 0, 0, 0, 0, 0.0057], 0.3),
        321.8,
        None,
        "stiff kinetics",
        np.eye(8)[[6]] + np.eye(8)[[7]],
    ),
    "oregonator": System(
        oregonator, _around([1.0, 2.0, 3.0], 0.3), 30.0, None, "stiff kinetics"
    ),
    "pollu": System(
        pollu,
        _around(POLLU_START, 0.3),
        60.0,
        lambda key: 10 ** jr.uniform(key, (1,), minval=-0.3, maxval=0.3),
        "stiff kinetics",
        _POLLU_ATOMS,
    ),
}


def draw(system: System, key: Any, num: int) -> tuple[Any, Any]:
    """Draws a batch of initial states and parameters."""
    x0 = jax.vmap(system.x0)(jr.split(jr.fold_in(key, 0), num))
    if system.args is None:
        return x0, None
    return x0, jax.vmap(system.args)(jr.split(jr.fold_in(key, 1), num))
