"""Runs of a script's main in processes that a test may stop or kill."""

import multiprocessing
import os
import sys
import time


def start(main, argv, output, **environment):
    """Run main(argv) in a process of its own, which prints into the file `output`.

    It leads a process group of its own, and its exitcode is what main returns, or minus a signal.
    """
    # A fork needs no imports. But libvips keeps idle threads for a while after it has written a picture, and
    # a fork of that process waits for them for ever: such processes fork from a server that wrote none.
    method = "forkserver" if main.__module__ == "infer" else "fork"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["infer"])
    process = context.Process(target=_run, args=(main, argv, output, environment))
    process.start()
    return process


def _run(main, argv, output, environment):
    os.setsid()
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.exit(main(argv))


def wait_for(found, process, seconds=60):
    """Until found() is true, the process has ended, or the time is up."""
    deadline = time.monotonic() + seconds
    while not found() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
