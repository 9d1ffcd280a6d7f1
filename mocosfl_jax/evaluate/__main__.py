"""`python -m mocosfl_jax.evaluate`; see `command`."""

from mocosfl_jax.run.console import run_command


def main(argv: list[str]) -> int:
    """Runs one command; returns the exit status."""
    from mocosfl_jax.evaluate.command import main as command  # takes seconds

    return command(argv)


if __name__ == "__main__":
    run_command(main, "mocosfl_jax.evaluate: interrupted; run the same command to start again")
