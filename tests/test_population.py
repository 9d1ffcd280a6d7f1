"""What clients keep, sharded over the devices: rows against NumPy, runs against unsharded ones."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.devices import collectives
from mocosfl_jax.config.data import partition_of
from mocosfl_jax.data.cohort import CohortSampler
from mocosfl_jax.federated import placement as placements
from mocosfl_jax.federated.axes import Axes
from mocosfl_jax.federated.placement import ROWS, make_placement
from mocosfl_jax.federated.population import gather, scatter
from mocosfl_jax.federated.state import PADDING
from mocosfl_jax.run.checkpoint import Checkpoints, Clock, Identity, find_newest
from mocosfl_jax.run.feed import dispatches
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds, place_inputs, run_constants
from tests import tiny
from tests.test_devices import TOLERANCE, processes

CLIENTS = 5
FIELDS = {  # what clients keep: a key encoder, an optimizer state and a queue
    "num_clients": CLIENTS,
    "cohort_size": 3,
    "align_momentum": False,
    "feature_sharing": False,
    "queue_length": 40 * CLIENTS,
    "loss": "one_way",
    "blocks_per_stage": (1,),
    "learning_rate": 0.003,
    "schedule": "constant",
    "augmentation": "v1",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
}
MIDDLE, END = 9, 18  # steps; a round has 6 and a dispatch 3
NEVER = 2**62


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    return tiny.write_npz(tmp_path_factory.mktemp("data") / "images.npz", train=67, test=21)


# ------------------------------------------------------------------------------ gather and scatter


def awkward(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Leaves of several types, whose floats are any bits: NaNs, infinities and -0.0 among them."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, (rows, 2, 3), dtype=np.uint32)
    bits[0, 0] = 0x80000000, 0x7FC00001, 0xFF800000  # -0.0, a NaN with a payload, -inf
    return {
        "floats": bits.view(np.float32),
        "numbers": rng.integers(-(2**31), 2**31, rows).astype(np.int32),
        "bytes": rng.integers(0, 256, (rows, 4)).astype(np.uint8),
        "flags": rng.integers(0, 2, (rows, 1)).astype(bool),
    }


def assert_same_bits(actual, expected) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(*(jax.tree.map(as_bytes, tree) for tree in (actual, expected)))


def as_bytes(x) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


MESHES = pytest.mark.parametrize("mesh", [(4, 1), (4, 2)], ids=str)
SHARDED = pytest.mark.parametrize(
    "sharded", [{"floats", "bytes"}, {"floats", "numbers", "bytes", "flags"}, set()], ids=len
)
COHORTS = (  # of one to five participants, in eight slots
    [3, 0, 4, PADDING, PADDING, PADDING, PADDING, PADDING],
    [1, 3, 2, 0, 4, PADDING, PADDING, PADDING],
    [1, PADDING, PADDING, PADDING, PADDING, PADDING, PADDING, PADDING],
)


def padded(population: dict[str, np.ndarray], sharded: set[str]) -> dict[str, np.ndarray]:
    """Sharded leaves with three rows of no client."""
    others = awkward(3, seed=7)
    return {
        name: np.concatenate([rows, others[name]]) if name in sharded else rows
        for name, rows in population.items()
    }


def on_mesh(mesh: tuple[int, int], function, sharded: set[str]):
    """`gather` or `scatter` inside a `shard_map`, jitted; it must compile once for all cohorts."""
    chex.clear_trace_counter()
    flags = {name: name in sharded for name in awkward(1, 0)}
    leaves = jax.tree.map(lambda flag: P(ROWS) if flag else P(), flags)
    mapped = jax.shard_map(
        lambda *arguments: function(*arguments, sharded=flags, axes=Axes(ROWS)),
        mesh=make_placement(*mesh).mesh,
        in_specs=(leaves, P(ROWS), P(ROWS)) if function is scatter else (leaves, P(ROWS)),
        out_specs=leaves if function is scatter else P(ROWS),
    )
    return jax.jit(chex.assert_max_traces(lambda *arguments: mapped(*arguments), n=1))


@MESHES
@SHARDED
def test_rows_come_from_their_clients(mesh, sharded):
    population = padded(awkward(CLIENTS, seed=1), sharded)
    take = on_mesh(mesh, gather, sharded)
    for ids in COHORTS:
        got = take(population, np.int32(ids))
        # A padding slot has the values of a row, not something that no client could have.
        rows = [-1 if i == PADDING else i for i in ids]
        assert_same_bits(got, jax.tree.map(lambda x, rows=rows: x[rows], population))


@MESHES
@SHARDED
def test_rows_go_to_their_clients_and_nothing_else_changes(mesh, sharded):
    population = padded(awkward(CLIENTS, seed=2), sharded)
    put = on_mesh(mesh, scatter, sharded)
    for ids in COHORTS:
        rows = awkward(len(ids), seed=3)
        expected = jax.tree.map(np.copy, population)
        for slot, client in enumerate(ids):
            if client != PADDING:
                for name in expected:
                    expected[name][client] = rows[name][slot]
        assert_same_bits(put(population, np.int32(ids), rows), expected)


def test_without_a_mesh_they_do_the_same():
    population, rows = awkward(CLIENTS, seed=4), awkward(4, seed=5)
    ids = jnp.asarray([4, 1, 0, PADDING], jnp.int32)
    assert_same_bits(gather(population, ids), jax.tree.map(lambda x: x[[4, 1, 0, 4]], population))
    expected = jax.tree.map(np.copy, population)
    for name in expected:
        expected[name][[4, 1, 0]] = rows[name][:3]
    assert_same_bits(scatter(jax.tree.map(jnp.asarray, population), ids, rows), expected)


# ------------------------------------------------------------------------------------- whole runs


class Run:
    """A run as the training loop does it, without evaluation and log."""

    def __init__(self, npz: Path, devices: int, **fields):
        self.config, self._dataset = tiny.load(npz, **{**FIELDS, **fields})
        self._placement = make_placement(devices, 1)
        self._program = program_of(self.config, self._placement)
        self.rounds = Rounds(self.config, self._placement, self._program)
        self._partition = partition_of(
            self.config, len(self._dataset.train.images), self._dataset.train.labels
        )
        self.sampler = CohortSampler(self._partition, self.config.cohort_size, self.config.seed)
        self.identity = Identity(self.config, "some data")

    def train(self, state, start: int, stop: int):
        """The state after the steps from `start` to `stop`, as it is on the devices."""
        constants, advance = run_constants(self.config, self._placement), None
        feed = dispatches(self.config, self._partition, self.sampler, self.rounds.slots, start)
        for dispatch in feed:
            if dispatch.step == stop:
                break
            _, ids, inputs = place_inputs(self._placement, self._dataset, False, dispatch)
            if dispatch.begins_round:
                state = self.rounds.begin(state, ids)
            advance = advance or self._placement.dispatch(self._program, state)
            state, _ = advance(state, inputs, constants)
            if dispatch.ends_round:
                state = self.rounds.end(state)
        return state

    def save(self, folder: Path, step: int, state) -> None:
        checkpoints = Checkpoints(folder, 1, self.identity)
        checkpoints.save(step, self.rounds.unpadded(state), Clock(), lambda: None)
        checkpoints.close()

    def restore(self, folder: Path):
        """The state on the devices, from a checkpoint that passes all checks."""
        found = find_newest(folder, self.rounds.abstract_unpadded(), self.identity)
        assert not found.bad
        return self.rounds.padded(found.restored.state)


def assert_close(actual, expected) -> None:
    """Within a share of each leaf's largest value."""
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    scale = jax.tree.map(lambda x: np.abs(x).max().astype(np.float64) or 1.0, expected)
    chex.assert_trees_all_close(
        *(jax.tree.map(np.divide, tree, scale) for tree in (actual, expected)),
        rtol=0,
        atol=TOLERANCE,
    )


