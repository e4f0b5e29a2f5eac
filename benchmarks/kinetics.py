"""Stiff kinetics: learned solvers against Diffrax, CVODE and LSODA at equal error.

    pip install scikit-sundae numba flatbuffers
    python benchmarks/kinetics.py                    # five systems, an hour on two cores
    python benchmarks/kinetics.py --systems pollu --minutes 2

Each system is learned by `flowdiffrax.learn_solver`, with nothing but its vector field,
the draws of its starts and its parameters, and the time. `mechanism` is a generated
mechanism of 60 species. The references are fresh solutions by LSODA at rtol 1e-10. They
are independent of the teacher.

- An error is relative, |y - exact| / (|exact| + 1e-12 scale), where `scale` is the
  largest size of the entry. Quantiles are over fresh starts and entries, at the end.
- `kept` is the largest change of a conserved total by the jumps, relative to the total.
  The totals are known from the mechanism, and `learn_solver` is not told.
- Equal error means that neither the median nor the 90 % quantile is larger than those of
  the map on the same starts. Each classical solver is tried at rtol 1e-1 to 1e-8 and
  with two absolute tolerances, and the fastest of those that qualify is taken.
- CVODE (scikit-sundae, left out if not installed) and LSODA (`scipy.integrate.odeint`)
  call a right-hand side and an analytic Jacobian that Numba compiles, in a Python loop
  over starts: one process on one core. A call from Python costs LSODA about one
  microsecond and CVODE three, which matters for a few species, and which a program in C
  would not pay. Everything else may use all cores.
- Diffrax's solvers run in float64 and in batches, with the field in units of `scale`.
  Kvaerno5 is tried with its own root finder and with Optimistix' `Chord`, which rejects
  fewer steps at tight tolerances.
  The map runs in float32.
- Seconds of one start are means over eight. Those of 4,096 are extrapolated from 64 for
  CVODE and LSODA. Diffrax solves them at once or 64 at a time, whichever is faster; where
  that would take over half a minute, its seconds are extrapolated as well.
- Gradients are of a random linear function of the end state, with respect to the entries
  of the start and the parameters that vary, in units of their size. They are compared
  with those through Kvaerno5 at rtol 1e-5.

Tables, numbers and figures are written under `--out`.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import pathlib
import tempfile
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
import optimistix as optx
import scipy.integrate
import systems

import flowdiffrax as fd

SYSTEMS = {
    name: systems.SYSTEMS[name] for name in ("pollu", "hires", "robertson", "oregonator")
} | {"mechanism": systems.random_mechanism()}
JUMPS = (1, 2, 4)
BATCHES = (1, 64, 4096)
CHORD = diffrax.with_stepsize_controller_tols(optx.Chord)(cauchy_termination=False)
KVAERNO5 = {
    "Kvaerno5": diffrax.Kvaerno5(),
    "Kvaerno5, Chord": diffrax.Kvaerno5(root_finder=CHORD),
}
DIFFRAX = {"Kvaerno3": diffrax.Kvaerno3(), **KVAERNO5}
RTOLS = [10.0**-digits for digits in range(1, 9)]
# Absolute tolerances, as shares of the relative one and in units of `scale`.
ATOLS = (1e-2, 1e-5)
NUM_FRESH, NUM_GRADIENTS = 256, 16
LIMIT = 30.0  # seconds


def double():
    return jax.enable_x64(True)


def timed(function, *given):
    """The result of a call, and the shortest of several times that it takes."""
    times = []
    while not times or sum(times) < 0.3 and len(times) < 100:
        begin = time.perf_counter()
        result = function(*given)
        times.append(time.perf_counter() - begin)
    return result, min(times)


class Starts:
    """Fresh starts of a system with their exact ends, in NumPy and in float64."""

    def __init__(self, system):
        x0, args = systems.draw(system, jr.key(1000), NUM_FRESH)
        self.x0 = np.asarray(x0, np.float64)
        self.args = None if args is None else np.asarray(args, np.float64)
        self.exact = self.scale = None

    def solve(self, peers):
        """Solves all of them to ten digits, whatever the size of an entry."""
        self.exact = peers.lsoda(self.x0, 1e-10, 1e-20 * self.x0.max())
        scale = np.maximum(abs(self.x0), abs(self.exact)).max(0)
        self.scale = np.where(scale > 0, scale, 1.0)

    def rows(self, end, start=0):
        """The starts and parameters of a batch, repeated if there are not enough."""
        index = np.arange(start, end) % len(self.x0)
        return self.x0[index], None if self.args is None else self.args[index]

    def quantiles(self, ys):
        """The median and the 90 % quantile of errors of the first of the ends."""
        exact = self.exact[: len(ys)]
        error = abs(ys - exact) / (abs(exact) + 1e-12 * self.scale)
        error = np.nan_to_num(error, nan=np.inf)
        return np.quantile(error, (0.5, 0.9), method="higher").tolist()


# --- compiled peers -------------------------------------------------------------------


def terms_of(system, args, size):
    """The terms of a vector field that is quadratic in the state.

    Returns the entry and the two factors of each term, where the factor `size` means 1,
    and the coefficients, with a row for each of the `args`. All are found by automatic
    differentiation at zero, where it is exact.
    """

    def taylor(args):
        field = lambda x: system.vector_field(0.0, x, args)
        slope = jax.jacfwd(field)
        zero = jnp.zeros(size)
        terms = jnp.zeros((size, size + 1, size + 1)).at[:, size, size].set(field(zero))
        # Each product of two entries once.
        half = jnp.tril(jnp.ones((size, size))) - 0.5 * jnp.eye(size)
        terms = terms.at[:, size, :size].set(slope(zero))
        return terms.at[:, :size, :size].set(jax.jacfwd(slope)(zero) * half)

    with double():
        rows = jnp.zeros((1, 0)) if args is None else jnp.asarray(args)
        given = (lambda args: None) if args is None else (lambda args: args)
        some = jax.vmap(lambda args: taylor(given(args)))(rows[:4])
        pattern = np.nonzero((np.asarray(some) != 0).any(0))
        pick = jax.jit(lambda args: taylor(given(args))[pattern])
        return pattern, np.asarray(jax.lax.map(pick, rows))


def compile_field(pattern, size):
    """Compiles the field and its Jacobian: they fill the array that is given last."""
    import numba

    entries, *factors = pattern
    pairs, which = np.unique(np.stack(factors, 1), axis=0, return_inverse=True)
    left, right = pairs.T.copy()
    which = which.ravel()

    @numba.njit
    def pad(x):
        padded = np.ones(size + 1)
        padded[:size] = x
        return padded

    @numba.njit
    def field(x, coefficients, out):
        padded = pad(x)
        products = np.empty(len(left))
        for pair in range(len(left)):
            products[pair] = padded[left[pair]] * padded[right[pair]]
        out[:] = 0
        for term in range(len(entries)):
            out[entries[term]] += coefficients[term] * products[which[term]]

    @numba.njit
    def jacobian(x, coefficients, out):
        padded = pad(x)
        out[:] = 0
        for term in range(len(entries)):
            i, j = left[which[term]], right[which[term]]
            if i < size:
                out[entries[term], i] += coefficients[term] * padded[j]
            if j < size:
                out[entries[term], j] += coefficients[term] * padded[i]

    return field, jacobian


class Peers:
    """LSODA and CVODE, one start at a time."""

    def __init__(self, system, starts):
        import numba

        size = starts.x0.shape[1]
        self.t1 = system.t1
        pattern, self.coefficients = terms_of(system, starts.args, size)
        field, jacobian = compile_field(pattern, size)

        @numba.njit
        def lsoda_field(x, t, coefficients):
            out = np.empty(size)
            field(x, coefficients, out)
            return out

        @numba.njit
        def lsoda_jacobian(x, t, coefficients):
            # LSODA wants the transpose: its arrays are stored by columns.
            out = np.empty((size, size))
            jacobian(x, coefficients, out.T)
            return out

        # CVODE takes no array as its data.
        cvode_field = lambda t, x, out, data: field(x, data[0], out)
        cvode_jacobian = lambda t, x, rate, out, data: jacobian(x, data[0], out)
        self.for_lsoda = lsoda_field, lsoda_jacobian
        self.for_cvode = cvode_field, cvode_jacobian
        self.check(system, starts)

    def check(self, system, starts):
        """Compares the compiled field with the system's."""
        row = self.rows(1)[0]
        x = starts.x0.max(0) + 0.1 * starts.x0.max()
        with double():
            args = None if starts.args is None else jnp.asarray(starts.args[0])
            rates = np.asarray(system.vector_field(0.0, jnp.asarray(x), args))
        error = abs(self.for_lsoda[0](x, 0.0, row) - rates).max() / abs(rates).max()
        assert error < 1e-12, "the field is not quadratic in the state"

    def rows(self, num):
        return np.resize(self.coefficients, (num, self.coefficients.shape[1]))

    def calls(self, scale):
        """Both, for the first of the starts, with tolerances in units of `scale`."""
        solves = {"LSODA": self.lsoda}
        if importlib.util.find_spec("sksundae"):
            solves["CVODE"] = self.cvode
        return {
            name: lambda x0, args, rtol, atol, solve=solve: solve(x0, rtol, atol * scale)
            for name, solve in solves.items()
        }

    def lsoda(self, x0, rtol, atol):
        """The states at the end; not finite if LSODA fails."""
        ends = np.full_like(x0, np.nan)
        for i, row in enumerate(self.rows(len(x0))):
            ys, info = scipy.integrate.odeint(
                self.for_lsoda[0],
                x0[i],
                [0.0, self.t1],
                (row,),
                Dfun=self.for_lsoda[1],
                col_deriv=True,
                rtol=rtol,
                atol=atol,
                mxstep=100_000,
                full_output=True,
            )
            if info["message"] == "Integration successful.":
                ends[i] = ys[-1]
        return ends

    def cvode(self, x0, rtol, atol):
        """The states at the end; not finite if CVODE fails."""
        from sksundae.cvode import CVODE

        ends, row = np.full_like(x0, np.nan), self.coefficients[0].copy()
        field, jacobian = self.for_cvode
        settings = dict(rtol=rtol, atol=atol, max_num_steps=10_000)
        solver = CVODE(field, jacfn=jacobian, userdata=(row,), **settings)
        for i, coefficients in enumerate(self.rows(len(x0))):
            row[:] = coefficients
            solver.init_step(0.0, x0[i])
            solution = solver.step(self.t1)
            if solution.success:
                ends[i] = solution.y
        return ends


