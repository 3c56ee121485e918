"""Images per second and core, from files to augmented uint8 batches, beside a torch DataLoader with Pillow.

    .venv-parity/bin/python -m pip install -e '.[fast]'
    .venv-parity/bin/python benchmarks/input.py [--rounds=7] [--batches=6] [--out=benchmarks/input.md]

Runs where torch is. Both read the same files of $MLJAX_DATA, in one process and one thread pinned to one core, and
hand over batches of 64. The DataLoader's data set does with Pillow what the transform does: the same kinds of boxes,
operations and flips. A second DataLoader also turns images into normalised float tensors, as the papers' code does (we
do that on the device). Rounds alternate between all of them, so that whatever else the machine does falls on all alike;
what is told is the median of the rounds' ratios, and times are CPU times of the process.
"""

import argparse
import importlib
import io
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1]))

from mljax.data.source import Files, Source
from mljax.pipeline import loader, picture, transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64
RECIPES: dict[str, dict[str, Any]] = {
    "random resized crop + flip": {"crop": "random_resized", "flip": 0.5},
    "MultiScaleCrop + flip": {"crop": "multi_scale", "flip": 0.5},
    "squish + RandAugment": {"crop": "squish", "flip": 0.0, "randaugment": "package", "cutout": 0.5},
}


HEADER = """# Input pipeline

Images per second and core, from JPEG files to augmented uint8 batches of 64, by `benchmarks/input.py`:

    .venv-parity/bin/python -m pip install -e '.[fast]'
    MLJAX_DATA=../shared/data .venv-parity/bin/python benchmarks/input.py --memory=10000 --out=benchmarks/input.md

One process, one thread, one core; CPU time. `torch` is a DataLoader whose data set does the same with Pillow and hands
over uint8; `torch, floats` also turns images into normalised float tensors, as the papers' code does, where we do that
on the device. In brackets: how many times as fast as these two, the median over rounds that alternate between all
columns, because other programs used the machine at the same time. `bilinear`, `antialias` and `fast` are values of
`config.input.train.resize` ([docs/data.md](../docs/data.md)); recipes are those of `RECIPES` in the script.
"""


def source_of(root: Path) -> Source:
    paths = [str(p) for p in sorted((root / "VOCdevkit/VOC2007/JPEGImages").glob("*.jpg"))]
    labels = np.ones((len(paths), 20), np.uint8)
    return Source(
        name="photos", classes=tuple(map(str, range(20))), ids=paths, labels=labels, observed=labels, scored=labels,
        read=Files(paths), fingerprint="",
    )  # fmt: skip


def _affine(image: Image.Image, matrix: Sequence[float], filter: Image.Resampling) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, filter, fillcolor=(128, 128, 128))


def _box(image: Image.Image, level: int, rng: np.random.Generator) -> Image.Image:
    x, y, half = int(rng.integers(image.width)), int(rng.integers(image.height)), round(20 * level / 9) // 2
    image = image.copy()
    corners = (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
    image.paste((125, 122, 113), corners)
    return image


_BICUBIC, _NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
# The package's operations as Pillow has them, in the order of `mljax.pipeline.randaugment.PACKAGE`: image, share of the
# range (level / 9), sign.
PLAIN: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, share, sign: ImageOps.invert(image),
    lambda image, share, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * 0.9 * share),
    lambda image, share, sign: ImageOps.autocontrast(image),
    lambda image, share, sign: ImageOps.posterize(image, round(8 - 4 * share)),
    lambda image, share, sign: _affine(image, (1, sign * 0.3 * share, 0, 0, 1, 0), _BICUBIC),
    lambda image, share, sign: _affine(image, (1, 0, sign * 150 / 331 * share * image.width, 0, 1, 0), _NEAREST),
    lambda image, share, sign: _affine(image, (1, 0, 0, 0, 1, sign * 150 / 331 * share * image.height), _NEAREST),
    lambda image, share, sign: _affine(image, (1, 0, 0, sign * 0.3 * share, 1, 0), _BICUBIC),
    lambda image, share, sign: image.rotate(30 * share, fillcolor=(128, 128, 128)),
    lambda image, share, sign: ImageOps.equalize(image),
    lambda image, share, sign: ImageEnhance.Contrast(image).enhance(1 + sign * 0.9 * share),
    lambda image, share, sign: ImageEnhance.Color(image).enhance(1 + sign * 0.9 * share),
    lambda image, share, sign: ImageOps.solarize(image, 256 - 256 * share),  # pyright: ignore[reportArgumentType]
    lambda image, share, sign: ImageEnhance.Brightness(image).enhance(1 + sign * 0.9 * share),
)


def randaugment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The package's RandAugment with Pillow alone: the same draws, and the same pixels but for the last bit."""
    for _ in range(2):
        number, level = int(rng.integers(1 + len(PLAIN))), int(rng.integers(1, 10))
        if rng.random() < 0.5:
            if number:
                image = PLAIN[number - 1](image, level / 9, 2 * int(rng.integers(2)) - 1)
            else:
                image = _box(image, level, rng)
    return image


