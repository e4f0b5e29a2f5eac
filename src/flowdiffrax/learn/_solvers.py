import diffrax
import optimistix as optx


def make_solver(name: str) -> diffrax.AbstractSolver:
    """The Diffrax solver of a name, set up for exact solutions."""
    if name != "Kvaerno5":
        return getattr(diffrax, name)()
    # Diffrax's own root finder uses one Jacobian for all stages. At tight tolerances most
    # of its steps are rejected: at rtol 1e-5 it takes 4 to 10 times as many in all on
    # Robertson, HIRES, the Oregonator and POLLU. A test of the residual, which is the
    # default here, never passes if rates are large enough for it to be round-off.
    root_finder = diffrax.with_stepsize_controller_tols(optx.Chord)
    return diffrax.Kvaerno5(root_finder=root_finder(cauchy_termination=False))
