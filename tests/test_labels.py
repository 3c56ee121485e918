"""Names of labels, and label correlations against hand computation, golden cases and published counts."""

from pathlib import Path

import numpy as np
import pytest

from mljax.data import labels
from mljax.data.voc import CLASSES
from toy import golden_file


def test_spelled_twice():
    assert labels.spelled_twice(["dog", "cat", "dog"]) is None
    assert labels.spelled_twice(["tv monitor", "dog", "TV-Monitor"]) == ("TV-Monitor", "tv monitor")


def loop_cosine(vectors: np.ndarray) -> np.ndarray:
    rows = [[float(x) for x in row] for row in vectors]
    norms = [sum(x * x for x in row) ** 0.5 for row in rows]
    return np.array(
        [[sum(a * b for a, b in zip(p, q)) / (m * n) for q, n in zip(rows, norms)] for p, m in zip(rows, norms)]
    )


@pytest.mark.parametrize(
    ("name", "edges"),
    [("voc", {0.2: 134, 0.3: 74, 0.4: 36, 0.5: 14}), ("coco", {0.2: 1318, 0.3: 454, 0.4: 166, 0.5: 46})],
)
def test_cosines_keep_the_published_edges(real_data: Path, name: str, edges: dict[float, int]):
    with np.load(real_data / "label_embeddings" / f"glove300_{name}.npz") as file:
        names, vectors = file["names"].tolist(), file["vectors"]
    similarity = labels.cosine(vectors)
    for threshold, count in edges.items():
        kept = labels.mlgcn_correlation(similarity, threshold)
        np.fill_diagonal(kept, 0)
        assert (kept > 0).sum() == count
        assert (labels.gatn_correlation(similarity, threshold) > 0).sum() == count
    if name == "voc":
        np.testing.assert_allclose(similarity, loop_cosine(vectors), atol=1e-6)
    assert similarity[names.index("cat"), names.index("dog")] == pytest.approx(0.682, abs=5e-4)


def test_published_cooccurrence(real_data: Path):
    official = np.load(real_data / "labels" / "voc2007_labels.npz")
    assert official["classes"].tolist() == list(CLASSES)
    positive = (official["trainval_labels"] == 1).astype(np.uint8)
    counts, nums = labels.cooccurrence(positive, np.ones_like(positive))
    fixture = "238 243 330 181 244 186 713 337 445 141 200 421 287 245 2008 245 96 229 261 256"
    assert nums.tolist() == [int(n) for n in fixture.split()] and nums.sum() == 7306
    published = np.load(real_data / "labels" / "voc_cooccurrence.npz")
    np.testing.assert_array_equal(counts, published["adj"])
    np.testing.assert_array_equal(nums, published["nums"])
    adjacency = labels.mlgcn_adjacency(counts, nums) - np.eye(20, dtype=np.float32)
    edges = {(CLASSES[i], CLASSES[j]) for i, j in zip(*np.nonzero(adjacency))}
    assert edges == {
        *((name, "person") for name in ("bicycle", "bottle", "diningtable", "horse", "motorbike")),
        ("diningtable", "chair"),
    }
    coco = np.load(real_data / "labels" / "coco_cooccurrence.npz")
    adjacency = labels.mlgcn_adjacency(coco["adj"], coco["nums"]) - np.eye(80, dtype=np.float32)
    assert (adjacency > 0).sum() == 111 and coco["nums"].sum() == 241_035


# --- correlations by hand -----------------------------------------------------------------------------------


def test_cosine_by_hand():
    found = labels.cosine(np.array([[3.0, 4.0], [4.0, 3.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [[1, 0.96, 0], [0.96, 1, 0], [0, 0, 1]], atol=1e-7)
    assert found.dtype == np.float32 and found[0, 0] == 1


SIMILARITY = np.array([[1, 0.5, 0.4, 0.1], [0.5, 1, 0.3, 0], [0.4, 0.3, 1, 0.2], [0.1, 0, 0.2, 1]], np.float32)


def test_mlgcn_correlation_by_hand():
    found = labels.mlgcn_correlation(SIMILARITY, 0.4, p=0.2)
    expected = [[0.8, 0.1, 0.1, 0], [0.2, 0.8, 0, 0], [0.2, 0, 0.8, 0], [0, 0, 0, 1]]  # the last label is isolated
    np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


def test_gatn_correlation_by_hand():
    found = labels.gatn_correlation(SIMILARITY, 0.2, 0.5)
    expected = 0.25 * np.array([[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0]]) / np.array([1, 1, 3, 1])
    np.testing.assert_allclose(found, expected, atol=1e-6)


LABELS = np.array([[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 1]])
OBSERVED = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 0]])


def test_cooccurrence_and_conditional_by_hand():
    counts, nums = labels.cooccurrence(LABELS, OBSERVED)
    # row 3 hides label 0, row 4 hides label 2
    assert nums.tolist() == [3, 3, 0] and counts.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    found = labels.conditional(LABELS, OBSERVED)
    # P(1|0): label 0 is known positive with label 1 known in rows 0 and 4; P(0|1): rows 0 and 2
    np.testing.assert_allclose(found, [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]])
    assert found.dtype == np.float32


def test_products_in_blocks_are_exact():
    rng = np.random.default_rng(0)
    left, right = rng.random((1000, 5)) < 0.3, rng.random((1000, 4)) < 0.5
    expected = [[sum(int(a) & int(b) for a, b in zip(left[:, i], right[:, j])) for j in range(4)] for i in range(5)]
    np.testing.assert_array_equal(labels._products(left, right, rows=300), expected)


def test_mlgcn_golden():
    golden = np.load(golden_file("ml_gcn.npz"))
    adjacency = labels.mlgcn_adjacency(golden["in/cooccurrence_counts"], golden["in/class_counts"], threshold=0.4)
    np.testing.assert_allclose(adjacency, golden["out/adjacency_A"], atol=1e-6)
    np.testing.assert_allclose(labels.normalise_adjacency(adjacency), golden["out/adjacency_normalised"], atol=1e-6)


def test_gatn_golden():
    golden = np.load(golden_file("gatn.npz"))
    found = labels.gatn_correlation(golden["in/cosine_matrix"], 0.2)
    np.testing.assert_allclose(found, golden["out/correlation_A1"], atol=1e-6)
    adjacency = golden["out/transformed_adjacency"] + np.eye(len(found), dtype=np.float32)
    np.testing.assert_allclose(labels.normalise_adjacency(adjacency), golden["out/adjacency_normalised"], atol=1e-6)


def test_guards():
    adjacency = labels.mlgcn_adjacency(np.zeros((2, 2), int), np.array([0, 3]))
    np.testing.assert_array_equal(adjacency, np.eye(2))
    found = labels.normalise_adjacency(np.array([[-1.0, 0.5], [0.0, 4.0]]))
    np.testing.assert_array_equal(found, [[0, 0], [0, 1]])