# --- Diffrax --------------------------------------------------------------------------


class DiffraxSolves:
    """Batches of solves, at any tolerance without compiling anew."""

    def __init__(self, system, scale):
        self.system, self.scale = system, scale
        axes = (0, None if system.args is None else 0, None, None)
        self._solves = {
            name: jax.jit(jax.vmap(self._one(solver), axes))
            for name, solver in DIFFRAX.items()
        }
        self._gradients = jax.jit(jax.vmap(self._gradient, (None, *axes)))

    def _one(self, solver):
        system, scale = self.system, self.scale

        def solve(x, args, rtol, atol):
            # `scale` enters here: an array of float64 needs the setting.
            size = jnp.asarray(scale)
            field = lambda t, z, args: system.vector_field(t, z * size, args) / size
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field),
                solver,
                0.0,
                system.t1,
                None,
                x / size,
                args,
                stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
                max_steps=16384,
                throw=False,
            )
            good = solution.result == diffrax.RESULTS.successful
            return jnp.where(good, solution.ys[0] * size, jnp.nan)

        return solve

    def _gradient(self, weights, x, args, rtol, atol):
        solve = self._one(KVAERNO5["Kvaerno5, Chord"])
        end = lambda x, args: weights @ solve(x, args, rtol, atol)
        return jax.grad(end, (0,) if args is None else (0, 1))(x, args)

    def __call__(self, name, x0, args, rtol, atol):
        with double():
            return np.asarray(self._solves[name](x0, args, rtol, atol))

    def gradients(self, weights, x0, args, rtol, atol):
        with double():
            return as_rows(self._gradients(weights, x0, args, rtol, atol))


