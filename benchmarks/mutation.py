"""Finds small mistakes in the library that the quick tests do not notice.

Each mutant is the library with one mistake: a lost argument, two times swapped, another
default, a sign, a boundary, a wrong axis. For each mutant, only the quick tests that run
the line are run, fastest first, until one fails. This needs Linux (it forks) and the
`tests` group:

    python benchmarks/mutation.py --sample 200 --seed 0 --workers 2

The first run traces the quick tests once, which takes ten to twenty minutes. Use
`--trace` to trace again after tests or sources have changed. `--again` runs only the
survivors of the last run, and `--list` prints mutants without running any. The mutants
are a random sample, spread over the groups of modules. The report gives the share that
was noticed with its 95 % interval, by group and by operator, and names each survivor.

Some code is omitted, since no test should depend on it: error messages, warnings,
docstrings, annotations, and the mutants of `EQUIVALENT`, which change nothing, each for
the reason given.
"""

import argparse
import ast
import collections
import functools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import typing
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path("src/flowdiffrax")
# Tests that run last, and tests that read the sources and so would notice anything.
TABLES = ("tests/test_defaults.py",)
# Constructs every objective with settings of its own, which runs none of their lines.
SETTINGS = ("tests/objectives/test_objectives.py::test_objectives_keep_their_settings",)
READERS = ("tests/objectives/test_mutants.py", "tests/test_prose.py")
GROUPS = {
    "identities": ["identities.py"],
    "objectives": ["objectives/*.py", "weights/*.py", "times/*.py", "paths/*.py"],
    "solvers": ["solvers/*.py"],
    "estimates": ["estimates/*.py"],
    "train": ["train/*.py"],
    "data": ["data/*.py"],
    "rest": [
        *("flow_maps/*.py", "velocities/*.py", "likelihood/*.py", "_derivative.py"),
        *("exact/*.py", "metrics/*.py", "nn/*.py", "plot/*.py", "testing/*.py"),
        *("images/*.py", "images/sets/*.py", "images/scores/*.py", "images/command/*.py"),
    ],
}
OPERATORS = [
    *("lost argument", "ignored argument", "changed default"),
    *("swapped times", "sign", "boundary", "wrong axis"),
]
# (file, correct line, mutated line): why the mutation changes nothing.
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "solvers/_hybrid.py",
        "helps = taken & (ratio < 0.5)",
        "helps = taken & ((ratio <= 0.5))",
    ): "no ratio is exactly one half",
    (
        "solvers/_hybrid.py",
        "classical = self.classical.evaluate(t0, left=left)",
        "classical = self.classical.evaluate(t0)",
    ): "Diffrax's own interpolations ignore it",
    (
        "solvers/_sample.py",
        "if grid.shape[0] == 2:",
        "if grid.shape[0] == 1:",
    ): "a scan of one jump is that jump",
    (
        "times/_grids.py",
        "j = jnp.minimum((second * (size - 1)).astype(int), size - 2)",
        "j = jnp.minimum((second * (size - 1)).astype(int), size - 1)",
    ): "for products that are rounded up alone",
    (
        "times/_karras.py",
        "i = jnp.minimum(jnp.floor(first * num_pairs), num_pairs - 1)",
        "i = jnp.minimum(jnp.floor(first * num_pairs), (num_pairs + 1))",
    ): "for products that are rounded up alone",
    (
        "solvers/_hybrid.py",
        "jump_error = scale(jnp.where(taken, ratio, 0) ** power, jump_error)",
        "jump_error = scale(jnp.where(taken, ratio, 1) ** power, jump_error)",
    ): "the error of a jump that is not taken is not used",
    (
        "solvers/_jump.py",
        "values = np.cos(np.outer(np.pi - angles, np.arange(degree + 1)))",
        "values = np.cos(np.outer((np.pi + angles), np.arange(degree + 1)))",
    ): "the cosine is even about multiples of pi",
    (
        "solvers/_dense.py",
        "if is_concrete((first, solution.t0)) and not jnp.all(first == solution.t0):",
        "if is_concrete((first, solution.t0)) and not jnp.any(first == solution.t0):",
    ): "there is one time",
    (
        "estimates/_clock.py",
        "return lax.stop_gradient(jnp.where(grade > _LEAST_GRADE, grade, 0))",
        "return lax.stop_gradient(jnp.where((grade >= _LEAST_GRADE), grade, 0))",
    ): "no grade is exactly the least",
    (
        "solvers/_hybrid.py",
        "is_known = (size > 1e-5) & (rate > 1e-5)",
        "is_known = ((size >= 1e-05)) & (rate > 1e-5)",
    ): "no size is exactly that",
    (
        "times/_logit_normal.py",
        "gap = jax.nn.sigmoid(self.mean + self.std * _quantile(first))",
        "gap = jax.nn.sigmoid((self.mean - self.std * _quantile(first)))",
    ): "the distribution is symmetric, and `first` uniform",
    (
        "paths/_optimal_transport.py",
        "return _nth_largest(limits, max(round(share * limits.size), 1))",
        "return _nth_largest(limits, max(round(share * limits.size), 0))",
    ): "a weight of NaN pairs equal conditions only, as an infinite one does",
    (
        "paths/_optimal_transport.py",
        "found = jax.lax.fori_loop(0, size - 1, add_bit, 0 * one)",
        "found = jax.lax.fori_loop(0, size - 0, add_bit, 0 * one)",
    ): "a shift by -1 leaves no bit",
    (
        "estimates/_collocation.py",
        "index = jnp.sum(jnp.asarray(ends[:-1], share.dtype) <= share, "
        "dtype=jnp.int32) - 1",
        "index = jnp.sum(jnp.asarray(ends[:-1], share.dtype) <= share) - 1",
    ): "an index of either kind",
    (
        "solvers/_tilted.py",
        "end = look_ahead(mean + std * z)",
        "end = look_ahead((mean - std * z))",
    ): "a normal draw is as likely with the other sign",
    (
        "paths/_trajectory.py",
        "return jnp.clip(index, 0, self.ts.size - 1)",
        "return jnp.clip(index, 0, (self.ts.size + 1))",
    ): "JAX reads the last row beyond the end",
    (
        "times/_grids.py",
        "i = jnp.minimum((first * size).astype(int), size - 1)",
        "i = jnp.minimum((first * size).astype(int), (size + 1))",
    ): "for products that are rounded up alone",
    (
        "objectives/_batch.py",
        "losses = eqx.filter_vmap(one, in_axes=(axes, 0, 0, axes, 0))(",
        "losses = eqx.filter_vmap(one, in_axes=(axes, 0, -1, axes, 0))(",
    ): "times have one axis",
}
AXES = ("axis", "axes", "in_axes", "out_axes")
# Arguments of fields, of places in the source, and settings that are Python's or NumPy's
# defaults here anyway.
KEPT = ("default", "static", "converter", "stacklevel", "encoding", "allow_pickle")
# Arguments that change only the run time, or only guard against our own mistakes.
KEPT += ("strict", "unroll")
TIMES = {"s", "t", "u", "t0", "t1", "tprev", "tnext"}
OPPOSITES = {
    **{"max": "min", "maximum": "minimum", "argmax": "argmin", "amax": "amin"},
    **{"floor": "ceil", "any": "all"},
}
OPPOSITES |= {there: here for here, there in OPPOSITES.items()}