class Plain:
    """The transform's steps with Pillow alone, as a torch data set has them."""

    def __init__(self, paths: list[str], transform: transforms.Train, floats: bool):
        torch: Any = importlib.import_module("torch")
        self.torch, self.paths, self.transform, self.floats = torch, paths, transform, floats
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        rng, own = np.random.default_rng([0, index]), self.transform
        with Image.open(self.paths[index]) as file:
            image = file.convert("RGB")
        box = own.box(image.width, image.height, rng)
        image = image.resize((own.size, own.size), Image.Resampling.BILINEAR, box=box)
        if own.cutout > 0 and rng.random() < own.cutout_prob:
            colour = rng.integers(256, size=3)
            box = transforms.cutout_box(own.size, own.cutout, rng)
            image.paste((int(colour[0]), int(colour[1]), int(colour[2])), box)
        if own.randaugment == "package":
            image = randaugment(image, rng)
        if rng.random() < own.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = self.torch.from_numpy(np.array(image))
        if self.floats:
            tensor = tensor.permute(2, 0, 1).contiguous().float().div(255).sub(self.mean).div(self.std)
        return {"image": tensor, "labels": self.torch.ones(20)}


def torch_batches(source: Source, transform: transforms.Train, floats: bool) -> Iterator[Any]:
    data: Any = Plain(list(source.ids), transform, floats)
    load: Any = importlib.import_module("torch.utils.data").DataLoader
    return iter(load(data, batch_size=BATCH, shuffle=True, drop_last=True, num_workers=0))


def our_batches(source: Source, transform: transforms.Train) -> Iterator[Any]:
    return loader.train_batches(source, transform, batch_size=BATCH, seed=0, start=0, steps=10**6, threads=0)


def measure(batches: Callable[[], Iterator[Any]], size: int, count: int) -> float:
    """CPU milliseconds per image, over `count` batches after the first."""
    iterator = batches()
    next(iterator)
    began = time.process_time()
    for _ in range(count):
        assert size in next(iterator)["image"].shape
    return (time.process_time() - began) / count / BATCH * 1e3


def table(source: Source, rounds: int, count: int) -> list[str]:
    lines = []
    for (name, recipe), size in itertools.product(RECIPES.items(), (224, 448)):
        variants: dict[str, Callable[[], Iterator[Any]]] = {}
        plain = transforms.train(size, **recipe)
        variants["torch"] = lambda plain=plain: torch_batches(source, plain, False)
        variants["torch, floats"] = lambda plain=plain: torch_batches(source, plain, True)
        for resize in ("bilinear", *picture.OPENCV):
            transform = transforms.train(size, resize=resize, **recipe)
            variants[resize] = lambda transform=transform: our_batches(source, transform)
        found: dict[str, list[float]] = {key: [] for key in variants}
        for _, (key, batches) in itertools.product(range(rounds), variants.items()):
            found[key].append(measure(batches, size, count))
        cells = [f"{1e3 / statistics.median(found[k]):.0f}" for k in ("torch", "torch, floats")]
        for key in ("bilinear", *picture.OPENCV):
            ratio = statistics.median(a / b for a, b in zip(found["torch"], found[key]))
            floats = statistics.median(a / b for a, b in zip(found["torch, floats"], found[key]))
            cells.append(f"{1e3 / statistics.median(found[key]):.0f} ({ratio:.2f}x, {floats:.2f}x)")
        lines.append(f"| {name} | {size} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines


def memory(source: Source, batches: int) -> list[tuple[int, float]]:
    """Resident MB after so many small batches, read by 8 threads."""
    transform = transforms.train(32, crop="random_resized")
    points = []
    found = loader.train_batches(source, transform, batch_size=8, seed=0, start=0, steps=batches)
    for step, _ in enumerate(found, 1):
        if step in (batches // 10, batches // 2, batches):
            status = Path("/proc/self/status").read_text()
            points.append((step, int(status.split("VmRSS:")[1].split()[0]) / 1e3))
    return points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=6, help="of each measurement")
    parser.add_argument("--memory", type=int, default=0, help="batches over which to watch the memory")
    parser.add_argument("--out")
    args = parser.parse_args()
    importlib.import_module("torch").set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    source = source_of(Path(os.environ["MLJAX_DATA"]))
    points = memory(source, args.memory) if args.memory else []
    print(json.dumps({"memory MB": points}))
    megapixels = statistics.mean(
        np.prod(Image.open(io.BytesIO(bytes(source.read(i)))).size) / 1e6 for i in range(len(source))
    )
    packages = ("pillow", "simplejpeg", "opencv-python-headless", "torch", "grain", "numpy")
    lines = [
        HEADER,
        f"{len(source)} photos, {megapixels:.3f} MP on average; {args.rounds} rounds of {args.batches} batches;"
        f" {platform.machine()}, Python {platform.python_version()},"
        f" {', '.join(f'{p} {version(p)}' for p in packages)}.",
        "",
        "| recipe | size | torch | torch, floats | bilinear | antialias | fast |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += table(source, args.rounds, args.batches)
    if points:
        told = ", ".join(f"{mb:.0f} MB after {step:,}" for step, mb in points)
        lines += ["", f"Resident memory over batches of 8, read by 8 threads: {told}."]
    if args.out:
        Path(args.out).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
