"""Figures of label features: photos retrieved by one label or several, and t-SNE."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mljax.analyze.inputs import CELL, Inputs, filename
from mljax.config.command import Parser
from mljax.errors import UserError
from mljax.pictures import plots
from mljax.pipeline.images import decode


def retrieval_flags(parser: Parser) -> None:
    parser.add_argument("--labels", action="append", help="labels to retrieve by, joined by commas; may be given again")
    parser.add_argument("--query", action="append", help="a photo of your own; by default images that have the labels")
    parser.add_argument("--queries", type=int, default=4, help="how many images ask, where no --query does")
    parser.add_argument("--neighbours", type=int, default=6, help="nearest photos to show")


def retrieval(inputs: Inputs, args: argparse.Namespace) -> dict[str, Any]:
    """Nearest photos by the features of one label, and of several labels concatenated.

    Every label's feature has length 1, so that each of several labels weighs the same: the similarity is the mean of
    their cosines. A hit is a photo that truly has all the labels asked for. precision: the share of hits among the
    nearest, averaged over all images that have the labels, each asking once; chance: their share among the others.
    Reference: Dao et al., "Multi-Label Image Classification with Contrastive Learning", 2021, where label-level
    features retrieve images.
    """
    if args.queries < 1 or args.neighbours < 1:
        raise UserError("--queries and --neighbours count photos; each must be at least 1.")
    groups = inputs.asked(args.labels) or frequent(inputs)
    columns = sorted({inputs.column(label) for labels in groups for label in labels})
    features = inputs.features(columns)
    results = []
    for labels in groups:
        chosen = features[:, [columns.index(inputs.column(label)) for label in labels]]
        results.append(retrieve(inputs, labels, chosen.reshape(len(chosen), -1) / len(labels) ** 0.5, args))
    return {"retrieval": results}


def frequent(inputs: Inputs) -> list[list[str]]:
    """The default labels: the most frequent one, and the most frequent pair."""
    labels, classes = inputs.source.labels.astype(int), inputs.run.classes
    single = int(labels.sum(0).argmax())
    pairs = np.triu(labels.T @ labels, 1)
    i, j = np.unravel_index(pairs.argmax(), pairs.shape)
    return [[classes[single]], *([[classes[i], classes[j]]] if pairs[i, j] > 1 else [])]


def retrieve(inputs: Inputs, labels: list[str], x: np.ndarray, args: argparse.Namespace) -> dict[str, Any]:
    """One picture: a row for each query, with its nearest photos; x (N d) has rows of length 1."""
    source, title = inputs.source, " + ".join(labels)
    matching = np.all(inputs.source.labels[:, [inputs.column(label) for label in labels]] > 0, axis=1).reshape(-1)
    if args.query:
        asking = [(-1, path) for path in args.query]
        queries = file_queries(inputs, args.query, labels)
    else:
        if matching.sum() < 2:
            raise UserError(
                f"{source.name} has {int(matching.sum())} image with {title}, and a query needs two; name other"
                " --labels, raise --images, or give a --query."
            )
        chosen = np.sort(inputs.rng.permutation(np.flatnonzero(matching))[: args.queries])
        asking, queries = [(int(i), str(source.ids[i])) for i in chosen], x[chosen]
    pictures, captions, results = [], [], []
    for (row, name), similar in zip(asking, queries @ x.T):
        order = [int(i) for i in np.argsort(-similar, kind="stable") if i != row][: args.neighbours]
        first = decode(name, where=name) if row < 0 else inputs.picture(row)
        shown = title if row < 0 else inputs.names(row)
        pictures.append([plots.framed(first, "query", CELL)])
        captions.append([f"query {Path(name).stem}\n{shown}"])
        for i in order:
            pictures[-1].append(plots.framed(inputs.picture(i), "hit" if matching[i] else "miss", CELL))
            captions[-1].append(f"{similar[i]:.3f}  {source.ids[i]}\n{inputs.names(i)}")
        near = [{"id": str(source.ids[i]), "similarity": float(similar[i]), "hit": bool(matching[i])} for i in order]
        results.append({"query": name, "nearest": near})
    target = inputs.folder / f"retrieval_{filename(title)}.png"
    legend = f"nearest photos by {title}: blue asks, green has {'all' if len(labels) > 1 else 'it'}, orange does not"
    plots.save(plots.rows(pictures, captions, legend, CELL), target)
    precision, chance = precision_at(x, matching, args.neighbours)
    if precision is not None:
        print(
            f"retrieval by {title}: {precision:.1f} % of the {args.neighbours} nearest have it ({int(matching.sum())}"
            f" queries), {chance:.1f} % by chance"
        )
    print(target)
    return {"labels": labels, "precision": precision, "chance": chance, "queries": results, "picture": target.name}


def file_queries(inputs: Inputs, paths: list[str], labels: list[str]) -> np.ndarray:
    """Features (q d) of a user's photos."""
    columns = [inputs.column(label) for label in labels]
    parts = [np.asarray(inputs.unit(out, columns)) for _, _, out in inputs.run.stream(paths)]
    x = np.concatenate(parts)
    return x.reshape(len(x), -1) / len(labels) ** 0.5