class Mutant(typing.NamedTuple):
    group: str
    file: str
    operator: str
    line: int  # the first line of the node, counted from 1
    scope: tuple[int, int]  # first and last line of the function or class around it
    start: int  # of the replaced text, in characters
    stop: int
    new: str

    def text(self, source: str) -> str:
        return source[: self.start] + self.new + source[self.stop :]

    def lines(self, source: str) -> tuple[str, str]:
        """The statement's lines before and after, on one line each."""
        first = source.rfind("\n", 0, self.start) + 1
        last = source.find("\n", self.stop)
        before = source[first:last]
        after = source[first : self.start] + self.new + source[self.stop : last]
        return " ".join(before.split()), " ".join(after.split())


# Operators: each yields (operator, replaced node, replacement)


def changed(node: ast.expr, **fields) -> ast.expr:
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def is_time(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in TIMES


def is_number(node: ast.AST | None) -> typing.TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def other_number(value):
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) or value == 0 else value / 2


def called(node: ast.Call) -> str:
    return ast.unparse(node.func).split(".")[-1]


@functools.cache
def required() -> dict[str, set[str]]:
    """Parameters without defaults of all functions and classes, by unqualified name."""
    found = collections.defaultdict(set)
    for path in sorted((ROOT / SOURCE).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                fields = [f for f in node.body if isinstance(f, ast.AnnAssign)]
                names = {ast.unparse(f.target) for f in fields if f.value is None}
                found[node.name] |= names
                found["cls"] |= names
            elif isinstance(node, ast.FunctionDef):
                args = node.args
                positional = args.args[: len(args.args) - len(args.defaults)]
                rows = zip(args.kwonlyargs, args.kw_defaults, strict=True)
                keywords = [argument for argument, default in rows if default is None]
                found[node.name] |= {a.arg for a in positional + keywords}
    return found


def of_call(node: ast.Call):
    if called(node) in ("minimum", "maximum"):
        return  # the order of arguments does not matter
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is None:
            continue
        if keyword.arg in AXES:
            yield from of_axis(keyword.value)
        elif keyword.arg in required()[called(node)]:
            continue  # this would certainly raise a `TypeError`
        elif keyword.arg not in KEPT:
            rest = node.keywords[:index] + node.keywords[index + 1 :]
            yield "lost argument", node, changed(node, keywords=rest)
    for index, argument in enumerate(node.args):
        name = getattr(argument, "id", getattr(argument, "attr", None))
        if name in ("args", "key", "weight", "z"):
            yield "lost argument", argument, ast.Constant(None)
        pair = node.args[index : index + 2]
        if len(pair) == 2 and all(map(is_time, pair)):
            args = [*node.args[:index], *pair[::-1], *node.args[index + 2 :]]
            yield "swapped times", node, changed(node, args=args)


def of_axis(node: ast.expr):
    if isinstance(node, ast.Constant) and node.value in (0, 1, None):
        other = {0: -1, 1: 0, None: 0}[node.value]
        yield "wrong axis", node, ast.Constant(other)
    elif isinstance(node, ast.UnaryOp) and is_number(node.operand):
        yield "wrong axis", node, ast.Constant(0)
    elif isinstance(node, ast.Tuple):
        for element in node.elts:
            yield from of_axis(element)


def of_node(node: ast.AST):
    match node:
        case ast.Call():
            yield from of_call(node)
        case ast.Tuple(ctx=ast.Load(), elts=[first, second]):
            if is_time(first) and is_time(second):
                yield "swapped times", node, ast.Tuple([second, first], ast.Load())
        case ast.BinOp(op=ast.Add()):
            yield "sign", node, changed(node, op=ast.Sub())
        case ast.BinOp(op=ast.Sub()):
            yield "sign", node, changed(node, op=ast.Add())
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            if not is_number(operand) or operand.value != 1:  # -1 is mostly an index
                yield "sign", node, operand
        case ast.Compare(ops=[op], left=left, comparators=[right]):
            swap = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
            if type(op) in swap:
                ops = [swap[type(op)]()]
                yield "boundary", node, ast.Compare(left, ops, [right])
        case ast.Attribute(attr=attr, ctx=ast.Load()) if attr in OPPOSITES:
            yield "boundary", node, changed(node, attr=OPPOSITES[attr])
        case ast.Attribute(attr="T", value=value):
            yield "wrong axis", node, value
        case ast.Name(id=name, ctx=ast.Load()) if name in OPPOSITES:
            yield "boundary", node, ast.Name(OPPOSITES[name], ast.Load())
        case ast.Constant(value=value) if type(value) in (int, float):
            if value in (0, 1, 2):
                yield "boundary", node, ast.Constant(1 - value if value < 2 else 1)


def defaults_of(node: ast.AST):
    """Default values of parameters and of fields."""
    match node:
        case ast.FunctionDef(args=args):
            yield from [*args.defaults, *filter(None, args.kw_defaults)]
        case ast.ClassDef(body=body):
            for statement in body:
                if isinstance(statement, ast.AnnAssign) and statement.value is not None:
                    value = statement.value
                    if isinstance(value, ast.Call) and called(value) == "field":
                        found = [k.value for k in value.keywords if k.arg == "default"]
                        yield from found
                    else:
                        yield value


def ignored(node: ast.AST):
    """Makes parameters and fields always use their default: (node, replacement text)."""
    match node:
        case ast.FunctionDef(args=args, body=[*_, _] as body):
            if isinstance(body[0], ast.Expr):  # docstring
                body = body[1:]
            deleted = [ast.unparse(s) for s in body if isinstance(s, ast.Delete)]
            named = [*zip(args.args[::-1], args.defaults[::-1], strict=False)]
            named += [*zip(args.kwonlyargs, args.kw_defaults, strict=True)]
            for parameter, default in named:
                is_used = not any(parameter.arg in text for text in deleted)
                if body and default is not None and is_used:
                    line = f"{parameter.arg} = {ast.unparse(default)}"
                    yield body[0], f"{line}\n{' ' * body[0].col_offset}{{}}"
        case ast.ClassDef(body=body, decorator_list=[]):
            for field in body:
                if not isinstance(field, ast.AnnAssign) or field.value is None:
                    continue
                if "ClassVar" in ast.unparse(field.annotation):
                    continue
                value, rest = field.value, {}
                if isinstance(value, ast.Call) and "field" in ast.unparse(value.func):
                    rest = {k.arg: ast.unparse(k.value) for k in value.keywords}
                default = rest.pop("default", None if rest else ast.unparse(value))
                if default and not default.startswith("stop_gradient_field"):
                    make = '__import__("equinox").field'
                    rest["converter"] = f"lambda _: {default}"
                    rest = ", ".join(f"{k}={v}" for k, v in rest.items())
                    yield field.value, f"{make}(default={default}, {rest})"


def is_prose(node: ast.AST) -> bool:
    """Whether tests should not depend on the inside of a node."""
    prose = ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom
    if isinstance(node, prose):
        return True
    if isinstance(node, ast.FunctionDef):
        return node.name in ("__repr__", "__pdoc__", "__str__", "tree_pformat")
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    if isinstance(node, ast.Call):
        return called(node) in ("warn", "print", "cast", "tqdm", "lru_cache")
    return False


def mutants_of(group: str, file: Path) -> list[Mutant]:
    source = (ROOT / file).read_text()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found, done, of_defaults = [], set(), set()

    def offset(line, column):
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:column].decode())

    def visit(node, scope):
        defaults = list(defaults_of(node))
        of_defaults.update(id(part) for value in defaults for part in ast.walk(value))
        for default in defaults:
            if is_number(default):
                new = ast.Constant(other_number(default.value))
                add("changed default", default, new, scope_of(node))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = scope_of(node)
        for operator, old, new in of_node(node):
            add(operator, old, new, scope)
        for old, text in ignored(node):
            add("ignored argument", old, text, scope)
        done.update(id(default) for default in defaults if is_number(default))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not is_prose(child):
                    axis = isinstance(child, ast.keyword) and child.arg in AXES
                    if id(child) not in done and not axis:
                        visit(child, scope)

    def scope_of(node):
        return node.lineno, node.end_lineno

    def add(operator, old, new, scope):
        if id(old) in of_defaults and operator != "ignored argument":
            operator = "changed default"
        start = offset(old.lineno, old.col_offset)
        stop = offset(old.end_lineno, old.end_col_offset)
        if isinstance(new, str):
            text = new.replace("{}", source[start:stop])
        else:
            text = ast.unparse(ast.fix_missing_locations(new))
        if isinstance(old, ast.BinOp | ast.Compare | ast.Tuple | ast.UnaryOp):
            text = f"({text})"
        args = group, str(file), operator, old.lineno, scope, start, stop, text
        found.append(Mutant(*args))

    visit(ast.parse(source), (1, len(starts)))
    return found