def as_rows(parts):
    return np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)


# --- the map --------------------------------------------------------------------------


class Jumps:
    """Equal jumps of a map from 0 to the end, for a batch."""

    def __init__(self, flow_map, system):
        axes = (0, None if system.args is None else 0)

        def one(flow_map, num, x, args):
            times = jnp.linspace(0.0, system.t1, num + 1, dtype=x.dtype)
            for s, t in zip(times[:-1], times[1:], strict=True):
                x = flow_map(s, t, x, args)
            return x

        def gradient(flow_map, weights, num, x, args):
            end = lambda x, args: weights @ one(flow_map, num, x, args)
            return jax.grad(end, (0,) if args is None else (0, 1))(x, args)

        self.flow_map = flow_map
        self._ends = eqx.filter_jit(
            lambda flow_map, num, *rows: jax.vmap(
                lambda *row: one(flow_map, num, *row), axes
            )(*rows)
        )
        self._gradients = eqx.filter_jit(
            lambda flow_map, weights, num, *rows: jax.vmap(
                lambda *row: gradient(flow_map, weights, num, *row), axes
            )(*rows)
        )

    def __call__(self, num, x0, args):
        """The ends, in the precision of the given arrays."""
        return np.asarray(self._ends(self.flow_map, num, x0, args))

    def gradients(self, weights, num, x0, args):
        return as_rows(self._gradients(self.flow_map, weights, num, x0, args))


