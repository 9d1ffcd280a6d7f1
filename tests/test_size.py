"""What a config makes of memory and cache: refusals, and parts of the cohort."""

import jax
import pytest

from mocosfl_jax.errors import InputError
from mocosfl_jax.federated.axes import NO_MESH
from mocosfl_jax.federated.placement import single_device
from mocosfl_jax.methods.mocosfl.build import build
from mocosfl_jax.run.plan import check_fits
from mocosfl_jax.run.program import program_of
from mocosfl_jax.run.rounds import Rounds
from tests.test_config import resolved


def test_a_million_clients_that_share_images():
    config = resolved(num_clients=1_000_000, images_per_client=5, epochs=1)
    assert (config.cohort_size, config.batch_size, config.steps_per_round) == (100, 1, 5)
    assert config.rounds == 10_000
    with pytest.raises(InputError, match=r"num_clients = 1000000: .*config\.images_per_client"):
        resolved(num_clients=1_000_000)


def test_state_beyond_the_memory_is_refused_with_sizes_and_a_way_out():
    """Two client models of 928 parameters of 4 bytes each, state and copy: 15 GB."""
    narrow = {"width": 32, "blocks_per_stage": (1, 1), "images_per_client": 1}

    def check(memory_bytes: int, **fields) -> None:
        config = resolved(num_clients=1_000_000, **narrow, **fields)
        rounds = Rounds(config, single_device(), program_of(config))
        check_fits(config, rounds.bytes_a_device(), memory_bytes)

    with pytest.raises(InputError, match=r"client_state = 'persistent': .* 14\.8 GB.* stateless"):
        check(14 * 10**9)
    check(16 * 10**9)
    check(10**9, client_state="stateless", align_momentum=True)
    with pytest.raises(InputError, match=r"queue_length = 1000000: .* the queue alone 8\.2 GB"):
        check(10**9, client_state="stateless", align_momentum=True, queue_length=1_000_000)


@pytest.mark.parametrize(
    ("clients", "batch", "width", "devices", "chunks"),
    [
        (100, 1, 64, 1, 10),  # 16.8 parts of 25 million; 10 divides 100
        (100, 1, 64, 2, 5),  # 8.4 on each device, which has 50 clients
        (99, 1, 64, 2, 5),  # a padded slot
        (100, 1, 32, 1, 4),  # 4.2
        (1000, 1, 16, 1, 10),  # 10.5
        (1000, 1, 16, 8, 1),
        (100, 1, 16, 1, 1),
        (12, 50, 16, 1, 6),  # 6.3
    ],
)
def test_a_cpu_runs_parts_that_stay_in_its_cache(
    clients, batch, width, devices, chunks, monkeypatch
):
    def chunks_of(**fields) -> int:
        sizes = {"num_clients": clients, "cohort_size": clients, "batch_size": batch}
        narrow = {"width": width, "blocks_per_stage": (1, 1), "queue_length": 2000}
        config = resolved(**sizes, **narrow, **fields)
        return build(config, NO_MESH, devices).chunks

    assert chunks_of() == chunks
    assert chunks_of(cohort_chunks=3) == 3
    assert chunks_of(head="largeV2") == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chunks_of() == 1


def test_parts_follow_the_size_of_the_first_features():
    config = resolved(num_clients=100, batch_size=1, width=32, stem="3x3s2", image_size=32)
    assert build(config, NO_MESH, 1).chunks == 1
    config = resolved(num_clients=100, batch_size=1, width=32, stem="3x3s2", image_size=63)
    assert build(config, NO_MESH, 1).chunks == 4


def test_parts_of_the_cohort_are_equal():
    """7 clients of 64 images would be 4.7 parts, but 7 has no divisor up to 4."""
    config = resolved(num_clients=7, batch_size=64, width=16)
    assert build(config, NO_MESH, 1).chunks == 1
