"""Two CPU devices, strict dtypes and ranks, a persistent compile cache."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "mljax-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

GOLDEN = Path(__file__).parent / "golden"


def data_root() -> Path | None:
    """Where real photos, labels and weights lie: $MLJAX_DATA, or ../shared/data beside the checkout."""
    for root in (os.environ.get("MLJAX_DATA"), Path(__file__).parents[2] / "shared" / "data"):
        if root and Path(root).is_dir():
            return Path(root)
    return None


def golden_file(name: str) -> Path:
    """A golden case: kept here if small, else beside the data; the test skips where it is absent."""
    root = data_root()
    for path in (GOLDEN / name, *([root.parent / "golden" / name] if root else [])):
        if path.is_file():
            return path
    pytest.skip(f"golden case {name} is not on this machine")


def weights(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The authors' parameters in a golden case, by their names: what stands behind "w/"."""
    return {name.removeprefix("w/"): arrays[name] for name in arrays if name.startswith("w/")}


def close(got: Any, wanted: Any, **tolerance: float) -> None:
    """Within the tolerance of golden cases, or another."""
    np.testing.assert_allclose(got, wanted, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


@pytest.fixture(scope="session")
def real_data() -> Path:
    root = data_root()
    if root is None:
        pytest.skip("no real data: set MLJAX_DATA to a folder with VOCdevkit/, weights/ and label_embeddings/")
    return root