@pytest.fixture(scope="module")
def one(npz) -> dict[int, chex.ArrayTree]:
    """States of a run on one device, where nothing is sharded."""
    run = Run(npz, devices=1)
    drawn = [set(run.sampler.draw(round_)) for round_ in range(3)]
    assert drawn[0] & drawn[1] and drawn[1] != drawn[2]  # some come back, and not always the same
    state = run.rounds.initial_state()
    saved = {0: run.rounds.unpadded(state)}
    state = run.train(state, 0, MIDDLE)
    saved[MIDDLE] = run.rounds.unpadded(state)
    saved[END] = run.rounds.unpadded(run.train(state, MIDDLE, END))
    return saved


@pytest.fixture(scope="module")
def sharded(npz, tmp_path_factory) -> tuple[Path, dict[int, chex.ArrayTree]]:
    """A checkpoint in the middle of a round, and the states, of a run on four devices."""
    folder = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(placements, "SHARDED_FROM", 0)
        run = Run(npz, devices=4)
        state = run.rounds.initial_state()
        saved = {0: run.rounds.unpadded(state)}
        for leaf in jax.tree.leaves(state.population):
            assert leaf.shape[0] == 8
            chex.assert_shape(leaf.addressable_shards[0].data, (2, *leaf.shape[1:]))
        state = run.train(state, 0, MIDDLE)
        saved[MIDDLE] = run.rounds.unpadded(state)
        run.save(folder, MIDDLE, state)
        saved[END] = run.rounds.unpadded(run.train(state, MIDDLE, END))
    return folder, saved