def as_single(rows):
    return [None if row is None else jnp.asarray(row, jnp.float32) for row in rows]


# --- measurement ----------------------------------------------------------------------


def measure_map(jumps, system, starts):
    """Errors, signs, conserved totals and seconds, for each number of jumps."""
    found = []
    whole = starts.rows(NUM_FRESH)
    for num in JUMPS:
        single = np.asarray(jumps(num, *as_single(whole)), np.float64)
        with double():
            ends = jumps(num, *whole)
        row = {"jumps": num, "negative": int((single < 0).sum())}
        row["median"], row["most"] = starts.quantiles(single)
        row["equal"] = starts.quantiles(single[:64])
        # Starts are rounded as well.
        rounded = np.float64(np.float32(whole[0]))
        row["kept_single"] = change_of_totals(system, rounded, single)
        row["kept_double"] = change_of_totals(system, whole[0], ends)
        row["seconds"] = {}
        for size in BATCHES:
            batch = as_single(starts.rows(size))
            jumps(num, *batch)  # compiles
            row["seconds"][size] = timed(jumps, num, *batch)[1]
        found.append(row)
    return found


def change_of_totals(system, x0, ys):
    if system.conserved is None:
        return None
    before, change = x0 @ system.conserved.T, (ys - x0) @ system.conserved.T
    return float((abs(change) / before).max())


def as_exact(row, target):
    """Whether the two quantiles of a classical solver are no larger than the target's."""
    return row["median"] <= target[0] and row["most"] <= target[1]


def fastest(rows, target, size, solvers=None):
    """The fastest of those that are as exact as the target; `None` if there is none."""
    good = [
        row
        for row in rows
        if as_exact(row, target)
        and size in row["seconds"]
        and (solvers is None or row["solver"] in solvers)
    ]
    return min(good, key=lambda row: row["seconds"][size], default=None)


def scan(calls, starts, target):
    """Errors and seconds of 64 solves, for each solver and tolerance.

    A solver's scan ends where it takes ten times longer than it needs for the target.
    """
    rows, batch = [], starts.rows(64)
    for name, solve in calls.items():
        solve(*batch, 1e-2, 1e-4)  # compiles
        for rtol, share in itertools.product(RTOLS, ATOLS):
            ends, seconds = timed(solve, *batch, rtol, share * rtol)
            row = {"solver": name, "rtol": rtol, "atol": share * rtol}
            row["median"], row["most"] = starts.quantiles(ends)
            row["failed"] = int((~np.isfinite(ends).all(1)).sum())
            row["seconds"] = {64: seconds}
            rows.append(row)
            enough = fastest(rows, target, 64, (name,))
            if enough and seconds > 10 * enough["seconds"][64]:
                break
    return rows


def time_other_batches(rows, targets, calls, starts):
    """Times each solver for 1 and 4,096 starts, where it is fastest for 64."""
    for target, (name, solve) in itertools.product(targets, calls.items()):
        row = fastest(rows, target, 64, (name,))
        if row is None or 4096 in row["seconds"]:
            continue
        tolerances = row["rtol"], row["atol"]
        singles = [(*starts.rows(i + 1, i), *tolerances) for i in range(8)]
        solve(*singles[0])  # compiles
        row["seconds"][1] = float(np.mean([timed(solve, *one)[1] for one in singles]))
        by_chunks = 64 * row["seconds"][64]
        row["seconds"][4096] = by_chunks
        if name in DIFFRAX and by_chunks < LIMIT:
            batch = *starts.rows(4096), *tolerances
            solve(*batch)  # compiles
            row["seconds"][4096] = min(by_chunks, timed(solve, *batch)[1])


