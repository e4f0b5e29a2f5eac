"""Error against work: learned maps, the hybrid solver, and Diffrax, on scientific ODEs.

    python benchmarks/work_precision.py                         # everything, half an hour
    python benchmarks/work_precision.py --problems pendulum --batches 4096

For each problem of `examples/`, the map is learned as in the example. It then solves new
initial conditions in batches of 1, 64 and 4,096, and so do Diffrax's own solvers, with
separate step sizes for each initial condition. An error is the rms distance to a tight
float64 solution, in standard deviations of the end states, over the initial conditions
for which the solver does not report a failure. The number of failures is given too.
Seconds are for the batch: the median over rounds in which everything runs once, in random
order. Compilation is timed separately. Methods that would take longer than `--limit`
seconds, at the speed per initial condition of the previous batch, are omitted: implicit
solvers and the hybrid pay for thousands of linear solves.

A further test checks whether `HybridSolver` keeps its promise, on a thousand initial
conditions, a third of them far from the training data, at the relative `--tolerances`.

The tables, the numbers and the figure are saved under `--out`.
"""

import argparse
import importlib.util
import json
import pathlib
import platform
import random
import subprocess
import sys
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np

import flowdiffrax as fd

HERE = pathlib.Path(__file__).resolve().parent
JUMPS = (1, 2, 4, 8, 16, 32)
TOLERANCES = (1e-2, 1e-4, 1e-6)


class Setting:
    """What the benchmarks need to know about a problem that its example does not say."""

    def __init__(self, module, *, positive=False, stiff=False, atol=1e-2, t1=None):
        self.module, self.positive, self.stiff = module, positive, stiff
        self.atol = atol  # times the relative tolerance
        self.t1 = t1  # given if the example's own end is far beyond a jump


PROBLEMS = {
    "pendulum": Setting("pendulum"),
    "lotka-volterra": Setting("lotka_volterra_parameters"),
    "robertson": Setting("stiff_robertson", positive=True, stiff=True, atol=1e-4),
    "kepler": Setting("kepler_or_nbody", t1=np.pi),
    "density": Setting("density_likelihood"),
}


def load(name):
    """The example of a problem, as a module."""
    path = HERE.parent / "examples" / f"{PROBLEMS[name].module}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if PROBLEMS[name].t1 is not None:
        module.T1 = PROBLEMS[name].t1
    return module


def initial(example, key, size, far=False, positive=False):
    """A batch of states and `args`; if `far`, well outside the training data."""
    drawn = example.draw(key, size)
    x0, args = drawn if isinstance(drawn, tuple) else (drawn, None)
    if far:
        if positive:
            x0 = jax.tree_util.tree_map(lambda x: 4 * x, x0)
        else:
            move = lambda x: x.mean(axis=0) + 2.5 * (x - x.mean(axis=0))
            x0 = jax.tree_util.tree_map(move, x0)
    return x0, args


def as_vectors(states):
    """A batch of states as rows of a NumPy array in float64."""
    leaves = jax.tree_util.tree_leaves(states)
    rows = [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in leaves]
    return np.concatenate(rows, axis=1)


def exact(example, setting, x0, args, t1=None):
    """End states to nine digits, in float64."""
    solver = example.STIFF if setting.stiff else diffrax.Dopri8()

    def solve(row):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(example.vector_field),
            solver,
            example.T0,
            example.T1 if t1 is None else t1,
            None,
            row[0],
            args=row[1],
            stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-12),
            max_steps=100_000,
        ).ys

    with jax.enable_x64(True):
        widen = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
        rows = jax.tree_util.tree_map(widen, (x0, args))
        ends = jax.jit(lambda rows: jax.lax.map(solve, rows, batch_size=512))(rows)
        return as_vectors(jax.tree_util.tree_map(lambda y: y[:, 0], ends))


# --- contenders -----------------------------------------------------------------------


def diffeqsolve(example, solver, controller, dt0, x0, args, saveat=None):
    as_time = lambda t: jnp.asarray(t, jax.tree_util.tree_leaves(x0)[0].dtype)
    return diffrax.diffeqsolve(
        diffrax.ODETerm(example.vector_field),
        solver,
        as_time(example.T0),
        as_time(example.T1),
        dt0,
        x0,
        args=args,
        stepsize_controller=controller,
        saveat=diffrax.SaveAt(t1=True) if saveat is None else saveat,
        max_steps=1024,
        throw=False,
    )


def stages(solver):
    """Vector field evaluations per step, without the iterations of implicit solvers."""
    tableau = getattr(solver, "tableau", None)
    if tableau is None:
        return 1
    return tableau.num_stages - bool(tableau.fsal)


