"""Tests of processes.py: several processes train what one does, and none of them fails alone."""

import csv
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import infer
from engine.checkpoint import load_checkpoint
from models import export_safetensors
from tests.networks import random_model
from tests.runs import flags, logged, newest, start, wait_for
from train_diffusion import main

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "train_diffusion.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


def start_two(script, folder, argv):
    """A script's main in two processes that meet as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder.mkdir()
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(script, argv, folder / f"printed_{rank}", RANK=rank, LOCAL_RANK=rank, **common) for rank in "01"
    ]


def run_two(script, folder, argv):
    """The statuses of two such processes, and what each of them printed."""
    two = start_two(script, folder, argv)
    for process in two:
        process.join(120)
    return [process.exitcode for process in two], [(folder / f"printed_{rank}").read_text() for rank in "01"]


def test_two_processes_train_what_one_does(photo_folder, tmp_path):
    """5 training images in groups of 4: the last group of an epoch leaves one process without a sample."""
    more = ["--batch_size", "1", "--log_every", "1", "--max_steps", "4", "--validate_every", "2"]
    assert main(flags(photo_folder, tmp_path / "one", *more, "--accumulation_steps", "4")) == 0
    argv = flags(photo_folder, tmp_path / "two", *more, "--accumulation_steps", "2")
    statuses, printed = run_two(main, tmp_path / "two", argv)
    assert statuses == [0, 0], printed
    assert "2 process(es)" in printed[0]
    assert "process(es)" not in printed[1]  # rank 0 alone speaks
    ours, theirs = (np.array(logged(tmp_path / name / "logs")) for name in ("two", "one"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    ours, theirs = load_checkpoint(newest(tmp_path / "two")), load_checkpoint(newest(tmp_path / "one"))
    assert ours["best_score"] == pytest.approx(theirs["best_score"], abs=1e-2)
    for name, value in theirs["ema"].items():
        torch.testing.assert_close(ours["ema"][name], value, atol=1e-3, rtol=0)


ENDLESS = (
    "--batch_size 1 --max_steps 100000 --save_every 2 --validate_every 100000 --accumulation_steps 1".split()
)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_other_and_the_checkpoint_is_good(photo_folder, tmp_path, rank):
    two = start_two(main, tmp_path / "run", flags(photo_folder, tmp_path / "run", *ENDLESS))
    wait_for(lambda: list(tmp_path.glob("run/checkpoints/*/*_last.pth")), two[0])
    two[rank].kill()
    two[1 - rank].join(60)
    assert two[1 - rank].exitcode not in (None, 0)
    assert load_checkpoint(newest(tmp_path / "run"))["step"] >= 2


def test_a_signal_to_torchrun_ends_the_job_and_saves(photo_folder, tmp_path):
    more = [*ENDLESS, "--validate_every", "1", "--save_every", "100000"]
    job = subprocess.Popen(
        [*TORCHRUN, SCRIPT, *flags(photo_folder, tmp_path, *more)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("checkpoints/*/*_best.pth")) and time.monotonic() < deadline:
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=90)
    assert job.returncode != 0
    assert "SIGTERM" in errors
    assert load_checkpoint(newest(tmp_path))["step"] >= 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    export_safetensors(random_model(2.0), path)
    return str(path)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_a_killed_worker_loses_only_its_current_file_and_two_others_do_the_rest_to_the_byte(
    photo_folder, weights, tmp_path
):
    common = [str(photo_folder), "--weights_path", weights, "--device", "cpu", "--steps", "12", "--output"]
    assert infer.main([*common, str(tmp_path / "one")]) == 0
    expected, results = contents(tmp_path / "one"), tmp_path / "results"
    two = start_two(infer.main, tmp_path / "killed", [*common, str(results)])
    wait_for(lambda: {"0_x2.png", "1_x2.png"} <= contents(results).keys(), two[1], 200)  # one of each
    two[1].kill()
    two[0].join(90)
    assert two[0].exitcode == 1
    found = contents(results)
    assert len(found) < 6
    statuses, printed = run_two(infer.main, tmp_path / "again", [*common, str(results), "--skip_existing"])
    assert statuses == [0, 0], printed
    said = "".join(printed)
    assert said.count(f"{len(found)} of 6 images have a result") == 1
    named = sorted(Path(line).name for line in said.splitlines() if line.endswith(".png"))
    assert named == sorted(expected.keys() - found.keys())
    assert contents(results) == {**expected, **found} == expected


def test_two_processes_measure_the_table_of_one(photo_folder, weights, tmp_path, capsys):
    photos = shutil.copytree(photo_folder, tmp_path / "photos")
    (photos / "0_damaged.png").write_bytes(b"no image")
    common = ["--data", str(photos), "--scale", "2", "--weights_path", weights, "--device", "cpu"]
    common += ["--no_lpips", "--steps", "1", "--csv"]
    one, two = ([*common, str(tmp_path / f"{name}.csv")] for name in ("one", "two"))
    assert evaluate.main(one) == 1
    statuses, printed = run_two(evaluate.main, tmp_path / "two", two)
    assert statuses == [1, 1], printed
    for each in (capsys.readouterr().err, "".join(printed)):
        assert each.count("1 of 7 images were left out") == 1
    tables = []
    for name in ("one", "two"):
        rows = csv.DictReader((tmp_path / f"{name}.csv").read_text().splitlines())
        tables.append([{key: row[key] for key in row if key != "seconds_per_megapixel"} for row in rows])
    assert len(tables[0]) == 2 * 6
    assert tables[0] == tables[1]
