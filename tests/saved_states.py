"""States to save, and processes to save them in: what the tests of checkpoints share."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mljax import optim
from mljax.rundir.checkpoint import Checkpoints
from mljax.types import TrainState

ROOT = Path(__file__).parents[1]


def new_state(seed=0, *, ema=True, width=4):
    """Two Adam steps from random parameters, with a frozen group, a memory, an empty array and several dtypes."""
    rng = np.random.default_rng(seed)
    params = {
        "backbone": {"kernel": rng.normal(size=(3, width)).astype(np.float32), "bias": np.zeros(width, np.float32)},
        "head": {"kernel": rng.normal(size=(width, 2)).astype(np.float32)},
    }
    params = jax.tree.map(jnp.asarray, params)
    tx = optim.optimizer(params, lr=0.1, total_steps=9, weight_decay=0.1, groups=(("bias", {"frozen": True}),))
    opt_state = tx.init(params)
    for _ in range(2):
        updates, opt_state = tx.update(jax.tree.map(jnp.cos, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    stats = {"backbone": {"mean": jnp.asarray(rng.normal(size=width), jnp.float32)}}
    variables = {
        "batch_stats": stats,
        "memory": {"queue": jnp.asarray(rng.normal(size=(2, 3)), jnp.bfloat16), "full": jnp.asarray(True)},
        "constants": {"none": jnp.zeros((0, 3)), "ids": jnp.arange(5, dtype=jnp.uint8)},
    }
    averaged = {"params": jax.tree.map(lambda p: p * 0.5, params), "batch_stats": stats} if ema else None
    return TrainState(jnp.int32(2), params, variables, opt_state, averaged, jax.random.PRNGKey(seed))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


def shapes(state):
    return jax.eval_shape(lambda: state)


def saved(folder, **metrics_by_step):
    """Steps 1, 2, .. with these mAPs; the state of step s is new_state(s)."""
    with Checkpoints(folder) as checkpoints:
        for step, value in enumerate(metrics_by_step["mAP"], 1):
            checkpoints.save(step, new_state(step), metrics=None if value is None else {"mAP": value})
    return Checkpoints(folder, read_only=True)


def biggest(folder):
    return max((path for path in Path(folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def python(code, *args, **kwargs):
    code = textwrap.dedent(code)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, **kwargs)


BIG = """
    import os, resource, signal, sys
    import numpy as np
    from mljax.rundir.checkpoint import Checkpoints
    from mljax.errors import UserError
    from mljax.types import TrainState

    def new_state(step, size=2_000_000):
        w = np.random.default_rng(step).random(size, np.float32)
        return TrainState(np.int32(step), {"w": w}, {}, {}, None, np.zeros(2, np.uint32))

    checkpoints = Checkpoints(sys.argv[1])
"""
