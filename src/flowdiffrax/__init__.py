"""Flow maps of ODEs as Equinox modules, and as learned solvers for Diffrax.

The names that most programs need are here. The others are in namespaces, one for each
folder of the source. Namespaces are imported when they are first used: together they
would take half as long as JAX and Diffrax.
"""

import importlib
import importlib.metadata
import typing

if typing.TYPE_CHECKING:
    from . import data as data
    from . import estimates as estimates
    from . import exact as exact
    from . import flow_maps as flow_maps
    from . import identities as identities
    from . import images as images
    from . import learn as learn
    from . import likelihood as likelihood
    from . import metrics as metrics
    from . import nn as nn
    from . import objectives as objectives
    from . import paths as paths
    from . import plot as plot
    from . import solvers as solvers
    from . import times as times
    from . import train as train
    from . import velocities as velocities
    from . import weights as weights
    from .flow_maps import AbstractFlowMap as AbstractFlowMap
    from .flow_maps import AutonomousFlowMap as AutonomousFlowMap
    from .flow_maps import ComposedFlowMap as ComposedFlowMap
    from .flow_maps import ConserveInvariants as ConserveInvariants
    from .flow_maps import FlowMap as FlowMap
    from .flow_maps import HypersolverFlowMap as HypersolverFlowMap
    from .flow_maps import InverseFlowMap as InverseFlowMap
    from .flow_maps import Normalisation as Normalisation
    from .flow_maps import NormalisedFlowMap as NormalisedFlowMap
    from .flow_maps import ODEFlowMap as ODEFlowMap
    from .flow_maps import ProjectedFlowMap as ProjectedFlowMap
    from .flow_maps import RescheduledFlowMap as RescheduledFlowMap
    from .identities import eulerian_residual as eulerian_residual
    from .identities import inverse_residual as inverse_residual
    from .identities import lagrangian_residual as lagrangian_residual
    from .identities import semigroup_residual as semigroup_residual
    from .identities import tangent_residual as tangent_residual
    from .learn import advise as advise
    from .learn import learn_solver as learn_solver
    from .objectives import FlowMatching as FlowMatching
    from .objectives import LagrangianMapDistillation as LagrangianMapDistillation
    from .objectives import LagrangianSelfDistillation as LagrangianSelfDistillation
    from .objectives import TrajectoryMatching as TrajectoryMatching
    from .paths import LinearInterpolant as LinearInterpolant
    from .paths import solve_trajectories as solve_trajectories
    from .solvers import AdaptiveFlowMapSolver as AdaptiveFlowMapSolver
    from .solvers import FlowMapSolver as FlowMapSolver
    from .solvers import HybridSolver as HybridSolver
    from .solvers import sample as sample
    from .solvers import sample_with_restarts as sample_with_restarts
    from .solvers import solve_batch as solve_batch

__version__ = importlib.metadata.version("flowdiffrax")

_NAMESPACES = (
    *("objectives", "weights", "times", "paths", "flow_maps", "velocities", "identities"),
    *("estimates", "solvers", "likelihood", "nn", "train", "data", "metrics", "plot"),
    *("exact", "learn", "images"),
)
# The names above, and where they are.
_NAMES = {
    **dict.fromkeys(
        (
            *("AbstractFlowMap", "AutonomousFlowMap", "ComposedFlowMap", "FlowMap"),
            *("ConserveInvariants", "HypersolverFlowMap", "InverseFlowMap"),
            *("Normalisation", "NormalisedFlowMap", "ODEFlowMap", "ProjectedFlowMap"),
            "RescheduledFlowMap",
        ),
        "flow_maps",
    ),
    **dict.fromkeys(
        (
            *("eulerian_residual", "inverse_residual", "lagrangian_residual"),
            *("semigroup_residual", "tangent_residual"),
        ),
        "identities",
    ),
    **dict.fromkeys(("advise", "learn_solver"), "learn"),
    **dict.fromkeys(
        (
            *("FlowMatching", "LagrangianMapDistillation", "LagrangianSelfDistillation"),
            "TrajectoryMatching",
        ),
        "objectives",
    ),
    **dict.fromkeys(("LinearInterpolant", "solve_trajectories"), "paths"),
    **dict.fromkeys(
        (
            *("AdaptiveFlowMapSolver", "FlowMapSolver", "HybridSolver", "sample"),
            *("sample_with_restarts", "solve_batch"),
        ),
        "solvers",
    ),
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMESPACES, *_NAMES})


# To type checkers, a module with this function would have every name.
if not typing.TYPE_CHECKING:

    def __getattr__(name: str):
        room = lambda name: importlib.import_module(f"{__name__}.{name}")
        if name in _NAMESPACES:
            return room(name)
        if name in _NAMES:
            globals()[name] = value = getattr(room(_NAMES[name]), name)
            return value
        text = f"module {__name__!r} has no attribute {name!r}"
        if not name.startswith("_"):
            for each in _NAMESPACES:
                if hasattr(room(each), name):
                    text += f". It is in a namespace: `{__name__}.{each}.{name}`"
                    break
        raise AttributeError(text)
