"""Where compiled programs are kept, asked of fresh processes: jax reads its environment once, when it is imported."""

import json
import os
import subprocess
import sys

import pytest

TELL = """
import jax, json, os
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 3 + 1)(jax.numpy.arange(5))
folder = jax.config.jax_compilation_cache_dir
print(json.dumps([folder, jax.config.jax_compilation_cache_max_size, len(os.listdir(folder))]))
"""
BEGINNINGS = {
    "notebook": "import mljax; mljax.read_config",
    "notebook that has compiled": "import jax; jax.jit(lambda x: x - 1)(2.0); import mljax; mljax.load",
    "command": "from mljax import main; main.guarded(lambda: 0)",
    "command that imports jax": "from mljax import predict, main; main.guarded(lambda: 0)",
}


def told(code, home, **more):
    hidden = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE", "MLJAX_CACHE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    env |= {"HOME": str(home), **more}
    done = subprocess.run([sys.executable, "-c", code + TELL], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", BEGINNINGS)
def test_programs_are_kept_for_the_next_time(name, tmp_path):
    folder, limit, files = told(BEGINNINGS[name], tmp_path)
    assert folder == str(tmp_path / ".cache" / "mljax" / "xla")
    assert limit == 2147483648 and files > 0


def test_a_folder_that_the_user_gave_stays(tmp_path):
    own = tmp_path / "own"
    folder, _, files = told(BEGINNINGS["command that imports jax"], tmp_path, JAX_COMPILATION_CACHE_DIR=str(own))
    assert folder == str(own) and files > 0 and not (tmp_path / ".cache" / "mljax" / "xla").exists()
