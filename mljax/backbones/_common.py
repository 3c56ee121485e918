"""What every backbone has: stages that can be frozen, endpoints, checks of its settings and of its images."""

from collections.abc import Mapping, Sequence

from jaxtyping import Array, Float

from mljax.errors import UserError, nearest, one_of
from mljax.types import ArrayLike

Image = Float[ArrayLike, "..."]  # (b h w c); anything else is an error that `check_image` puts into words
Endpoints = dict[str, Float[Array, "b _ _ _"]]


def norm_mode(norm: str, stage_frozen: bool) -> str:
    """The mode of the BatchNorm of a stage, from a backbone's fields `norm` and `frozen`."""
    one_of("config.backbone.norm", norm, ("batch", "frozen"))
    if norm == "frozen":
        return "fixed"
    return "running" if stage_frozen else "batch"


def frozen_stages(frozen: str, stages: Sequence[str]) -> tuple[str, ...]:
    """The stages that a backbone's field `frozen` names, in order.

    Args:
      frozen: comma list of names, or "all", or "".
      stages: all names, in the order in which they run.
    Raises:
      UserError: no such stage, or a stage before a frozen one is not frozen: a gradient would not reach it.
    """
    names = {name.strip() for name in frozen.split(",") if name.strip()}
    if names == {"all"}:
        return tuple(stages)
    for name in sorted(names):
        if name not in stages:
            hint = nearest(name, (*stages, "all"))
            raise UserError(f"config.backbone.frozen: there is no stage {name!r}{hint}.")
    chosen = tuple(stages[: len(names)])
    if set(chosen) != names:
        raise UserError(
            f"config.backbone.frozen={frozen!r} leaves out a stage before a frozen one; freeze from the first on, as in"
            f" {','.join(stages[: max(map(stages.index, names)) + 1])!r}."
        )
    return chosen


def frozen_parameters(frozen: str, norm: str, stages: Mapping[str, str]) -> tuple[str, ...]:
    """Regular expressions of the parameter paths ("stem/conv/kernel") that no gradient reaches.

    Args:
      frozen, norm: the backbone's fields.
      stages: stage name -> regular expression of its parameters' paths.
    """
    patterns = [stages[name] for name in frozen_stages(frozen, tuple(stages))]
    if norm_mode(norm, False) == "fixed":
        patterns.append(r"(^|/)[^/]*bn[^/]*/(scale|bias)$")
    return tuple(patterns)


def check_endpoints(endpoints: Sequence[str], known: Sequence[str], name: str) -> None:
    """UserError unless every endpoint is one of those that the backbone has."""
    for endpoint in endpoints:
        if endpoint not in known:
            raise UserError(f"The backbone {name} has no endpoint {endpoint!r}{nearest(endpoint, known)}.")


def check_image(image: Image, channels: int, name: str) -> None:
    """UserError unless the image is (b h w channels)."""
    if image.ndim != 4 or image.shape[-1] != channels:
        raise UserError(
            f"The backbone {name} got images of shape {image.shape}; expected (b, h, w, {channels}): set"
            " config.backbone.in_channels, or change the data."
        )