def test_what_is_saved_has_a_row_for_each_client_and_participant(sharded):
    saved = sharded[1][MIDDLE]
    assert {x.shape[0] for x in jax.tree.leaves(saved.population)} == {CLIENTS}
    assert {x.shape[0] for x in jax.tree.leaves((saved.cohort, saved.cohort_ids))} == {3}
    assert PADDING not in np.asarray(saved.cohort_ids)


def test_each_device_makes_its_own_clients_first_state(sharded, one):
    """The queues are drawn with a key of each client."""
    start, expected = sharded[1][0], one[0]
    chex.assert_trees_all_equal(start.population, expected.population)
    chex.assert_trees_all_equal(start.server, expected.server)
    assert len(np.unique(np.asarray(start.population.queue.keys), axis=0)) == CLIENTS


def test_sharding_the_population_changes_no_bit(npz, sharded, monkeypatch):
    monkeypatch.setattr(placements, "SHARDED_FROM", NEVER)
    run = Run(npz, devices=4)
    state = run.rounds.initial_state()
    assert all(x.shape[0] == CLIENTS for x in jax.tree.leaves(state.population))
    end = run.rounds.unpadded(run.train(state, 0, END))
    chex.assert_trees_all_equal(sharded[1][END], end)


def test_a_sharded_run_is_that_of_one_device(sharded, one):
    for step in (MIDDLE, END):
        np.testing.assert_array_equal(sharded[1][step].cohort_ids, one[step].cohort_ids)
        assert_close(sharded[1][step], one[step])


@pytest.mark.parametrize(("devices", "threshold"), [(1, 0), (2, 0), (4, NEVER)])
def test_a_sharded_run_resumes_on_other_devices(devices, threshold, npz, sharded, monkeypatch):
    """Saved in the middle of a round, when what the cohort has counts."""
    monkeypatch.setattr(placements, "SHARDED_FROM", threshold)
    folder, saved = sharded
    run = Run(npz, devices)
    state = run.restore(folder)
    assert np.all(np.asarray(state.cohort_ids)[run.config.cohort_size :] == PADDING)
    chex.assert_trees_all_equal(run.rounds.unpadded(state), saved[MIDDLE])
    end = run.rounds.unpadded(run.train(state, MIDDLE, END))
    if devices == 4:
        chex.assert_trees_all_equal(end, saved[END])
    else:
        assert_close(end, saved[END])


def test_a_copy_that_is_saved_outlives_the_state(npz):
    """The state's buffers are donated while the copy is written."""
    rounds = Run(npz, devices=1, cohort_chunks=2).rounds  # a padding slot on a single device
    state = rounds.initial_state()
    saved = rounds.unpadded(state)
    before = jax.tree.map(np.array, saved)
    add_one = jax.jit(
        lambda state: jax.tree.map(lambda x: x + jnp.ones_like(x), state), donate_argnums=0
    )
    jax.block_until_ready(add_one(state))
    chex.assert_trees_all_equal(saved, before)


# ------------------------------------------------------------------------- where the arrays live


def test_large_leaves_are_sharded_and_small_ones_replicated(npz, monkeypatch):
    """A private queue of 40 rows of 8 numbers for each of 5 clients has 6400 bytes."""
    monkeypatch.setattr(placements, "SHARDED_FROM", 6400)
    population = Run(npz, devices=4).rounds.initial_state().population
    queue = population.queue.keys
    assert queue.sharding.spec == P(ROWS)
    chex.assert_shape(queue, (8, 40, 8))
    others = jax.tree.leaves(population.replace(queue=population.queue.ptr))
    assert all(x.sharding.is_fully_replicated and x.shape[0] == CLIENTS for x in others)
    monkeypatch.setattr(placements, "SHARDED_FROM", 6401)
    queue = Run(npz, devices=4).rounds.initial_state().population.queue.keys
    assert queue.sharding.is_fully_replicated
    chex.assert_shape(queue, (CLIENTS, 40, 8))


