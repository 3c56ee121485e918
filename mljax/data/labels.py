"""What is known of labels apart from images: word vectors for their names, and how they go together."""

import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mljax.cache import cache_dir
from mljax.data import glove
from mljax.errors import UserError

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


def key(name: str) -> str:
    """A name without case, spaces, hyphens and underscores: what "TV monitor" and "tvmonitor" share."""
    return "".join(c for c in name.casefold() if c not in "_-" and not c.isspace())


def spelled_twice(names: Iterable[str]) -> tuple[str, str] | None:
    """The first two different names that are the same but for case, spaces, hyphens and underscores, or None."""
    seen: dict[str, str] = {}
    for name in sorted(set(names)):
        other = seen.setdefault(key(name), name)
        if other != name:
            return other, name
    return None


# --- vectors ------------------------------------------------------------------------------------------------


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
        if path.is_file():
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
        with np.load(path, allow_pickle=False) as file:
            names, vectors = [str(name) for name in file["names"]], np.asarray(file["vectors"], np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{str(path)!r} cannot be read as label vectors ({error}): {expected}.") from error
    if vectors.ndim != 2 or len(vectors) != len(names) or not np.isfinite(vectors).all():
        raise UserError(
            f"{str(path)!r} holds {len(names)} names and vectors of shape {vectors.shape}, or values that "
            "are not finite: "
            f"{expected}."
        )
    return dict(zip(names, vectors))


# --- how labels go together ---------------------------------------------------------------------------------


def cosine(vectors: np.ndarray) -> np.ndarray:
    """(l e) -> (l l) float32 cosine similarity; the diagonal is exactly 1, a zero vector is similar to nothing."""
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 1.0)
    return similarity.astype(np.float32)


def mlgcn_correlation(similarity: np.ndarray, threshold: float, p: float = 0.2) -> np.ndarray:
    """Binarised and re-weighted similarity; rows sum to 1.

    A_ij = 1[sim_ij >= threshold];  S_ij = p A_ij / sum_{k != i} A_ik for i != j,  S_ii = 1 - p.

    A label without neighbours keeps everything: S_ii = 1.

    Args:
      similarity: (l l), cosines or P(j | i) at [i, j]; the diagonal does not matter.
      threshold: tau; CMSG takes cosines at about 0.2 to 0.4.
      p: share that goes to the neighbours, in [0, 1].
    Returns:
      (l l) float32.
    Reference: Chen et al., "Multi-Label Image Recognition with Graph Convolutional Networks", CVPR 2019, eq.
    7 and 8.
    Differs from the authors' code: theirs divides by column sums and adds the identity: see
    `mlgcn_adjacency`.
    """
    edges = _edges(similarity, threshold)
    degree = edges.sum(1, keepdims=True)
    weights = np.divide(p * edges, degree, out=np.zeros_like(edges), where=degree > 0)
    np.fill_diagonal(weights, np.where(degree[:, 0] > 0, 1.0 - p, 1.0))
    return weights.astype(np.float32)


def gatn_correlation(
    similarity: np.ndarray, low: float, high: float = 1.0, *, weight: float = 0.25, epsilon: float = 1e-6
) -> np.ndarray:
    """Band of similarity, binarised and divided by column sums; no self-loops.

    A_ij = 1[low <= sim_ij < high], A_ii = 0;  S_ij = weight A_ij / (sum_k A_kj + epsilon).

    Args:
      similarity: (l l) cosines.
      low, high: the band; the authors' are 0.2 (COCO) or 0.4 (VOC) to 1.0.
      weight: what a column sums to.
    Returns:
      (l l) float32.
    Reference: Yuan et al., "Graph Attention Transformer Network for Multi-Label Image Classification", TOMM
    2023.
    Differs from the authors' code: the diagonal is removed as such, not by cosines being >= 1.0, which
    rounding breaks; and so two labels with one and the same vector (cosine 1) are still cut where high is
    1.0.
    """
    edges = _edges(similarity, low) * (np.asarray(similarity) < high)
    return (weight * edges / (edges.sum(0, keepdims=True) + epsilon)).astype(np.float32)


def cooccurrence(labels: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How often two labels are positive in one image.

    Args:
      labels: (N l) in {0, 1}.
      observed: (N l) in {0, 1}; what is not observed counts nowhere.
    Returns:
      counts (l l) int64, symmetric, the diagonal zero; nums (l) int64, images per class.
    """
    positive = (np.asarray(labels) > 0) & (np.asarray(observed) > 0)
    counts = _products(positive, positive)
    nums = np.diag(counts).copy()
    np.fill_diagonal(counts, 0)
    return counts, nums


def conditional(labels: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """P(j | i) at [i, j], among the images where both labels are observed.

    Args:
      labels, observed: (N l) in {0, 1}.
    Returns:
      (l l) float32; 0 where i is never positive with j observed; the diagonal is 1 for classes with a
      positive.
    """
    known = np.asarray(observed) > 0
    positive = (np.asarray(labels) > 0) & known
    both, given = _products(positive, positive), _products(positive, known)
    return np.divide(both, given, out=np.zeros(both.shape), where=given > 0).astype(np.float32)


def mlgcn_adjacency(
    counts: np.ndarray, nums: np.ndarray, threshold: float = 0.4, p: float = 0.2, *, epsilon: float = 1e-6
) -> np.ndarray:
    """ML-GCN's label graph, before normalisation.

    P_ij = counts_ij / nums_i;  B_ij = 1[P_ij >= threshold];  A = p/(1-p) B_ij / (sum_k B_kj + epsilon) + I.

    Args:
      counts: (l l) co-occurrences, the diagonal is not looked at.
      nums: (l) images per class; a class without images has no edges of its own.
      threshold: of the conditional probability.
      p: the paper's weight of the neighbours; 0.2 makes the factor 0.25.
    Returns:
      (l l) float32.
    Reference: Chen et al., CVPR 2019, eq. 6 to 8; column sums and the added identity as in the authors' code.
    """
    nums = np.asarray(nums, np.float64)[:, None]
    probability = np.divide(counts, nums, out=np.zeros(np.shape(counts)), where=nums > 0)
    edges = _edges(probability, threshold)
    adjacency = p / (1 - p) * edges / (edges.sum(0, keepdims=True) + epsilon) + np.eye(len(edges))
    return adjacency.astype(np.float32)


def normalise_adjacency(adjacency: np.ndarray) -> np.ndarray:
    """(l l) -> (l l) float32: D A^T D with D = diag(row sums)^(-1/2); the transposition is in ML-GCN's code.

    Differs from the authors' code: a row whose sum is not positive gets zero, not NaN.
    """
    adjacency = np.asarray(adjacency, np.float64)
    rows = adjacency.sum(1)
    scale = np.where(rows > 0, 1 / np.sqrt(np.where(rows > 0, rows, 1.0)), 0.0)
    return (scale[:, None] * adjacency.T * scale[None, :]).astype(np.float32)


def _edges(similarity: np.ndarray, threshold: float) -> np.ndarray:
    edges = (np.asarray(similarity) >= threshold).astype(np.float64)
    np.fill_diagonal(edges, 0.0)
    return edges


def _products(left: np.ndarray, right: np.ndarray, rows: int = 16384) -> np.ndarray:
    """left^T right of boolean (N l) arrays as int64; exact: a block's sums are below 2^24."""
    total = np.zeros((left.shape[1], right.shape[1]), np.int64)
    for start in range(0, len(left), rows):
        block = slice(start, start + rows)
        total += (left[block].astype(np.float32).T @ right[block].astype(np.float32)).astype(np.int64)
    return total
