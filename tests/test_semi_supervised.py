"""Semi-supervised probes, against plain loops in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.config import check_types, default_config
from mocosfl_jax.config.checks import check_fields
from mocosfl_jax.errors import InputError
from mocosfl_jax.evaluation.linear_probe import Batch, Labelled, train_head
from mocosfl_jax.evaluation.semi_supervised import (
    FRACTIONS,
    MLPHead,
    labelled_subset,
    semi_supervised_probe,
)
from mocosfl_jax.randomness import Stream, device_key, host_rng

CLASSES, WIDTH, HIDDEN, BATCH = 3, 5, 4, 4


# ------------------------------------------------------------------------------- which labels


def some_of_each_class(labels: np.ndarray, fraction: float, seed: int) -> list[int]:
    """The first rows of each class in a random order, as many as its share, or one."""
    order = host_rng(seed, Stream.PROBE).permutation(len(labels))
    chosen = []
    for kind in sorted(set(labels.tolist())):
        rows = [int(row) for row in order if labels[row] == kind]
        chosen += rows[: max(1, round(fraction * len(rows)))]
    return sorted(chosen)


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("fraction", FRACTIONS.values())
def test_a_share_of_each_class_has_labels(fraction, seed):
    """Of 3, 40, 160 and 7 rows; a tenth of 3, and a hundredth of all but 160, round to 0."""
    labels = np.random.default_rng(7).permutation(np.repeat([0, 1, 2, 4], [3, 40, 160, 7]))
    rows = labelled_subset(labels, fraction, seed)
    assert rows.tolist() == some_of_each_class(labels, fraction, seed)
    numbers = {0.1: [1, 4, 16, 0, 1], 0.01: [1, 1, 2, 0, 1]}[fraction]
    assert np.bincount(labels[rows]).tolist() == numbers
    assert rows.tolist() != labelled_subset(labels, fraction, seed + 1).tolist()
    assert set(labelled_subset(labels, 0.01, seed)) <= set(rows)


def test_other_rows_are_not_looked_at():
    """Classes that one feature tells apart, but for the rows without labels, where it lies."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % CLASSES
    features = rng.normal(0, 0.1, (120, WIDTH)).astype(np.float32)
    features[np.arange(120), labels] += 3
    test = Labelled(features, labels)
    rows = labelled_subset(labels, 0.1, seed=2)
    assert len(rows) == 12
    lying = features[:, [1, 2, 0, 3, 4]]
    lying[rows] = features[rows]
    train = Labelled(lying, labels)
    arguments = {"seed": 2, "learning_rate": 0.01, "batch_size": BATCH, "epochs": 20}
    assert semi_supervised_probe(train, test, CLASSES, 0.1, **arguments) == 100.0
    assert semi_supervised_probe(train, test, CLASSES, 1.0, **arguments) < 50.0


# ------------------------------------------------------------------------------------ training


class Reference:
    """The network with its training by hand, in float64. Its arrays are named as in `MLPState`."""

    def __init__(self, state):
        parts = {**state.params, "norm": {**state.params["norm"], **state.stats["norm"]}}
        self.arrays = {
            f"{part}/{name}": np.asarray(array, np.float64)
            for part, arrays in parts.items()
            for name, array in arrays.items()
        }
        learned = [name for name in self.arrays if name not in ("norm/mean", "norm/var")]
        self.moments = {name: (0.0, 0.0) for name in learned}
        self.steps = 0

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def step(self, x: np.ndarray, labels: np.ndarray, rate: float) -> None:
        number = len(x)
        hidden = x @ self["dense1/kernel"]
        mean, variance = hidden.mean(0), hidden.var(0)
        for name, value in (("mean", mean), ("var", variance * number / (number - 1))):
            self.arrays[f"norm/{name}"] = 0.9 * self[f"norm/{name}"] + 0.1 * value
        deviation = np.sqrt(variance + 1e-5)
        unit = (hidden - mean) / deviation
        normed = unit * self["norm/scale"] + self["norm/bias"]
        active = np.maximum(normed, 0)
        exponentials = np.exp(active @ self["dense2/kernel"] + self["dense2/bias"])
        error = exponentials / exponentials.sum(1, keepdims=True)
        error[np.arange(number), labels] -= 1
        error /= number
        back = error @ self["dense2/kernel"].T * (normed > 0)
        to_unit = back * self["norm/scale"]
        to_hidden = to_unit - to_unit.mean(0) - unit * (to_unit * unit).mean(0)
        gradients = {
            "dense2/kernel": active.T @ error,
            "dense2/bias": error.sum(0),
            "norm/scale": (back * unit).sum(0),
            "norm/bias": back.sum(0),
            "dense1/kernel": x.T @ (to_hidden / deviation),
        }
        self.adam(gradients, rate)

    def adam(self, gradients: dict[str, np.ndarray], rate: float) -> None:
        self.steps += 1
        for name, gradient in gradients.items():
            first, second = self.moments[name]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            self.moments[name] = first, second
            denominator = np.sqrt(second / (1 - 0.999**self.steps)) + 1e-8
            self.arrays[name] = self[name] - rate * first / (1 - 0.9**self.steps) / denominator

    def logits(self, x: np.ndarray) -> np.ndarray:
        hidden = x @ self["dense1/kernel"]
        unit = (hidden - self["norm/mean"]) / np.sqrt(self["norm/var"] + 1e-5)
        active = np.maximum(unit * self["norm/scale"] + self["norm/bias"], 0)
        return active @ self["dense2/kernel"] + self["dense2/bias"]


