"""The kNN monitor, against a NumPy loop over queries and neighbours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.knn import knn_scores, knn_top1

CLASSES = 4


def sets(queries: int = 11, bank: int = 37, width: int = 5):
    """Features of unequal lengths around one centre a class, and labels of unequal counts."""
    rng = np.random.default_rng(3)
    centres = rng.normal(size=(CLASSES, width))
    labels = rng.choice(CLASSES, queries, p=[0.4, 0.3, 0.2, 0.1])
    bank_labels = rng.choice(CLASSES, bank, p=[0.1, 0.2, 0.3, 0.4])
    features = (centres[labels] + rng.normal(size=(queries, width))).astype(np.float32)
    bank_features = (centres[bank_labels] + rng.normal(size=(bank, width))).astype(np.float32)
    return features, labels, bank_features, bank_labels


def scores_loop(features, bank, bank_labels, k, temperature):
    scores = np.zeros((len(features), CLASSES))
    for i, query in enumerate(features.astype(np.float64)):
        cosine = [query @ b / (np.linalg.norm(query) * np.linalg.norm(b)) for b in bank]
        for j in sorted(range(len(bank)), key=lambda j: -cosine[j])[:k]:
            scores[i, bank_labels[j]] += np.exp(cosine[j] / temperature)
    return scores


@pytest.mark.parametrize("k, temperature", [(1, 0.1), (6, 0.1), (6, 1.0), (37, 0.1), (200, 0.1)])
def test_scores_equal_the_loop(k, temperature):
    features, _, bank, bank_labels = sets()
    expected = scores_loop(features, bank, bank_labels, k, temperature)
    scores = knn_scores(features, bank, bank_labels, CLASSES, k, temperature)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_scores_are_the_same_under_jit():
    features, _, bank, bank_labels = sets()
    plain = partial(knn_scores, num_classes=CLASSES, k=6, temperature=0.2)
    np.testing.assert_allclose(
        jax.jit(plain)(features, bank, bank_labels), plain(features, bank, bank_labels), rtol=1e-6
    )


def test_a_zero_row_is_finite():
    features, _, bank, bank_labels = sets()
    features[2], bank[5] = 0.0, 0.0
    assert np.isfinite(knn_scores(features, bank, bank_labels, CLASSES)).all()


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 500])
def test_top1_equals_the_loop_for_every_chunk_size(chunk_size):
    features, labels, bank, bank_labels = sets()
    predicted = scores_loop(features, bank, bank_labels, 6, 0.1).argmax(axis=1)
    expected = 100.0 * np.mean(predicted == labels)
    assert 0.0 < expected < 100.0
    top1 = knn_top1(features, labels, bank, bank_labels, CLASSES, 6, 0.1, chunk_size)
    assert top1 == pytest.approx(expected)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"k": 0}, "k"),
        ({"temperature": 0.0}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"num_classes": 2}, "query_labels range"),
        ({"bank_labels_N": np.arange(37)}, "bank_labels range"),
        ({"bank_ND": np.zeros((37, 6), np.float32)}, "query_features width"),
    ],
)
def test_bad_input_is_named(change, named):
    features, labels, bank, bank_labels = sets()
    arguments = {
        "features_MD": features,
        "labels_M": labels,
        "bank_ND": bank,
        "bank_labels_N": bank_labels,
        "num_classes": CLASSES,
    } | change
    with pytest.raises(InputError, match=f"^{named} = "):
        knn_top1(**arguments)
