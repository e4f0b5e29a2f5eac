"""A batch of which a map serves a part: `solve_batch` against classical solvers.

    python benchmarks/batches.py                    # all rows
    python benchmarks/batches.py --sizes 1000 --fields cheap

The ODE is a Hopf oscillator, to T = 10. Its field is cheap, or as costly as a network of
3 layers of 64 or of 256, whose output is added times 1e-6. The map is the exact one, with
an error that oscillates in time, of a tenth of the tolerance or as large; or the former,
but wrong by one in 3 % of the region; or useless, which is the identity.

Errors are against Dopri8 at rtol 1e-10, in float64; everything else is float32. Classical
solvers are Tsit5 and Dopri8 under `jax.vmap` at rtol 1e-1 to 1e-6, and the row shows the
fastest whose 90 % quantile and worst errors are no larger than those of `solve_batch`.
Seconds are the shortest of several runs, compiled before.
"""

import argparse
import itertools
import json
import pathlib
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import flowdiffrax as fd

T1 = 10.0
FIELDS = {"cheap": None, "3 x 64": 64, "3 x 256": 256}
MAPS = "tolerance / 10", "tolerance", "3 % wrong", "useless"
TOLERANCES = [10.0**-digits for digits in range(1, 7)]


def make_field(width):
    """A Hopf oscillator, with the cost of a network of this width."""
    net = None if width is None else eqx.nn.MLP(2, 2, width, 3, key=jr.key(0))

    def field(t, x, args):
        radius = jnp.sum(x**2)
        rate = jnp.stack(
            [x[0] - 2 * x[1] - radius * x[0], 2 * x[0] + x[1] - radius * x[1]]
        )
        if net is None:
            return rate
        arrays, static = eqx.partition(net, eqx.is_array)
        arrays = jax.tree.map(lambda leaf: leaf.astype(x.dtype), arrays)
        return rate + 1e-6 * eqx.combine(arrays, static)(x)

    return field


def exact_map(s, t, x, args=None):
    """The flow of the oscillator, in polar coordinates."""
    h = t - s
    squared = jnp.sum(x**2)
    radius = jnp.sqrt(1 / (1 + (1 / squared - 1) * jnp.exp(-2 * h)))
    x = x / jnp.sqrt(squared) * radius
    cos, sin = jnp.cos(2 * h), jnp.sin(2 * h)
    return jnp.stack([cos * x[0] - sin * x[1], sin * x[0] + cos * x[1]])


def make_map(kind, tol):
    def flow_map(s, t, x, args):
        h = t - s
        size = tol if kind == "tolerance" else tol / 10
        off = size * jnp.sin(10 * h + 3 * x) * (1 - jnp.exp(-h))
        wrong = jnp.where(x[0] > 1.5, jnp.minimum(h, 1.0), 0.0)
        y = exact_map(s, t, x) + off
        return x if kind == "useless" else y + wrong * (kind == "3 % wrong")

    return flow_map


def seconds_of(run, *given):
    """The result of a call, and the shortest of several times that it takes."""
    result = jax.block_until_ready(run(*given))
    times = []
    while len(times) < 3 or sum(times) < 0.5 and len(times) < 50:
        begin = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append(time.perf_counter() - begin)
    return result, min(times)


def classical(field, solver):
    def solve(x, rtol):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            T1,
            None,
            x,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=1e-3 * rtol),
            max_steps=16384,
            throw=False,
        ).ys[0]

    return jax.jit(jax.vmap(solve, (0, None)))


def quantiles(ys, exact):
    error = np.abs(np.asarray(ys, np.float64) - exact).max(1)
    return np.quantile(error, 0.9), error.max()


def run_one(width, size, tol, jumps):
    """Rows for one field and one size."""
    field = make_field(width)
    x0 = jr.uniform(jr.key(1), (size, 2), minval=-1.5, maxval=1.6)
    with jax.enable_x64(True):
        exact = np.asarray(classical(field, diffrax.Dopri8())(np.float64(x0), 1e-10))
    scanned = []
    for solver in (diffrax.Tsit5(), diffrax.Dopri8()):
        solve = classical(field, solver)
        for rtol in TOLERANCES:
            ys, seconds = seconds_of(solve, x0, jnp.float32(rtol))
            name = f"{type(solver).__name__}, {rtol:.0e}"
            scanned.append((seconds, name, *quantiles(ys, exact)))
    rows = []
    ts = jnp.linspace(0.0, T1, jumps + 1)
    for kind in MAPS:
        flow_map = make_map(kind, tol)
        solve = jax.jit(
            lambda x, flow_map=flow_map: fd.solve_batch(
                flow_map, field, ts, x, rtol=tol, atol=1e-3 * tol
            )
        )
        solution, seconds = seconds_of(solve, x0)
        most, worst = quantiles(solution.ys[:, -1], exact)
        good = [row for row in scanned if row[2] <= most and row[3] <= worst]
        best = min(good, default=(np.nan, "none", np.nan, np.nan))
        row = {"map": kind, "size": size, "tol": tol, "ms": 1e3 * seconds}
        row |= {"learned": float(solution.is_learned.mean()), "90 %": most}
        row |= {"worst": worst, "peer": best[1], "peer_ms": 1e3 * best[0]}
        rows.append(row)
    return rows


def report(name, rows):
    for row in rows:
        cells = [name, f"{row['size']:,}", f"{row['tol']:.0e}", row["map"]]
        cells += [f"{row['learned']:.0%}", f"{row['90 %']:.1e}", f"{row['worst']:.1e}"]
        cells += [f"{row['ms']:.3g}", row["peer"], f"{row['peer_ms']:.3g}"]
        cells += [f"{row['peer_ms'] / row['ms']:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)


def main(options):
    options.out.mkdir(parents=True, exist_ok=True)
    heads = "field", "batch", "rtol", "map", "jumps taken", "error: 90 %", "worst", "ms"
    heads = *heads, "as exact", "ms", "times"
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    found = {}
    for name, size in itertools.product(options.fields, options.sizes):
        for tol in options.tolerances:
            rows = run_one(FIELDS[name], size, tol, options.jumps)
            found.setdefault(name, []).extend(rows)
            report(name, rows)
    (options.out / "batches.json").write_text(json.dumps(found, indent=1, default=float))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fields", nargs="+", choices=FIELDS, default=[*FIELDS])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 4096])
    parser.add_argument("--tolerances", nargs="+", type=float, default=[1e-3])
    parser.add_argument("--jumps", type=int, default=2, help="intervals to T")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/batches"))
    main(parser.parse_args())
