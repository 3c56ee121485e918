"""Which labels training may see: a function of (seed, index) laid over any source, before anything reads labels.

    config.observe = {"name": "known", "proportion": 0.1, "mode": "hcp"}  # 10 % of all labels, as HCP-MLR-PL draws them
    config.observe = {"name": "single_positive"}                          # one positive of each image
    config.observe = {"name": "candidates", "rate": 0.1}                  # all positives, and false ones among them
    config.observe = {"name": "file", "path": "masks.npz"}                # what was drawn or annotated elsewhere

Every draw belongs to an image of the whole split: a slice of a split sees what the split would see, and more images at
the end change nothing for those before. A hidden label is 0 in `labels` and 0 in `observed`.

    python -m mljax.data observe configs/role.py:voc2012 --out=masks.npz    # write what a config observes
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mljax.build import check_keys, keywords
from mljax.data import label_bias, masks, spml
from mljax.data.source import Source
from mljax.errors import UserError, nearest

Observed = tuple[np.ndarray, np.ndarray, str]  # labels (N l), observed (N l), and how to say it


def observe(source: Source, section: Mapping[str, Any]) -> Source:
    """A training split as training may see it.

    Args:
      source: any split; entries that it does not know itself (`observed` 0) stay hidden.
      section: `config.observe`: a name of `NAMES` and its settings.
    Returns:
      The split with labels (N l) uint8, 0 where hidden, and observed (N l) uint8. Fingerprint and images stay as they
      are, so that cached features are shared; instances are gone, since they would tell the labels.
    Raises:
      UserError: a wrong setting, something the source cannot give, or nothing is known at all.
    """
    settings = dict(section)
    function = NAMES[check(settings)]
    settings.pop("name")
    whole = source.base or source
    labels, observed, text = function(whole, **settings)
    observed = np.asarray(observed, np.uint8) * whole.observed
    seen = _seen(whole, np.asarray(labels, np.uint8) * observed, observed, text)
    if source is not whole:
        rows = source.indices
        seen = dataclasses.replace(_seen(source, seen.labels[rows], seen.observed[rows], text), base=seen)
    if not seen.observed.any():
        raise UserError(f"No label of {seen.name} is known: raise config.observe's share, or name another split.")
    return seen


def check(section: Mapping[str, Any]) -> str:
    """The name of an observation whose settings exist and are in range; before any data are read.

    Raises:
      UserError: there is no such observation or setting, with the nearest one, or a share is out of range.
    """
    name = section.get("name")
    if name not in NAMES:
        raise UserError(f"config.observe.name is {name!r}{nearest(str(name), NAMES)}.")
    allowed = keywords(NAMES[name]).keys() - {"source"}
    check_keys(f"config.observe ({name!r})", section.keys() - {"name"}, allowed)
    for key in ("proportion", "rate"):
        if key in section:
            _number(key, section[key], 0, 1)
    if "bias" in section:
        _choice("bias", section["bias"], label_bias.BIASES)
    return name


def _seen(source: Source, labels: np.ndarray, observed: np.ndarray, text: str) -> Source:
    name = f"{source.name} ({text})" if text else source.name
    return dataclasses.replace(source, name=name, labels=labels, observed=observed, instances=None)


def everything(source: Source) -> Observed:
    """All labels that the source has."""
    return source.labels, source.observed, ""


def known(source: Source, *, proportion: float = 0.1, mode: str = "nested", seed: int = 0) -> Observed:
    """Each label is known with a probability, drawn once for all proportions: known at 10 % is known at 20 %.

    A label of image i and class c is known iff u[i, c] < proportion, u uniform in [0, 1), row by row in the order of
    the split and the columns of its classes. No image is promised a known label.

    Args:
      proportion: 0 to 1.
      mode: "nested": u from Philox; "hcp": from NumPy's legacy generator, with seed 0 the masks of HCP-MLR-PL (SST,
        SARB) if images and classes have its order: COCO with annotated_only=False and order="id", VOC as it is.
      seed: of u.
    Reference: Chen et al., AAAI 2022, as in the authors' code.
    """
    _number("proportion", proportion, 0, 1)
    _choice("mode", mode, ("nested", "hcp"))
    shape = source.labels.shape
    u = np.random.RandomState(seed).random_sample(shape) if mode == "hcp" else uniform(seed, 0, shape)
    return source.labels, u < proportion, f"{100 * proportion:.3g}% known"


def single_positive(
    source: Source,
    *,
    bias: str = "uniform",
    negatives: int = 0,
    mode: str = "index",
    seed: int = spml.SEED,
    weights: str = "",
) -> Observed:
    """One positive of each image is known; of an image without positives, nothing is.

    Args:
      bias: which positive is likely: "uniform"; "size", the sum of the areas of its instances; "location", the sum of
        1 / distance of their centres to the image's; "semantic", a weight per class (all zero: uniform).
      negatives: how many negatives of an image are known besides: 0, 1 (with the loss `iu`, the paper's IU), .., or -1
        for all (IUN).
      mode: "index": a function of (seed, index); "spml": the sequential stream of the single-positive code, with seed
        1200 its very labels for VOC2012 (difficult="V3") and COCO (order="id"); see `mljax.data.spml`.
      seed: of the choice.
      weights: for "semantic": a JSON file {class: weight}.
    Raises:
      UserError: the bias needs instances (boxes) or weights that are not there.
    Reference: Cole et al., CVPR 2021; Arroyo, Perona and Cole, "Understanding Label Bias in Single Positive Multi-Label
      Learning", 2023.
    Differs from the authors' code: location weights are not normalised by distances to a corner, which changes no
      choice.
    """
    _choice("mode", mode, ("index", "spml"))
    if isinstance(negatives, bool) or not isinstance(negatives, int) or negatives < -1:
        raise UserError(f"config.observe.negatives is {negatives!r}; it is a number of labels, or -1 for all.")
    given = source.observed > 0
    positive, negative = (source.labels > 0) & given, (source.labels == 0) & given
    chances = label_bias.chances(source, positive, bias, weights)
    if mode == "index":
        u, v = uniform(seed, 1, positive.shape), uniform(seed, 2, positive.shape)
        # the first to arrive, each at a rate of its weight; evenly where no weight tells them apart
        rate = np.where(chances.any(axis=1, keepdims=True), chances, positive)
        wait = -np.log1p(-u) / np.where(rate > 0, rate, 1)
        observed = first(wait, positive & (rate > 0), 1)
        observed |= first(v, negative, negatives)
    else:
        if bias != "uniform" and negatives:
            raise UserError("config.observe.negatives is for bias='uniform' where mode='spml'; use mode='index'.")
        if bias == "uniform":
            observed = spml.draw(positive, negative, negatives, source.ids, seed)
        else:
            observed = spml.draw_biased(positive, chances, source.ids, seed)
    also = {0: "", -1: ", all negatives"}.get(negatives, f", {negatives} negatives")
    return source.labels, observed, f"single positive{'' if bias == 'uniform' else f', {bias}'}{also}"


def candidates(source: Source, *, rate: float = 0.1, seed: int = 1) -> Observed:
    """Partial multi-label learning: every positive, and each negative with a probability, is a candidate label.

    Candidates are 1 in `labels`, which of them are false is unknown; what is 0 is negative for sure.

    Args:
      rate: of a negative to become a candidate, 0 to 1; the papers take .05, .1 and .2.
      seed: of the noise.
    Reference: CDCR (repository xiemk/PML-CDCR). Its stream follows its own shuffling of files, and is not repeated.
    """
    _number("rate", rate, 0, 1)
    noise = (uniform(seed, 3, source.labels.shape) < rate) & (source.observed > 0)
    return np.maximum(source.labels, noise), source.observed, f"candidates, {100 * rate:.3g}% noise"


def file(source: Source, *, path: str = "") -> Observed:
    """Labels and masks written by `masks.write`, checked against the data set; see there."""
    return *masks.read(path, source), "masks of a file"


NAMES: dict[str, Callable[..., Observed]] = {
    "all": everything,
    "known": known,
    "single_positive": single_positive,
    "candidates": candidates,
    "file": file,
}


def uniform(seed: int, stream: int, shape: tuple[int, int]) -> np.ndarray:
    """(N l) float64 in [0, 1): row i does not depend on how many rows there are."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"config.observe.seed is {seed!r}; it is a whole number, 0 or more.")
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(shape[0] * shape[1])
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(shape)


def first(order: np.ndarray, among: np.ndarray, count: int) -> np.ndarray:
    """(N l) bool: the `count` entries of each row with the least `order` among those allowed; -1: all of them."""
    if count < 0:
        return among
    rank = np.argsort(np.argsort(np.where(among, order, np.inf), axis=1, kind="stable"), axis=1, kind="stable")
    return among & (rank < count)


def _number(key: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise UserError(f"config.observe.{key} is {value!r}; it is a number from {least} to {most}.")


def _choice(key: str, value: Any, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"config.observe.{key} is {value!r}{nearest(str(value), options)}.")
