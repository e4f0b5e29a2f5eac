r"""Errors and corrections of jumps of PDEs, by Newton steps without matrices.

    python benchmarks/pde_estimates.py                         # half an hour
    python benchmarks/pde_estimates.py --problems burgers --starts 16

The PDEs are viscous Burgers on 96 points, with a map that is learned briefly, and
Kuramoto-Sivashinsky on 64, Allen-Cahn on 100 x 100 and advection with a reaction on
10,000, whose maps are one or two steps of an exponential integrator.

The first table has the calibration of estimates over jumps of three lengths from new
starts: quantiles of estimate over true error, coverage (the share of jumps whose error is
no more than the estimate), rank correlations by length, products with the Jacobians at
all nodes, and seconds of one jump. The second has solves by `HybridSolver`, by Tsit5 and
for small states Kvaerno5, and by the integrator.
"""

import argparse
import functools
import importlib
import math
import sys
import timeit
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import flowdiffrax as fd

sys.path.append(str(Path(__file__).parents[1] / "examples"))
NODES = 8


def phi(k, z):
    """The functions of exponential integrators, for real arguments."""
    is_small = jnp.abs(z) < 0.5
    near, far = jnp.where(is_small, z, 0), jnp.where(is_small, 1, z)
    series = sum(near**j / math.factorial(j + k) for j in range(12))
    value = jnp.exp(far)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / far
    return jnp.where(is_small, series, value)


class Problem:
    """A PDE u' = L u + N(u) with L diagonal in Fourier space, for one `args`."""

    def __init__(self, rates, rest, field, draw, flow_map, t1, args=None):
        self.rates, self.rest, self.field, self.draw = rates, rest, field, draw
        self.flow_map, self.t1, self.args = flow_map, t1, args
        self.axes = tuple(range(rates.ndim))

    def by_waves(self, factors, u):
        made = factors * jnp.fft.fftn(u, axes=self.axes)
        return jnp.fft.ifftn(made, axes=self.axes).real

    def stiff_solve(self, h, r, args):
        return self.by_waves(1 / (1 - h * self.rates), r)

    def integrate(self, num_steps, h, u):
        """Krogstad's exponential Runge-Kutta method of order 4."""
        z = h / num_steps * self.rates
        half1, half2 = (h / num_steps / 2 * phi(k, z / 2) for k in (1, 2))
        one, two, three = (h / num_steps * phi(k, z) for k in (1, 2, 3))
        full, part = jnp.exp(z), jnp.exp(z / 2)
        fft = functools.partial(jnp.fft.fftn, axes=self.axes)
        ifft = lambda y: jnp.fft.ifftn(y, axes=self.axes).real
        rest = lambda u: fft(self.rest(u))

        def step(_, u):
            y = fft(u)
            a = rest(u)
            b = rest(ifft(part * y + half1 * a))
            c = rest(ifft(part * y + half1 * a + 2 * half2 * (b - a)))
            d = rest(ifft(full * y + one * a + 2 * two * (c - a)))
            y = full * y + (one - 3 * two + 4 * three) * a + (4 * three - two) * d
            return ifft(y + (2 * two - 4 * three) * (b + c))

        return jax.lax.fori_loop(0, num_steps, step, u)


def in_double(learn):
    """A map that is learned in single precision."""
    with jax.enable_x64(False):
        learned = learn()
    jax.clear_caches()  # of functions of NumPy arrays, in single precision
    wide = {jnp.dtype("float32"): jnp.float64, jnp.dtype("complex64"): jnp.complex128}
    widen = lambda leaf: jnp.asarray(leaf, wide.get(leaf.dtype, leaf.dtype))
    return jax.tree.map(lambda leaf: widen(leaf) if eqx.is_array(leaf) else leaf, learned)