def all_mutants(groups) -> list[Mutant]:
    found = []
    for group in groups:
        for pattern in GROUPS[group]:
            for path in sorted((ROOT / SOURCE).glob(pattern)):
                found += mutants_of(group, path.relative_to(ROOT))
    sources = {m.file: (ROOT / m.file).read_text() for m in found}
    short = lambda m: (m.file.removeprefix(f"{SOURCE}/"), *m.lines(sources[m.file]))
    return [mutant for mutant in found if short(mutant) not in EQUIVALENT]


def draw(mutants: list[Mutant], size: int, seed: int) -> list[Mutant]:
    """A sample in proportion to the mutants of each group, with at least 12 of each."""
    chosen, rng = [], random.Random(seed)
    for group in GROUPS:
        rows = [mutant for mutant in mutants if mutant.group == group]
        count = max(12, round(size * len(rows) / max(len(mutants), 1)))
        chosen += rng.sample(rows, min(count, len(rows)))
    rng.shuffle(chosen)
    return chosen


# The tests that run a line, and how long they take


def environment(folder: Path, tree: Path) -> dict[str, str]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return {**os.environ, **cache, "PYTHONPATH": str(tree / "src")}


def copy_tree(tree: Path) -> None:
    """Copies the current files of the project."""
    shutil.rmtree(tree, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    for name in names.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)


