"""The forms of the contrastive loss: which way the two views of an image are compared."""

from typing import NamedTuple


class Loss(NamedTuple):
    """How a step compares query view and key view.

    both_views: both views pass through both client encoders, so a client sends 2B rows of each.
    swapped: the server also contrasts the key view's latents with keys of the query view; the
      gradient of this direction stops at the server.
    """

    both_views: bool
    swapped: bool

    @property
    def rows(self) -> int:
        """Query rows that a client sends for each of its images."""
        return 2 if self.both_views else 1

    @property
    def keys(self) -> int:
        """Keys that a step writes to the queue for each image."""
        return 2 if self.both_views or self.swapped else 1


LOSSES = {
    "one_way": Loss(both_views=False, swapped=False),  # MoCo
    "server": Loss(both_views=False, swapped=True),  # the paper's public code
    "client": Loss(both_views=True, swapped=False),  # MonAcoSFL
}