LARGE = {"num_clients": 40, "cohort_size": 32, "classes_per_client": None, "width": 8}
LARGE |= {"queue_length": 40 * 100, "batch_size": 1}
DEVICES = 8
SLACK = 4096  # bytes: ids, pointers, loop counters, alignment


class Programs:
    """The programs of a large population, compiled from shapes."""

    def __init__(self, npz: Path, devices: int, sharded_from: int):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(placements, "SHARDED_FROM", sharded_from)
            rounds = Run(npz, devices, **LARGE).rounds
            initial = jax.jit(rounds._initial, out_shardings=rounds._shardings).lower()
            state = initial.out_info
            slots = state.cohort_ids
            ids = jax.ShapeDtypeStruct(slots.shape, slots.dtype, sharding=slots.sharding)
            self.initial = initial.compile()
            self.begin = rounds.begin.lower(state, ids).compile()
            self.end = rounds.end.lower(state).compile()
        self.population, self.cohort = size(state.population), size(state.cohort)
        self.own = size(state.server) + (self.population + self.cohort) // devices
        self.slots = self.population // 40 * 32 // devices  # what those of one device keep


def size(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def programs(npz) -> Programs:
    """Those of eight devices, where every leaf is sharded."""
    return Programs(npz, DEVICES, 0)


@pytest.mark.parametrize("name", ["begin", "end"])
def test_no_device_holds_all_clients_or_all_participants(name, programs):
    """But its own, and what is passed on: the slots of this device and of the one before."""
    memory = getattr(programs, name).memory_analysis()
    assert memory.output_size_in_bytes <= programs.own + SLACK
    assert memory.temp_size_in_bytes <= 2 * programs.slots + SLACK
    assert memory.temp_size_in_bytes < programs.cohort // 2 < programs.population


def test_no_device_makes_all_clients(programs):
    memory = programs.initial.memory_analysis()
    assert memory.output_size_in_bytes <= programs.own + SLACK
    assert memory.temp_size_in_bytes < programs.population // 2


@pytest.mark.parametrize("name", ["begin", "end"])
def test_only_slots_travel_when_a_round_begins_and_ends(name, programs):
    found = collectives(getattr(programs, name).as_text())
    assert {c.operation for c in found} == {"collective-permute"}
    moved = sum(c.operand_bytes for c in found)  # in each of the turns
    assert programs.slots <= moved <= programs.slots + SLACK


def test_small_leaves_are_gathered_and_large_ones_are_not(npz):
    end = Programs(npz, DEVICES, 4 * 40 * 100).end  # bytes of a leaf of 100 numbers a client
    found = collectives(end.as_text())
    gathered = [c.operand_bytes for c in found if c.operation == "all-gather"]
    assert gathered and max(gathered) < 4 * 100 * 32 // DEVICES


def test_one_device_writes_in_place(npz):
    programs = Programs(npz, 1, 0)
    memory = programs.end.memory_analysis()
    assert memory.alias_size_in_bytes == memory.argument_size_in_bytes
    assert memory.temp_size_in_bytes <= SLACK
    memory = programs.begin.memory_analysis()
    assert memory.alias_size_in_bytes >= programs.population
    assert memory.temp_size_in_bytes <= SLACK


# ------------------------------------------------------------------------------ several processes


def test_two_processes_share_a_population_that_needs_padding(npz, tmp_path):
    """Private queues of 1.3 MB, which are sharded; the folder goes on with one process."""
    fields = {**FIELDS, "queue_length": 8000 * CLIENTS, "knn_every": 0, "probe_epochs": 0}
    fields |= {"rounds": 1, "steps_per_round": 3}
    both = processes(tmp_path / "both", npz, 2, **fields)
    outputs = [p.communicate(timeout=200) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    run = Run(npz, 1, **fields)
    end = run.rounds.unpadded(run.train(run.rounds.initial_state(), 0, 3))
    assert_close(tiny.saved_state(tmp_path / "both", npz, **fields), end)