def trace(folder: Path, workers: int) -> None:
    """Runs the quick tests once, and records which lines each of them runs."""
    copy_tree(folder / "traced")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow"]
    command += ["-n", str(workers), "--dist", "worksteal", "--cov", "--cov-context=test"]
    command += ["--cov-report=", "--cov-fail-under=0", f"--junitxml={folder}/times.xml"]
    env = environment(folder, folder / "traced")
    env |= {"COVERAGE_FILE": str(folder / "lines.coverage"), "COVERAGE_CORE": "ctrace"}
    subprocess.run(command, cwd=folder / "traced", env=env, check=False)


class Trace:
    """The quick tests that ran each line, and how long they took."""

    def __init__(self, folder: Path):
        import coverage

        self.data = coverage.CoverageData(str(folder / "lines.coverage"))
        self.data.read()
        self.seconds = {}
        for case in xml.etree.ElementTree.parse(folder / "times.xml").iter("testcase"):
            name = case.get("classname", "").replace(".", "/") + ".py"
            if not len(case):  # it passed
                self.seconds[f"{name}::{case.get('name')}"] = float(case.get("time", 1))
        self.files = {}
        for path in self.data.measured_files():
            _, _, tail = path.partition(f"{SOURCE}/")
            self.files[tail] = self.data.contexts_by_lineno(path)

    def tests(self, mutant: Mutant) -> list[str]:
        """The tests that run the line, or if there are none, its scope or its file."""
        lines = self.files.get(mutant.file.removeprefix(f"{SOURCE}/"), {})
        first, last = mutant.scope
        scope = range(first, last + 1)
        for wanted in ([mutant.line], scope, list(lines)):
            found = {c.split("|")[0] for line in wanted for c in lines.get(line, ()) if c}
            found = {t for t in found & {*self.seconds} if not t.startswith(READERS)}
            if found:
                break
        if mutant.operator == "changed default":
            found |= {test for test in self.seconds if test.startswith(TABLES)}
        if mutant.operator == "ignored argument":
            found |= {test for test in self.seconds if test.startswith(SETTINGS)}
        cost = lambda test: (test.startswith(TABLES), self.seconds[test])
        return sorted(found, key=cost)