def contenders(example, setting, flow_map, size):
    """Yields the name and setting of each contender, and a function of a batch.

    The function returns end states, evaluations, and whether the solver reports success.
    """
    length = example.T1 - example.T0
    # Diffrax's own guess of a first step, 0.01, does not depend on the problem.
    first = (1e-6 if setting.stiff else 0.02) * length

    def by_map(jumps):
        def run(x0, args):
            return fd.sample(flow_map, x0, times(jumps, x0), args), jumps, True

        return run

    def times(jumps, x0):
        dtype = jax.tree_util.tree_leaves(x0)[0].dtype
        return jnp.linspace(example.T0, example.T1, jumps + 1, dtype=dtype)

    def by_diffrax(solver, controller, dt0):
        def run(x0, args):
            sol = diffeqsolve(example, solver, controller, dt0, x0, args)
            return last(sol.ys), sol.stats["num_steps"] * stages(solver), success(sol)

        return run

    def by_hybrid(tolerance):
        def run(x0, args):
            sol = hybrid(example, setting, flow_map, tolerance, x0, args)
            evaluations = evaluations_of_hybrid(example, setting, sol, x0)
            return last(sol.ys), evaluations, success(sol)

        return run

    def by_batch(tolerance):
        def run(x0, args):
            solution = fd.solve_batch(
                flow_map,
                example.vector_field,
                times(2, x0),
                x0,
                args,
                rtol=tolerance,
                atol=tolerance * setting.atol,
                args_per_example=bool(jax.tree_util.tree_leaves(args)),
                fallback=classical(example, setting),
            )
            ends = jax.tree_util.tree_map(lambda y: y[:, -1], solution.ys)
            # How many evaluations were made is not known.
            return ends, jnp.nan, solution.is_successful

        return run

    for jumps in JUMPS:
        yield ("map", jumps), jax.vmap(by_map(jumps))
    for tolerance in (1e-2, 1e-3, 1e-4):
        yield ("HybridSolver", tolerance), jax.vmap(by_hybrid(tolerance))
        yield ("solve_batch", tolerance), by_batch(tolerance)
    adaptive = [diffrax.Tsit5(), diffrax.Dopri8()]
    # Thousands of Kvaerno5's linear solves in one loop can hang JAX 0.10 on two cores.
    adaptive += [diffrax.Kvaerno5()] if size <= 64 else []
    for solver in [example.STIFF] if setting.stiff else adaptive:
        for tolerance in TOLERANCES:
            pid = diffrax.PIDController(rtol=tolerance, atol=tolerance * setting.atol)
            name = type(solver).__name__, tolerance
            yield name, jax.vmap(by_diffrax(solver, pid, first))
    for solver in () if setting.stiff else (diffrax.Euler(), diffrax.Heun()):
        for steps in (64, 512):
            fixed = diffrax.ConstantStepSize()
            name = type(solver).__name__, steps
            yield name, jax.vmap(by_diffrax(solver, fixed, length / steps))


def hybrid(example, setting, flow_map, tolerance, x0, args):
    solver = fd.HybridSolver(flow_map, classical(example, setting))
    pid = diffrax.PIDController(rtol=tolerance, atol=tolerance * setting.atol)
    saveat = diffrax.SaveAt(t1=True, solver_state=True)
    length = 2 * (example.T1 - example.T0)
    return diffeqsolve(example, solver, pid, length, x0, args, saveat)


def success(sol):
    return sol.result == diffrax.RESULTS.successful


def last(ys):
    return jax.tree_util.tree_map(lambda y: y[0], ys)


def classical(example, setting):
    return example.STIFF if setting.stiff else diffrax.Tsit5()


def evaluations_of_hybrid(example, setting, sol, x0):
    """An upper bound on evaluations: as if the map were tried and corrected every time.

    A Jacobian counts as many evaluations as there are entries.
    """
    size = sum(leaf.size for leaf in jax.tree_util.tree_leaves(x0))
    nodes = 24 if size <= 8 else 12
    tries = (5 + nodes * (2 + size)) * sol.stats["num_steps"]
    return tries + stages(classical(example, setting)) * sol.solver_state.num_classical


# --- measurement ----------------------------------------------------------------------