def burgers(steps):
    example = importlib.import_module("burgers")
    n = example.N
    waves = 2 * np.pi * np.fft.fftfreq(n)
    rates = jnp.asarray(0.01 * 2 * n**2 * (np.cos(waves) - 1))
    args = jnp.asarray(0.0)
    lift = lambda f: lambda u: f(u[:, None])[:, 0]
    learned = in_double(lambda: example.learn(steps, 256))
    flow_map = lambda s, t, u, args: learned(s, t, u[:, None], args)[:, 0]
    field = lambda t, u, args: example.vector_field(t, u[:, None], args)[:, 0]
    draw = lambda key, num: example.draw(key, num)[0][..., 0]
    return Problem(rates, lift(example.advect), field, draw, flow_map, 1.0, args)


def kuramoto_sivashinsky(steps):
    del steps
    example = importlib.import_module("kuramoto_sivashinsky")
    n = example.N
    waves = 2 * np.pi * np.fft.fftfreq(n, 1 / n) / example.LENGTH
    rates = jnp.asarray(waves**2 - waves**4)
    rest = lambda u: example.ifft(example.advect(u[:, None]))[:, 0]
    linear = lambda u: jnp.fft.ifft(rates * jnp.fft.fft(u)).real
    field = lambda t, u, args: linear(u) + rest(u)
    draw = lambda key, num: example.draw(key, num)[..., 0]
    flow_map = lambda s, t, u, args: made.integrate(2, t - s, u)
    made = Problem(rates, rest, field, draw, flow_map, 4.0)
    return made


def allen_cahn(steps):
    """u' = 0.05^2 u'' + u - u^3 on the periodic unit square, by differences."""
    del steps
    n, scale = 100, 0.05**2
    line = 2 * n**2 * (np.cos(2 * np.pi * np.fft.fftfreq(n)) - 1)
    rates = jnp.asarray(scale * (line[:, None] + line))
    rest = lambda u: u - u**3

    def field(t, u, args):
        around = sum(jnp.roll(u, k, axis) for k in (1, -1) for axis in (0, 1))
        return scale * n**2 * (around - 4 * u) + rest(u)

    def draw(key, num):
        k = np.fft.fftfreq(n, 1 / n)
        shape = np.exp(-(k[:, None] ** 2 + k**2) / 18)
        noise = jnp.fft.fft2(jr.normal(key, (num, n, n)))
        u = jnp.fft.ifft2(shape * noise).real
        u = jnp.tanh(u / jnp.std(u, axis=(1, 2), keepdims=True))
        return jax.lax.map(lambda u: made.integrate(20, 0.2, u), u)

    flow_map = lambda s, t, u, args: made.integrate(1, t - s, u)
    made = Problem(rates, rest, field, draw, flow_map, 1.5)
    return made


def advection(steps):
    """u' = -c u_x + u - u^3 by central differences on 10,000 points: not stiff."""
    del steps
    n, speed = 10_000, 5.0
    rates = -1j * speed * jnp.sin(2 * np.pi * np.fft.fftfreq(n))
    rest = lambda u: u - u**3
    field = lambda t, u, args: speed / 2 * (jnp.roll(u, 1) - jnp.roll(u, -1)) + rest(u)

    def draw(key, num):
        factor = np.exp(-(np.fft.fftfreq(n, 1 / n) ** 2) / 2 / (n / 30) ** 2)
        u = jnp.fft.ifft(factor * jnp.fft.fft(jr.normal(key, (num, n)))).real
        return jnp.tanh(u / jnp.std(u, axis=1, keepdims=True))

    flow_map = lambda s, t, u, args: made.integrate(1, t - s, u)
    made = Problem(rates, rest, field, draw, flow_map, 0.6)
    return made


PROBLEMS = {f.__name__: f for f in (burgers, kuramoto_sivashinsky, allen_cahn, advection)}


class Counter:
    """Counts calls while the compiled code runs."""

    def __init__(self):
        self.count = 0

    def __call__(self, value):
        """Returns `value`, a scalar, and counts."""
        like = jax.ShapeDtypeStruct((), value.dtype)
        return jax.pure_callback(self._add, like, value, vmap_method="broadcast_all")

    def _add(self, value):
        self.count += np.size(value)
        return np.asarray(value)


