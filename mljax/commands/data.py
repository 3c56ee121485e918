"""Look at, check, pack and fetch data sets.

python -m mljax.data stats configs/cmsg.py:voc2007 [--content] [--config.data.root=/data]
python -m mljax.data show configs/cmsg.py:voc2007 --out=samples.png
python -m mljax.data pack configs/cmsg.py:voc2007 packed/voc2007 --short-side=512
python -m mljax.data observe configs/role.py:voc2012 --out=masks.npz
python -m mljax.data prepare voc2007 --root=data
python -m mljax.data check configs/baseline.py:csv [--write]
"""

import dataclasses
import sys
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mljax import experiment
from mljax.build import find, keywords, settings
from mljax.config.command import Parser, guarded
from mljax.config.overrides import overridden
from mljax.config.reading import read_config
from mljax.data import digests, masks, prepare, stats, unseen
from mljax.data.source import Source
from mljax.data.splits import load
from mljax.errors import UserError, nearest
from mljax.pictures import samples
from mljax.pipeline import transforms
from mljax.pipeline.pack import pack

COMMANDS = ("stats", "show", "pack", "observe", "prepare", "check")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("data", __doc__)
    parser.add_argument("command", help=", ".join(COMMANDS))
    parser.add_argument("what", help="CONFIG, e.g. configs/cmsg.py:voc2007; of prepare: a data set, e.g. voc2007")
    parser.add_argument("place", nargs="?", help="of pack: the folder to pack into")
    parser.add_argument("--content", action="store_true", help="stats: compare splits by the bytes of their images too")
    parser.add_argument("--split", help="show, pack: of which split (pack: of these, joined by commas)")
    parser.add_argument(
        "--out",
        help="the file: show: samples.png; observe: masks.npz; check: the digests",
    )
    parser.add_argument("--count", type=int, default=6, help="show: photos")
    parser.add_argument("--views", type=int, default=4, help="show: different augmented ones of each, at most")
    parser.add_argument("--seed", type=int, default=0, help="show: of the choice")
    parser.add_argument("--short-side", type=int, help="pack: make larger images smaller; else bytes are kept")
    parser.add_argument("--quality", type=int, default=95, help="pack: of JPEG, where images are made smaller")
    parser.add_argument("--root", help="prepare: the folder that becomes MLJAX_DATA")
    parser.add_argument("--write", action="store_true", help="check: write a digest of every image, to check later")
    args, overrides = parser.parse_overrides(argv)
    if args.command not in COMMANDS:
        raise UserError(f"There is no command {args.command!r}{nearest(args.command, COMMANDS)}.")
    if args.place is not None and args.command != "pack":
        raise UserError(f"The argument {args.place!r} is not expected here; see python -m mljax.data --help.")
    if args.command == "prepare":
        return _prepare(args, overrides)
    config = overridden(read_config(args.what), overrides)
    commands = {"stats": _stats, "show": _show, "pack": _pack, "observe": _observe, "check": _check}
    return commands[args.command](config, args)


def _source(config: Any, split: str, *, training: bool) -> Source:
    """A split with all its labels, whatever `config.observe` would hide."""
    section = dict(config.data)
    if "training" in keywords(find("data", section.get("name", ""))):
        section["training"] = training
    return load(section, split)


def _splits(config: Any) -> list[tuple[str, str]]:
    """(what it is for, its name), the training split first."""
    return sorted(dict(config.splits).items(), key=lambda item: item[0] != "train")


def _stats(config: Any, args: Any) -> int:
    began = time.perf_counter()
    sources = [_source(config, split, training=kind == "train") for kind, split in _splits(config)]
    print(stats.describe(sources))
    print()
    fine, wrong = [], []
    for source in sources:
        agrees, differs = stats.check(source)
        fine, wrong = fine + agrees, wrong + differs
    for one, other in combinations(sources, 2):
        shared = stats.overlap(one, other) or (stats.overlap(one, other, content=True) if args.content else None)
        if shared:
            wrong.append(shared)
        else:
            by = "by name and content" if args.content else "by name (--content compares the images themselves)"
            fine.append(f"{one.name} and {other.name} share no image, {by}.")
    print("\n".join(fine))
    print(f"read in {time.perf_counter() - began:.1f} s")
    if wrong:
        raise UserError(" ".join(wrong))
    return 0


