"""Two CPU devices, quick compilation, strict dtypes and ranks, checked shapes, a persistent compile cache."""

import os
import tempfile
from pathlib import Path

# Compiling costs far more here than computing does: LLVM optimises nothing.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "mljax-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Checks the shapes in annotations whenever one of these is called; before anything of them is imported.
CHECKED = [f"mljax.{room}" for room in ("losses", "metrics", "layers", "systems", "backbones", "convolution")]
jaxtyping.install_import_hook(CHECKED, "shapes.checked")

# What tests import from here until they import it from toy.
from toy import close, data_root, golden_file, weights  # noqa: E402, F401


@pytest.fixture(scope="session")
def real_data() -> Path:
    root = data_root()
    if root is None:
        pytest.skip("no real data: set MLJAX_DATA to a folder with VOCdevkit/, weights/ and label_embeddings/")
    return root
