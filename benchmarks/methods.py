"""Every objective with its short name, its teacher, and what an example costs.

The benchmarks of objectives read this table, so that all of them mean the same by a name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flowdiffrax as fd

objectives = fd.objectives


class Method(NamedTuple):
    """An objective with its defaults, and its evaluations for one example.

    A derivative along a direction counts as one more evaluation. Examples on the diagonal
    are not meant: there, objectives with such examples are flow matching.
    """

    make: Callable[[], Any]
    # Evaluations and directional derivatives with a gradient.
    trained: int
    # Evaluations and directional derivatives that are held fixed.
    frozen: int = 0
    # Frozen networks with a gradient in their inputs.
    through: int = 0
    # Those of the above in later iterations of a loop, which XLA does not count.
    looped: int = 0
    # A "velocity" or a "map", or exact "trajectories" as data.
    teacher: str | None = None
    # It learns only jumps to the end, or from the start.
    is_single: bool = False
    # Why it is no way to learn a map to be sampled.
    no_sampler: str | None = None

    @property
    def evaluations(self) -> int:
        """All evaluations of one example."""
        return self.trained + self.frozen + self.through

    @property
    def name(self) -> str:
        """The name of the class, or what a function is called in sentences."""
        names = {"free_flow": "FreeFlow", "split_mean_flow": "SplitMeanFlow"}
        return names.get(self.make.__name__, self.make.__name__)


_VELOCITY = "learns the velocity only"

METHODS = {
    "FM": Method(fd.FlowMatching, 1, no_sampler=_VELOCITY),
    "trajectory matching": Method(fd.TrajectoryMatching, 1, teacher="trajectories"),
    # Two jumps.
    "roll-outs": Method(
        objectives.RollOutMatching,
        2,
        teacher="trajectories",
        no_sampler="is several jumps of trajectory matching",
    ),
    # There and back.
    "cycles": Method(
        objectives.CycleConsistency,
        2,
        no_sampler="learns no flow, and is to be mixed with an objective that does",
    ),
    "VD": Method(
        objectives.VelocityDistillation, 1, 1, teacher="velocity", no_sampler=_VELOCITY
    ),
    # The evaluation, its derivative in t, the teacher.
    "LMD": Method(fd.LagrangianMapDistillation, 2, 1, teacher="velocity"),
    "LSD": Method(fd.LagrangianSelfDistillation, 2, 1),
    # The same, and flow matching.
    "TVM": Method(objectives.TerminalVelocityMatching, 3, 1),
    # The derivative and the teacher, both held fixed.
    "FreeFlow": Method(objectives.free_flow, 1, 2, teacher="velocity", is_single=True),
    "AYF-LMD": Method(objectives.AlignYourFlowLMD, 1, 2, teacher="velocity"),
    # The evaluation, its derivative along the teacher, the teacher.
    "EMD": Method(objectives.EulerianMapDistillation, 2, 1, teacher="velocity"),
    "EE": Method(objectives.StopGradientEulerian, 2, 1),
    "naive Eulerian": Method(
        objectives.NaiveEulerian, 2, no_sampler="biased, and there to show it"
    ),
    "ESD": Method(objectives.EulerianSelfDistillation, 2, 2),
    # The derivative is held fixed, and so is its direction if it is not from data.
    "MeanFlow": Method(objectives.MeanFlow, 1, 1),
    "improved MeanFlow": Method(objectives.ImprovedMeanFlow, 1, 2),
    "AYF-EMD": Method(objectives.AlignYourFlowEMD, 1, 2, teacher="velocity"),
    "sCT": Method(objectives.ContinuousConsistency, 1, 1, is_single=True),
    "sCD": Method(
        objectives.ContinuousConsistency, 1, 2, teacher="velocity", is_single=True
    ),
    # The map after a short step along the data.
    "AlphaFlow": Method(objectives.AlphaFlow, 1, 1),
    # Two pieces.
    "PSD": Method(objectives.ProgressiveSelfDistillation, 1, 2),
    "SplitMeanFlow": Method(objectives.split_mean_flow, 1, 2),
    "Shortcut": Method(objectives.Shortcut, 1, 2),
    "PFMM": Method(objectives.ProgressiveFlowMapMatching, 1, 2, looped=1, teacher="map"),
    # The way back, the evaluation, its derivative in t.
    "FMM": Method(objectives.FlowMapMatching, 3),
    "CT": Method(objectives.ConsistencyTraining, 1, 1, is_single=True),
    # The target, and the two stages of Heun's method.
    "CD": Method(
        objectives.ConsistencyDistillation,
        1,
        3,
        looped=1,
        teacher="velocity",
        is_single=True,
    ),
}
