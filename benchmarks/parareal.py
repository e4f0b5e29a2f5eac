"""One long trajectory in windows side by side: `parareal` against classical solvers.

    python benchmarks/parareal.py

The ODE is the Hopf oscillator of `batches.py`, to T = 100; its field is cheap, or has the
cost of a network of 3 layers of 256 or 1,024. The map is the exact one, off by an error
that oscillates in time, of the given size. Each row has the number of sweeps, the depth
(evaluations of the vector field that wait for each other) and seconds, beside Tsit5 and
Dopri8 at the fastest tolerance at which their error at the end is no larger. Everything
is float32, errors are against the closed form, and seconds are the shortest of several
runs, compiled before.
"""

import argparse

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from batches import TOLERANCES, exact_map, make_field, seconds_of

import flowdiffrax as fd

T1 = 100.0
X = np.asarray([0.4, 0.2], np.float32)
FIELDS = {"cheap": None, "3 x 256": 256, "3 x 1024": 1024}


def disturbed(size):
    def flow_map(s, t, x, args):
        h = t - s
        return exact_map(s, t, x) + size * jnp.sin(10 * h + 3 * x) * -jnp.expm1(-h)

    return flow_map


def classical(field, solver, tol):
    """Returns the error, the steps and the seconds of one solve from start to end."""

    @jax.jit
    def run(x):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            solver,
            0.0,
            T1,
            None,
            x,
            stepsize_controller=diffrax.PIDController(rtol=tol, atol=tol),
            max_steps=100_000,
        )

    sol = run(X)
    return error_of(sol.ys[0]), int(sol.stats["num_steps"]), seconds_of(run, X)[1]


def error_of(y):
    return float(jnp.max(jnp.abs(y - exact_map(0.0, T1, X))))


def main(options):
    print(f"{'field':>9} {'error of map':>12} {'windows':>7} {'sweeps':>6} {'error':>8} "
          f"{'depth':>6} {'ms':>8} | {'classical':>9} {'error':>8} {'depth':>6} {'ms':>8}"
          " | times less deep, faster")  # fmt: skip
    solvers = {"Tsit5": (diffrax.Tsit5(), 6), "Dopri8": (diffrax.Dopri8(), 13)}
    for name in options.fields:
        field = make_field(FIELDS[name])
        scan = [
            (kind, stages, *classical(field, solver, tol))
            for kind, (solver, stages) in solvers.items()
            for tol in TOLERANCES
        ]
        for size in options.sizes:
            for windows in options.windows:
                ts = jnp.linspace(0.0, T1, windows + 1)
                flow_map, how = disturbed(size), {"rtol": 1e-4, "atol": 1e-4}
                run = jax.jit(
                    lambda x, flow_map=flow_map, field=field, ts=ts, how=how: (
                        fd.solvers.parareal(flow_map, field, ts, x, **how)
                    )
                )
                sol = run(X)
                seconds, error = seconds_of(run, X)[1], error_of(sol.ys[-1])
                # The windows are about as long, and so are their steps.
                counted = classical_steps(field, ts, sol.ys)
                depth = 6 * counted * int(sol.num_sweeps)
                ok = [
                    row for row in scan if row[2] <= max(error, min(r[2] for r in scan))
                ]
                kind, stages, wrong, steps, other = min(ok, key=lambda row: row[-1])
                print(f"{name:>9} {size:12.0e} {windows:7} {int(sol.num_sweeps):6} "
                      f"{error:8.1e} {depth:6} {1e3 * seconds:8.2f} | {kind:>9} "
                      f"{wrong:8.1e} {stages * steps:6} {1e3 * other:8.2f} | "
                      f"{stages * steps / depth:.1f}, {other / seconds:.2f}",
                      flush=True)  # fmt: skip


def classical_steps(field, ts, ys):
    """Returns the most steps that Tsit5 takes in one of the windows."""

    @jax.jit
    @jax.vmap
    def run(s, t, x):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field),
            diffrax.Tsit5(),
            s,
            t,
            None,
            x,
            stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
        ).stats["num_steps"]

    return int(np.max(run(ts[:-1], ts[1:], ys[:-1])))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fields", nargs="+", choices=FIELDS, default=list(FIELDS))
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e-4, 1e-2])
    parser.add_argument("--windows", nargs="+", type=int, default=[8, 32])
    main(parser.parse_args())
