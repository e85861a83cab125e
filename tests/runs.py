"""Runs of a script's main in processes that a test may stop or kill."""

import multiprocessing
import os
import sys
import time


def start(main, argv, output, **environment):
    """Run main(argv) in a forked process, which needs no imports; it prints into the file `output`.

    It leads a process group of its own, and its exitcode is what main returns, or minus a signal.
    """

    def run():
        os.setsid()
        os.environ.update(environment)
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        sys.exit(main(argv))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def wait_for(found, process, seconds=60):
    """Until found() is true, the process has ended, or the time is up."""
    deadline = time.monotonic() + seconds
    while not found() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