def labelled(seed: int, size: int) -> Labelled:
    rng = np.random.default_rng(seed)
    features = rng.normal(0.7, 1.5, (size, WIDTH)).astype(np.float32)
    return Labelled(features, rng.integers(0, CLASSES, size))


def test_training_equals_a_loop_by_hand():
    """Two epochs of batches of 4, 4 and 3 rows; the rate falls before the fourth step, at 60 % of
    six, and before the fifth, at 80 %."""
    train, test, seed, rate = labelled(0, 11), labelled(1, 40), 5, 0.02
    head = MLPHead(CLASSES, rate, steps=6, hidden=HIDDEN)
    key = device_key(seed, Stream.PROBE)
    reference = Reference(head.init(WIDTH, jax.random.fold_in(key, 2**32 - 1)))
    before = dict(reference.arrays)
    rates = iter([rate, rate, rate, rate / 10, rate / 100, rate / 100])
    for epoch in range(2):
        order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), 11))
        for rows in (order[:4], order[4:8], order[8:]):
            reference.step(train.features_MD[rows].astype(float), train.labels_M[rows], next(rates))
    state, top1_E = train_head(head, train, test, seed=seed, batch_size=BATCH, epochs=2)
    found = Reference(state)
    for name, expected in reference.arrays.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-5, err_msg=name)
        assert np.abs(expected - before[name]).max() > 0.02
    logits = found.logits(test.features_MD.astype(float))
    assert top1_E[-1] == 100 * np.mean(logits.argmax(1) == test.labels_M)


def test_the_last_epoch_counts():
    """Not the best one; half of the labels are 11, so there are nine steps."""
    train, test, seed = labelled(2, 21), labelled(3, 40), 8
    rows = labelled_subset(train.labels_M, 0.5, seed)
    half = Labelled(train.features_MD[rows], train.labels_M[rows])
    head = MLPHead(CLASSES, 0.1, steps=9)
    arguments = {"seed": seed, "batch_size": BATCH, "epochs": 3}
    _, top1_E = train_head(head, half, test, **arguments)
    found = semi_supervised_probe(train, test, CLASSES, 0.5, learning_rate=0.1, **arguments)
    assert len(rows) == 11 and found == top1_E[-1] < max(top1_E)


def test_evaluation_uses_running_statistics():
    """Each row for itself, however many there are, and not its batch's statistics."""
    head = MLPHead(CLASSES, 0.1, steps=9, hidden=HIDDEN)
    state = head.init(WIDTH, jax.random.key(3))
    stats = {"mean": jnp.linspace(-1.0, 2.0, HIDDEN), "var": jnp.linspace(0.5, 4.0, HIDDEN)}
    state = state._replace(stats={"norm": stats})
    rows = labelled(4, 7).features_MD
    expected = Reference(state).logits(rows.astype(float))
    np.testing.assert_allclose(head.logits(state, rows), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(head.logits(state, rows[2:3]), expected[2:3], rtol=1e-4, atol=1e-5)


def batch(rows: Labelled, counts: list[float]) -> Batch:
    labels = jnp.asarray(rows.labels_M, jnp.int32)
    return Batch(jnp.asarray(rows.features_MD), labels, jnp.asarray(counts, jnp.float32))


def test_padding_counts_for_nothing_and_a_single_row_neither():
    head = MLPHead(CLASSES, 0.1, steps=9, hidden=HIDDEN)
    start = head.init(WIDTH, jax.random.key(3))
    step = jax.jit(head.step)
    rows = labelled(4, 5)
    short = Labelled(rows.features_MD[:3], rows.labels_M[:3])
    expected = step(start, batch(short, [1, 1, 1]))
    found = step(start, batch(rows, [1, 1, 1, 0, 0]))
    for part in ("params", "stats"):
        one, other = (getattr(state, part) for state in (found, expected))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), one, other)
    alone = step(found, batch(rows, [0, 0, 1, 0, 0]))
    jax.tree.map(np.testing.assert_array_equal, alone, found)


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "change, named",
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 0}, "epochs"),
        ({"num_classes": 2}, "train_labels range"),
        ({"test": Labelled(np.zeros((2, 4), np.float32), np.arange(2))}, "test_features width"),
    ],
)
def test_bad_input_is_named(change, named):
    arguments = {"train": labelled(0, 11), "test": labelled(1, 6), "num_classes": CLASSES} | change
    with pytest.raises(InputError, match=f"^{named} = "):
        semi_supervised_probe(**arguments, fraction=0.1, seed=0)


def test_a_run_that_skips_probes_has_no_semi_supervised_ones():
    raw = default_config()
    raw.update(semi_supervised=True, probe_epochs=0)
    with pytest.raises(InputError, match=r"config\.semi_supervised = True: config\.probe_epochs"):
        check_fields(check_types(raw))
