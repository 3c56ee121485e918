"""The data sets and backbones of the papers' experiments, as changes of a config that the files in configs/ share."""

from collections.abc import Callable

from ml_collections import config_dict

from mljax.types import Config


def resnet101(config: Config, size: int = 448) -> None:
    """ResNet-101 with ImageNet weights, MultiScaleCrop and flip: the setting of most papers since ML-GCN."""
    config.backbone = {"name": "resnet101"}
    config.weights.name = "resnet101"
    config.input.size = size
    config.input.train = {"crop": "multi_scale", "flip": 0.5}
    config.input.eval = {"crop": "squish"}


def voc(config: Config, year: str) -> None:
    """VOC2007 trainval / test, or VOC2012 train / val (the labels of its test split are on the server only)."""
    config.data = {"name": "voc", "root": None, "year": year, "difficult": "V1"}
    config.splits = {"train": "trainval", "eval": "test"} if year == "2007" else {"train": "train", "eval": "val"}
    config.vectors = "glove"


def coco2014(config: Config) -> None:
    """COCO 2014: train2014 / val2014 images that have annotations, alphabetical class order."""
    config.data = {"name": "coco", "root": None, "year": "2014"}
    config.splits = {"train": "train", "eval": "val"}
    config.vectors = "glove"


def nuswide(config: Config) -> None:
    """NUS-WIDE, 81 concepts, by the list of ASL's authors, which Query2Label and MulCon name; ML-GCN's is not known."""
    config.data = {"name": "nuswide", "root": None, "variant": "asl"}
    config.splits = {"train": "train", "eval": "val"}
    config.vectors = "glove"


def visual_genome(config: Config, size: int) -> None:
    """VG-200 or VG-500; its labels have no names unless a file gives them, so that "glove" needs one."""
    config.data = {"name": "visual_genome", "root": None, "size": size}
    config.splits = {"train": "train", "eval": "test"}
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


VIEWS = ("224", "224:flip", "224:tl85", "224:br85", "224:flip:tr85", "224:flip:bl85")  # six looks at a photo


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
    """The words of a system's data sets, each followed by its paper's settings; names are those of the table here."""
    readers: dict[str, Callable[[Config], None]] = {
        "voc2007": lambda config: voc(config, "2007"),
        "voc2012": lambda config: voc(config, "2012"),
        "coco2014": coco2014,
        "nuswide": nuswide,
        "vg200": lambda config: visual_genome(config, 200),
        "vg500": lambda config: visual_genome(config, 500),
    }

    def word(name: str) -> Callable[[Config], None]:
        def chosen(config: Config) -> None:
            readers[name](config)
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
