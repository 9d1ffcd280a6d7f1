"""Memory of a compiled function."""

from dataclasses import dataclass

import jax

from mocosfl_jax.federated.contract import Work


@dataclass(frozen=True)
class Memory:
    """Bytes that XLA assigns to a call on this machine's device.

    arguments, outputs: what goes in and comes out. temporaries: what exists in between. reused: of
    the outputs, what lies where the replaced state lay.
    """

    arguments: int
    outputs: int
    temporaries: int
    reused: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.reused + self.temporaries


def memory_of(work: Work) -> Memory:
    """Of one call; it is compiled, not run."""
    donated = (0,) if work.replaces else ()
    lowered = jax.jit(work.function, donate_argnums=donated).lower(*work.arguments)
    found = lowered.compile().memory_analysis()
    assert found is not None, "backends of JAX's own have it"
    return Memory(
        arguments=found.argument_size_in_bytes,
        outputs=found.output_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        reused=found.alias_size_in_bytes,
    )
