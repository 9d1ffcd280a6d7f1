"""Sweeps: a grid over config fields and seeds, each run in its own process, and one report.

`python -m mocosfl_jax.sweep --config configs/sweeps/X.py --workdir DIR`; see docs/sweeps.md.
"""