# Running


def ask(tests: list[str], tree: Path, log: Path, *options: str) -> int:
    """Starts a process that runs tests of a tree, and returns its id."""
    pid = os.fork()
    if pid > 0:
        return pid
    import pytest

    os.setsid()
    os.chdir(tree)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree / "src"))
    os.environ["PYTHONPATH"] = sys.path[0]
    # The parent has already imported the plugins.
    quiet = ("-q", "--no-header", "--tb=line", "-p", "no:cacheprovider")
    quiet += ("-W", "ignore::pytest.PytestAssertRewriteWarning")
    status = int(pytest.main([*quiet, *options, *tests]))
    sys.stdout.flush()
    os._exit(status)


def failed(log: Path) -> list[str]:
    lines = log.read_text().splitlines()
    return [x.split(" ")[1] for x in lines if x.startswith(("FAILED ", "ERROR "))]


class Job:
    """A mutant in a worker's tree. Runs a few seconds of tests first, then the rest."""

    def __init__(self, mutant: Mutant, tree: Path, trace: Trace):
        self.mutant, self.tree, self.trace = mutant, tree, trace
        self.log, self.status = tree / "log.txt", "survived"
        tests, spent = trace.tests(mutant), 0.0
        first = []
        for test in tests:
            spent += trace.seconds[test]
            if not first or (spent < 10 and len(first) < 40):
                first.append(test)
        self.parts = [part for part in (first, tests[len(first) :]) if part]
        self.source = (tree / mutant.file).read_text()
        self.mtime = (tree / mutant.file).stat().st_mtime
        (tree / mutant.file).write_text(mutant.text(self.source))
        self.next()

    def next(self) -> None:
        tests = self.parts.pop(0) if self.parts else []
        seconds = sum(self.trace.seconds[test] for test in tests)
        self.deadline = time.time() + 120 + 10 * seconds
        self.pid = ask(tests, self.tree, self.log, "-x") if tests else None
        if self.pid is None:
            self.status = "no test"

    def is_done(self) -> bool:
        if self.pid is None:
            return True
        ended, code = os.waitpid(self.pid, os.WNOHANG)
        if not ended and time.time() < self.deadline:
            return False
        if not ended:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.status = "too long"
            return True
        code = os.waitstatus_to_exitcode(code)
        if code == 0 and self.parts:
            self.next()
            return False
        if code:  # other than 1 if the tests cannot even be imported
            is_found = code in (1, 2) or "ERROR collecting" in self.log.read_text()
            self.status = "noticed" if is_found else f"exit status {code}"
        return True

    def result(self) -> dict:
        path = self.tree / self.mutant.file
        path.write_text(self.source)
        os.utime(path, (self.mtime, self.mtime))
        before, after = self.mutant.lines(self.source)
        found = failed(self.log) if self.pid else []
        result = {"status": self.status, "by": found[0] if found else None}
        result["is_crash"] = bool(found) and "TypeError: " in self.log.read_text()
        result |= {"file": self.mutant.file, "before": before, "after": after}
        return result | {"group": self.mutant.group, "operator": self.mutant.operator}


