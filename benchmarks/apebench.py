r"""Flow maps of PDEs beside the five networks of APEBench, with equal data and budget.

    python benchmarks/apebench.py                    # the errors over 100 steps
    python benchmarks/apebench.py --parts any        # any step length, and seconds
    python benchmarks/apebench.py --parts parameters # viscosities never seen

APEBench trains its networks on single steps of its scenarios, and measures the mean
normalised error of roll-outs. The flow maps learn from the same 50 trajectories of 50
steps, for as many updates of batches of 20, and have about as many weights:

- `one step`: a Fourier neural operator beside the linear step of each wave that fits the
  data best. Its loss is the relative error of single steps.
- `no linear step`: the same without the linear step.
- `any step`: as the first, learned from steps of 1 to 50 at once.

Results are kept in `--out`, and a run that is repeated goes on from there.
"""

import argparse
import functools
import importlib
import json
import pathlib
import sys
import time
import timeit

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

import flowdiffrax as fd

ONE_D = {
    "conv": "Conv;34;10;relu", "resnet": "Res;26;8;relu", "unet": "UNet;13;2;relu",
    "dilated": "Dil;2;32;2;relu", "fno": "FNO;12;18;4;gelu",
}  # fmt: skip
TWO_D = {
    "conv": "Conv;13;10;relu", "resnet": "Res;10;8;relu", "unet": "UNet;5;2;relu",
    "dilated": "Dil;2;12;2;relu", "fno": "FNO;6;5;4;gelu",
}  # fmt: skip
PLANE = {"num_spatial_dims": 2, "num_points": 24}
SCENARIOS = {
    "advection": ("diff_adv", {}), "dispersion": ("diff_disp", {}),
    "Burgers": ("diff_burgers", {}), "KdV": ("diff_kdv", {}),
    "Kuramoto-Sivashinsky": ("diff_ks", {}), "Fisher-KPP": ("diff_fisher", {}),
    "Burgers 2-D": ("diff_burgers_sc", PLANE),
}  # fmt: skip
OURS = ("one step", "no linear step", "any step")
LENGTHS = (1, 2, 5, 10, 25, 50)  # of the steps that `any step` learns from
VISCOSITIES = (0.75, 1.0, 1.5, 2.0, 3.0)  # seen; 1.25 and 2.5 are not


def load(name):
    """Imports APEBench or a package that it needs, instead of this file."""
    folder, path = pathlib.Path(__file__).resolve().parent, sys.path
    sys.path = [each for each in path if pathlib.Path(each).resolve() != folder]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}. Run: pip install apebench==0.1.1") from error
    finally:
        sys.path = path


def make_scenario(name, options, **others):
    kind, settings = SCENARIOS[name]
    steps = options.steps_2d if settings else options.steps
    settings = {"num_points": options.points} | settings | others
    rate = f"adam;{steps};warmup_cosine;0.0;{options.their_rate};{steps // 5}"
    horizon = {"optim_config": rate, "test_temporal_horizon": 100}
    return load("apebench").scenarios.scenario_dict[kind](**settings, **horizon)


def nrmse(made, true):
    """APEBench's error at each time, of shapes (pool, times, channels, *grid)."""
    metrics = load("exponax").metrics
    mean = lambda made, true: metrics.mean_metric(metrics.nRMSE, made, true)
    return np.asarray(jax.vmap(mean, in_axes=1)(made, true), float)


def geometric_mean(errors):
    # A roll-out that blew up counts as an error of a million.
    return float(np.exp(np.mean(np.log(np.fmin(errors, 1e6)))))


channels_last = functools.partial(jnp.moveaxis, source=2, destination=-1)


def train_theirs(scenario, config, seed):
    """As `scenario.run_raw` does for one seed."""
    net_key, shuffle_key = jr.split(jr.PRNGKey(seed))
    how = {"task_config": "predict", "network_config": config}
    net = scenario.get_neural_stepper(**how, key=net_key)
    trainer = scenario.get_trainer(train_config="one")
    begin = time.process_time()
    net = trainer(net, shuffle_key, spawn_tqdm=False)[0]
    seconds = time.process_time() - begin
    true = scenario.get_test_data()
    made = eqx.filter_jit(jax.vmap(load("exponax").rollout(net, 100)))(true[:, 0])
    return nrmse(made, true[:, 1:]), seconds, scenario.get_parameter_count(config)


