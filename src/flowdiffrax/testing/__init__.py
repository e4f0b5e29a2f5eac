"""Property tests for any flow map, in any test suite or notebook.

The strategies need Hypothesis: `pip install "flowdiffrax[testing]"`. Nothing else needs
further packages. `import flowdiffrax` does not import this module; use
`import flowdiffrax.testing`. `assert_starts_as_identity` documents the arguments of all
assertions about flow maps.
"""

from ._assert import assert_average_velocity as assert_average_velocity
from ._assert import assert_both_directions as assert_both_directions
from ._assert import assert_dense_output as assert_dense_output
from ._assert import assert_eulerian as assert_eulerian
from ._assert import assert_identities as assert_identities
from ._assert import assert_inverse as assert_inverse
from ._assert import assert_lagrangian as assert_lagrangian
from ._assert import assert_path_derivative as assert_path_derivative
from ._assert import assert_positive_jacobian as assert_positive_jacobian
from ._assert import assert_semigroup as assert_semigroup
from ._assert import assert_solver_equals_map as assert_solver_equals_map
from ._assert import assert_starts_as_identity as assert_starts_as_identity
from ._assert import assert_tangent as assert_tangent
from ._check import CheckReport as CheckReport
from ._check import check as check
from ._failure import Failure as Failure
from ._failure import IdentityError as IdentityError
from ._fields import KnownField as KnownField
from ._report import DefectReport as DefectReport
from ._report import defect_report as defect_report
from ._statistics import assert_independent as assert_independent
from ._statistics import assert_unbiased as assert_unbiased
from ._strategies import dtypes as dtypes
from ._strategies import gaussian_flows as gaussian_flows
from ._strategies import pytrees as pytrees
from ._strategies import states as states
from ._strategies import states_like as states_like
from ._strategies import time_pairs as time_pairs
from ._strategies import time_triples as time_triples
from ._strategies import times as times
from ._strategies import vector_fields as vector_fields
