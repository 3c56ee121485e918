"""Two CPU devices, quick compilation, strict dtypes and ranks, checked shapes, a persistent compile cache."""

import gc
import importlib
import logging
import os
import sys
import tempfile
from pathlib import Path

# Compiling costs far more here than computing does: little is optimised, and each program by one thread.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2"
    " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest

gc.set_threshold(100_000, 20, 50)  # tracing makes many objects, and few circles

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), "mljax-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# Checks the shapes in annotations whenever one of these is called; before anything of them is imported.
CHECKED = [f"mljax.{room}" for room in ("losses", "metrics", "layers", "systems", "backbones", "convolution")]
jaxtyping.install_import_hook(CHECKED, "shapes.checked")

import toy  # noqa: E402
from mljax import build, main, train  # noqa: E402

# Files whose tests take longest, the longest first: one of them at the end would leave the other worker idle.
LONG = (
    *("parallel", "systems", "not_finite", "sarb", "backbones", "transformers", "resume", "mulcon", "role", "c_tran"),
    *("curriculum", "published", "tdrg", "analyze", "out_of_memory", "bench", "cvt", "swin", "fold", "dropout", "sst"),
    *("released", "interrupts", "waiting", "bad_images", "zero_shot", "query2label", "config", "checkpoint_damage"),
)


def pytest_collection_modifyitems(items):
    rank = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
    gc.freeze()


def pytest_sessionfinish():
    gc.freeze()  # the last collection need not look at gigabytes of compiled programs


@pytest.fixture(scope="session")
def real_data() -> Path:
    root = toy.data_root()
    if root is None:
        pytest.skip("no real data: set MLJAX_DATA to a folder with VOCdevkit/, weights/ and label_embeddings/")
    return root


@pytest.fixture
def surroundings(monkeypatch, tmp_path_factory):
    """A cache folder of the test's own, and what `guarded` sets put back."""
    monkeypatch.setenv("MLJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in ("DIR", "MAX_SIZE"):
        monkeypatch.setenv(f"JAX_COMPILATION_CACHE_{name}", os.environ.get(f"JAX_COMPILATION_CACHE_{name}", "0"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
    yield
    log = logging.getLogger("mljax")
    log.handlers, log.propagate = [], True


@pytest.fixture
def shell(surroundings, capsys):
    """Runs a command as a shell does: its exit status, and the lines of stderr."""

    def run(command, *argv):
        capsys.readouterr()
        status = main.guarded(lambda: command.main([str(word) for word in argv]))
        lines = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in lines)
        return status, lines

    return run


@pytest.fixture
def refused(shell):
    """Exit status 2 and one sentence, the last line of stderr."""

    def run(command, *argv):
        status, lines = shell(command, *argv)
        assert status == 2, lines
        assert lines[-1].startswith("mljax: ") and sum(line.startswith("mljax: ") for line in lines) == 1, lines
        return lines[-1].removeprefix("mljax: ")

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """A short run of the baseline, trained once for all; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train.fit(toy.small(), workdir)
    return workdir


@pytest.fixture
def add_file(tmp_path, monkeypatch):
    """add_file(package, name, text) puts a file among those of a package, until the test ends."""
    modules = []

    def add(package, name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
        modules.append(f"{package.__name__}.{name}")
        importlib.invalidate_caches()
        build.forget()

    yield add
    for name in modules:
        sys.modules.pop(name, None)
    monkeypatch.undo()
    build.forget()
