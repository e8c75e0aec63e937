"""DeferredSignals records the first signal, ends the process at a second one, and restores the handlers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from sftx.distributed.signals import DeferredSignals, Stop

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Gives the signals the handlers of a terminal, also when the process that runs the tests ignores some."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_recorded(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with DeferredSignals() as deferred:
        assert deferred.pending is None
        os.kill(os.getpid(), number)
        assert deferred.pending == number
    assert Stop(number).exit_code == 128 + number
    assert signal.getsignal(number) == before
    assert f"sftx: {number.name}:" in capfd.readouterr().err


def test_the_second_ends_the_process_at_once() -> None:
    code = (
        "import os, signal, time\nfrom sftx.distributed.signals import DeferredSignals\n"
        "with DeferredSignals():\n    os.kill(os.getpid(), signal.SIGTERM)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('one event', flush=True)\n    time.sleep(1.1)\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "one event\n")


def test_ignored_signals_stay_ignored_and_other_threads_are_left_alone() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with DeferredSignals() as deferred:
            os.kill(os.getpid(), signal.SIGHUP)
            assert deferred.pending is None
    finally:
        signal.signal(signal.SIGHUP, before)
    found = []

    def elsewhere() -> None:
        with DeferredSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    expected = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [expected]


def test_a_command_is_tidied_up_when_it_is_terminated() -> None:
    """Before a run has started SIGTERM raises an exception, so that temporary directories are removed."""
    code = (
        "import os, signal, sys, tempfile\nfrom sftx import cli\nimport sftx.cli.run as run\n"
        "def assemble(*args, **kwargs):\n"
        "    with tempfile.TemporaryDirectory() as place:\n"
        "        print(place, flush=True)\n        os.kill(os.getpid(), signal.SIGTERM)\n        print('never')\n"
        "import sftx.training\nsftx.training.run = assemble\nsys.argv = ['sftx', 'run']\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    place = done.stdout.strip()
    assert done.returncode == 143, done.stderr
    assert done.stderr == "sftx: stopped by SIGTERM\n"
    assert not os.path.exists(place)
