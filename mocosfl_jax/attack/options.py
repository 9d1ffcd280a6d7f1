"""The options of an attack: the attacker's own, in one place, with their ranges."""

import re
from dataclasses import dataclass
from typing import Annotated

from mocosfl_jax.config.ranges import ABOVE_0_TO_1, FROM_0, FROM_1, check_ranges
from mocosfl_jax.errors import InputError
from mocosfl_jax.models.decoder import DecoderShape, parse_decoder

TEST = "test"


@dataclass(frozen=True)
class Options:
    """What the attacker does; the command line has a flag of the same name for each.

    Raises: InputError: a value that is not allowed, under the name of its flag.
    """

    # The network that is trained from latents to images: res_normN{blocks}C{channels} or
    # conv_normN{blocks}C{channels}.
    decoder: str = "res_normN4C64"
    # Whose images are reconstructed: `test`, or `client:ID` for training images of one client.
    targets: str = TEST
    # Most of them that are; the first ones count.
    num_targets: Annotated[int, FROM_1] = 1000
    # Images that the attacker has itself: this part of the train split, at random.
    auxiliary: Annotated[float, ABOVE_0_TO_1] = 0.01
    # Passes over the auxiliary images.
    epochs: Annotated[int, FROM_1] = 50
    # Images of a step.
    batch_size: Annotated[int, FROM_1] = 32
    # Of Adam.
    learning_rate: Annotated[float, ABOVE_0_TO_1] = 1e-3
    # Of auxiliary images, decoder and noise.
    seed: Annotated[int, FROM_0] = 0

    def __post_init__(self) -> None:
        check_ranges(self, "--")
        _ = self.decoder_shape, self.client  # which raise

    @property
    def decoder_shape(self) -> DecoderShape:
        try:
            return parse_decoder(self.decoder)
        except ValueError as error:
            raise InputError("--decoder", self.decoder, str(error)) from None

    @property
    def client(self) -> int | None:
        """Id of the client whose training images are the targets; None: test images are."""
        if self.targets == TEST:
            return None
        match = re.fullmatch(r"client:(\d{1,10})", self.targets)
        if match is None:
            allowed = "'test', or 'client:' and the id of a client, is needed"
            raise InputError("--targets", self.targets, allowed)
        return int(match[1])

    @property
    def default_name(self) -> str:
        """Of the attack: decoder and targets."""
        return f"{self.decoder}-{self.targets.replace(':', '')}"
