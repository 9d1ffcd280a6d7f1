"""Probes, against a NumPy loop of Adam and against a head that only records what it is shown."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.linear_probe import (
    Batch,
    Labelled,
    LinearHead,
    linear_probe,
    train_head,
)
from mocosfl_jax.randomness import Stream, device_key

CLASSES, WIDTH, BATCH = 3, 5, 4


def labelled(seed: int, size: int) -> Labelled:
    rng = np.random.default_rng(seed)
    features = rng.normal(0.3, 1.0, (size, WIDTH)).astype(np.float32)
    labels = rng.permutation(np.arange(size) ** 2 % 7 % CLASSES)
    return Labelled(features, labels)


def adam_loop(train: Labelled, test: Labelled, seed: int, rate: float, epochs: int):
    """Softmax regression by hand, in float64; accuracies in percent after each epoch."""
    params = np.zeros((WIDTH + 1, CLASSES))  # the last row is the bias
    first, second, count, accuracies = np.zeros_like(params), np.zeros_like(params), 0, []
    for epoch in range(epochs):
        key = jax.random.fold_in(device_key(seed, Stream.PROBE), epoch)
        order = np.asarray(jax.random.permutation(key, len(train.labels_M)))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            x = np.column_stack([train.features_MD[rows], np.ones(len(rows))])
            exponentials = np.exp(x @ params)
            error = exponentials / exponentials.sum(1, keepdims=True)
            error[np.arange(len(rows)), train.labels_M[rows]] -= 1.0
            gradient, count = x.T @ error / len(rows), count + 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            denominator = np.sqrt(second / (1 - 0.999**count)) + 1e-8
            params -= rate * first / (1 - 0.9**count) / denominator
        logits = np.column_stack([test.features_MD, np.ones(len(test.labels_M))]) @ params
        accuracies.append(100.0 * np.mean(logits.argmax(1) == test.labels_M))
    return params, accuracies


def test_probe_equals_adam_by_hand_with_a_short_last_batch():
    train, test = labelled(0, 11), labelled(1, 29)
    params, accuracies = adam_loop(train, test, seed=5, rate=0.1, epochs=6)
    result = linear_probe(
        train, test, CLASSES, seed=5, learning_rate=0.1, batch_size=BATCH, epochs=6
    )
    np.testing.assert_allclose(result.kernel, params[:-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result.bias, params[-1], rtol=1e-3, atol=1e-4)
    assert result.top1_last == pytest.approx(accuracies[-1])
    assert result.top1_best_test_epoch == pytest.approx(max(accuracies))
    assert result.best_epoch == 1 + accuracies.index(max(accuracies))
    assert len(set(accuracies)) > 2 and accuracies[-1] < max(accuracies)  # the case is not trivial


def test_separable_data_is_learnt_completely():
    rng = np.random.default_rng(2)
    centres = 6.0 * np.eye(CLASSES, WIDTH)
    labels = rng.integers(0, CLASSES, 150)
    features = (centres[labels] + rng.uniform(-1, 1, (150, WIDTH))).astype(np.float32)
    train = Labelled(features[:90], labels[:90])
    test = Labelled(features[90:], labels[90:])
    result = linear_probe(train, test, CLASSES, seed=0, learning_rate=0.01, epochs=60)
    assert (result.top1_last, result.top1_best_test_epoch) == (100.0, 100.0)


def test_the_seed_moves_the_order_only():
    train, test = labelled(0, 11), labelled(1, 29)

    def kernel(seed, batch_size):
        return linear_probe(train, test, CLASSES, seed=seed, batch_size=batch_size, epochs=3).kernel

    np.testing.assert_array_equal(kernel(1, BATCH), kernel(1, BATCH))
    assert np.abs(kernel(1, BATCH) - kernel(2, BATCH)).max() > 1e-5
    np.testing.assert_allclose(kernel(1, 11), kernel(2, 11), rtol=1e-3, atol=1e-6)  # one full batch
    np.testing.assert_allclose(kernel(1, 11), kernel(1, 128), rtol=1e-3, atol=1e-6)  # all padding


@dataclass(frozen=True)
class RecordingHead:
    """Learns nothing: notes the rows shown to it (feature 0 is the row's number); -1 is padding.

    It answers class 1 after an even number of batches and class 0 after an odd one.
    """

    num_classes: int
    batches: int
    batch_size: int

    def init(self, width: int, key):
        return jnp.full((self.batches, self.batch_size), -2, jnp.int32), jnp.int32(0)

    def step(self, state, batch: Batch):
        log, count = state
        number_B = batch.features_BD[:, 0].astype(jnp.int32)
        shown_B = jnp.where(batch.mask_B > 0, number_B, -1)
        return log.at[count].set(shown_B), count + 1

    def logits(self, state, features_MD):
        answer_C = jnp.arange(self.num_classes) == 1 - state[1] % 2
        rows = features_MD.shape[0]
        return jnp.broadcast_to(answer_C[None], (rows, self.num_classes)).astype(jnp.float32)


def test_any_head_sees_each_row_once_an_epoch_in_a_new_order():
    numbers = np.arange(11, dtype=np.float32)
    train = Labelled(np.column_stack([numbers, numbers]), np.arange(11) % CLASSES)
    test = Labelled(np.zeros((5, 2), np.float32), np.array([1, 0, 1, 1, 2]))
    head = RecordingHead(CLASSES, batches=9, batch_size=BATCH)
    (log, count), top1_E = train_head(head, train, test, seed=0, batch_size=BATCH, epochs=3)
    assert count == 9
    epochs = np.asarray(log).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(epochs[:, :11]), np.tile(np.arange(11), (3, 1)))
    np.testing.assert_array_equal(epochs[:, 11], -1)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    np.testing.assert_allclose(top1_E, [20.0, 60.0, 20.0])  # after 3, 6 and 9 batches


def test_head_ignores_padding_rows():
    head = LinearHead(CLASSES, learning_rate=0.1)
    features, labels = labelled(4, 3)
    labels = labels.astype(np.int32)
    step = jax.jit(head.step)
    whole = Batch(jnp.asarray(features), jnp.asarray(labels), jnp.ones(3))
    short = step(head.init(WIDTH, jax.random.key(0)), whole)
    padded = Batch(
        jnp.asarray(np.vstack([features, np.full((2, WIDTH), 50.0, np.float32)])),
        jnp.asarray(np.append(labels, np.int32([2, 1]))),
        jnp.asarray([1.0, 1.0, 1.0, 0.0, 0.0]),
    )
    longer = step(head.init(WIDTH, jax.random.key(1)), padded)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(longer.params[name], short.params[name], rtol=1e-4)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"num_classes": 2}, "train_labels range"),
        ({"test": Labelled(np.zeros((2, WIDTH), np.float32), np.arange(3))}, "test_labels.shape"),
        ({"test": Labelled(np.zeros((2, 4), np.float32), np.arange(2))}, "test_features width"),
    ],
)
def test_bad_input_is_named(change, named):
    arguments = {"train": labelled(0, 11), "test": labelled(1, 6), "num_classes": CLASSES} | change
    with pytest.raises(InputError, match=f"^{named} = "):
        linear_probe(**arguments, seed=0)