def measure_gradients(jumps, solves, rows, map_rows, starts):
    """Errors and seconds of gradients through the map and through Kvaerno5."""
    batch, found = starts.rows(NUM_GRADIENTS), []
    weights = np.random.default_rng(0).normal(size=len(starts.scale)) / starts.scale
    unit = np.concatenate([part for part in batch if part is not None], axis=1).mean(0)
    exact = solves.gradients(weights, *batch, 1e-5, 1e-7) * unit
    for row in map_rows:
        given = jnp.float32(weights), row["jumps"], *as_single(batch)
        jumps.gradients(*given)  # compiles
        gradients, seconds = timed(jumps.gradients, *given)
        error = np.linalg.norm(gradients * unit - exact, axis=1)
        relative = np.median(error / np.linalg.norm(exact, axis=1))
        new = {"jumps": row["jumps"], "error": float(relative), "seconds": seconds}
        peer = fastest(rows, row["equal"], 64, KVAERNO5)
        if peer is not None:
            tolerances = peer["rtol"], peer["atol"]
            new["peer_seconds"] = gradient_seconds(solves, weights, batch, *tolerances)
        found.append(new)
    return found


def gradient_seconds(solves, weights, batch, rtol, atol):
    """Seconds of gradients through Kvaerno5, at the loosest tolerance that has them."""
    while rtol > 1e-9:
        try:
            return timed(solves.gradients, weights, *batch, rtol, atol)[1]
        except (RuntimeError, ValueError):  # a rejected step without a finite Jacobian
            rtol, atol = rtol / 10, atol / 10
    return float("nan")


def exported_seconds(flow_map, system, starts):
    """The seconds of one jump of one start, by the function that `export_jump` writes."""
    x0, args = as_single(starts.rows(1))
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "jump.bin"
        given = jnp.asarray(x0[0]), None if args is None else jnp.asarray(args[0])
        fd.learn.export_jump(flow_map, *given, batch_size=1, path=path)
        jump = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    batch = (np.asarray(x0),) if args is None else (np.asarray(x0), np.asarray(args))
    call = lambda: jax.block_until_ready(jump(0.0, system.t1, *batch))
    call()  # compiles
    return timed(call)[1]


def run_one(name, options):
    """All numbers of one system."""
    system = SYSTEMS[name]
    learned = fd.learn_solver(**system.problem(), minutes=options.minutes)
    print(learned.report(options.out / f"{name}.png"), flush=True)
    starts = Starts(system)
    peers = Peers(system, starts)
    starts.solve(peers)
    solves, jumps = DiffraxSolves(system, starts.scale), Jumps(learned.flow_map, system)
    map_rows = measure_map(jumps, system, starts)
    targets = [row["equal"] for row in map_rows]
    calls = {solver: functools.partial(solves, solver) for solver in DIFFRAX}
    calls = peers.calls(starts.scale) | calls
    rows = scan(calls, starts, np.min(targets, axis=0))
    time_other_batches(rows, targets, calls, starts)
    numbers = {"minutes": learned.minutes, "flops": learned.flops, "map": map_rows}
    numbers |= {"size": len(starts.scale), "classical": rows}
    numbers["trajectories"] = learned.num_trajectories
    numbers["exported"] = exported_seconds(learned.flow_map, system, starts)
    numbers["gradients"] = measure_gradients(jumps, solves, rows, map_rows, starts)
    return numbers


# --- reports --------------------------------------------------------------------------


