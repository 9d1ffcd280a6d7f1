"""One run: its folder, clocks, signals, processes, checkpoints and numbers."""
