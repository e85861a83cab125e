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
    """Give a function that shows how much of `total` is done, with a remark; on stderr."""
    last, in_a_log = time.monotonic(), not sys.stderr.isatty()
    with tqdm(None, name, total, initial=done, disable=hidden or in_a_log) as bar:

        def show(done: float, remark: str) -> None:
            nonlocal last
            bar.set_postfix_str(remark, refresh=False)
            bar.update(done - bar.n)
            if in_a_log and not hidden and time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                line = f"{name}: {done:g} of {total:g}, {remark}".rstrip(", ")
                with contextlib.suppress(OSError):  # a log that cannot be written is no reason to stop
                    print(line, file=sys.stderr, flush=True)  # noqa: T201

        yield show