def report(name, numbers):
    """The Markdown tables of one system."""
    lines = [
        f"\n## {name}\n",
        f"{numbers['size']} species; learned in {numbers['minutes']:.1f} minutes from "
        f"{numbers['trajectories']:,} trajectories; {numbers['flops'] / 1e3:.3g} kFLOP a "
        f"jump. As `export_jump` writes it, a jump of one start takes "
        f"{milliseconds(numbers['exported'])} ms.\n",
        "| jumps | median error | 90 % | negative | kept, float32 | float64 | gradient: "
        "error | ms for 16 | Kvaerno5 |",
        "| --- " * 9 + "|",
    ]
    for row, gradient in zip(numbers["map"], numbers["gradients"], strict=True):
        cells = [row["jumps"], f"{row['median']:.2%}", f"{row['most']:.2%}"]
        cells += [row["negative"], digits(row["kept_single"]), digits(row["kept_double"])]
        cells += [f"{gradient['error']:.2%}", milliseconds(gradient["seconds"])]
        cells.append(milliseconds(gradient.get("peer_seconds")))
        lines.append(as_line(cells))
    lines.append(
        "\n| jumps | batch | map, ms | best | ms | times | Kvaerno5 | ms | times |"
    )
    lines.append("| --- " * 9 + "|")
    for row, size in itertools.product(numbers["map"], BATCHES):
        seconds = row["seconds"][size]
        cells = [row["jumps"], f"{size:,}", milliseconds(seconds)]
        for solvers in (None, KVAERNO5):
            peer = fastest(numbers["classical"], row["equal"], size, solvers)
            cells += describe(peer, size, seconds)
        lines.append(as_line(cells))
    return "\n".join(lines)


def describe(peer, size, seconds):
    """Three cells: a classical solver, its milliseconds, and how many times the map's."""
    if peer is None:
        return ["none", "", ""]
    theirs = peer["seconds"][size]
    name = f"{peer['solver']}, {peer['rtol']:.0e}, {peer['atol']:.0e}"
    return [name, milliseconds(theirs), f"{theirs / seconds:.3g}"]


def summary(results):
    """A row for each system, of one jump."""
    lines = ["\n## One jump\n", "| system | species | median | 90 % | negative | kept |"]
    lines[1] += " times: 1 | 64 | 4,096 | Kvaerno5: 1 | 64 | 4,096 |"
    lines.append("| --- " * 12 + "|")
    for name, numbers in results.items():
        row = numbers["map"][0]
        cells = [name, numbers["size"], f"{row['median']:.2%}", f"{row['most']:.2%}"]
        cells += [row["negative"], digits(row["kept_single"])]
        for solvers, size in itertools.product((None, KVAERNO5), BATCHES):
            peer = fastest(numbers["classical"], row["equal"], size, solvers)
            cells.append(describe(peer, size, row["seconds"][size])[-1])
        lines.append(as_line(cells))
    return "\n".join(lines)


def as_line(cells):
    return f"| {' | '.join(map(str, cells))} |"


def milliseconds(seconds):
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def digits(number):
    return "" if number is None else f"{number:.1e}"


def draw(results, path):
    """Plots seconds a start against the median error, for batches of 64."""
    size = 4 * len(results), 4
    figure, axes = plt.subplots(
        1, len(results), figsize=size, squeeze=False, layout="constrained"
    )
    for axis, (name, numbers) in zip(axes[0], results.items(), strict=True):
        rows = numbers["classical"]
        for solver in dict.fromkeys(row["solver"] for row in rows):
            mine = [row for row in rows if row["solver"] == solver and not row["failed"]]
            # The fastest of those whose median is no larger.
            target = lambda row: (row["median"], np.inf)
            mine = [row for row in mine if fastest(mine, target(row), 64) is row]
            points = [(row["median"], row["seconds"][64] / 64) for row in mine]
            axis.loglog(*zip(*points, strict=True), "o-", label=solver, markersize=4)
        for num, marker in zip(JUMPS, "*Pd", strict=True):
            row = next(row for row in numbers["map"] if row["jumps"] == num)
            label = "a jump" if num == 1 else f"{num} jumps"
            point = row["equal"][0], row["seconds"][64] / 64
            axis.plot(*point, f"k{marker}", markersize=9, label=label)
        axis.set(title=name, xlabel="median relative error")
    axes[0, 0].set_ylabel("seconds a start, in batches of 64")
    axes[0, -1].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(options):
    options.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in options.systems:
        results[name] = run_one(name, options)
        (options.out / f"{name}.json").write_text(json.dumps(results[name], indent=1))
        print(report(name, results[name]), flush=True)
        jax.clear_caches()
    text = "\n".join(report(name, numbers) for name, numbers in results.items())
    print(summary(results))
    (options.out / "kinetics.md").write_text(f"{text}\n{summary(results)}\n")
    draw(results, options.out / "kinetics.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[*SYSTEMS])
    parser.add_argument("--minutes", type=float, default=5.0, help="to learn each")
    parser.add_argument("--out", type=pathlib.Path, default="out/kinetics")
    main(parser.parse_args())
