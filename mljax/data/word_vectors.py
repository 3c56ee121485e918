"""Word vectors for the names of labels: which files are looked at, and how a name is looked up in them."""

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mljax.cache import cache_dir
from mljax.data import glove
from mljax.data.labels import key
from mljax.errors import UserError
from mljax.untrusted import read_npz

UNNAMED = (".npy", ".pth", ".pt")  # endings of files with vectors in the order of the classes

# Names whose own spelling a file of word vectors may not have -> the words that stand for them, averaged.
# Used only where the name itself is not found. Keys as `key` makes them. "tv" alone for tvmonitor is what
# ML-GCN's file holds.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    # VOC
    "aeroplane": ("airplane",),
    "diningtable": ("dining", "table"),
    "motorbike": ("motorcycle",),
    "pottedplant": ("potted", "plant"),
    "sofa": ("couch",),
    "tvmonitor": ("tv",),
    # COCO: its names of two words in one, and other spellings
    "airplane": ("aeroplane",),
    "baseballbat": ("baseball", "bat"),
    "baseballglove": ("baseball", "glove"),
    "cellphone": ("cell", "phone"),
    "couch": ("sofa",),
    "donut": ("doughnut",),
    "firehydrant": ("fire", "hydrant"),
    "hairdrier": ("hair", "dryer"),
    "hotdog": ("hot", "dog"),
    "motorcycle": ("motorbike",),
    "parkingmeter": ("parking", "meter"),
    "skis": ("ski",),
    "sportsball": ("sports", "ball"),
    "stopsign": ("stop", "sign"),
    "teddybear": ("teddy", "bear"),
    "tennisracket": ("tennis", "racket"),
    "toothbrush": ("tooth", "brush"),
    "trafficlight": ("traffic", "light"),
    "tv": ("television",),
    "wineglass": ("wine", "glass"),
    # NUS-WIDE
    "cityscape": ("city", "skyline"),
    "harbor": ("harbour",),
    "nighttime": ("night",),
    "railroad": ("railway",),
    "swimmers": ("swimmer",),
    # Visual Genome
    "armrest": ("arm", "rest"),
    "backsplash": ("tile", "wall"),
    "bathtub": ("bath", "tub"),
    "countertop": ("counter", "top"),
    "eyeglasses": ("eye", "glasses"),
    "facialhair": ("facial", "hair"),
    "flowerpot": ("flower", "pot"),
    "headboard": ("head", "board"),
    "lampshade": ("lamp", "shade"),
    "licenseplate": ("license", "plate"),
    "nightstand": ("night", "stand"),
    "placemat": ("place", "mat"),
    "shoelace": ("shoe", "lace"),
    "skatepark": ("skate", "park"),
    "streetlight": ("street", "light"),
    "tanktop": ("tank", "top"),
    "tshirt": ("shirt",),
    "windowsill": ("window", "sill"),
    "wristband": ("wrist", "band"),
}


def load_vectors(classes: Sequence[str], *, source: str = "glove", root: str | os.PathLike | None = None) -> np.ndarray:
    """Word vectors of class names, in the order of the classes.

    A name is looked up as it is, then in lower case (in an .npz also without regard to spaces and hyphens);
    failing that, it is the mean of the vectors of its words; failing that, of the words that SYNONYMS gives
    for it.

    Args:
      classes: l names.
      source: a file, .npz with `names` (l) and `vectors` (l e), text in GloVe's format, or vectors in the order of the
        classes: .npy with (l e) (`vg_200_vector.npy`), .pth with (e l) or (l e) (`wordvec_array.pth`); relative to the
        working folder, the data folder or its label_embeddings/. Or "glove": the first of these that has all classes,
        synonyms last: `label_embeddings/glove*.npz`, GloVe 6B 300-d there or in the user's cache folder, other
        `label_embeddings/glove*.txt`, and at last a download of GloVe 6B (862 MB, once).
      root: the data folder, looked at before the one that the environment variable MLJAX_DATA names, if any.
    Returns:
      (l e) float32, not normalised.
    Raises:
      UserError: no such file, a damaged one, or classes without a vector; these are named, and the ways on.
    Reference: Pennington et al., "GloVe: Global Vectors for Word Representation", EMNLP 2014.
    Differs from the authors' code: ML-GCN ships vectors for VOC and COCO, in which "diningtable" is not "dining table"
    nor "pottedplant" "potted plant"; where a file has only the words, we take their mean for both spellings.
    """
    roots = [Path(given).expanduser() for given in (root, os.environ.get("MLJAX_DATA")) if given]
    own = [folder / "label_embeddings" for folder in roots]
    if source != "glove":
        return _of_file(_locate(source, [*roots, *own]), classes)
    full = [path for folder in (*own, cache_dir()) if (path := folder / glove.MEMBER).is_file()]
    tables = [path for folder in own for path in sorted(folder.glob("glove*.npz"))]
    parts = [path for folder in own for path in sorted(folder.glob("glove*.txt")) if path not in full]
    problems: list[Missing] = []
    # A file that has the names themselves goes before one that has synonyms: COCO's "airplane" is not
    # "aeroplane".
    for synonyms, offered in ((False, tables + full + parts), (True, full + tables + parts)):
        for path in offered:
            try:
                return _of_file(path, classes, synonyms)
            except Missing as error:
                problems.append(error)
    if full:
        raise min(problems, key=lambda problem: problem.count)
    try:
        path = glove.fetch(cache_dir())
    except UserError as error:
        if not problems:
            raise
        nearest_file = min(problems, key=lambda problem: problem.count)
        raise UserError(f"{str(nearest_file).rstrip('.')}; {error}") from error
    return _of_file(path, classes)


