"""`python -m mocosfl_jax` is no command: it says which modules are."""

import sys

if __name__ == "__main__":
    print(
        "mocosfl_jax: run one of its modules: python -m mocosfl_jax.main trains,"
        " .sweep does many runs, .evaluate, .attack and .costs measure; each has --help",
        file=sys.stderr,
    )
    sys.exit(2)