def run(mutants: list[Mutant], folder: Path, workers: int) -> list[dict]:
    trace = Trace(folder)
    trees = [folder / f"worker-{index}" for index in range(workers)]
    copy_tree(trees[0])
    os.environ.update(environment(folder, trees[0]))
    # This compiles sources to bytecode, which mutants only read.
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only"]
    subprocess.run(collect, cwd=trees[0], stdout=subprocess.DEVNULL, check=True)
    for tree in trees[1:]:
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(trees[0], tree)
    # Every forked process has these already, and imports only the library itself.
    import diffrax, equinox, hypothesis, optax, optimistix, scipy.stats  # noqa

    waiting, jobs, results = collections.deque(mutants), [], []
    while waiting or jobs:
        for tree in {*trees} - {job.tree for job in jobs}:
            if waiting:
                jobs.append(Job(waiting.popleft(), tree, trace))
        time.sleep(0.05)
        for job in [job for job in jobs if job.is_done()]:
            jobs.remove(job)
            results.append(job.result())
            (folder / "results.json").write_text(json.dumps(results, indent=1))
            print(f"{len(results):4d} {job.status:10} {results[-1]['file']}", end=" ")
            print(results[-1]["operator"], results[-1]["by"] or "", flush=True)
    # A test that fails without a mutation has not noticed anything.
    tests = sorted({result["by"] for result in results if result["by"]})
    os.waitpid(ask(tests, trees[0], folder / "log.txt"), 0)
    for result in results:
        if result["by"] in failed(folder / "log.txt"):
            result["status"] = "fails anyway"
    return results