def seconds_of(run, *given):
    jax.block_until_ready(run(*given))
    call = lambda: jax.block_until_ready(run(*given))
    return min(timeit.repeat(call, number=1, repeat=5))


def size(u):
    return jnp.sqrt(jnp.mean(u**2))


def ranks(x):
    return np.argsort(np.argsort(x))


def estimates(problem):
    stiff = fd.estimates.Krylov(problem.stiff_solve)
    linearised = lambda how: fd.estimates.LinearisedError(NODES, linear_solver=how)
    return {
        "Picard defect": fd.estimates.PicardDefect(NODES),
        "Alekseev-Gröbner": fd.estimates.AlekseevGroebner(NODES),
        "linearised": linearised(fd.estimates.Krylov()),
        "linearised, `stiff_solve`": linearised(stiff),
    }


def counted(problem, estimate, counter):
    """The same estimate, which counts the sweeps over all nodes."""
    own = getattr(estimate, "linear_solver", None)
    if own is None:
        return estimate
    solve = own.stiff_solve or (lambda h, r, args: r * (1 + 0 * h))
    solve = functools.partial(_counting, solve, counter)
    return fd.estimates.LinearisedError(NODES, linear_solver=fd.estimates.Krylov(solve))


def _counting(solve, counter, h, r, args):
    return solve(counter(h), r, args)


def calibrate(problem, num):
    """Prints the table of estimates."""
    truth = lambda h, u: problem.integrate(100, h, u)
    error = lambda h, u: size(problem.flow_map(0.0, h, u, problem.args) - truth(h, u))
    lengths = [share * problem.t1 for share in (0.1, 0.3, 1.0)]
    starts = [problem.draw(jr.key(100 + part), num) for part in range(len(lengths))]
    over = lambda f: jax.jit(lambda h, us: jax.lax.map(functools.partial(f, h), us))
    pairs = list(zip(lengths, starts, strict=True))
    errors = [np.asarray(over(error)(h, us)) for h, us in pairs]
    print("| estimate | estimate / error: 5 %, median, 95 % | coverage "
          "| rank correlations | products | seconds |")  # fmt: skip
    print("| --- " * 6 + "|")
    for name, estimate in estimates(problem).items():
        counter = Counter()

        def call(h, u, estimate=estimate):
            jump = problem.flow_map, problem.field, 0.0, h, u, problem.args
            return size(estimate(*jump)[1])

        count = functools.partial(call, estimate=counted(problem, estimate, counter))
        count = jax.jit(count)
        found = [np.asarray(over(call)(h, us)) for h, us in pairs]
        run, products, seconds = jax.jit(call), [], []
        for h, us in pairs:
            seconds.append(f"{seconds_of(run, h, us[0]):.2g}")
            counter.count = 0
            jax.block_until_ready(count(h, us[0]))
            # Apart from two right sides, and the two parts of the gap twice.
            products.append(f"{max(0, (counter.count - 4) / NODES - 2):.0f}")
        all_errors, all_found = np.concatenate(errors), np.concatenate(found)
        is_found = np.isfinite(all_found)
        cells = ["-"]
        if is_found.any():
            ratios = (all_found / all_errors)[is_found]
            cells = [
                ", ".join(f"{q:.2g}" for q in np.quantile(ratios, (0.05, 0.5, 0.95)))
            ]
        cells[0] += "" if is_found.all() else f" ({np.mean(~is_found):.0%} infinite)"
        cells += [f"{np.mean(all_found >= all_errors):.0%}"]
        both = [(ranks(e), ranks(f)) for e, f in zip(errors, found, strict=True)]
        cells += [", ".join(f"{np.corrcoef(e, f)[0, 1]:.2f}" for e, f in both)]
        cells += [", ".join(products), ", ".join(seconds)]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    print("median errors:", ", ".join(f"{np.median(e):.2g}" for e in errors))


