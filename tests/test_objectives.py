"""A step of one client, against plain loops over the images that count."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.learning.siamese import nt_xent
from mocosfl_jax.methods.local.learner import Examples
from mocosfl_jax.methods.local.merge import Average
from mocosfl_jax.methods.local.objectives import OBJECTIVES
from tests.tiny_local import (
    DECAY,
    EMA,
    MOMENTUM,
    QUEUE,
    RATE,
    SIZE,
    TEMPERATURE,
    WIDTH,
    local,
    moved,
    stem_and_head,
)
from tests.tiny_method import assert_close

MASK = np.array([True, False, True, True, True])  # the second image is padding
LABELS = np.array([2, -1, 0, 5, 2], np.int32)


def head_by_hand(params, rows):
    """Outputs of a head, and mean and unbiased variance of its hidden layer."""
    hidden = [x @ params["dense1"]["kernel"] + params["dense1"]["bias"] for x in rows]
    mean = sum(hidden) / len(hidden)
    squares = sum((x - mean) ** 2 for x in hidden)
    std = jnp.sqrt(squares / len(hidden) + 1e-5)
    scaled = [(x - mean) / std * params["norm"]["scale"] + params["norm"]["bias"] for x in hidden]
    second = params["dense2"]
    outputs = [jnp.maximum(x, 0) @ second["kernel"] + second["bias"] for x in scaled]
    return outputs, (mean, squares / (len(hidden) - 1))


def embedded_by_hand(params, images):
    latents = [stem_and_head().latents(params["client"], image[None]) for image in images]
    return head_by_hand(params["server"]["head"], [x[0].mean(axis=(0, 1)) for x in latents])


def cosine(a, b):
    return jnp.dot(a, b) / jnp.sqrt(jnp.dot(a, a) * jnp.dot(b, b))


def cross_entropy(logits, right):
    return -jnp.log(jnp.exp(logits[right]) / sum(jnp.exp(x) for x in logits))


def rows_by_hand(name, online, predicted, target, queue, labels):
    """The loss of each image. Args: of each view, a list of vectors; labels: of the images."""
    rows = range(len(online[0]))
    if name == "supervised":
        return [cross_entropy(online[0][i], labels[i]) for i in rows]
    other = {0: 1, 1: 0}
    losses = []
    for i in rows:
        total = 0.0
        for view in (0, 1):
            if name == "simclr":
                everyone = [(v, j) for v in (0, 1) for j in rows if (v, j) != (view, i)]
                logits = [cosine(online[view][i], online[v][j]) / TEMPERATURE for v, j in everyone]
                total += cross_entropy(logits, everyone.index((other[view], i))) / 2
            elif name == "moco":
                keys = [target[other[view]][i], *queue]
                logits = [cosine(online[view][i], key) / TEMPERATURE for key in keys]
                total += cross_entropy(logits, 0)
            elif name == "byol":
                total += 2 - 2 * cosine(predicted[view][i], target[other[view]][i])
            else:
                constant = jax.lax.stop_gradient(online[other[view]][i])
                total -= cosine(predicted[view][i], constant) / 2
        losses.append(total)
    return losses


def moved_network(target, params):
    pairs = {part: params[part] for part in ("client", "server")}
    return jax.tree.map(lambda t, p: EMA * t + (1 - EMA) * p, target, pairs)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_what_plain_loops_give(name):
    """Loss, parameters, momentum, statistics, target network or key encoder, queue."""
    method, objective = local(name, Average()), OBJECTIVES[name]
    start = jax.jit(method._first_participant)(jax.random.key(3))
    client = start.replace(
        model=moved(start.model, 1),
        opt_state=moved(start.opt_state, 2),
        target=moved(start.target, 4),
    )
    if objective.queue:
        client = client.replace(queue=client.queue.replace(ptr=jnp.int32(7)))
    rng = np.random.default_rng(5)
    shape = (objective.views, len(MASK), SIZE, SIZE, 3)
    views = rng.normal(size=shape).astype(np.float32)
    labels = jnp.asarray(LABELS) if objective.labels else None
    examples = Examples(tuple(map(jnp.asarray, views)), labels, jnp.asarray(MASK))
    found, loss = jax.jit(method.learner.step)(client, examples, jnp.float32(RATE))

    target = client.target
    if name == "moco":
        target = moved_network(target, client.model.params)

    def by_hand(params):
        online, moments = zip(
            *(embedded_by_hand(params, view[MASK]) for view in views), strict=True
        )
        predicted, constant = (), ()
        if objective.predictor:
            predicted, more = zip(
                *(head_by_hand(params["predictor"], view) for view in online), strict=True
            )
            moments = {"head": moments, "predictor": more}
        else:
            moments = {"head": moments}
        if target is not None:
            constant = [embedded_by_hand(target, view[MASK])[0] for view in views]
        queue = client.queue.keys if objective.queue else ()
        rows = rows_by_hand(name, online, predicted, constant, queue, LABELS[MASK])
        return sum(rows) / len(rows), (sum(rows), moments, constant)

    gradient = jax.jit(jax.grad(by_hand, has_aux=True))
    grads, (total, moments, constant) = gradient(client.model.params)
    trace = client.opt_state[1].trace
    direction = jax.tree.map(
        lambda t, g, p: MOMENTUM * t + g + DECAY * p, trace, grads, client.model.params
    )
    wanted = jax.tree.map(lambda p, d: p - RATE * d, client.model.params, direction)
    np.testing.assert_allclose(loss, total, rtol=1e-5)
    assert_close(found.model.params, wanted, "parameters", 1e-5)
    assert_close(found.opt_state[1].trace, direction, "momentum", 1e-4)
    for head, of_views in moments.items():
        norm = client.model.stats[head]["norm"]
        mean, var = norm["mean"], norm["var"]
        for batch_mean, batch_var in of_views:
            mean, var = 0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * batch_var
        assert_close(found.model.stats[head], {"norm": {"mean": mean, "var": var}}, head, 1e-5)
    if name == "byol":
        target = moved_network(target, found.model.params)
    assert_close(found.target, target, "target", 1e-6)
    if objective.queue:
        keys = np.array(client.queue.keys)
        brought = [row / np.linalg.norm(row) for view in constant for row in view]
        for index, row in enumerate(brought):
            keys[(7 + index) % QUEUE] = row
        assert_close(found.queue.keys, keys, "queue", 1e-5)
        assert int(found.queue.ptr) == (7 + len(brought)) % QUEUE


def test_an_image_alone_has_no_negatives():
    """The loss is 0 and the gradient finite; so is that of padding alone."""
    views = [jnp.asarray(moved(np.zeros((2, 3), np.float32), seed, 1.0)) for seed in (1, 2)]
    for mask in ([True, False], [False, False]):
        rows = jnp.asarray(mask)

        def loss(first):
            return jnp.sum(nt_xent((first, views[1]), rows, 0.07), where=rows)  # noqa: B023

        value, gradient = jax.value_and_grad(loss)(views[0])
        assert abs(float(value)) < 1e-6
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_work_of_a_client_is_its_step(objective):
    """What is counted of it takes and gives the state of a participant."""
    method = local(objective, Average())
    train, infer = method.client_work(jax.ShapeDtypeStruct((5, SIZE, SIZE, 3), jnp.float32))
    client, _ = jax.eval_shape(train.function, *train.arguments)
    assert train.replaces and not infer.replaces
    chex.assert_trees_all_equal_shapes_and_dtypes(client, train.arguments[0])
    assert jax.eval_shape(infer.function, *infer.arguments).embedding.shape == (5, WIDTH)