def precision_at(x: np.ndarray, matching: np.ndarray, k: int) -> tuple[float | None, float | None]:
    """In percent: how many of the k nearest others of an image with the labels have them too, and by chance."""
    asking = np.flatnonzero(matching)
    if len(asking) < 2 or len(x) <= k:
        return None, None
    hits = []
    for part in np.array_split(asking, -(-len(asking) // 256)):
        similar = x[part] @ x.T
        similar[np.arange(len(part)), part] = -np.inf
        near = np.argsort(-similar, axis=1, kind="stable")[:, :k]
        hits.append(matching[near].mean(1))
    chance = (len(asking) - 1) / (len(x) - 1)
    return 100 * float(np.concatenate(hits).mean()), 100 * chance


def tsne_flags(parser: Parser) -> None:
    parser.add_argument("--labels", action="append", help="labels to show, joined by commas; by default all")
    parser.add_argument("--points", type=int, default=2000, help="label features at most, the labels' shares equal")
    parser.add_argument("--perplexity", type=float, default=30.0, help="of t-SNE: about how many neighbours count")


def tsne(inputs: Inputs, args: argparse.Namespace) -> dict[str, Any]:
    """Features of labels that images truly have, in two dimensions, and how well the labels are told apart.

    silhouette: of the features' cosine distances, by label, from -1 to 1 (scikit-learn's silhouette_score); of t-SNE's
    plane besides. present_absent: for each label the silhouette between its features in images that have it and in as
    many that do not; the mean. The first is high for any system whose features carry their label, as learned queries
    do; the second says whether they carry what is in the image.
    Reference: van der Maaten and Hinton, JMLR 2008; scikit-learn's TSNE with PCA's start.
    """
    if not args.perplexity > 0:
        raise UserError(f"--perplexity={args.perplexity:g} is not positive; 5 to 50 are usual.")
    try:
        from sklearn.manifold import TSNE
        from sklearn.metrics import silhouette_samples, silhouette_score
    except ImportError:
        raise UserError(f"t-SNE needs scikit-learn and matplotlib; {plots.REPORT}.") from None
    source, classes = inputs.source, inputs.run.classes
    labels = list(dict.fromkeys(name for some in inputs.asked(args.labels) for name in some)) or classes
    columns = np.array([inputs.column(label) for label in labels])
    features = inputs.features(columns)
    present = source.labels[:, columns] > 0
    rows, groups = balanced(present, args.points, inputs.rng)
    kept = np.flatnonzero(np.bincount(groups, minlength=len(columns)) > 1)
    use = np.isin(groups, kept)
    rows, groups = rows[use], np.searchsorted(kept, groups[use])
    names = [classes[i] for i in columns[kept]]
    if len(kept) < 2 or len(rows) < 5:
        raise UserError(
            f"t-SNE needs two labels that two images have each, and {source.name} has {len(kept)}; raise"
            " --images or name other --labels."
        )
    x = features[rows, kept[groups]]
    perplexity = min(args.perplexity, (len(x) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=args.seed).fit_transform(x)
    each = np.asarray(silhouette_samples(x, groups, metric="cosine"))
    apart = [separation(features[:, i], present[:, i], inputs.rng) for i in kept]
    results = {
        "points": len(x),
        "silhouette": float(each.mean()),
        "silhouette_plane": float(silhouette_score(plane, groups)),
        "silhouette_of": {name: float(each[groups == i].mean()) for i, name in enumerate(names)},
        "present_absent": mean_of(apart),
        "present_absent_of": dict(zip(names, apart)),
        "perplexity": perplexity,
    }
    text = f"{results['silhouette']:.3f} (in the plane {results['silhouette_plane']:.3f})"
    if results["present_absent"] is not None:
        text += f", present against absent {results['present_absent']:.3f}"
    title = f"{inputs.run.experiment.config.system.name} on {source.name}: {len(x)} label features"
    target = inputs.folder / "tsne.png"
    plots.save(plots.scatter(plane, groups, names, f"{title}\nsilhouette {text}"), target)
    print(f"{title} of {len(names)} labels; silhouette {text}\n{target}")
    return results | {"picture": target.name}


def balanced(present: np.ndarray, points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(N m) bool -> images and labels of at most `points` true entries, in turn one of each label that has more."""
    images, labels = np.nonzero(present)
    order = rng.permutation(len(images))
    images, labels = images[order], labels[order]
    turn = np.zeros(len(labels), int)  # 0 for the first entry of each label, 1 for the second, ..
    for label in range(present.shape[1]):
        entries = np.flatnonzero(labels == label)
        turn[entries] = np.arange(len(entries))
    chosen = np.sort(np.argsort(turn, kind="stable")[: max(points, 0)])
    return images[chosen], labels[chosen]


def separation(x: np.ndarray, present: np.ndarray, rng: np.random.Generator, most: int = 200) -> float | None:
    """Silhouette between features (N d) of a label where it is present and where it is not, as many of each."""
    from sklearn.metrics import silhouette_score

    count = min(int(present.sum()), int((~present).sum()), most)
    if count < 2:
        return None
    chosen = np.concatenate([rng.permutation(np.flatnonzero(side))[:count] for side in (present, ~present)])
    return float(silhouette_score(x[chosen], present[chosen], metric="cosine"))


def mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
