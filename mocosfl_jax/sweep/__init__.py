"""Sweeps: a grid over config fields and seeds, each run a process of its own, and one report.

`python -m mocosfl_jax.sweep --config configs/sweeps/X.py --workdir DIR`; see docs/sweeps.md.
"""