# Report


def interval(noticed: int, total: int) -> tuple[float, ...]:
    """Wilson's 95 % interval for a share."""
    z, p = 1.96, noticed / total
    middle, width = (
        p + z**2 / (2 * total),
        z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2)),
    )
    return tuple((middle + sign * width) / (1 + z**2 / total) for sign in (-1, 1))


def report(results: list[dict]) -> None:
    noticed = lambda rows: sum(row["status"] in ("noticed", "too long") for row in rows)
    for key in ("group", "operator"):
        for name in sorted({result[key] for result in results}):
            rows = [result for result in results if result[key] == name]
            print(f"{name:18} {noticed(rows):4d} of {len(rows):4d}")
    for result in results:
        if not noticed([result]):
            print(f"{result['status']}: {result['file']}, {result['operator']}")
            print(f"    - {result['before']}\n    + {result['after']}")
    total, tables = len(results), sum(str(r["by"]).startswith(TABLES) for r in results)
    soft = [result for result in results if not result["is_crash"]]
    low, high = interval(noticed(results), total)
    print(f"noticed: {noticed(results)} of {total}, {noticed(results) / total:.1%}")
    print(f"95 % interval: {low:.1%} to {high:.1%}")
    print(f"by the table of defaults alone: {tables}")
    print(f"without those that end in a `TypeError`: {noticed(soft)} of {len(soft)}")


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    groups, default = list(GROUPS), list(GROUPS)[:-1]
    parser.add_argument("--groups", nargs="*", default=default, choices=groups)
    parser.add_argument("--operators", nargs="*", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--folder", type=Path, default=ROOT / "out/mutation")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    everything = all_mutants(options.groups)
    everything = [m for m in everything if m.operator in options.operators]
    mutants, known = draw(everything, options.sample, options.seed), []
    changes = {m: m.lines((ROOT / m.file).read_text()) for m in everything}
    if options.again:
        last = json.loads((folder / "results.json").read_text())
        known = [r for r in last if r["status"] in ("noticed", "too long")]
        open_ = {(r["file"], r["before"], r["after"]) for r in last if r not in known}
        mutants = [m for m in everything if (m.file, *changes[m]) in open_]
    print(f"{len(mutants)} of {len(everything)} mutants")
    if options.list:
        for mutant in mutants:
            print(f"{mutant.file}:{mutant.line} {mutant.operator}")
            print("    - {}\n    + {}".format(*changes[mutant]))
        return
    if options.trace or not (folder / "times.xml").exists():
        trace(folder, options.workers)
    results = known + run(mutants, folder, options.workers)
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    report(results)


if __name__ == "__main__":
    main()
