import functools

import pytest


@pytest.fixture(autouse=True, scope="module")
def compile_a_step_once():
    """Runs of one file with the same objective, optimiser and settings share their step.

    Each call of `fit` makes a step of its own, and compiling it is most of what the tests
    here do.
    """
    # Not above: a package that pytest imports by itself is not checked by jaxtyping.
    from flowdiffrax.train import _fit

    make = _fit.make_step
    shared = functools.cache(make)

    def make_or_share(*args, **kwargs):
        try:
            return shared(*args, **kwargs)
        except TypeError:  # an objective with arrays, which have no hash
            return make(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fit, "make_step", make_or_share)
        yield