class Missing(UserError):
    """A file of vectors lacks `count` classes."""

    count = 0


def _locate(source: str, folders: Sequence[Path]) -> Path:
    tried = [folder / Path(source).expanduser() for folder in (Path(), *folders)]
    for path in tried:
        if os.path.isfile(path):  # also where no system has such a path
            return path
    raise UserError(
        f"There is no file of label vectors {source!r} (looked in "
        f"{', '.join(repr(str(p.parent)) for p in tried)}): "
        "give an .npz with names and vectors, a text file in GloVe's format, or 'glove'."
    )


def _of_file(path: Path, classes: Sequence[str], synonyms: bool = True) -> np.ndarray:
    look_up: Callable[[str], np.ndarray | None]
    if path.suffix == ".npy":
        return glove.read_rows(path, len(classes))
    if path.suffix in UNNAMED:
        return glove.read_tensor(path, len(classes))
    if path.suffix == ".npz":
        table = _read_npz(path)
        by_key = {key(name): vector for name, vector in reversed(table.items())}

        look_up = lambda word: table.get(word, by_key.get(key(word)))  # noqa: E731
    else:
        wanted = {word for name in classes for phrase in _spellings(name) for word in phrase}
        found = glove.read_words(path, wanted)
        look_up = lambda word: found.get(word)  # noqa: E731

    vectors = [_vector(name, look_up, synonyms) for name in classes]
    missing = [name for name, vector in zip(classes, vectors) if vector is None]
    if missing:
        shown = ", ".join(map(repr, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        error = Missing(
            f"{str(path)!r} has no vector for {shown}: give a vectors file that has them (config.vectors), "
            "take the correlation from co-occurrence, or do without (config.vectors='none')."
        )
        error.count = len(missing)
        raise error
    return np.stack([vector for vector in vectors if vector is not None]).astype(np.float32)


def _spellings(name: str, synonyms: bool = True) -> Iterator[tuple[str, ...]]:
    """The ways to look up a name, best first; each is the words whose mean stands for it."""
    plain = " ".join(name.replace("_", " ").split())
    yield (plain,)
    yield (plain.lower(),)
    yield tuple(plain.lower().split())
    yield tuple(plain.lower().replace("-", " ").split())
    if synonyms and key(name) in SYNONYMS:
        yield SYNONYMS[key(name)]


def _vector(name: str, look_up: Callable[[str], np.ndarray | None], synonyms: bool) -> np.ndarray | None:
    for phrase in _spellings(name, synonyms):
        found = [vector for word in phrase if (vector := look_up(word)) is not None]
        if phrase and len(found) == len(phrase):
            return np.stack(found).astype(np.float64).sum(0) / len(found)
    return None


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    expected = "an .npz with `names` (l) and `vectors` (l e) is expected"
    try:
        arrays = read_npz(path)
        names, vectors = [str(name) for name in arrays["names"]], np.asarray(arrays["vectors"], np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{str(path)!r} cannot be read as label vectors ({error}): {expected}.") from error
    if vectors.ndim != 2 or len(vectors) != len(names) or not np.isfinite(vectors).all():
        raise UserError(
            f"{str(path)!r} holds {len(names)} names and vectors of shape {vectors.shape}, or values that "
            "are not finite: "
            f"{expected}."
        )
    return dict(zip(names, vectors))