def measure(example, setting, flow_map, size, options, before):
    """A row of numbers for each contender on one batch.

    `before` has the seconds per initial condition in the previous, smaller batch.
    """
    x0, args = initial(example, jr.key(1000 + size), size)
    truth = exact(example, setting, x0, args)
    # Use a separate batch: a single example has no spread.
    spread = exact(example, setting, *initial(example, jr.key(7), 256)).std(axis=0)
    rows, programs, seconds = [], {}, {}
    for name, batched in contenders(example, setting, flow_map, size):
        if options.methods and name[0] not in options.methods:
            continue
        if size * before.get(name, 0.0) > options.limit:
            print(f"{name[0]} ({name[1]:g}) is left out of the batch of {size}")
            continue
        start = time.perf_counter()
        program = jax.jit(batched).lower(x0, args).compile()
        compiling = time.perf_counter() - start
        start = time.perf_counter()
        ends, evaluations, succeeded = jax.block_until_ready(program(x0, args))
        succeeded = np.broadcast_to(succeeded, size)
        first = time.perf_counter() - start
        print(f"batch {size}, {name[0]} ({name[1]:g}): {first:.3g} s", flush=True)
        error = ((as_vectors(ends) - truth) / spread)[succeeded]
        programs[name], seconds[name] = program, [first]
        rows.append(
            {
                "method": name[0],
                "setting": name[1],
                "error": float(np.sqrt(np.mean(error**2))),
                "worst": float(np.abs(error).max(initial=0.0)),
                "failed": int((~succeeded).sum()),
                "evaluations": float(np.mean(evaluations)),
                "compile": compiling,
            }
        )
    # For slow contenders, use only the first run.
    again = [name for name in programs if seconds[name][0] < options.limit / 10]
    for turn in range(options.rounds):
        for name in random.sample(again, len(again)):
            if turn == 0:
                seconds[name].clear()
            start = time.perf_counter()
            jax.block_until_ready(programs[name](x0, args))
            seconds[name].append(time.perf_counter() - start)
    for row in rows:
        row["seconds"] = float(np.median(seconds[row["method"], row["setting"]]))
    return rows


