"""Ctrl-C outside training: one line and status 130, whatever the process is doing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "mocosfl_jax.main": "run the same command to continue",
    "mocosfl_jax.sweep": "run the same command to continue",
    "mocosfl_jax.attack": "run the same command to start again",
    "mocosfl_jax.evaluate": "run the same command to start again",
    "mocosfl_jax.costs": "",
}


def start(*arguments: str) -> subprocess.Popen:
    pipe = subprocess.PIPE
    argv = [sys.executable, *arguments]
    return subprocess.Popen(argv, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


ANSWERING = """
import sys
from mocosfl_jax.run.interrupt import end_when_interrupted
end_when_interrupted("the line")
print("kept")  # in a buffer until the end
print("ready", file=sys.stderr, flush=True)
"""
BUSY = {
    "waiting": "import time\ntime.sleep(100)",
    # Where an exception is printed and forgotten.
    "collecting garbage": (
        "import gc, time\ngc.callbacks.append(lambda phase, info: time.sleep(100))\ngc.collect()"
    ),
    "importing": (
        "import sys, time\n"
        "class Finder:\n"
        "    def find_spec(self, *_):\n"
        "        try:\n            time.sleep(100)\n"
        "        except BaseException:\n            raise ImportError\n"
        "sys.meta_path.insert(0, Finder())\n"
        "try:\n    import no_such_module\nexcept ImportError:\n    pass"
    ),
}


@pytest.mark.parametrize("doing", BUSY)
def test_the_line_comes_whatever_python_code_runs(doing):
    process = start("-c", ANSWERING + BUSY[doing])
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("kept\n", "the line\n")
    assert process.returncode == 130


IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes, as XLA may take


def test_the_line_comes_while_the_main_thread_is_in_c():
    process = start("-c", f"import hashlib\n{ANSWERING}{IN_C}")
    assert process.stderr.readline() == "ready\n"
    time.sleep(0.1)  # it is in the call by then; if not, the test has less to say
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "the line\n")


TAKEN_OVER = """
import signal, time
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
print("taken over", file=sys.stderr, flush=True)
while not heard:
    time.sleep(0.01)
time.sleep(2 * interrupt.BUSY_SECONDS)
"""


def test_another_handler_takes_the_signal_over():
    early = "from mocosfl_jax.run import interrupt\ninterrupt.BUSY_SECONDS = 0.05\n"
    process = start("-c", early + ANSWERING + TAKEN_OVER)
    assert [process.stderr.readline() for _ in range(2)] == ["ready\n", "taken over\n"]
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("kept\n", "")
    assert process.returncode == 0


def test_commands_answer_before_they_import_what_takes_time():
    imports = "\n".join(f"import {x if x.endswith('main') else x + '.__main__'}" for x in COMMANDS)
    heavy = "{'absl', 'jax', 'ml_collections', 'numpy'}"
    process = start("-c", f"import sys\n{imports}\nprint({heavy} & set(sys.modules))")
    assert process.communicate(timeout=60) == ("set()\n", "")


@pytest.mark.parametrize("command", ["mocosfl_jax.main", "mocosfl_jax.attack"])
def test_a_command_is_interrupted_while_it_imports(command):
    process = start("-X", "importtime", "-m", command, "--workdir", "nowhere")
    for line in process.stderr:
        if line.endswith(" absl\n"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    rest = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert rest == [f"{command.removesuffix('.main')}: interrupted; {COMMANDS[command]}"]


def test_the_package_itself_is_no_command():
    process = start("-m", "mocosfl_jax")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, len(err.splitlines())) == (2, "", 1)
    for command in COMMANDS:
        assert f".{command.rpartition('.')[2]}" in err
