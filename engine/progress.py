"""Progress of long work: a bar on a terminal, and in a log a line now and then."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


@contextlib.contextmanager
def progress(
    name: str, total: float, done: float = 0, *, hidden: bool = False
) -> Iterator[Callable[[float, str], None]]:
    """Gives a function that shows how much of `total` is done, with a remark; on stderr."""
    last = time.monotonic()

    def log(done: float, remark: str) -> None:
        nonlocal last
        if time.monotonic() - last > SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            with contextlib.suppress(OSError):  # a log that cannot be written is no reason to stop
                print(f"{name}: {done:g} of {total:g}, {remark}".rstrip(", "), file=sys.stderr, flush=True)  # noqa: T201

    if hidden:
        yield lambda done, remark: None
    elif not sys.stderr.isatty():
        yield log
    else:
        with tqdm(None, name, total, initial=done) as bar:

            def draw(done: float, remark: str) -> None:
                bar.set_postfix_str(remark, refresh=False)
                bar.update(done - bar.n)

            yield draw
