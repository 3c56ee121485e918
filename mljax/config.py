"""The sections that every experiment has, with their defaults, and the words that choose between experiments.

A file in `configs/` says only what differs: `configs/cmsg.py:voc2007,smoke` calls its `get_config("voc2007,smoke")`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from mljax.errors import UserError, nearest
from mljax.types import Config

Words = Mapping[str, Callable[..., Any]]


def base() -> Config:
    """Every key of a run, with a default that trains on the embedded data set."""
    config = ConfigDict()
    config.experiment = ""  # words that chose it, filled in by `choose`
    config.seed = 0
    config.parallel = "jit"  # "jit": arrays are global; "pmap": a step per device with explicit collectives
    config.devices = config_dict.placeholder(int)  # how many to use; None for all
    config.dtype = "float32"  # of the computation; parameters and loss stay float32

    config.data = {"name": "scenes"}  # a reader and its settings
    config.splits = {"train": "train", "eval": "test"}  # names, or slices such as "trainval[:-500]"
    config.unseen = ()  # labels that training does not have; `mljax.evaluate --labels=unseen` scores them by vectors
    config.observe = {"name": "all"}  # which labels of the training split are seen (mljax.data.observe)
    config.vectors = "auto"  # label vectors: "auto" (the data set's own or none), "glove", a file, or "none"
    config.input = ConfigDict(
        {
            "size": 96,
            "train": {"crop": "squish", "flip": 0.5},  # settings of data.transforms.train
            "eval": {"crop": "squish"},  # settings of data.transforms.evaluate
            "views": 1,  # how many augmented views a batch holds of each image
            "threads": 8,  # that read and augment
            "workers": 0,  # processes in place of threads
        }
    )
    config.cache = ConfigDict(  # endpoints of a frozen backbone, computed once; no train_views: no cache
        {"train_views": (), "eval_views": (), "limit_gb": 30.0}
    )
    config.backbone = {"name": "small", "widths": (16, 32, 64, 96), "endpoints": ("8",)}
    config.weights = ConfigDict(  # a record's name or a file; None: random
        {
            **{"name": config_dict.placeholder(str), "prefix": "", "skip": ()},
            **{"mean": (), "std": ()},  # three numbers each of values in [0, 1]; empty: what the weights were made with
        }
    )
    config.system = {"name": "baseline"}
    config.loss = {"name": "bce", "reduction": "mean"}
    config.optim = ConfigDict(
        {"name": "adamw", "lr": 2e-3, "epochs": 10, "batch_size": 32, "schedule": "one_cycle", "weight_decay": 1e-2}
    )
    config.ema = 0.0  # decay of the averaged parameters; 0: none
    config.eval = ConfigDict(
        {
            "every": 5,  # epochs between evaluations
            "batch_size": 64,
            "select": "last",  # "last", "best", or "best_of_raw_and_ema"
            "definition": "raw",  # of average precision: "raw", "env", "sklearn", "11point"
            "threshold": 0.0,  # on logits, of a predicted label
            "scored_in": "AP",  # where difficult entries are left out: "AP" alone, or "all"
        }
    )
    config.init = ""  # a run directory whose network the training starts from, in place of config.weights
    config.stages = ()  # partial configs run in order; each may say start="last" | "best" | "ema"
    config.start = "last"  # what a stage takes over from the one before
    config.log_every = 20  # steps between lines of metrics.jsonl
    return config


# Words that set a whole experiment, so that what other words change must come after them.
DATA_SETS = (
    "voc2007",
    "voc2012",
    "coco2014",
    "coco576",
    "nuswide",
    "nuswide_zero_shot",
    "vg200",
    "vg500",
    "openimages",
    "voc_resplit",
    "csv",
)


def choose(config: Config, arg: str | None, words: Words) -> Config:
    """Apply the words of `configs/x.py:word,word`: those of data sets first, then the others in order, `smoke` last.

    Args:
      arg: what stands behind the colon, or None.
      words: name -> a function that changes the config in place; "key=value" words call `words["key"]` with the value.
    """
    chosen = [w for w in (arg or "").split(",") if w]
    chosen.sort(key=lambda w: 2 if w == "smoke" else w not in DATA_SETS)
    table = {"smoke": smoke, **words}
    for word in chosen:
        key, _, value = word.partition("=")
        name = f"{key}=" if value else key
        if name == key and f"{key}=" in table and (key not in table or word != key):
            raise UserError(f"The word {key!r} wants a value: {key}=VALUE.")
        if name not in table:
            raise UserError(f"The config has no experiment {word!r}{nearest(word, table)}.")
        if value:
            try:
                table[name](config, value)
            except ValueError:
                raise UserError(f"The word {word!r} wants a number behind the equals sign.") from None
        else:
            table[name](config)
    config.experiment = ",".join(chosen)
    return config


def smoke(config: Config) -> None:
    """Shrink any experiment to seconds on the embedded data set: it checks the plumbing, not the numbers."""
    config.data = {"name": "scenes", "train_images": 48, "test_images": 24, "size": 64}
    config.splits = {"train": "train", "eval": "test"}
    config.vectors = "auto"
    config.input.size, config.input.workers = 64, 0
    config.input.train = {k: v for k, v in config.input.train.items() if k not in ("pre_size", "sides")}
    config.input.eval = {"crop": "squish"}
    if config.cache.train_views:
        config.cache.train_views, config.cache.eval_views = ("64", "64:flip"), ("64",)
    kept: dict[str, Any] = {k: v for k, v in config.backbone.items() if k == "frozen" and v == "all"}
    if len(config.backbone.get("endpoints", ())) > 1:  # of a system that reads several stages
        kept["endpoints"] = ("8", "16")
    config.backbone = {"name": "small", "widths": (8, 16, 16, 16), **kept}
    config.weights.update(name=None, prefix="", skip=())
    config.unseen = ()
    config.optim.batch_size = config.eval.batch_size = 16
    config.optim.epochs = 2
    config.eval.every = 1
    config.log_every = 1
    config.stages = tuple(_short(stage) for stage in config.stages)
    for system in (config.system, config.system.get("net", {})):
        for key, value in (("width", 32), ("ffn", 64)):
            if key in system:
                system[key] = value


def _short(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage that says its own length, batch or cached views, as small as the rest of a smoke run."""
    short = {"epochs": 2, "batch_size": 16}
    found = dict(stage)
    if optim := {k: short.get(k, v) for k, v in stage.get("optim", {}).items()}:
        found["optim"] = optim
    if stage.get("cache", {}).get("train_views"):
        found["cache"] = {"train_views": ("64", "64:flip"), "eval_views": ("64",)}
    return found


# --- data sets of the papers, shared by the configs -----------------------------------------------------------------


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
