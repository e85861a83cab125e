"""Runs of a script's main in processes that a test may stop or kill, and what runs log."""

import multiprocessing
import os
import sys
import time

import torch

TINY = (
    "--img_size 32 --downscale_factor 2 --batch_size 2 --accumulation_steps 1 --unet_base_dim 8 "
    "--unet_dim_mults 1 2 --context_dim 16 --blocks_per_level 1 --predictor_blocks 1 --device cpu "
    "--precision fp32 --learning_rate 1e-3"
).split()


def flags(photo_folder, folder, *more):
    """Flags of a tiny training on these photos, in a folder of its own."""
    places = ["--log_dir", str(folder / "logs"), "--checkpoint_dir", str(folder / "checkpoints")]
    return [*TINY, "--image_folder", str(photo_folder), *places, *more]


def newest(folder, kind="last"):
    """The checkpoint of the only run in such a folder."""
    return next((folder / "checkpoints").glob(f"*/diffusion_model_*_{kind}.pth"))


def assert_equal(one, other):
    """Compare nested dicts and lists of tensors and numbers, to the bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), [other[key] for key in one]
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other


def logged(folder, tag="train/loss"):
    """The (step, value) pairs of a curve, of a log folder or of the only one in it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = next((path for path in folder.iterdir() if path.is_dir()), folder)
    return [(event.step, event.value) for event in EventAccumulator(str(run)).Reload().Scalars(tag)]


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
