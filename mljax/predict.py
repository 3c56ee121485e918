"""A run directory -> scores, labels and attention maps for anyone's images.

python -m mljax.predict --workdir=runs/cmsg photo.jpg holiday/ [--json] [--overlay=maps/] [--threshold=0.5] [--top=5]
python -m mljax.predict --workdir=runs/zero_shot photo.jpg --labels=zebra,giraffe
python -m mljax.predict --workdir=runs/c_tran photo.jpg --known=dog=1,cat=0

import mljax
run = mljax.load("runs/cmsg")
run.predict(["photo.jpg", array, pil_image])
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mljax.config.command import Parser, guarded
from mljax.errors import UserError
from mljax.known_labels import from_text
from mljax.pictures.overlays import Overlays
from mljax.pipeline.images import ImageError
from mljax.run import Run, load

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


def photos(paths: Iterable[str]) -> Iterator[Path]:
    """Files as given; folders by the images in them, sorted, with their subfolders."""
    for text in paths:
        path = Path(text)
        if path.is_dir():
            images = sorted(
                p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.name[0] != "." and p.is_file()
            )
            if not images:
                raise UserError(f"The folder {path} holds no image ({' '.join(ENDINGS)}).")
            yield from images
        elif path.exists():
            yield path
        else:
            raise UserError(f"There is no file or folder {path}.")


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    chosen = list(photos(args.photos))
    overlays = Overlays(args.overlay) if args.overlay else None
    run = load(args.workdir)
    if args.vectors and not args.labels:
        raise UserError("--vectors has the vectors of new labels; name them with --labels.")
    if args.labels is not None:
        run = run.with_labels(args.labels, args.vectors)
    failed = []

    def skip(path: Path, error: ImageError) -> None:
        failed.append(path)
        print(f"mljax: {error}", file=sys.stderr)
        if args.json:
            print(json.dumps({"image": str(path), "error": str(error)}), flush=True)

    for paths, scores, out in run.stream(chosen, skip, known=[args.known] * len(chosen) if args.known else None):
        show(run, paths, scores, args)
        if overlays is not None:
            threshold, maps = least(args), run.maps(out)
            for path, row, attention in zip(paths, scores, maps):
                overlays.write(path, run.labels(row, threshold, args.top), dict(zip(run.classes, attention)))
    if failed:
        print(f"mljax: {len(failed)} of {len(chosen)} photos could not be read", file=sys.stderr)
    return 1 if failed else 0


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """The command line, `known` as {label: 0 or 1}; raises UserError for values that make no sense."""
    parser = Parser("predict", __doc__)
    parser.add_argument("photos", nargs="+", metavar="PHOTO_OR_FOLDER")
    parser.add_argument("--workdir", required=True, help="run directory")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--threshold", type=float, default=0.5, help="least probability of a label")
    parser.add_argument("--top", type=int, help="at most so many labels per photo; also below the threshold")
    parser.add_argument("--overlay", help="folder for a picture of the attention per photo and label")
    parser.add_argument(
        "--labels", help="names to score in place of the run's, of a zero-shot ML-Decoder: zebra,giraffe"
    )
    parser.add_argument(
        "--vectors", help="where their vectors are: a file with names, or glove; default: as the run's config says"
    )
    parser.add_argument("--known", help="labels that are known of all photos, of a C-Tran: dog=1,cat=0")
    args = parser.parse_args(argv)
    args.known = None if args.known is None else from_text(args.known)
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold={args.threshold:g} is not a probability; expected a number from 0 to 1.")
    if args.top is not None and args.top < 1:
        raise UserError(f"--top={args.top} is not a number of labels; expected at least 1.")
    return args


def least(args: argparse.Namespace) -> float:
    """--top alone decides where it is given."""
    return 0.0 if args.top is not None else args.threshold


def show(run: Run, paths: list[Path], scores: np.ndarray, args: argparse.Namespace) -> None:
    """Print the labels of some photos."""
    for path, row in zip(paths, scores):
        labels = run.labels(row, least(args), args.top)
        if args.json:
            print(json.dumps({"image": str(path), "labels": labels}))
        else:
            text = "  ".join(f"{name} {score:.2f}" for name, score in labels.items())
            print(f"{path}: {text or f'nothing above {args.threshold:g}'}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(guarded(main))
