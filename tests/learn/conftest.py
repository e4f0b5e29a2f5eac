import pytest


@pytest.fixture
def unmeasured(monkeypatch):
    """Leaves out classical solvers and the seconds of jumps, and what they compile."""
    # Not above: a package that pytest imports by itself is not checked by jaxtyping.
    from flowdiffrax.learn import _learned

    monkeypatch.setattr(_learned, "scan_tolerances", lambda *given: [])
    monkeypatch.setattr(_learned, "jump_seconds", lambda *given: 1e-3)
