"""Networks, and how they are cut in two."""
