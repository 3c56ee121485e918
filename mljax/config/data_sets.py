"""The data sets and backbones of the papers' experiments, as changes of a config that the files in configs/ share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import config_dict

if TYPE_CHECKING:
    from mljax.types import Config


def resnet101(config: Config, size: int = 448) -> None:
    """ResNet-101 with ImageNet weights, MultiScaleCrop and flip: the setting of most papers since ML-GCN."""
    config.backbone = {"name": "resnet101"}
    config.weights.name = "resnet101"
    config.input.size = size
    config.input.train = {"crop": "multi_scale", "flip": 0.5}
    config.input.eval = {"crop": "squish"}


class DataSet(NamedTuple):
    """A data set of the papers.

    Attributes:
      data: its `config.data`.
      splits: (training, evaluation).
      single_positive: what the single-positive papers change of `data`; None: they do not use it.
      partial: what HCP-MLR-PL (SST, SARB) changes of `data`; None: it does not use it.
      positives: of an image, as the single-positive papers have it.
    """

    data: Mapping[str, Any]
    splits: tuple[str, str]
    single_positive: Mapping[str, Any] | None = None
    partial: Mapping[str, Any] | None = None
    positives: float | None = None


_VOC = {"name": "voc", "root": None}
_GENOME = {"name": "visual_genome", "root": None}

# Words of the configs that set a data set. The labels of VOC2012's test split are on the server only. NUS-WIDE has the
# list of ASL's authors, which Query2Label and MulCon name; ML-GCN's is not known. Labels of Visual Genome have no names
# unless a file gives them, so that "glove" needs one.
DATA_SETS: dict[str, DataSet] = {
    "voc2007": DataSet({**_VOC, "year": "2007", "difficult": "V1"}, ("trainval", "test"), partial={"difficult": "V2"}),
    "voc2012": DataSet(
        {**_VOC, "year": "2012", "difficult": "V1"},
        ("train", "val"),
        single_positive={"difficult": "V3"},
        positives=1.5,
    ),
    "coco2014": DataSet(  # train2014 / val2014 images that have annotations, alphabetical class order
        {"name": "coco", "root": None, "year": "2014"},
        ("train", "val"),
        single_positive={"order": "id"},
        partial={"order": "id", "annotated_only": False},
        positives=2.9,
    ),
    "nuswide": DataSet(
        {"name": "nuswide", "root": None, "variant": "asl"},
        ("train", "val"),
        single_positive={"variant": "spml"},
        positives=1.9,
    ),
    "vg200": DataSet({**_GENOME, "size": 200}, ("train", "test"), partial={}),
    "vg500": DataSet({**_GENOME, "size": 500}, ("train", "test")),
}
# Words of some configs that set a data set too.
VARIANTS = ("coco576", "nuswide_zero_shot", "openimages", "voc_resplit", "csv")


def data_set(config: Config, word: str) -> None:
    """Data, splits and label vectors of a word of `DATA_SETS`."""
    chosen = DATA_SETS[word]
    config.data = dict(chosen.data)
    config.splits = dict(zip(("train", "eval"), chosen.splits))
    config.vectors = "glove"


def voc_resplit(config: Config, views: tuple[str, ...] = ("224",)) -> None:
    """The VOC2007 re-split of benchmarks/voc_resplit with a frozen MobileNetV1, features cached; last step counts."""
    config.data = {"name": "voc", "root": None, "year": "2007", "difficult": "V4", "variant": "VOC2007 re-split"}
    config.splits = {"train": "trainval", "eval": "test"}
    config.vectors = "glove"
    config.backbone = {"name": "mobilenet_v1", "frozen": "all"}
    config.weights.name = "mobilenet_v1"
    config.input.size = int(views[0].split(":")[0])
    config.input.train = {"crop": "squish", "flip": 0.0}
    config.input.eval = {"crop": "squish"}
    config.cache.train_views = config.cache.eval_views = views
    config.eval.select = "last"


VIEWS = ("224", "224:flip", "224:tl85", "224:br85", "224:flip:tr85", "224:flip:bl85")  # six views of a photo


MIRRORED = ("224", "224:flip")


def small_sets(settings: Callable[[Config], None], views: tuple[str, ...] = MIRRORED) -> dict[str, Callable[..., None]]:
    """The words voc_resplit and csv of a system: the same settings on cached features of a frozen MobileNetV1.

    Args:
      settings: changes the config after the data set's word has.
      views: that are cached of the re-split; own photos always have two.
    """

    def resplit(config: Config) -> None:
        voc_resplit(config, views)
        settings(config)
        config.eval.every = config.optim.epochs

    def photos(config: Config) -> None:
        own_csv(config)
        settings(config)

    return {"voc_resplit": resplit, "csv": photos}


def data_sets(paper: Callable[[Config], None], *names: str) -> dict[str, Callable[..., None]]:
    """The words of a system's data sets, keys of `DATA_SETS`, each followed by its paper's settings."""

    def word(name: str) -> Callable[[Config], None]:
        def chosen(config: Config) -> None:
            data_set(config, name)
            paper(config)

        return chosen

    return {name: word(name) for name in names}


def own_csv(config: Config) -> None:
    """Anyone's photos: a CSV with the columns image, labels, split (`--config.data.file=photos/labels.csv`)."""
    config.data = {"name": "csv", "file": config_dict.placeholder(str)}
    config.splits = {"train": "train", "eval": "val"}
    config.vectors = "glove"
    config.backbone = {"name": "mobilenet_v1", "frozen": "all"}
    config.weights.name = "mobilenet_v1"
    config.input.size = 224
    config.input.eval = {"crop": "squish"}
    config.cache.train_views, config.cache.eval_views = ("224", "224:flip"), ("224", "224:flip")