def linear_step(us):
    """The linear step that fits consecutive states best, for each wave and channel."""
    grid, axes = us.shape[2:-1], tuple(range(2, us.ndim - 1))
    # Relative to the first state of each pair.
    size = jnp.sqrt(jnp.mean(us**2, axis=(*axes, -1), keepdims=True))[:, :-1]
    waves = jnp.fft.rfftn(us, axes=axes)
    before, after = waves[:, :-1] / size, waves[:, 1:] / size
    power = jnp.mean(jnp.abs(before) ** 2, (0, 1))
    # Waves that the data do not have are left as they are.
    least = 1e-8 * jnp.max(power)
    product = jnp.mean(jnp.conj(before) * after, (0, 1))
    rates, axes = jnp.log((product + least) / (power + least)), tuple(range(len(grid)))

    def step(s, t, u, args):
        waves = jnp.exp((t - s) * rates) * jnp.fft.rfftn(u, axes=axes)
        return jnp.fft.irfftn(waves, grid, axes=axes)

    return step


def relative(x, y):
    """The difference in units of the size of the truth, as in the metric."""
    return (x - y) / jnp.sqrt(jnp.sum(y**2) + 1e-8)


def train_ours(us, kind, steps, rate, seed, args=None):
    """Learns a flow map from trajectories of shape (pool, times, *grid, channels)."""
    net_key, key = jr.split(jr.key(seed))
    width, modes = (12, 22) if us.ndim == 4 else (5, 5)
    size = {} if args is None else {"args_size": args.shape[-1]}
    net = fd.nn.FNO(us.shape[2:], width, modes, 4, key=net_key, **size)
    ts = jnp.arange(us.shape[1], dtype=us.dtype)
    flow_map, times = fd.FlowMap(net), fd.times.Neighbours(ts)
    if kind != "no linear step":
        flow_map = fd.flow_maps.StepperFlowMap(linear_step(us), net)
    if kind == "any step":
        each = tuple(fd.times.Neighbours(ts, distance=n) for n in LENGTHS)
        times = fd.times.MixedTimes(each, (1.0,) * len(each))
    # For steps of length 1, the weight is 1.
    weight = fd.weights.InverseGap()
    rates = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 5, steps)
    begin = time.process_time()
    state = fd.train.fit(
        fd.AutonomousFlowMap(flow_map),
        fd.TrajectoryMatching(times, weight, difference=relative),
        fd.data.TrajectoryBatches(ts, us, 20, args),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rates)),
        num_steps=steps, key=key, progress=False,
    )  # fmt: skip
    seconds = time.process_time() - begin
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(net) if jnp.ndim(leaf))
    return state.ema_map, seconds, count


def roll_out(flow_map, length, u0, args=None):
    """The states at times 1 to 100, by jumps of `length` and shorter ones from them."""
    starts = jnp.arange(0, 100, length, dtype=u0.dtype)
    ends = jnp.arange(1, length + 1, dtype=u0.dtype)
    us = fd.solvers.roll_out(flow_map, u0, starts, args, throw=False)
    jump = lambda u, t: flow_map(jnp.zeros_like(t), t, u, args)
    made = jax.vmap(jax.vmap(jump, (None, 0)), (0, None))(us, ends)
    return made.reshape(-1, *u0.shape)[:100]


def test_ours(scenario, flow_map, length=1, args=None):
    true = scenario.get_test_data()
    run = lambda flow_map, u: roll_out(flow_map, length, u, args)
    made = eqx.filter_jit(jax.vmap(run, (None, 0)))(flow_map, channels_last(true)[:, 0])
    return nrmse(jnp.moveaxis(made, -1, 2), true[:, 1:])


def compare(name, options):
    """Prints a row for each network: errors as medians over seeds, seconds, weights."""
    scenario = make_scenario(name, options)
    theirs = TWO_D if scenario.num_spatial_dims == 2 else ONE_D
    steps, points = scenario.num_training_steps, scenario.num_points
    for kind in (*options.networks, *options.maps):
        rows = []
        for seed in range(options.seeds):
            rate = options.their_rate if kind in theirs else options.rate
            file = f"{name}_{kind}_{steps}_{points}_{rate}_{seed}.json"
            file = options.out / file.replace(" ", "-")
            if not file.exists():
                if kind in theirs:
                    found = train_theirs(scenario, theirs[kind], seed)
                else:
                    us = channels_last(scenario.get_train_data())
                    flow_map, *rest = train_ours(us, kind, steps, rate, seed)
                    found = test_ours(scenario, flow_map), *rest
                row = dict(zip(("errors", "seconds", "weights"), found, strict=True))
                file.write_text(json.dumps(row | {"errors": row["errors"].tolist()}))
            rows.append(json.loads(file.read_text()))
        means = [geometric_mean(row["errors"]) for row in rows]
        first, last = (np.median([row["errors"][i] for row in rows]) for i in (0, -1))
        seconds = np.median([row["seconds"] for row in rows])
        cells = [f"{np.median(means):.2g}", f"{min(means):.2g} to {max(means):.2g}"]
        cells += [f"{first:.2g}", f"{last:.2g}", f"{seconds:.0f}"]
        cells += [f"{rows[0]['weights']:,}"]
        print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)


