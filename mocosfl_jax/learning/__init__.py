"""Pure functions and types of self-supervised learning: no client axis, no mesh."""
