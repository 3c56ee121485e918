"""What a kind and a case are, how one case is run, and the file that keeps the outcomes.

A case is derived from (seed, kind, index) alone. Its outcome is a line of OUT/KIND.jsonl, written when it ends, so a
harness that was killed goes on where it was.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
# LLVM optimises little, as in the tests: compiling costs far more here than computing.
QUICK = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"


class Failed(Exception):
    """A case whose outcome is not what it has to be; the message says how it differs."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
      index: in the plan, from 0.
      what: its category in the plan.
      rng: of this case alone.
      folder: its own, empty; deleted if it passes.
      shared: of the kind, for what is made once.
      share: of the full plan that is run: a case that is long by itself is shortened by it.
    """

    index: int
    what: str
    rng: np.random.Generator
    folder: Path
    shared: Path
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of torture.

    Attributes:
      name: on the command line.
      goal: of the table.
      plan: category -> how many cases of it.
      case: runs one; returns what is worth keeping beside the outcome, raises `Failed`.
      units: what a case of a category counts for in the table (mutants of a group); 1 unless named.
      limit: seconds after which a case counts as hung.
      jobs: workers at once, at most.
      env: of the workers, besides that of all.
      shim: whether workers run with the shim for faults (`benchmarks.torture.shim`).
      scales: of a share all cases are run, each shortened by itself.
    """

    name: str
    goal: str
    plan: Mapping[str, int]
    case: Callable[[Case], Mapping[str, Any] | None]
    units: Mapping[str, int] = dataclasses.field(default_factory=dict)
    limit: float = 120.0
    jobs: int = 8
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shim: bool = False
    scales: bool = False

    @property
    def total(self) -> int:
        return sum(self.plan.values())

    def categories(self) -> list[str]:
        """The category of every case of the full plan, mixed, so that the first few stand for all."""
        every = [what for what, count in self.plan.items() for _ in range(count)]
        order = np.random.default_rng(zlib.crc32(self.name.encode())).permutation(len(every))
        return [every[i] for i in order]

    def count(self, share: float) -> int:
        """Cases of a share of the plan."""
        return self.total if self.scales else math.ceil(self.total * share)

    def planned(self, count: int, share: float = 1.0) -> int:
        """Units of so many cases."""
        every = self.categories()
        return sum(self.units_of(every[i % len(every)], share) for i in range(count))

    def units_of(self, what: str, share: float) -> int:
        """What a case of a category counts for."""
        whole = self.units.get(what, 1)
        return max(1, round(whole * share)) if self.scales else whole


@dataclasses.dataclass(frozen=True)
class Options:
    """What of the command line concerns every kind."""

    out: Path
    seed: int = 0
    share: float = 1.0
    jobs: int = 2
    keep: bool = False


def make_case(kind: Kind, index: int, options: Options) -> Case:
    """The case of an index, with its folder made."""
    every = kind.categories()
    folder, shared = options.out / "cases" / kind.name / str(index), options.out / "shared" / kind.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shared.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([options.seed, zlib.crc32(kind.name.encode()), index])
    return Case(index, every[index % len(every)], rng, folder, shared, options.share)


def run_case(kind: Kind, index: int, options: Options) -> dict[str, Any]:
    """Run a case -> the line that is kept of it."""
    case, began = make_case(kind, index, options), time.perf_counter()
    line: dict[str, Any] = {"case": index, "what": case.what, "outcome": "ok"}
    line["units"] = kind.units_of(case.what, options.share)
    try:
        line |= {k: v for k, v in (kind.case(case) or {}).items() if k not in line}
    except Failed as error:
        line |= {"outcome": "failed", "why": str(error)}
    except Exception as error:  # of the harness or of what it calls: never counted as passed
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else "?"
        line |= {"outcome": "failed", "why": f"{type(error).__name__} at {where}: {error}"[:2000]}
    line["seconds"] = round(time.perf_counter() - began, 3)
    if line["outcome"] == "ok" and not options.keep:
        shutil.rmtree(case.folder, ignore_errors=True)
    return line


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def once(folder: Path, make: Callable[[Path], Any]) -> Path:
    """A folder that several cases read, made by the first of them in any process; returns it."""
    done = folder.with_name(f"{folder.name}.done")
    with exclusive(folder.with_name(f"{folder.name}.lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            make(folder)
            done.touch()
    return folder


# --- outcomes ---------------------------------------------------------------------------------------------------------


def read_outcomes(path: Path) -> dict[int, dict[str, Any]]:
    """Case -> its line; a line that was cut by a kill is left out."""
    lines: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for text in path.read_text().splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                line = json.loads(text)
                lines[int(line["case"])] = line
    return lines


def write_outcomes(path: Path, lines: Mapping[int, Mapping[str, Any]]) -> None:
    """Write all lines anew, in the order of their cases."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text("".join(json.dumps(lines[i]) + "\n" for i in sorted(lines)))
    temporary.replace(path)
