import ctypes
import gc
import os
import pathlib

import hypothesis
import jax
import pytest

# Identities are checked in float64, and everything the library promotes, it promotes on
# purpose.
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes millions of objects that live on, and looking through them for garbage as
# often as Python does by default takes a twentieth of the time.
gc.set_threshold(100_000, 50, 100)
# Tests compile far more than they compute. XLA's older emitters take half the time, but
# XLA does not start with a flag that it does not know, so name the versions that do.
jax.config.update("jax_disable_most_optimizations", True)
if (0, 8) <= jax.__version_info__ < (0, 11):
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false"]
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

# The first example of a shape compiles.
_COMPILES = {
    "deadline": None,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
# Pick one by `--hypothesis-profile`, or by the environment. What is not said here takes
# other values where the environment says `CI`.
hypothesis.settings.register_profile(
    "quick", derandomize=True, max_examples=25, **_COMPILES
)
hypothesis.settings.register_profile(
    "thorough", derandomize=False, max_examples=200, print_blob=True, **_COMPILES
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


# Folders of tests of code that draws nothing, with one exception. Looking for keys that
# are used twice there would only take time, a tenth of it.
WITHOUT_KEYS = {"estimates", "exact", "flow_maps", "solvers"}


@pytest.fixture(autouse=True, scope="module")
def no_key_is_used_twice(request):
    draws = request.path.parent.name not in WITHOUT_KEYS
    draws |= request.path.name in {"test_sample.py", "test_tilted.py"}
    # Before JAX 0.8 the check takes `keys[-1]` for a second use.
    with jax.debug_key_reuse(draws and jax.__version_info__ >= (0, 8)):
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_what_is_compiled():
    """Keeps a process below 65,530 memory maps, the limit of Linux, and 2 GiB of memory.

    Each compiled function takes some of both. A process that runs thousands of tests
    would end in a crash of the compiler, or take the memory of the machine.
    """
    yield
    process = pathlib.Path("/proc/self")
    if not process.exists():
        return
    num_maps = (process / "maps").read_bytes().count(b"\n")
    pages = int((process / "statm").read_text().split()[1])
    if num_maps > 40_000 or pages * os.sysconf("SC_PAGE_SIZE") > 2**31:
        jax.clear_caches()
        # What is free goes back to the system only when asked, in the GNU library.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
        trim(0)
