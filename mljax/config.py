"""The sections that every experiment has, with their defaults, and the words that choose between experiments.

A file in `configs/` says only what differs: `configs/cmsg.py:voc2007,smoke` calls its `get_config("voc2007,smoke")`.
"""

import json
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
        {"name": config_dict.placeholder(str), "prefix": "", "skip": ()}
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
        if name not in table:
            raise UserError(f"The config has no experiment {word!r}{nearest(word, table)}.")
        if value:
            table[name](config, value)
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
    config.weights = {"name": None, "prefix": "", "skip": ()}
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
    """A stage that says its own length and batch, as short as the rest of a smoke run."""
    short = {"epochs": 2, "batch_size": 16}
    optim = {k: short.get(k, v) for k, v in stage.get("optim", {}).items()}
    return {**stage, "optim": optim} if optim else dict(stage)


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


EXPECTED = {"voc2012": 1.5, "coco2014": 2.9}  # positives of an image, as the single-positive papers have it


def single_positive(config: Config, name: str) -> None:
    """VOC2012 or COCO 2014 as the single-positive code takes them: ResNet-50 at 448, its split, labels and Adam."""
    if name == "voc2012":
        voc(config, "2012")
        config.data.difficult = "V3"
    else:
        coco2014(config)
        config.data.order = "id"
    config.splits = {"train": "train[spml:train]", "eval": "train[spml:val]"}  # report val: mljax.evaluate --split=val
    config.observe = {"name": "single_positive", "mode": "spml", "seed": 1200}
    config.vectors = "none"
    config.backbone = {"name": "resnet50"}
    config.weights.name = "resnet50"
    config.input.size = 448
    config.optim.update(name="adam", lr=1e-5, epochs=10, batch_size=8, schedule="constant", weight_decay=0.0)
    config.eval.update(every=1, select="best", definition="sklearn")


def linear(config: Config) -> None:
    """Only what stands on the frozen backbone is trained, on cached features of the whole image: its linear mode."""
    config.backbone.frozen = "all"
    config.cache.train_views = config.cache.eval_views = (str(config.input.size),)
    config.optim.update(lr=1e-3, epochs=25, batch_size=16)


def linear_init(config: Config) -> None:
    """Linear first, then all of the network from the best of it; the stages of the single-positive code."""
    views = (str(config.input.size),)
    cache, none = {"train_views": views, "eval_views": views}, {"train_views": (), "eval_views": ()}
    first = {"backbone": {"frozen": "all"}, "cache": cache, "optim": {"lr": 1e-3, "epochs": 25, "batch_size": 16}}
    config.stages = (first, {"backbone": {"frozen": ""}, "cache": none, "optim": dict(config.optim), "start": "best"})


def partial(config: Config, name: str) -> None:
    """VOC2007 or COCO 2014 with the masks of HCP-MLR-PL (SST, SARB): all images, its class order, 10 % known."""
    if name == "voc2007":
        voc(config, "2007")
        config.data.difficult = "V2"
    else:
        coco2014(config)
        config.data.update(order="id", annotated_only=False)
    config.observe = {"name": "known", "proportion": 0.1, "mode": "hcp"}


def known(config: Config, share: str) -> None:
    """The word known=0.3: which share of the labels is known."""
    config.observe.update(name="known", proportion=float(share))


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


# --- configs as data -------------------------------------------------------------------------------------------------


def to_json(config: Config) -> str:
    """One canonical text for a config, as it lies in a run directory."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=list)


def from_json(text: str) -> Config:
    """The config of a run directory; lists come back as the tuples that they were."""

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    return ConfigDict(tuples(json.loads(text)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configs, as `key: old -> new`."""
    found: list[str] = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found
