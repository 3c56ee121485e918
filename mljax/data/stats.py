"""What papers print of their data, checked against published counts: a wrong class order or a missing archive shows."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mljax.data import _published_counts, label_counts
from mljax.data.files import some
from mljax.data.source import Source
from mljax.errors import printable


def describe(sources: Sequence[Source], *, top: int = 5) -> str:
    """A table of splits: images, labels an image, images without labels, difficult entries, images per class.

    Args:
      sources: splits of one data set, the training split first.
      top: how many of the pairs that occur together most often are listed.
    """
    names = [source.name for source in sources]
    width = max(map(len, names))
    heads = ("images", "classes", "labels", "a image", "most", "none", "difficult")
    lines = [f"{'split':<{width}}" + "".join(f" {head:>9}" for head in heads)]
    for source in sources:
        each = positives(source).sum(axis=1)
        hard = int((source.scored == 0).sum()) if source.observed.any() else 0
        mean = f"{each.mean() if len(each) else 0:.3f}"
        cells = (
            len(source),
            len(source.classes),
            int(each.sum()),
            mean,
            int(each.max(initial=0)),
            int((each == 0).sum()),
        )
        texts = (f"{cell:,}" if isinstance(cell, int) else cell for cell in (*cells, hard))
        lines.append(f"{source.name:<{width}}" + "".join(f" {cell:>9}" for cell in texts))
        known = source.observed.mean() if source.observed.size else 1.0
        if 0 < known < 1:
            lines[-1] += f"  ({known:.1%} of the labels observed)"
    lines += ["", *_classes(sources)]
    pairs = _pairs(sources[0], top)
    return "\n".join([*lines, *pairs])


def positives(source: Source) -> np.ndarray:
    """(N l) bool, the labels +1: what policies make of difficult objects is left out."""
    return (source.labels > 0) & (source.scored > 0)


def _classes(sources: Sequence[Source]) -> list[str]:
    """Images per class, a column a split."""
    classes = sources[0].classes
    if any(source.classes != classes for source in sources):
        return []
    columns = [positives(source).sum(axis=0) for source in sources]
    width = max(5, *(len(printable(name)) for name in classes))
    cell = max(7, *(len(f"{int(v):,}") for column in columns for v in column))
    head = "images per class: " + ", ".join(source.name for source in sources)
    cells = [
        f"{printable(name):<{width}}" + "".join(f" {int(column[i]):>{cell},}" for column in columns)
        for i, name in enumerate(classes)
    ]
    across = max(1, 110 // (len(cells[0]) + 3))
    rows = -(-len(cells) // across)
    return [head, *("   ".join(cells[row::rows]).rstrip() for row in range(rows))]


def _pairs(source: Source, top: int) -> list[str]:
    counts = np.triu(label_counts.cooccurrence(source).counts)
    best = np.argsort(-counts, axis=None, kind="stable")[:top]
    shown = [
        f"{printable(source.classes[i])} + {printable(source.classes[j])} {int(counts[i, j]):,}"
        for i, j in zip(*np.unravel_index(best, counts.shape))
        if counts[i, j]
    ]
    return ["", f"most often together: {', '.join(shown)}"] if shown else []


def check(source: Source) -> tuple[list[str], list[str]]:
    """Compare a split with the published counts -> (what agrees or is not known, what is wrong), a sentence each."""
    name, fine, wrong = _published_counts.plain_name(source.name), [], []
    if name in _published_counts.IMAGES:
        expected = _published_counts.IMAGES[name]
        numbers = " or ".join(f"{count:,}" for count in expected)
        if len(source) in expected:
            fine.append(f"{source.name} has {len(source):,} images, as published.")
        else:
            wrong.append(f"{source.name} has {len(source):,} images, but {numbers} are published: some are missing.")
    elif name in _published_counts.ABOUT:
        about = _published_counts.ABOUT[name]
        near = abs(len(source) - about) <= 0.01 * about
        (fine if near else wrong).append(f"{source.name} has {len(source):,} images; papers report about {about:,}.")
    wrong += _order(source, name)
    counts = _published_counts.counts(name)
    if counts and set(counts) == set(source.classes):
        ours = dict(zip(source.classes, positives(source).sum(axis=0).tolist()))
        off = [label for label in source.classes if ours[label] != counts[label]]
        if not off:
            fine.append(f"{source.name} has the published number of images in each of its {len(counts)} classes.")
        elif sorted(ours.values()) == sorted(counts.values()):
            wrong.append(f"{source.name} has the published counts under other classes: the order of classes is wrong.")
        else:
            shown = ", ".join(f"{label} {ours[label]:,} for {counts[label]:,}" for label in off[:5])
            wrong.append(f"{source.name} differs from the published counts in {len(off)} classes: {shown}.")
    if not fine and not wrong:
        fine.append(f"{source.name}: no published counts are known here.")
    return fine, wrong


def _order(source: Source, name: str) -> list[str]:
    orders = next((orders for kind, orders in _published_counts.CLASS_ORDERS.items() if name.startswith(kind)), ())
    if not orders or "re-split" in name or source.classes in orders or set(source.classes) != set(orders[0]):
        return []
    return [f"{source.name} begins with the class {source.classes[0]!r}, not one of the papers' orders of classes."]


def overlap(first: Source, second: Source, *, content: bool = False) -> str | None:
    """A sentence if two splits share images, by name or (content) by the bytes of their files; else None."""
    if first.fingerprint == second.fingerprint and first.indices is None and second.indices is None:
        return f"{first.name} and {second.name} are one and the same split."
    if content:
        one, other = (_digests(source) for source in (first, second))
        known = set(other)
        shared = [str(first.ids[row]) for row, digest in enumerate(one) if digest in known]
    else:
        known = set(map(str, second.ids))
        shared = [str(name) for name in first.ids if str(name) in known]
    if not shared:
        return None
    return f"{first.name} and {second.name} share {len(shared):,} images: {some(shared)}."


def _digests(source: Source) -> list[bytes]:
    def digest(row: int) -> bytes:
        image = source.read(row)
        return hashlib.sha256(image.tobytes() if isinstance(image, np.ndarray) else image).digest()

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(digest, range(len(source))))
