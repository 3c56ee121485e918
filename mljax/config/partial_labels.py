"""How the papers of missing labels set up their runs: data, hidden labels and training that several configs share.

Single-positive learning as Cole et al. (CVPR 2021) and later papers have it, and known shares of the labels as
HCP-MLR-PL (SST, SARB) hides them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mljax.config.data_sets import DATA_SETS, data_set, resnet101

if TYPE_CHECKING:
    from mljax.types import Config

SINGLE_POSITIVE = tuple(word for word, of in DATA_SETS.items() if of.single_positive is not None)
PARTIAL = tuple(word for word, of in DATA_SETS.items() if of.partial is not None)


def single_positive(config: Config, name: str) -> None:
    """VOC2012, COCO 2014 or NUS-WIDE as the single-positive code takes them: ResNet-50 at 448, its split and Adam."""
    data_set(config, name)
    config.data.update(DATA_SETS[name].single_positive)
    config.splits = {"train": "train[spml:train]", "eval": "train[spml:val]"}  # report val: mljax.evaluate --split=val
    config.observe = {"name": "single_positive", "mode": "spml", "seed": 1200}
    config.vectors = "none"
    config.backbone = {"name": "resnet50"}
    config.weights.name = "resnet50"
    config.input.size = 448
    config.optim.update(name="adam", lr=1e-5, epochs=10, batch_size=8, weight_decay=0.0)
    config.optim.schedule = {"name": "constant"}
    config.eval.update(every=1, select="best", definition="sklearn")


def linear(config: Config) -> None:
    """Only what stands on the frozen backbone is trained, on cached features of the whole image: its linear mode."""
    config.backbone.frozen = "all"
    config.cache.train_views = config.cache.eval_views = (str(config.input.size),)
    config.optim.update(lr=1e-3, epochs=25, batch_size=16)


def linear_init(config: Config, lr: float = 1e-3, batch_size: int = 16) -> None:
    """Linear first, then all of the network from the best of it; the stages of the single-positive code.

    `lr` and `batch_size` are those of the linear stage, by default what the authors chose for ROLE; the second stage
    has those of `config.optim`, the ones that the authors search.
    """
    views = (str(config.input.size),)
    cache, none = {"train_views": views, "eval_views": views}, {"train_views": (), "eval_views": ()}
    first = {"backbone": {"frozen": "all"}, "cache": cache, "optim": {"lr": lr, "epochs": 25, "batch_size": batch_size}}
    config.stages = (first, {"backbone": {"frozen": ""}, "cache": none, "start": "best"})


def partial(config: Config, name: str) -> None:
    """VOC2007, COCO 2014 or VG-200 with HCP-MLR-PL's masks (SST, SARB): all images, its class order, 10 % known."""
    data_set(config, name)
    config.data.update(DATA_SETS[name].partial)
    config.observe = {"name": "known", "proportion": 0.1, "mode": "hcp"}


def hcp(config: Config) -> None:
    """HCP-MLR-PL's training, of all rows of SST's and SARB's tables: 512 cropped to 448, Adam with L2, a tenth of the
    rate after ten of twenty epochs; of ResNet-101 only layer4 is trained."""
    resnet101(config)
    config.backbone.frozen = "stem,layer1,layer2,layer3"
    config.input.train = {"crop": "ssgrl", "pre_size": 512, "flip": 0.5, "resize": "bicubic"}
    config.input.eval = {"crop": "squish", "resize": "bicubic"}
    config.optim = {"name": "adam", "lr": 1e-5, "epochs": 20, "batch_size": 32, "weight_decay": 5e-4}
    config.optim["schedule"] = {"name": "step", "every": 10}
    config.eval.update(every=1, definition="env")


def partial_sets(apply: Callable[[Config], None]) -> dict[str, Callable[[Config], None]]:
    """The words voc2007, coco2014 and vg200 of SST's table: its data, its training, and then what `apply` sets."""

    def word(name: str) -> Callable[[Config], None]:
        def choose(config: Config) -> None:
            partial(config, name)
            hcp(config)
            apply(config)

        return choose

    return {name: word(name) for name in PARTIAL}


def known(config: Config, share: str) -> None:
    """The word known=0.3: which share of the labels is known."""
    config.observe.update(name="known", proportion=float(share))


def partial_baseline(config: Config, share: str) -> None:
    """The word known=0.3 of the systems that SST is compared with: partial BCE on HCP-MLR-PL's masks, and its training
    and data where ResNet-101 is trained."""
    if config.backbone.name == "resnet101":
        hcp(config)
        others = (of.partial for of in DATA_SETS.values() if of.data["name"] == config.data.name)
        config.data.update(next(filter(None, others), {}))
    config.observe = {"name": "known", "proportion": 0.1, "mode": "hcp"}
    known(config, share)
    config.loss = {"name": "partial_bce", "reduction": "batch_mean", "alpha": -4.45, "beta": 5.45, "gamma": 1.0}
