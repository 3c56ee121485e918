"""State dicts that the authors released -> variables of a system.

A system's file offers `PUBLISHED`, which knows the authors' names; the backbone's file translates its own part. Strict
on both sides: an array that nothing takes is an error, and so is a parameter that nothing fills.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from mljax.errors import UserError, nearest
from mljax.trees import flatten, merge, nest
from mljax.weights import files
from mljax.weights.convert import convert as convert_backbone

State = Mapping[str, np.ndarray]


class Names:
    """The authors' arrays by name, taken one at a time in linen's layout; `finish` raises an error for those left."""

    def __init__(self, state: State):
        self._state = dict(state)
        self._left = set(state)

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def array(self, name: str) -> np.ndarray:
        """As it is in the file, in float32."""
        if name not in self._state:
            raise UserError(f"The weights have no {name!r}{nearest(name, self._state)}; is it another variant?")
        self._left.discard(name)
        value = np.asarray(self._state[name])
        return value if value.dtype.kind in "iub" else value.astype(np.float32)

    def linear(self, name: str) -> dict[str, np.ndarray]:
        """torch.nn.Linear (out in) -> Dense: kernel (in out), and bias where there is one."""
        return self._with_bias(name, self.array(f"{name}.weight").T)

    def pointwise(self, name: str) -> dict[str, np.ndarray]:
        """A 1x1 convolution of any rank (out in 1 ..) -> Dense: kernel (in out), and bias where there is one."""
        weight = self.array(f"{name}.weight")
        if weight.size != weight.shape[0] * weight.shape[1]:
            raise UserError(f"{name!r} has the shape {weight.shape}; expected a 1x1 convolution.")
        return self._with_bias(name, weight.reshape(weight.shape[:2]).T)

    def conv(self, name: str) -> dict[str, np.ndarray]:
        """A convolution (out in h w) -> Conv: kernel (h w in out), and bias where there is one."""
        weight = self.array(f"{name}.weight")
        return self._with_bias(name, np.moveaxis(weight, (0, 1), (-1, -2)))

    def norm(self, name: str) -> dict[str, np.ndarray]:
        """LayerNorm -> scale and bias."""
        return {"scale": self.array(f"{name}.weight"), "bias": self.array(f"{name}.bias")}

    def batch_norm(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """BatchNorm -> params (scale, bias) and statistics (mean, var)."""
        self._left.discard(f"{name}.num_batches_tracked")
        stats = {"mean": self.array(f"{name}.running_mean"), "var": self.array(f"{name}.running_var")}
        return self.norm(name), stats

    def attention(self, name: str) -> dict[str, dict[str, np.ndarray]]:
        """torch.nn.MultiheadAttention, whose in-projection stacks q, k, v -> query, key, value, out."""
        weights = np.split(self.array(f"{name}.in_proj_weight"), 3)
        biases = np.split(self.array(f"{name}.in_proj_bias"), 3)
        parts = {
            part: {"kernel": weight.T, "bias": bias}
            for part, weight, bias in zip(("query", "key", "value"), weights, biases)
        }
        return {**parts, "out": self.linear(f"{name}.out_proj")}

    def count(self, start: str) -> int:
        """How many different parts follow a start: the layers of "decoder.layers."."""
        return len({name[len(start) :].split(".")[0] for name in self._state if name.startswith(start)})

    def ignore(self, pattern: str) -> None:
        """Leave out what is stored and never used."""
        self._left = {name for name in self._left if not re.fullmatch(pattern, name)}

    def finish(self) -> None:
        """UserError if an array was not taken."""
        if self._left:
            shown = ", ".join(repr(name) for name in sorted(self._left)[:5])
            more = f" and {len(self._left) - 5} more" if len(self._left) > 5 else ""
            raise UserError(f"This system has no place for {shown}{more} of the weights; is it another variant?")

    def _with_bias(self, name: str, kernel: np.ndarray) -> dict[str, np.ndarray]:
        bias = {"bias": self.array(f"{name}.bias")} if f"{name}.bias" in self else {}
        return {"kernel": np.ascontiguousarray(kernel), **bias}


@dataclasses.dataclass(frozen=True)
class Published:
    """What a system knows of the files that its authors released.

    Attributes:
      convert: (names, system) -> {"params": .., "batch_stats": .., "constants": ..} of all but the backbone.
      trunk: prefix of the backbone's names.
      own: regular expression of names that are the head's though they begin with `trunk`.
      ignored: regular expression of names that are stored and unused.
      rename: applied to the whole state dict first: wrappers, older namings, weights stored twice.
      files: for checkpoints of several files, a regular expression searched in their names; its group becomes the
        prefix "group." of the arrays of that file.
    """

    convert: Callable[[Names, nn.Module], dict[str, Any]]
    trunk: str = ""
    own: str = ""
    ignored: str = ""
    rename: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    files: str = ""


def of(system: nn.Module) -> Published:
    """The PUBLISHED of a system's file."""
    module = importlib.import_module(type(system).__module__)
    published = getattr(module, "PUBLISHED", None)
    if published is None:
        raise UserError(f"No released checkpoints of {type(system).__name__} are known.")
    return published


