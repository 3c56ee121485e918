"""The sections that every experiment has, with their defaults, and the words that choose between experiments.

A file in `configs/` says only what differs: `configs/cmsg.py:voc2007,smoke` calls its `get_config("voc2007,smoke")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict, config_dict

from mljax.config.data_sets import DATA_SETS, VARIANTS
from mljax.errors import UserError, nearest

if TYPE_CHECKING:
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

    _add_data(config)
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
        {
            **{"name": "adamw", "lr": 2e-3, "epochs": 10, "batch_size": 32, "weight_decay": 1e-2},
            "schedule": {"name": "one_cycle"},  # one of mljax.optim.schedules and its settings
        }
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


def _add_data(config: Config) -> None:
    """The sections that say what is trained on, and in which form it is read."""
    config.data = ConfigDict(  # a reader and its settings; digest and changed are of every reader, and may be left out
        {
            "name": "scenes",
            "digest": "sampled",  # of which images the run keeps digests, to notice changes: 64, the "whole", or "none"
            "changed": "refuse",  # "accept" goes on with data that changed since the run started
        }
    )
    config.splits = {"train": "train", "eval": "test"}  # names, or slices such as "trainval[:-500]"
    config.unseen = ()  # labels that training does not have; `mljax.evaluate --labels=unseen` scores them by vectors
    config.observe = {"name": "all"}  # which labels of the training split are seen (mljax.data.observe)
    config.vectors = "auto"  # label vectors: "auto" (the data set's own or none), "glove", a file, or "none"
    config.input = ConfigDict(
        {
            "size": 96,
            "train": {"crop": "squish", "flip": 0.5},  # settings of pipeline.transforms.train
            "eval": {"crop": "squish"},  # settings of pipeline.transforms.evaluate
            "views": 1,  # how many augmented views a batch holds of each image
            "threads": 8,  # that read and augment
            "workers": 0,  # processes in place of threads
        }
    )
    config.cache = ConfigDict(  # endpoints of a frozen backbone, computed once; no train_views: no cache
        {"train_views": (), "eval_views": (), "limit_gb": 30.0}
    )


def choose(config: Config, arg: str | None, words: Words) -> Config:
    """Apply the words of `configs/x.py:word,word`: those of data sets first, then the others in order, `smoke` last.

    Args:
      arg: what stands behind the colon, or None.
      words: name -> a function that changes the config in place; "key=value" words call `words["key"]` with the value.
    """
    chosen = [w for w in (arg or "").split(",") if w]
    chosen.sort(key=lambda w: 2 if w == "smoke" else w not in (*DATA_SETS, *VARIANTS))
    table = {"smoke": smoke, **words}
    for word in chosen:
        key, _, value = word.partition("=")
        name = f"{key}=" if value else key
        if name == key and f"{key}=" in table and (key not in table or word != key):
            raise UserError(f"The word {key!r} needs a value: {key}=VALUE.")
        if name not in table:
            raise UserError(f"The config has no experiment {word!r}{nearest(word, table)}.")
        if value:
            try:
                table[name](config, value)
            except ValueError:
                raise UserError(f"The word {word!r} has a value that is not a number; expected {key}=NUMBER.") from None
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
