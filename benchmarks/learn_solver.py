"""`learn_solver` on many systems without any tuning, beside the advice given beforehand.

    python benchmarks/learn_solver.py --minutes 2   # all of benchmarks/systems.py
    python benchmarks/learn_solver.py --systems kepler --form residual

It prints a row for each system as soon as it is done: the error of one, two and four
jumps on fresh starts (median and 90 %, relative for positive entries and otherwise in
standard deviations), what a jump costs beside the fastest classical solve of equal error,
and what `advise` says of such an error, from other starts and untrained maps. Rows are
kept as JSON under `--out`, beside the reports' figures.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import jax.random as jr
from systems import SYSTEMS

import flowdiffrax as fd


def run(name, minutes, form, out, advice):
    """Advice and a learned solver for one system, as one row."""
    problem = SYSTEMS[name].problem()
    row = {"system": name, "kind": SYSTEMS[name].kind, "minutes": minutes}
    if advice:
        begin = time.perf_counter()
        said = fd.advise(**problem)
        row |= {"advice_seconds": time.perf_counter() - begin, "advice": str(said)}
        row["predicted_solve"] = said.solve and dataclasses.asdict(said.solve)
    learned = fd.learn_solver(**problem, minutes=minutes, form=form)
    learned.report(out / f"{name}.png")
    plan = learned.plan
    row |= {"size": plan.size, "args_size": plan.args_size, "form": plan.form}
    row |= {"network": f"{plan.width}x{plan.depth}", "flops": learned.flops}
    row |= {"num_steps": plan.num_steps, "num_trajectories": learned.num_trajectories}
    row["took"] = learned.minutes
    if advice:
        # Asked again with other starts, for an error as large as it then was.
        tol = learned.errors[0].median
        ask = lambda size: fd.advise(**problem, tol=tol, batch_size=size, key=jr.key(1))
        row["said_of_error"] = {
            cost.batch_size: speedup_of(ask(cost.batch_size), row["network"])
            for cost in learned.costs
        }
    row["errors"] = [dataclasses.asdict(error) for error in learned.errors]
    row["costs"] = [
        dataclasses.asdict(cost) | {"speedup": cost.speedup} for cost in learned.costs
    ]
    return row


def speedup_of(advice, network):
    """The speedup that was said of a network such as `"64x3"`."""
    rows = [r for r in advice.networks if f"{r.width}x{r.depth}" == network]
    return rows[0].speedup if rows else float("nan")


def line(row):
    """A row of the table."""
    percent = lambda x: f"{100 * x:.2g}"
    errors = [f"{percent(e['median'])}, {percent(e['most'])}" for e in row["errors"][:3]]
    speed = [f"{cost['speedup']:.2g}" for cost in row["costs"]]
    said = row.get("said_of_error", {}).values()
    negative = sum(error["num_negative"] for error in row["errors"])
    entries = [row["system"], row["size"], row["network"], *errors, negative, *speed]
    return "| " + " | ".join(map(str, [*entries, *(f"{x:.2g}" for x in said)])) + " |"


def main():
    """Runs the systems, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--form")
    parser.add_argument("--no-advice", dest="advice", action="store_false")
    parser.add_argument("--out", type=pathlib.Path, default="out/learn_solver")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    heads = ["system", "entries", "network", "1 jump: %, 90 %", "2 jumps", "4 jumps"]
    heads += ["negative", "times faster, 64", "1,024"]
    heads += ["said for such an error, 64", "1,024"] if options.advice else []
    print("| " + " | ".join(heads) + " |\n|" + " --- |" * len(heads), flush=True)
    for name in options.systems:
        row = run(name, options.minutes, options.form, options.out, options.advice)
        path = options.out / f"{name}.json"
        path.write_text(json.dumps(row, indent=1, default=float))
        print(line(row), flush=True)


if __name__ == "__main__":
    main()
