"""`mocosfl_jax.main` with a fault: `python -m tests.broken_run FAULT... -- COMMAND LINE`.

Faults, in the order in which they are given:
  kill=MODULE:NAME:N         SIGKILL when NAME of the module is called for the N-th time
  kill_after=MODULE:NAME:N   the same when that call returns
  signal=MODULE:NAME:N       SIGTERM when it is called, and the call goes on
  file_size=MODULE:NAME:N:B  from then on no file may grow beyond B bytes
"""

import functools
import importlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any


def inject(fault: str) -> None:
    kind, _, place = fault.partition("=")
    module_name, name, number, *rest = place.split(":")
    owner: Any = importlib.import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), [0]

    @functools.wraps(original)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        now = calls[0] == int(number)
        if now and kind != "kill_after":
            FAULTS[kind](*rest)
        result = original(*args, **kwargs)
        if now and kind == "kill_after":
            kill()
        return result

    setattr(owner, last, faulty)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def limit(size: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))


FAULTS: dict[str, Callable[..., None]] = {
    "kill": kill,
    "signal": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "file_size": limit,
}


if __name__ == "__main__":
    from mocosfl_jax.main import main
    from mocosfl_jax.run.console import quiet_libraries, unbreakable_output

    split = sys.argv.index("--")
    for argument in sys.argv[1:split]:
        inject(argument)
    quiet_libraries()
    unbreakable_output()
    sys.exit(main(["main", *sys.argv[split + 1 :]]))
