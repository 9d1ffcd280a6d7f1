"""`python -m mocosfl_jax.sweep`; see `command`."""

from mocosfl_jax.run.console import run_command


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    from mocosfl_jax.sweep.command import main as command  # takes seconds

    return command(argv)


if __name__ == "__main__":
    run_command(main, "mocosfl_jax.sweep: interrupted; run the same command to continue")
