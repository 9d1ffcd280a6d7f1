"""The trained network that a run starts from: `config.init_from`."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from mocosfl_jax.config import Config, Resolved
from mocosfl_jax.config.network import model_of
from mocosfl_jax.errors import InputError
from mocosfl_jax.models.split import Variables
from mocosfl_jax.run.encoder_file import EncoderFile, by_name, file_of, read_encoder, weights_digest

_PARTS = {
    "client": ("client",),
    "server": ("server", "stats"),
    "both": ("client", "server", "stats"),
}
"""What of `Variables` is taken, by `config.init_parts`."""

_NETWORK = ("backbone", "blocks_per_stage", "width", "stem", "cut", "bottleneck")
_HEAD = ("head", "head_width")


class Source(NamedTuple):
    """variables: of the new run's network; None for each leaf that starts anew. digest: of the
    weights (`weights_digest`). notes: what a person should know, a line each."""

    variables: Variables
    digest: str
    notes: tuple[str, ...]


def with_init_digest(config: Resolved, stored: Config | None) -> Resolved:
    """Fills `init_digest` where the run starts from a trained network, which must fit it.

    Args:
      config: resolved.
      stored: that of the run that goes on, which needs its source no more; None: it is new.
    Raises: InputError: as `load_source`.
    """
    if config.init_from is None:
        return config
    known = None if stored is None else stored.init_digest
    same = stored is not None and config.init_from == stored.init_from
    if known is not None and (same or not file_of(config.init_from).exists()):
        return dataclasses.replace(config, init_digest=config.init_digest or known)
    return dataclasses.replace(config, init_digest=load_source(config).digest)


def load_source(config: Resolved) -> Source:
    """Reads what a run starts from.

    Args: config: resolved; `init_from` is set.
    Raises: InputError: no encoder of this version or an earlier one, one of another network, or of
      other weights than `init_digest` says.
    """
    assert config.init_from is not None, "only then is there a source"
    found = read_encoder(config.init_from, headless=True, field="config.init_from")
    fields = _NETWORK if found.headless or config.init_parts == "client" else _NETWORK + _HEAD
    changed = [
        f"{name} {getattr(found.config, name)!r} -> {getattr(config, name)!r}"
        for name in fields
        if getattr(found.config, name) != getattr(config, name)
    ]
    if changed:
        another = f"it holds another network than this run's ({', '.join(changed)})"
        raise InputError("config.init_from", config.init_from, another)
    digest = weights_digest(file_of(config.init_from))
    if digest is None or config.init_digest not in (None, digest):
        other = f"it holds the weights {digest}, config.init_digest is {config.init_digest}"
        raise InputError("config.init_from", config.init_from, other)
    return Source(_taken(config, found.variables), digest, _notes(config, found, digest))


def _taken(config: Resolved, found: Variables) -> Variables:
    """The variables of the run's network with None where nothing is found or wanted."""
    needed = model_of(config).shapes()
    parts = _PARTS[config.init_parts]
    taken = {name: x for name, x in by_name(found).items() if name.partition("/")[0] in parts}
    leaves = [taken.get(name) for name in by_name(needed)]
    return jax.tree.unflatten(jax.tree.structure(needed), leaves)


def _notes(config: Resolved, found: EncoderFile, digest: str) -> tuple[str, ...]:
    """What is taken, and what a person may not expect."""
    parts = "client and server" if config.init_parts == "both" else config.init_parts
    notes = [f"starts from {config.init_from} ({parts}; weights {digest})"]
    if found.headless and config.init_parts != "client":
        notes.append("the file has no head: that of this run starts anew")
    for name, before in (("mean", found.config.mean), ("std", found.config.std)):
        now = getattr(config, name)
        if now is not None and not np.allclose(now, before, atol=1e-4):
            notes.append(f"its images had the {name} {before}, those of this run have {now}")
    return tuple(notes)
