"""Maps from data beside the four PyTorch surrogates of the CODES benchmark.

    git clone https://github.com/robin-janssen/CODES-Benchmark codes
    pip install torch torchode schedulefree optuna h5py tqdm pyyaml matplotlib tabulate
    python benchmarks/surrogates.py --codes codes                # five hours on one core
    python benchmarks/surrogates.py --codes codes --seconds 20   # an hour

CODES (Janssen, Sulzer and others, arXiv:2603.08567) compares a fully connected network,
MultiONet, a latent neural ODE and a latent polynomial. Its code is used from a checkout,
and none of it is part of this project. `flowdiffrax.learn.learn_from_data` gets the same
trajectories, and nothing else: all of its settings are its own choices.

- Data are made by its generator at its own numbers: 350 trajectories to train on, 50 to
  choose by, 100 for the errors. The generator draws all three from one seed, so that the
  last two repeat the first; here each has its own. The sets `branca*`, `cloud*`,
  `primordial*` and `simple_primordial` are left out: they are downloads, and nothing in
  the repository makes them.
- For all, one core, float32, and `--seconds` of training. These are seconds of processor
  time, so that other jobs on the machine take no part of them. `learn_from_data` has to
  do everything in them, and to compile; a surrogate, its `fit`. How many steps or epochs
  that is follows from a short measurement, which is not counted. What it took in the end
  is reported.
- Each surrogate comes with a configuration that is tuned for the set, and with defaults.
  Both are for thousands of epochs on a GPU, in batches of 35,838 states or 717
  trajectories, of which there would be few steps here. Batches are 1,024 states or 32
  trajectories instead, and the learning rate is at least 1e-3: on `lotka_volterra`,
  smaller ones were worse. The better of the two configurations after a sixth of the
  seconds, by the error on the second part of the data, is trained in full. These trials
  are not counted. The least learning rate of the cosine schedule is a tenth of the first,
  as its documentation says; its code takes 0.1, whatever the first is. Losses are its
  own; those of the latent models also weigh first and second derivatives in time. A
  latent ODE becomes slower to solve as it learns, and is stopped at 1.25 times the
  seconds.
- Data are normalised as in its `config.yaml`: logarithms to base 10, then to [-1, 1] for
  each entry. The oscillators, whose entries change sign, are not transformed.
- A prediction is of the states at all times from the first state, and the parameters if
  there are any: one jump for each time.
- Errors are as CODES defines them, over all trajectories, times and entries: the mean and
  the 99 % quantile of the absolute error in decades (for the oscillators, in the units of
  the state), and the mean and the median of |y - exact| / max(|exact|, 1e-10).
- `us` is the time of a prediction in microseconds for each state: the shortest of several
  runs on all test trajectories in one batch, divided by the number of states.
- `interpolation` learns from every fourth time, `extrapolation` from the first 50 of 101,
  and `sparse` from every fourth trajectory, with the configuration found before. Errors
  are over all times. Where a time is beyond the longest jump that was learned, the map
  makes several equal jumps; the surrogates are given the true times, where the original
  gives them other units of time after training.

Rows are printed as soon as they are done, and everything is kept under `--out`.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import time
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import flowdiffrax as fd

# The name of each set in CODES, its name in the generator, and whether it is positive.
SETS = {
    "lotka_volterra": ("lotka_volterra", True),
    "lv_parametric": ("parametric_lotka_volterra", True),
    "simple_ode": ("simple_ode", True),
    "simple_reaction": ("reaction", True),
    "coupled_oscillators": ("nonlinear_oscillators", False),
    "osu2008": ("osu", True),
}
PARTS = {"train": 350, "test": 50, "val": 100}
SETTINGS = {"main": 1, "interpolation": 4, "extrapolation": 50, "sparse": 4}
# Sizes of a batch, which is of states for these, and of trajectories for the others.
OF_STATES = {"FullyConnected": 1024, "MultiONet": 1024}
SURROGATES = OF_STATES | {"LatentNeuralODE": 32, "LatentPoly": 32}
OURS = "flowdiffrax"
NUM_VALIDATIONS = 10
FEW_STEPS = 100  # of the training that is not counted
LEAST_RATE = 1e-3
# A latent ODE may become slower to solve. It ends here, with its best weights so far.
MOST_SHARE = 1.25
TINY = 1e-25  # Its `tolerance`.


@dataclasses.dataclass
class Data:
    """Trajectories by part, with shared times, and with parameters or `None` by part."""

    ts: np.ndarray
    ys: dict
    params: dict

    def both(self):
        """What is trained on and chosen by, as one."""
        parts = "train", "test"
        ys = np.concatenate([self.ys[part] for part in parts])
        rows = [self.params[part] for part in parts]
        return ys, None if rows[0] is None else np.concatenate(rows)


# --- data -----------------------------------------------------------------------------


def make_data(name, folder):
    """Makes a set by the generator of CODES, or reads what it made before."""
    path = folder / f"{name}.npz"
    if not path.exists():
        np.savez(path, **generate(SETS[name][0]))
    with np.load(path) as kept:
        ys = {part: kept[part] for part in PARTS}
        params = {part: kept.get(f"{part}_params") for part in PARTS}
        return Data(kept["ts"], ys, params)


def generate(name):
    """All arrays of a set."""
    from datasets._data_generation import generate_data

    info = generate_data.FUNCS[name]
    names = "init_func", "log_time", "final_transform"
    given = {key: info[key] for key in names if key in info}
    exact = {"method": "DOP853", "atol": 1e-8, "rtol": 1e-8}
    given |= {"solver_options": info.get("solver_options", exact)}
    sampling = info["sampling"] or {}
    arrays = {"ts": times_of(info)}
    for seed, (part, num) in enumerate(PARTS.items()):
        # Some starts are drawn without a seed.
        np.random.seed(seed)  # noqa: NPY002
        arrays[part], params = generate_data.create_data(
            num,
            info["func"],
            info["tsteps"],
            info["ndim"],
            dict(sampling),
            seed=seed,
            params_bounds=sampling.get("params_bounds"),
            **given,
        )
        if params is not None:
            arrays[f"{part}_params"] = params
    return arrays


def times_of(info):
    """The times at which the states really are."""
    ts = np.asarray(info["tsteps"], float)
    if not info.get("log_time", False):
        return ts
    # It solves in the logarithm of the time in seconds, from a millionth of a year.
    first = np.log10(1e-6 * 365 * 24 * 3600)
    return np.logspace(first, np.log10(ts[-1]), len(ts))


def subset(data, setting):
    """What is learned from in a setting."""
    value = SETTINGS[setting]
    rows, columns = slice(None), slice(None)
    if setting == "sparse":
        rows = slice(None, None, value)
    elif setting == "interpolation":
        columns = slice(None, None, value)
    elif setting == "extrapolation":
        columns = slice(value)
    ys = {part: y[rows, columns] for part, y in data.ys.items()}
    params = {part: p if p is None else p[rows] for part, p in data.params.items()}
    return Data(data.ts[columns], ys, params)


# --- measurement ----------------------------------------------------------------------


def errors_of(ys, exact, log):
    """The errors as CODES reports them; `ys` and `exact` as its networks see them."""
    ys, exact = np.float64(ys), np.float64(exact)
    error = abs(ys - exact)
    if log:
        ys, exact = 10**ys, 10**exact
    relative = abs(ys - exact) / np.maximum(abs(exact), 1e-10)
    return {
        "mae": float(error.mean()),
        "p99": float(np.percentile(error, 99)),
        "relative": float(relative.mean()),
        "median_relative": float(np.median(relative)),
    }


def transformed(ys, log):
    """The states, or their logarithms to base 10."""
    return np.log10(np.maximum(np.float64(ys), TINY)) if log else np.float64(ys)


def clock():
    """The seconds of this process, which other jobs on the machine do not take."""
    return time.process_time()


def seconds_of(call):
    """The shortest of several times that a call takes, after one to warm up."""
    call()
    times = []
    while len(times) < 3 or sum(times) < 1.0 and len(times) < 100:
        begin = clock()
        call()
        times.append(clock() - begin)
    return min(times)


# --- flowdiffrax ----------------------------------------------------------------------


def num_jumps(ts, longest):
    """How many equal jumps to each of the times, none of them longer than was learned."""
    return np.maximum(np.ceil((ts - ts[0]) / longest - 1e-6), 1)


@eqx.filter_jit
def predict(flow_map, ts, counts, x0, args, most):
    """The states at all times, of shape `(trajectories, times, size)`."""

    def one(t, count, x, args):
        at = lambda index: ts[0] + (t - ts[0]) * jnp.minimum(index / count, 1)
        for index in range(most):
            x = flow_map(at(index), at(index + 1), x, args)
        return x

    over_times = jax.vmap(one, (0, 0, None, None))
    axes = None, None, 0, None if args is None else 0
    return jax.vmap(over_times, axes)(ts, counts, x0, args)


def learn(known, **given):
    """What `learn_from_data` learns, and the seconds that it takes."""
    jax.clear_caches()  # It compiles as if it were the first call.
    ys, params = known.both()
    begin = clock()
    learned = fd.learn.learn_from_data(known.ts, ys, params, progress=False, **given)
    return learned, clock() - begin


def seconds_of_step(learned):
    """The mean seconds of a step of the training."""
    step = fd.train.make_step(learned.parts.objective, learned.optim)
    # A copy, since a step may reuse the memory of the state.
    state = jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, learned.state)
    state, _ = step(state, learned.parts.batches, None)
    jax.block_until_ready(state.step)
    begin = clock()
    for _ in range(2 * FEW_STEPS):
        state, _ = step(state, learned.parts.batches, None)
    jax.block_until_ready(state)
    return (clock() - begin) / (2 * FEW_STEPS)


class Ours:
    """The map of `learn_from_data`, on one set."""

    def __init__(self, data, log):
        self.data, self.log = data, log
        learned, took = learn(data, num_steps=FEW_STEPS)
        self.step = seconds_of_step(learned)
        self.rest = max(took - FEW_STEPS * self.step, 0)

    def learn(self, setting, seconds):
        """A row of the map that is learned in a setting."""
        data, known = self.data, subset(self.data, setting)
        num_steps = int((seconds - self.rest) / self.step)
        if num_steps < FEW_STEPS:
            return {"method": OURS}
        learned, took = learn(known, num_steps=num_steps)
        row = {"method": OURS, "seconds": took, "num_steps": num_steps}
        plan = learned.plan
        row["configuration"] = f"{plan.form}, {plan.width}x{plan.depth}"
        single = lambda rows: None if rows is None else jnp.asarray(rows, jnp.float32)
        counts = num_jumps(data.ts, known.ts[-1] - known.ts[0])
        given = [single(data.ts), single(counts), single(data.ys["val"][:, 0])]
        given += [single(data.params["val"]), int(counts.max())]
        call = lambda: jax.block_until_ready(predict(learned.flow_map, *given))
        exact = transformed(data.ys["val"], self.log)
        row |= errors_of(transformed(call(), self.log), exact, self.log)
        row["us"] = 1e6 * seconds_of(call) / exact[..., 0].size
        row["history"] = learned.history
        return row


# --- CODES ----------------------------------------------------------------------------


@dataclasses.dataclass
class UntilTime:
    """Batches, until it is too late for another epoch."""

    loader: Any
    end: float

    def __iter__(self):
        if clock() > self.end:
            raise TimeoutError
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)

    @property
    def dataset(self):
        return self.loader.dataset


class Surrogate:
    """One of the surrogates, on one set."""

    def __init__(self, name, data, log):
        from codes.utils.data_utils import normalize_data

        self.name, self.log, self.whole = name, log, data
        self.configuration = {}
        order = "train", "test", "val"
        ys = [transformed(data.ys[part], log).astype(np.float32) for part in order]
        modes = dict(mode="minmax", per_species=True)
        self.units, *ys = normalize_data(*ys, **modes)
        self.units["log10_transform"] = log
        params = [data.params[part] for part in order]
        if params[0] is not None:
            params = normalize_data(*map(np.float32, params), **modes)[1:]
        # Its times, from 0 to 1 whatever the set.
        ts = np.linspace(0, 1, len(data.ts))
        pairs = zip(order, ys, params, strict=True)
        named = {part: (y, p) for part, y, p in pairs}
        self.data = Data(
            ts,
            {part: y for part, (y, _) in named.items()},
            {part: p for part, (_, p) in named.items()},
        )

    def make(self, configuration, known):
        """An untrained model."""
        from codes import surrogates
        from codes.utils import set_random_seeds

        set_random_seeds(42, "cpu")
        params = known.params["train"]
        model = getattr(surrogates, self.name)(
            device="cpu",
            n_quantities=known.ys["train"].shape[2],
            n_timesteps=len(known.ts),
            n_parameters=0 if params is None else params.shape[1],
            config=dict(configuration),
            training_id="surrogates",
        )
        model.normalisation = self.units
        # The coders of its older latent ODEs are float64, and do not take its data.
        return model.float()

    def loaders(self, model, known, batch_size=None):
        """For training, for choosing, and for the errors."""
        return model.prepare_data(
            *(known.ys[part] for part in PARTS),
            timesteps=known.ts,
            batch_size=batch_size or SURROGATES[self.name],
            shuffle=True,
            dummy_timesteps=False,
            **{f"dataset_{part}_params": known.params[part] for part in PARTS},
        )

    def costs(self, configuration, known):
        """Seconds of an epoch, and of a validation, from those of one batch."""
        num = SURROGATES[self.name]
        if self.name in OF_STATES:
            num = max(num // len(known.ts), 1)
        some = lambda rows: None if rows is None else rows[:num]
        few = Data(
            known.ts,
            {part: some(y) for part, y in known.ys.items()},
            {part: some(p) for part, p in known.params.items()},
        )
        batches = [len(loader) for loader in self.loaders(self.make({}, known), known)]
        took = {}
        for epochs in (1, 1, 3):
            model = self.make(configuration, known)
            train, *_ = self.loaders(model, few)
            begin = clock()
            model.fit(train, train, epochs)
            took[epochs] = clock() - begin
        begin = clock()
        model.predict(train)
        # It calls the model once more than there are batches.
        prediction = (clock() - begin) / (len(train) + 1)
        epoch = max(took[3] - took[1], 1e-4) / 2 / len(train) * batches[0]
        # A validation predicts the training data once, and the others twice.
        return epoch, prediction * (batches[0] + 2 * batches[1] + 3)

    def fit(self, configuration, known, seconds, costs):
        """A trained model, and the seconds that it took; `None` if an epoch takes all."""
        import torch

        epoch, validation = costs
        left = seconds - (NUM_VALIDATIONS + 1) * validation
        num_epochs = int(max(left, 0.5 * seconds) / epoch)
        if num_epochs < 2:
            return None
        model = self.make(configuration, known)
        model.checkpointing = True
        model.update_epochs = max(num_epochs // NUM_VALIDATIONS, 1)
        # The last epoch is one of those after which it is validated.
        num_epochs -= (num_epochs - 1) % model.update_epochs
        train, test, _ = self.loaders(model, known)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            begin = clock()
            train = UntilTime(train, begin + MOST_SHARE * seconds)
            try:
                model.fit(train, test, num_epochs)
            except TimeoutError:
                if os.path.exists(model._checkpoint_path):
                    model.load_state_dict(torch.load(model._checkpoint_path))
            took = clock() - begin
        model.eval()
        return model, took

    def error(self, model, known):
        """The mean error on the part of the data that is there to choose by."""
        _, test, _ = self.loaders(model, known)
        ys, exact = (np.asarray(y) for y in model.predict(test, leave_log=True))
        return float(np.nan_to_num(abs(ys - exact), nan=np.inf).mean())

    def choose(self, configurations, seconds):
        """The best configuration after a short training, by name."""
        tried, costs = {}, {}
        for name, configuration in configurations.items():
            costs[name] = self.costs(configuration, self.data)
            trained = self.fit(configuration, self.data, seconds, costs[name])
            if trained is not None:
                tried[name] = self.error(trained[0], self.data)
        # If there is no time for any, the one that is fastest to train.
        scores = tried or costs
        return min(scores, key=lambda name: scores[name]), tried

    def learn(self, setting, seconds):
        """A row of the surrogate, trained in a setting."""
        import torch

        known = subset(self.data, setting)
        costs = self.costs(self.configuration, known)
        trained = self.fit(self.configuration, known, seconds, costs)
        row = {"method": self.name}
        if trained is None:
            return row
        model, row["seconds"] = trained
        row["epochs"] = model.n_epochs
        model.n_timesteps = len(self.data.ts)
        num = self.data.ys["val"].shape[0] * len(self.data.ts)
        *_, val = self.loaders(model, self.data, num)
        ys, _ = model.predict(val, leave_log=True)
        row |= errors_of(ys, transformed(self.whole.ys["val"], self.log), self.log)
        batches = list(val)

        def call():
            with torch.inference_mode():
                for batch in batches:
                    model(batch)

        row["us"] = 1e6 * seconds_of(call) / num
        row["weights"] = sum(weight.numel() for weight in model.parameters())
        return row


def configurations_of(codes, set_name, surrogate):
    """The configurations to try: the one that is tuned for the set, and the default."""
    from codes import surrogates

    path = codes / "datasets" / set_name / "surrogates_config.py"
    spec = importlib.util.spec_from_file_location("surrogates_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tuned = dataclasses.asdict(getattr(module, f"{surrogate}Config")())
    default = {
        "learning_rate": getattr(surrogates, surrogate)(device="cpu").config.learning_rate
    }
    found = {}
    for name, own in {"tuned": tuned, "default": default}.items():
        rate = max(own["learning_rate"], LEAST_RATE)
        given = own | {"learning_rate": rate}
        if given.get("scheduler", "cosine") == "cosine":
            given["eta_min"] = 0.1 * rate
        found[name] = given
    return found


# --- reports --------------------------------------------------------------------------

HEADS = ["set", "setting", "method", "configuration", "s", "mean", "99 %", "relative"]
HEADS += ["median relative", "us"]


def line(row):
    """A row of the long table."""
    digits = lambda name: f"{row[name]:.2g}" if name in row else ""
    cells = [row["set"], row["setting"], row["method"], row.get("configuration", "")]
    cells += [f"{row['seconds']:.0f}" if "seconds" in row else "too slow"]
    names = "mae", "p99", "relative", "median_relative", "us"
    return "| " + " | ".join([*cells, *map(digits, names)]) + " |"


def best_of(rows):
    """The surrogate with the least error; `None` if none could be trained."""
    rows = [row for row in rows if row["method"] != OURS and "mae" in row]
    return min(rows, key=lambda row: row["mae"], default=None)


def summary(rows):
    """A row for each set: the error beside the best surrogate's, in each setting."""
    heads = ["set"]
    for setting in SETTINGS:
        heads += [setting] + ["us"] * (setting == "main")
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for name in dict.fromkeys(row["set"] for row in rows):
        cells = [name]
        for setting in SETTINGS:
            key = name, setting
            some = [row for row in rows if (row["set"], row["setting"]) == key]
            ours = next((row for row in some if row["method"] == OURS), None)
            best = best_of(some)
            pair = (ours, best) if ours and "mae" in ours and best else ()
            text = ", ".join(f"{row['mae']:.2g}" for row in pair)
            cells.append(f"{text} ({best['method']})" if pair else "")
            if setting == "main":
                cells.append(", ".join(f"{row['us']:.2g}" for row in pair))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(name, options):
    """The rows of one set, one after the other."""
    data, (_, log) = make_data(name, options.out), SETS[name]
    made, chosen = {}, {}
    for method in options.methods:
        if method == OURS:
            made[method] = Ours(data, log)
            continue
        made[method] = Surrogate(method, data, log)
        found = configurations_of(options.codes, name, method)
        best, tried = made[method].choose(found, options.seconds / 6)
        chosen[method] = {"configuration": best, "tried": tried}
        made[method].configuration = found[best]
    for setting in options.settings:
        for method in options.methods:
            row = made[method].learn(setting, options.seconds)
            yield {"set": name, "setting": setting} | row | chosen.get(method, {})


def main():
    """Runs all sets, settings and methods."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--codes", type=pathlib.Path, required=True, help="its checkout")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    methods = [OURS, *SURROGATES]
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seconds", type=float, default=120.0, help="to train each")
    parser.add_argument("--out", type=pathlib.Path, default="out/surrogates")
    options = parser.parse_args()
    options.codes = options.codes.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TQDM_DISABLE", "1")
    if hasattr(os, "sched_setaffinity"):
        # One core for all, before JAX starts its threads.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(options.codes))
    print(f"| {' | '.join(HEADS)} |\n" + "| --- " * len(HEADS) + "|", flush=True)
    rows = []
    for name in options.sets:
        for row in run(name, options):
            rows.append(row)
            print(line(row), flush=True)
            mine = [row for row in rows if row["set"] == name]
            text = json.dumps(mine, indent=1, default=str)
            (options.out / f"{name}.json").write_text(text)
    print(f"\n{summary(rows)}")


if __name__ == "__main__":
    main()
