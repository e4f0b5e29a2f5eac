"""Draws flow_map.png: what a solver does with an ODE, and what its flow map does.

python docs/figures/flow_map.py
"""

import pathlib

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import flowdiffrax as fd

WEIGHTS, MEANS, STD = np.array([0.4, 0.35, 0.25]), np.array([-1.9, 0.3, 2.1]), 0.22
BLUE, ORANGE, GREY = "#3f51b5", "#e65100", "#9e9e9e"

velocity = fd.exact.GaussianMixtureVelocity(WEIGHTS, MEANS[:, None], np.full(3, STD**2))
exact = fd.ODEFlowMap(velocity)


def bell(x, mean, std):
    """The density of a normal."""
    return np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))


def field(axes, title):
    """Trajectories, and the densities at both ends."""
    quantiles = jax.scipy.stats.norm.ppf((jnp.arange(23) + 0.5) / 23)[:, None]
    ts = jnp.linspace(0, 1, 81)
    paths = fd.solve_trajectories(velocity, quantiles, ts)[:, :, 0]
    axes.plot(ts, paths.T, color=GREY, linewidth=0.6, alpha=0.8)
    x = np.linspace(-3, 3, 400)
    data = sum(w * bell(x, m, STD) for w, m in zip(WEIGHTS, MEANS, strict=True))
    for start, sign, density in ((0, -1, bell(x, 0, 1)), (1, 1, data)):
        axes.fill_betweenx(x, start, start + sign * 0.2 * density, color=GREY, alpha=0.4)
    axes.text(-0.02, 3.0, "base", ha="right", color="#616161")
    axes.text(1.02, 3.0, "data", ha="left", color="#616161")
    axes.set_title(title, fontsize=11)
    axes.set(xlim=(-0.16, 1.2), ylim=(-2.9, 3.3), xticks=[0, 1], yticks=[])
    axes.set_xlabel("time", labelpad=-8)
    axes.spines[["top", "right", "left"]].set_visible(False)


def solver_steps(axes, x0):
    """What Tsit5 does, to a tolerance of 1e-4."""
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Tsit5(),
        0.0,
        1.0,
        0.05,
        jnp.array([x0]),
        stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4),
        saveat=diffrax.SaveAt(t0=True, steps=True),
        max_steps=64,
    )
    keep = np.isfinite(sol.ts)
    ts, ys = np.asarray(sol.ts)[keep], np.asarray(sol.ys)[keep, 0]
    axes.plot(ts, ys, "o-", color=BLUE, markersize=4, linewidth=1.5)


def jump(axes, s, t, x, text, bend, offset):
    """An arrow from a state to where the exact map takes it."""
    end = float(exact(s, t, jnp.array([x]))[0])
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "linewidth": 1.8}
    style |= {"color": ORANGE, "connectionstyle": f"arc3,rad={bend}"}
    axes.annotate("", (t, end), (s, x), arrowprops={**style, "shrinkA": 3, "shrinkB": 1})
    axes.plot([s, t], [x, end], "o", color=ORANGE, markersize=4)
    axes.annotate(text, ((s + t) / 2, (x + end) / 2 + offset), color=ORANGE, ha="center")
    return end


def main():
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3.5), layout="constrained")
    field(left, "A solver follows the velocity, step by step")
    solver_steps(left, 1.1)
    solver_steps(left, -0.75)
    field(right, "A flow map jumps along the trajectory")
    jump(right, 0.0, 1.0, 1.1, "$X_{0,1}(x)$", -0.3, 1.12)
    middle = jump(right, 0.0, 0.5, -0.75, "$X_{0,u}$", 0.3, -1.0)
    jump(right, 0.5, 1.0, middle, "$X_{u,1}$", 0.3, -1.05)
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