def _check(config: Any, args: Any) -> int:
    """Compare every image with the digest that was written of it, or write digests."""
    sources = [_source(config, split, training=kind == "train") for kind, split in _splits(config)]
    path = Path(args.out) if args.out else digests.place(config.data)
    if path is None:
        raise UserError("The data set has no folder for its digests; name their file with --out=FILE.")
    if args.write:
        digests.write(path, sources)
        print(f"{path}: digests of {sum(map(len, sources)):,} images")
        return 0
    if wrong := digests.check(path, sources):
        raise UserError(" ".join(wrong))
    print(f"all {sum(map(len, sources)):,} images are as they were when {path} was written")
    return 0


def _show(config: Any, args: Any) -> int:
    split = args.split or config.splits.train
    source = unseen.without(_source(config, split, training=True), config.unseen)
    if split == config.splits.train:  # what training makes of it: labels that it does not see, and false ones
        seen = experiment.source(config, split, training=True)
        source = dataclasses.replace(
            source, labels=np.maximum(source.labels, seen.labels), observed=seen.observed, name=seen.name
        )
    transform = settings(transforms.train, config.input.train, "config.input.train", size=config.input.size)
    page = samples.page(source, transform, count=args.count, views=args.views, seed=args.seed)
    path = Path(args.out or "samples.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        page.save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"The page {str(path)!r} cannot be written ({reason}); give --out=samples.png.") from None
    print(f"{path}: {min(args.count, len(source))} photos of {source.name}, up to {args.views} augmented views each")
    return 0


def _pack(config: Any, args: Any) -> int:
    if not args.place:
        raise UserError("The folder to pack into is missing: python -m mljax.data pack CONFIG OUT.")
    if config.data.get("name") == "packed":
        raise UserError("The config's data is packed already; give a config whose data is not.")
    chosen = args.split.split(",") if args.split else [split.partition("[")[0] for _, split in _splits(config)]
    for split in dict.fromkeys(chosen):
        evaluated = _source(config, split, training=False)
        trained = _source(config, split, training=True) if evaluated.observed.any() else evaluated
        sources = {True: trained, False: evaluated}
        began = time.perf_counter()
        written = pack(
            sources,
            Path(args.place) / split,
            short_side=args.short_side,
            quality=args.quality,
            progress=lambda what, done, total: prepare.stderr(f"{what}: {done:,} of {total:,}"),
        )
        result = f"packed in {time.perf_counter() - began:.0f} s" if written else "was packed before"
        print(f"{Path(args.place) / split}: {len(evaluated):,} images of {evaluated.name} {result}")
    print(f"use it with --config.data.name=packed --config.data.root={args.place}")
    return 0


def _prepare(args: Any, overrides: list[tuple[str, str]]) -> int:
    if overrides:
        raise UserError("prepare takes the name of a data set and --root; leave --config.KEY=VALUE out.")
    if not args.root:
        raise UserError("The flag --root is missing; give --root=FOLDER, the folder that MLJAX_DATA names.")
    for line in prepare.prepare(args.what, Path(args.root).expanduser(), say=prepare.stderr):
        print(line)
    return 0


def _observe(config: Any, args: Any) -> int:
    """Write what a config lets training see of its labels."""
    source = experiment.source(config, config.splits.train, training=True)
    out = Path(args.out or "masks.npz")
    masks.write(out, source, noisy=config.observe.name == "candidates")
    share = source.observed.mean()
    print(f"{out}: {len(source)} images of {source.name}, {share:.1%} known, {int(source.labels.sum())} positives")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