def solved(problem, solver, dt0):
    """Returns a function of start and tolerance: the end, and the numbers of steps."""

    def run(u, tol, field=problem.field):
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), solver, 0.0, problem.t1, dt0, u, problem.args,
            stepsize_controller=diffrax.PIDController(tol, tol), max_steps=100_000,
            saveat=diffrax.SaveAt(t1=True, solver_state=True), throw=False,
        )  # fmt: skip
        learned = getattr(solution.solver_state, "num_learned", 0)
        steps = jnp.asarray(solution.stats["num_accepted_steps"])
        return solution.ys[0], jnp.stack([jnp.asarray(learned, steps.dtype), steps])

    return run


def work(problem, tols, num):
    """Prints the table of solves."""
    starts = problem.draw(jr.key(7), num)
    integrate = lambda n: jax.jit(lambda u: problem.integrate(n, problem.t1, u))
    truth = jnp.stack([integrate(1000)(u) for u in starts])
    error_of = lambda ends: float(jnp.median(jax.vmap(size)(jnp.stack(ends) - truth)))

    def hybrid(solve, *counter):
        if counter:
            solve = solve or (lambda h, r, args: r * (1 + 0 * h))
            solve = functools.partial(_counting, solve, *counter)
        how = fd.estimates.Krylov(solve)
        return fd.HybridSolver(problem.flow_map, linear_solver=how)

    solvers = {
        "corrected, `stiff_solve`": functools.partial(hybrid, problem.stiff_solve),
        "corrected": functools.partial(hybrid, None),
        "not corrected": lambda *counter: fd.HybridSolver(problem.flow_map),
        "Tsit5": lambda *counter: diffrax.Tsit5(),
        "Kvaerno5": lambda *counter: diffrax.Kvaerno5(),
    }
    if starts[0].size > 100:  # it would factorise matrices of this size
        del solvers["Kvaerno5"]
    print("\n| solver | tolerance | error | jumps, steps | evaluations | seconds |\n"
          + "| --- " * 6 + "|")  # fmt: skip
    for name, of in solvers.items():
        dt0 = 2 * problem.t1 if "corrected" in name else 1e-3
        run = jax.jit(solved(problem, of(), dt0))
        values, sweeps = Counter(), Counter()

        def field(t, u, args, values=values):
            return problem.field(t, u, args) + 0 * values(jax.lax.stop_gradient(t))

        count = jax.jit(functools.partial(solved(problem, of(sweeps), dt0), field=field))
        for tol in map(jnp.asarray, tols):
            ends, counts = zip(*(run(u, tol) for u in starts), strict=True)
            values.count = sweeps.count = 0
            jax.block_until_ready(count(starts[0], tol))
            cells = [name, f"{tol:.0e}", f"{error_of(ends):.1e}"]
            cells += [", ".join(f"{c:.1f}" for c in np.mean(counts, axis=0))]
            # A product with the Jacobian counts as two.
            number = values.count + 2 * sweeps.count
            cells += ["-" if name == "Kvaerno5" else f"{number:.0f}"]
            cells += [f"{seconds_of(run, starts[0], tol):.2g}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    for n in 2 ** np.arange(8):
        run = integrate(int(n))
        error, seconds = error_of([run(u) for u in starts]), seconds_of(run, starts[0])
        print(f"| ETDRK4 | | {error:.1e} | {n} | {4 * n} | {seconds:.2g} |")


def main(problems, starts, steps):
    for name in problems:
        problem = PROBLEMS[name](steps)
        print(f"\n{name}\n")
        calibrate(problem, starts)
        work(problem, (1e-3, 1e-5), 4)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--starts", type=int, default=32, help="jumps of each length")
    parser.add_argument("--steps", type=int, default=2000, help="steps of training")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    main(options.problems, options.starts, options.steps)