def keep_promise(example, setting, flow_map, tolerance, size):
    """Rows for the hybrid and its fallback, on initial conditions near and far."""
    near, far = (
        initial(example, jr.key(k), n, k == 6, setting.positive)
        for k, n in ((5, size - size // 3), (6, size // 3))
    )
    x0, args = jax.tree_util.tree_map(lambda a, b: jnp.concatenate([a, b]), near, far)
    truth = exact(example, setting, x0, args)
    fallback = classical(example, setting)
    pid = diffrax.PIDController(rtol=tolerance, atol=tolerance * setting.atol)

    def by_hybrid(x0, args):
        sol = hybrid(example, setting, flow_map, tolerance, x0, args)
        calls = evaluations_of_hybrid(example, setting, sol, x0)
        learned = sol.solver_state.num_learned
        return last(sol.ys), calls, sol.stats["num_steps"], learned, success(sol)

    def by_fallback(x0, args):
        first = (1e-6 if setting.stiff else 0.02) * (example.T1 - example.T0)
        sol = diffeqsolve(example, fallback, pid, first, x0, args)
        steps = sol.stats["num_steps"]
        return last(sol.ys), steps * stages(fallback), steps, 0, success(sol)

    rows = []
    for name, one in (
        ("HybridSolver", by_hybrid),
        (type(fallback).__name__, by_fallback),
    ):
        run = eqx.filter_jit(jax.vmap(one))
        ends, calls, steps, learned, succeeded = jax.block_until_ready(run(x0, args))
        start = time.perf_counter()
        jax.block_until_ready(run(x0, args))
        seconds = time.perf_counter() - start
        # Include the spread of each quantity, since some pass through zero.
        scale = tolerance * (np.abs(truth) + truth.std(axis=0))
        ratio = np.sqrt(np.mean(((as_vectors(ends) - truth) / scale) ** 2, axis=1))
        near = np.arange(size) < size - size // 3
        for part, among in (("near", near), ("far", ~near)):
            rows_of = among & np.asarray(succeeded)
            rows.append(
                {
                    "method": name,
                    "tolerance": tolerance,
                    "where": part,
                    "median of error / tolerance": float(np.median(ratio[rows_of])),
                    "worst": float(ratio[rows_of].max()),
                    "above 10": int((~(ratio[rows_of] <= 10)).sum()),
                    "failed": int((among & ~rows_of).sum()),
                    "evaluations": float(np.mean(np.asarray(calls)[rows_of])),
                    "steps": float(np.mean(np.asarray(steps)[rows_of])),
                    "learned steps": float(
                        np.mean(np.broadcast_to(learned, len(ratio))[rows_of])
                    ),
                    "seconds, all": seconds,
                }
            )
    return rows


def is_ours(method):
    return method in ("map", "HybridSolver", "solve_batch")


def best_seconds(rows, error):
    """The fewest seconds in which one of Diffrax's solvers reaches an error."""
    theirs = [row for row in rows if not is_ours(row["method"])]
    met = [
        (row["seconds"], row["method"], row["setting"])
        for row in theirs
        if row["error"] <= error and row["failed"] == 0
    ]
    return min(met) if met else None


def run_one(name, options, learn):
    """All numbers of one problem."""
    example, setting = load(name), PROBLEMS[name]
    start = time.perf_counter()
    flow_map = learn(example)
    numbers = {"learning": time.perf_counter() - start, "batches": {}}
    an_example = {}
    for size in sorted(options.batches):
        rows = measure(example, setting, flow_map, size, options, an_example)
        numbers["batches"][size] = rows
        for row in rows:
            an_example[row["method"], row["setting"]] = row["seconds"] / size
    numbers["promise"] = [
        row
        for tolerance in options.tolerances
        for row in keep_promise(example, setting, flow_map, tolerance, options.promised)
    ]
    return numbers


def table(rows):
    form = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[form(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(name, numbers):
    """The tables of a problem, and speed-ups over Diffrax's solvers at equal error."""
    text = [f"\n## {name}\n\nLearned in {numbers['learning']:.0f} seconds."]
    for size, rows in numbers["batches"].items():
        text.append(f"\nBatch of {size}\n\n{table(rows)}\n")
        for row in (row for row in rows if row["method"] == "map"):
            best = best_seconds(rows, row["error"])
            if best is not None:
                seconds, method, setting = best
                text.append(
                    f"- {row['setting']} jumps, error {row['error']:.2g}: "
                    f"{seconds / row['seconds']:.1f} times fewer seconds than {method} "
                    f"({setting:g})"
                )
    text.append(f"\nThe promise of HybridSolver\n\n{table(numbers['promise'])}")
    return "\n".join(text)


def draw(results, path):
    """Plots error against seconds: a row per problem, a column per batch size."""
    sizes = list(next(iter(results.values()))["batches"])
    figure, axes = plt.subplots(
        len(results), len(sizes), figsize=(5 * len(sizes), 3.6 * len(results)),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, (name, numbers) in zip(axes, results.items(), strict=True):
        for axis, (size, rows) in zip(line, numbers["batches"].items(), strict=True):
            for method in dict.fromkeys(row["method"] for row in rows):
                mine = [row for row in rows if row["method"] == method]
                style = "o-" if is_ours(method) else "s--"
                axis.loglog(
                    [row["seconds"] for row in mine],
                    [row["error"] for row in mine],
                    style,
                    label=method,
                    markersize=4,
                )
            axis.set(title=f"{name}, batch {size}", xlabel="seconds", ylabel="rms error")
    axes[0, -1].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def command_line(parser, run_one, report, draw):
    """Runs the chosen problems, each in a separate process, and reports on all.

    `run_one(name, options, learn)` returns the numbers of a problem.
    """
    stem = pathlib.Path(sys.argv[0]).stem
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    parser.add_argument("--steps", type=int, help="training steps; default: example's")
    parser.add_argument("--pool", type=int, help="trajectories; default: example's")
    parser.add_argument("--out", type=pathlib.Path, default=f"out/{stem}")
    parser.add_argument("--in-this-process", action="store_true", help="one problem")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = lambda name: options.out / f"{name}.json"
    if options.in_this_process:
        (name,) = options.problems
        given = {"num_steps": options.steps, "pool": options.pool}
        given = {key: value for key, value in given.items() if value is not None}
        numbers = run_one(name, options, lambda example: example.learn(**given).flow_map)
        path(name).write_text(json.dumps(numbers, indent=1))
        return
    results = {}
    for name in options.problems:
        # Examples set their precision for the whole process, so each needs its own.
        again = [sys.executable, *sys.argv, "--in-this-process", "--problems", name]
        subprocess.run(again, check=True)
        results[name] = json.loads(path(name).read_text())
        print(report(name, results[name]), flush=True)
    text = f"{platform.processor()}, jax {jax.__version__}\n"
    text += "\n".join(report(name, numbers) for name, numbers in results.items())
    (options.out / f"{stem}.md").write_text(text + "\n")
    draw(results, options.out / f"{stem}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds per row")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--tolerances", nargs="+", type=float, default=[1e-2, 1e-3])
    parser.add_argument("--promised", type=int, default=1000, help="initial conditions")
    command_line(parser, run_one, report, draw)