def any_length(name, options):
    """Jumps of lengths seen and not, roll-outs of several, seconds beside ETDRK."""
    scenario = make_scenario(name, options)
    us, steps = channels_last(scenario.get_train_data()), scenario.num_training_steps
    flow_map = train_ours(us, "any step", steps, options.rate, 0)[0]
    start, last = (scenario.get_test_data()[:, i] for i in (0, -1))
    half = make_scenario(name, options, coarse_proportion=0.5).get_coarse_stepper()
    truth = jax.jit(jax.vmap(load("exponax").rollout(half, 100)))(start)
    jump = lambda u, t: jnp.moveaxis(flow_map(0.0, t, jnp.moveaxis(u, 0, -1)), -1, 0)
    jumps = jax.jit(jax.vmap(jax.vmap(jump, (None, 0)), (0, None)))
    ts = jnp.array([1.0, 2.0, 3.0, 7.5, 10.0, 25.0, 37.5, 50.0])
    errors = nrmse(jumps(start, ts), truth[:, (2 * ts).astype(int) - 1])
    for t, error in zip(ts, errors, strict=True):
        print(f"| {name} | one jump of {t:g} | {error:.2g} |", flush=True)
    for n in LENGTHS[:-1]:
        mean = geometric_mean(test_ours(scenario, flow_map, n))
        print(f"| {name} | 100 steps, jumps of {n} | {mean:.2g} |", flush=True)
    runs = {("map", n): functools.partial(jumps_to_end, flow_map, n) for n in LENGTHS}
    for n in (1, 2, 5, 10, 20, 50, 100):
        for order in (2, 4):
            how = {"coarse_proportion": float(n), "order": order}
            step = make_scenario(name, options, **how).get_coarse_stepper()
            runs[f"ETDRK{order}", n] = load("exponax").repeat(step, 100 // n)
    for (method, n), run in runs.items():
        cells = " | ".join(f"{x:.2g}" for x in time_to_end(run, start, last))
        print(f"| {name} | {method} | {100 // n} | {cells} |", flush=True)


def jumps_to_end(flow_map, length, u):
    ts = jnp.arange(0.0, 100.5, length)
    return jnp.moveaxis(fd.sample(flow_map, jnp.moveaxis(u, 0, -1), ts), -1, 0)


def time_to_end(run, start, last):
    """The error at time 100, and seconds for 1 and for 64, the fastest of five runs."""
    run, many = jax.jit(jax.vmap(run)), jnp.resize(start, (64, *start.shape[1:]))
    error = nrmse(run(start)[:, None], last[:, None])[0]
    clock = lambda u: lambda: run(u).block_until_ready()
    fastest = lambda u: min(timeit.repeat(clock(u), number=1, repeat=6))
    return error, fastest(start[:1]), fastest(many)


def parameters(options):
    """One map of the Burgers equation for a range of viscosities, beside one for each."""
    make = lambda v, **how: make_scenario("Burgers", options, diffusion_gamma=v, **how)
    data = lambda *value, **how: channels_last(make(*value, **how).get_train_data())
    few = lambda seed: {"num_train_samples": 10, "train_seed": seed}
    us = jnp.concatenate([data(v, **few(i)) for i, v in enumerate(VISCOSITIES)])
    label = lambda value: jnp.log(jnp.array([value / 1.5]))
    args = jnp.repeat(jnp.stack([label(v) for v in VISCOSITIES]), 10, axis=0)
    learn = functools.partial(train_ours, seed=0, steps=options.steps, rate=options.rate)
    shared = learn(us, "one step", args=args)[0]
    for value in (1.25, 2.5):
        own = learn(data(value), "one step")[0]
        for who, flow_map, given in (("all", shared, label(value)), ("one", own, None)):
            errors = test_ours(make(value), flow_map, 1, given)
            mean = geometric_mean(errors)
            print(f"| viscosity {value} | a map of {who} | {mean:.2g} |", flush=True)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    parts = "errors", "any", "parameters"
    add("--parts", nargs="+", choices=parts, default=["errors"])
    add("--scenarios", nargs="+", choices=SCENARIOS, default=[*SCENARIOS])
    add("--networks", nargs="+", choices=ONE_D, default=[*ONE_D])
    add("--maps", nargs="+", choices=OURS, default=[*OURS[:2]])
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=1000, help="in one dimension")
    add("--steps-2d", type=int, default=300)
    add("--points", type=int, default=64, help="in one dimension")
    add("--rate", type=float, default=6e-3, help="the peak for flow maps")
    add("--their-rate", type=float, default=1e-3, help="for networks of APEBench")
    add("--out", type=pathlib.Path, default="out/apebench")
    options = parser.parse_args()
    load("apebench")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.scenarios:
        if "errors" in options.parts:
            compare(name, options)
        if "any" in options.parts:
            any_length(name, options)
    if "parameters" in options.parts:
        parameters(options)


if __name__ == "__main__":
    main()