def split(state: State, published: Published) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(trunk, head) of a state dict: the trunk's names without their prefix; DataParallel's wrapper is taken off."""
    state = dict(state)
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    if published.rename is not None:
        state = published.rename(state)
    trunk, head = {}, {}
    for name, value in state.items():
        if published.ignored and re.fullmatch(published.ignored, name):
            continue
        of_head = published.own and re.fullmatch(published.own, name)
        if name.startswith(published.trunk) and not of_head:
            trunk[name.removeprefix(published.trunk)] = value
        else:
            head[name] = value
    return trunk, head


def convert_head(state: State, system: nn.Module) -> dict[str, Any]:
    """The collections of all but the backbone.

    Args:
      state: the head's arrays by the authors' names (those of the trunk are left out).
    Raises:
      UserError: a name that is missing or left over.
    """
    published = of(system)
    names = Names(split(state, published)[1])
    names.ignore(r"(.*\.)?num_batches_tracked")
    variables = published.convert(names, system)
    names.finish()
    return variables


def convert(state: State, system: nn.Module, arch: str, variables: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """All variables of a system from a released state dict.

    Args:
      arch: name of the backbone.
      variables: shapes (or values) of the system's variables. Constants that the file lacks keep these values.
      path: of the file, for errors.
    Raises:
      UserError: names or shapes that do not fit, on either side.
    """
    trunk = split(state, of(system))[0]
    if not trunk:
        raise UserError(f"{path} has no backbone weights under {of(system).trunk!r}; give the whole checkpoint.")
    backbone = nest(convert_backbone(trunk, arch, path))
    head = convert_head(state, system)
    merged = {}
    for collection, initial in variables.items():
        released = dict(head.get(collection, {}))
        if "backbone" in initial:
            released["backbone"] = backbone.get(collection, {})
        if collection in ("params", "batch_stats"):
            merged[collection] = merge(initial, released)
        else:
            kept = {name: value for name, value in flatten(initial).items() if name not in flatten(released)}
            merged[collection] = merge(initial, nest(kept | flatten(released)))
    return merged


def read_files(paths: Sequence[Path], published: Published) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint of one file or several; a folder stands for the files in it.

    Raises:
      UserError: a file of another name, two of one network, or files of different checkpoints.
    """
    if not published.files:
        if len(paths) != 1:
            raise UserError(f"This system's checkpoints are one file, and {len(paths)} were given.")
        return files.read(paths[0])
    state: dict[str, np.ndarray] = {}
    for part, path in _parts(paths, published.files).items():
        for name, value in files.read(path).items():
            state[f"{part}.{name.removeprefix('module.')}"] = value
    return state


def _parts(paths: Sequence[Path], pattern: str) -> dict[str, Path]:
    """The file of each network; they all belong to one checkpoint: their names begin alike."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if re.search(pattern, p.name)) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"The folder {path} holds no file named like this system's checkpoints ({pattern}).")
        files += inside
    parts: dict[str, Path] = {}
    starts: dict[str, Path] = {}
    for path in files:
        match = re.search(pattern, path.name)
        if match is None:
            raise UserError(f"{path} is not named like the files of this system's checkpoints ({pattern}).")
        if match[1] in parts:
            raise UserError(f"{parts[match[1]]} and {path} are the same network; give the files of one checkpoint.")
        parts[match[1]] = starts[path.name[: match.start()]] = path
        if len(starts) > 1:
            first, second = starts.values()
            raise UserError(f"{first} and {second} are of different checkpoints; give the files of one.")
    return parts
