"""Tests of train_diffusion.py: as a user runs it, and every way to get it wrong."""

import contextlib
import io
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from degradation import Degradation
from diffusion import DiffusionModel, ProcessConfig
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.run import locked
from models import load_model
from tests.runs import start, wait_for
from train_diffusion import build_parser, choose_held_out, main, make_datasets, parse
from training import TrainingConfig, new_state, optimizer_for
from unet import UNet

ROOT = Path(__file__).parent.parent
TINY = "--img_size 32 --downscale_factor 2 --batch_size 2 --accumulation_steps 1 --unet_base_dim 8".split()
TINY += "--unet_dim_mults 1 2 --context_dim 16 --blocks_per_level 1 --predictor_blocks 1".split()
TINY += "--device cpu --precision fp32 --learning_rate 1e-3".split()


def flags(photo_folder, folder, *more):
    places = ["--log_dir", str(folder / "logs"), "--checkpoint_dir", str(folder / "checkpoints")]
    return [*TINY, "--image_folder", str(photo_folder), *places, *more]


def newest(folder, kind="last"):
    return next((folder / "checkpoints").glob(f"*/diffusion_model_*_{kind}.pth"))


def test_the_defaults_are_the_ones_the_mission_names():
    args = build_parser(given_only=False).parse_args([])
    expected = {
        "image_folder": os.path.abspath("data"),
        "img_size": 256,
        "downscale_factor": 4,
        "epochs": 40,
        "batch_size": 32,
        "accumulation_steps": 64,
        "learning_rate": 2e-5,
        "timesteps": 1000,
        "diffusion_mode": "v_prediction",
        "unet_base_dim": 32,
        "unet_dim_mults": (1, 2, 4),
        "log_dir": os.path.abspath("logs"),
        "checkpoint_dir": os.path.abspath("checkpoints"),
        "weights_path": None,
    }
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.args")), ids=lambda path: path.name)
def test_every_recipe_is_understood(recipe):
    settings, checkpoint = parse([f"@{recipe}", "--init_weights", "clean"])  # which a last phase needs
    assert settings.training.max_steps
    assert checkpoint is None


@pytest.mark.slow  # bitsandbytes takes seconds to import
def test_eight_bit_adamw_is_the_default_on_cuda_only():
    config = parse([])[0].training
    for device, expected in (("cuda", "adamw8bit"), ("cpu", "adamw"), ("mps", "adamw")):
        assert optimizer_for(config, torch.device(device)) == expected


def test_the_split_is_disjoint_complete_and_repeatable(photo_folder):
    settings, _ = parse([*TINY, "--image_folder", str(photo_folder), "--val_fraction", "0.3"])
    training, validation = make_datasets(settings, None)
    assert len(validation) == 2
    assert not set(training.paths) & set(validation.paths)
    assert len(set(training.paths) | set(validation.paths)) == 6
    assert make_datasets(settings, None)[1].paths == validation.paths
    assert not validation.train


def test_epochs_become_steps():
    config = TrainingConfig(epochs=3, batch_size=4, accumulation_steps=2)
    assert config.resolved(20).max_steps == 9
    assert config.resolved(20, world_size=2).max_steps == 6


@pytest.fixture(scope="module")
def finished(photo_folder, tmp_path_factory):
    """A run of the script: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(flags(photo_folder, folder, "--max_steps", "6", "--validate_every", "3")) == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_a_run_says_what_it_does_and_what_comes_next(finished):
    folder, printed = finished
    assert "UNet" in printed  # torchinfo's table
    assert "5 training and 1 validation images" in printed
    assert f"tensorboard --logdir {folder / 'logs'}" in printed
    assert f"--weights_path {newest(folder, 'best')}" in printed


def test_files_are_where_the_mission_says(finished):
    folder, _ = finished
    path = newest(folder, "best")
    assert re.fullmatch(r"v_prediction_\d{8}-\d{6}", path.parent.name)
    assert path.name == "diffusion_model_v_prediction_best.pth"
    assert list((folder / "logs" / path.parent.name).glob("events.*"))


def test_the_checkpoint_rebuilds_the_network(finished):
    loaded = load_model(newest(finished[0]), UNet)
    assert loaded.network.config.base_dim == 8
    assert loaded.process == ProcessConfig()
    assert float(loaded.network.scale) == 2


def test_the_optimizer_is_decided_once_and_recorded(finished):
    assert load_checkpoint(newest(finished[0]))["training"]["optimizer"] == "adamw"


def logged(folder, tag="train/loss"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((folder / "logs").iterdir()))).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


LENGTH = "--max_steps 10 --save_every 4 --log_every 1 --validate_every 5 --warmup_steps 1".split()


@pytest.fixture(scope="module")
def uninterrupted(photo_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(flags(photo_folder, folder, *LENGTH)) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "saved"),
    [(signal.SIGTERM, 128 + signal.SIGTERM, 7), (signal.SIGKILL, -signal.SIGKILL, 4)],
)
def test_resume_is_bit_exact_and_needs_only_the_checkpoint(
    number, status, saved, uninterrupted, photo_folder, tmp_path, monkeypatch
):
    """A request to stop, and an end as by a power cut, during step 7: in the middle of an epoch of three."""
    loss, calls = DiffusionModel.loss, []

    def interrupted(self, *arguments, **keywords):
        if "t" not in keywords:  # not the curve of a validation
            calls.append(1)
            if len(calls) == 7:
                os.kill(os.getpid(), number)
        return loss(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModel, "loss", interrupted)
        process = start(main, flags(photo_folder, tmp_path, *LENGTH), tmp_path / "printed")
    process.join(60)
    assert process.exitcode == status
    assert load_checkpoint(newest(tmp_path))["step"] == saved
    time.sleep(1)  # TensorBoard orders the logs of two processes by the second in their names
    assert main(["--weights_path", str(newest(tmp_path))]) == 0
    ours, theirs = load_checkpoint(newest(tmp_path)), load_checkpoint(newest(uninterrupted))
    assert ours["step"] == 10
    assert ours["best_score"] == theirs["best_score"]
    for content in (ours, theirs):
        content["moments"] = {
            f"{number} {name}": value
            for number, moments in content["optimizer"]["state"]["state"].items()
            for name, value in moments.items()
        }
    for part in ("model", "ema", "moments"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items())
    assert logged(tmp_path) == logged(uninterrupted)
    assert [step for step, _ in logged(tmp_path)] == list(range(1, 11))


@pytest.mark.slow
def test_bf16_and_fp32_learn_alike(photo_folder, tmp_path):
    """24 steps from the same start on the same data: the curves differ by less than either wanders."""
    curves = []
    for precision in ("fp32", "bf16"):
        more = ["--max_steps", "24", "--log_every", "3", "--validate_every", "24", "--batch_size", "5"]
        assert main(flags(photo_folder, tmp_path / precision, *more, "--precision", precision)) == 0
        curves.append(torch.tensor([value for _, value in logged(tmp_path / precision)]))
    wander = (curves[0] - curves[0].mean()).abs().mean()
    assert (curves[0] - curves[1]).abs().mean() < 0.25 * wander
    assert not torch.equal(curves[0], curves[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_job_saves_and_prints_how_to_go_on(photo_folder, tmp_path, number):
    """As a terminal, SLURM or systemd send it: the workers that read images get it, too."""
    more = ["--max_steps", "100000", "--num_workers", "2", "--save_every", "2"]
    printed = tmp_path / "printed"
    job = start(main, flags(photo_folder, tmp_path, *more), printed)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/*_last.pth")), job)
    os.killpg(job.pid, number)
    job.join(60)
    assert job.exitcode == 128 + number
    said = printed.read_text()
    assert f"resume: python train_diffusion.py --weights_path {newest(tmp_path)}" in said
    assert "Traceback" not in said
    assert load_checkpoint(newest(tmp_path))["step"] >= 2


def test_a_flag_that_contradicts_the_checkpoint_is_refused(finished, capsys):
    path = str(newest(finished[0]))
    assert main(["--weights_path", path, "--unet_base_dim", "16"]) == 2
    error = capsys.readouterr().err
    assert "--unet_base_dim is 16" in error
    assert "trained with 8" in error


@pytest.mark.slow
def test_a_resumed_run_takes_its_flags_from_the_checkpoint(finished):
    path = ["--weights_path", str(newest(finished[0]))]
    settings, checkpoint = parse([*path, "--unet_base_dim", "8", "--max_steps", "20"])
    assert settings.network.dim_mults == (1, 2)
    assert settings.data.img_size == 32
    assert settings.training.max_steps == 20
    assert checkpoint.content["step"] == 6
    assert parse([*path, "--epochs", "2"])[0].training.max_steps is None


@pytest.mark.slow
def test_a_profile_is_written_beside_the_curves(photo_folder, tmp_path):
    small = "--unet_dim_mults 1 --conditioning concat --attention_levels --max_steps 11 --profile".split()
    assert main(flags(photo_folder, tmp_path, *small)) == 0
    trace = next((tmp_path / "logs").glob("*/*.pt.trace.json")).read_text()
    assert "aten::mkldnn_convolution" in trace or "aten::convolution" in trace
    assert trace.count('"ProfilerStep#') == 5


@pytest.mark.slow
def test_a_checkpoint_from_before_a_flag_existed_had_its_default(finished, tmp_path):
    content = load_checkpoint(newest(finished[0]))
    content["objective"] |= {"timestep_density": "uniform", "perceptual_weight": 0.0}
    del content["objective"]["token_dropout"]
    save_checkpoint(tmp_path / "old_last.pth", content)
    path = ["--weights_path", str(tmp_path / "old_last.pth")]
    assert parse([*path, "--token_dropout", "0.1"])[0].objective.token_dropout == 0.1
    with pytest.raises(ValueError, match=r"--token_dropout.*0\.2.*0\.1"):
        parse([*path, "--token_dropout", "0.2"])
    content["objective"]["perceptual_weight"] = 1.0
    save_checkpoint(tmp_path / "old_last.pth", content)
    with pytest.raises(ValueError, match=r"perceptual_weight.*1\.0"):
        parse(path)


@pytest.mark.slow
def test_a_new_run_may_start_from_trained_weights(finished, photo_folder, tmp_path):
    start = newest(finished[0])
    more = ["--init_weights", str(start), "--max_steps", "1", "--learning_rate", "1e-12"]
    assert main(flags(photo_folder, tmp_path, *more)) == 0
    before, after = load_model(start, UNet).network.state_dict(), load_checkpoint(newest(tmp_path))
    assert after["step"] == 1
    for name, value in before.items():
        torch.testing.assert_close(after["model"][name], value, atol=1e-9, rtol=0)


@pytest.mark.slow
def test_a_run_on_photos_records_what_it_undoes_and_goes_on_with_it(photo_folder, tmp_path, capsys):
    photo = ["--degradation", "photo", "--strength", "0.4", "--noise_sigma", "2", "20"]
    assert main(flags(photo_folder, tmp_path, *photo, "--max_steps", "2", "--num_workers", "1")) == 0
    path = newest(tmp_path)
    expected = Degradation("photo", scale=2.0, strength=0.4, noise_sigma=(2.0, 20.0))
    assert load_model(path).degradation == expected
    resume = ["--weights_path", str(path)]
    assert parse([*resume, "--degradation", "photo", "--strength", "0.4"])[0].degradation == expected
    for wrong in (["--strength", "0.5"], ["--degradation", "bicubic"], ["--jpeg_quality", "50", "60"]):
        with pytest.raises(ValueError, match=wrong[0]):
            parse([*resume, *wrong])
    assert main([*resume, "--max_steps", "3"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strength", "0.5"], "--strength"),
        (["--degradation", "photo", "--blur_sigma", "3", "1"], "--blur_sigma"),
        (["--image_folder", "/nowhere"], "/nowhere"),
        (["--img_size", "31"], "31"),
        (["--img_size", "64"], "64"),
        (["--device", "quantum"], "quantum"),
        (["--weights_path", "gone.pth"], "gone.pth"),
        (["--init_weights", "gone.pth"], "gone.pth"),
        (["--val_fraction", "2"], "val_fraction"),
        (["--val_folder", "/nowhere"], "/nowhere"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--residual_std", "0"], "residual_std"),
        (["--unet_base_dim", "7"], "base_dim"),
        (["--timesteps", "0"], "timesteps"),
        (["--max_steps", "0"], "max_steps"),
        (["--cache_gb", "-1"], "cache_gb"),
        (["--cache_gb", "nan"], "cache_gb"),
        (["--seed", "-1"], "--seed"),
        (["--diffusion_mode", "magic"], "magic"),
        (["--device", "cpu:x"], "--device is 'cpu:x'"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(photo_folder, tmp_path, capsys, more, message):
    assert main([*flags(photo_folder, tmp_path), *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.strip().count("\n") == 0
    assert printed.err.startswith("train_diffusion.py: error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_settings_cannot_be_resumed(tmp_path, capsys):
    save_checkpoint(tmp_path / "bare.pth", {"step": 3})
    assert main(["--weights_path", str(tmp_path / "bare.pth")]) == 2
    assert "bare.pth" in capsys.readouterr().err


@pytest.mark.slow
def test_noise_that_never_ends_is_not_hidden(photo_folder, tmp_path, capsys):
    more = ["--learning_rate", "1e30", "--max_steps", "60", "--max_grad_norm", "1e30", "--warmup_steps", "0"]
    assert main(flags(photo_folder, tmp_path, *more)) == 1
    assert "finite" in capsys.readouterr().err


@pytest.mark.slow
def test_the_split_belongs_to_the_file_and_a_resumed_run_keeps_it(photo_folder, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder, folder)
    assert main(flags(folder, tmp_path, "--max_steps", "2", "--val_fraction", "0.3")) == 0
    former = load_checkpoint(newest(tmp_path))["held_out"]
    assert len(former) == 2
    for name in ("a.png", "b.png", "c.png", "d.png"):
        shutil.copy(folder / "0.png", folder / name)
    settings, checkpoint = parse(["--weights_path", str(newest(tmp_path))])
    training, validation = make_datasets(settings, checkpoint.content["held_out"])
    assert sorted(path.name for path in validation.paths) == sorted(former)
    assert len(training) == 8
    names = [f"{number}.png" for number in range(100)]
    assert choose_held_out(names, 0.1, 0) == choose_held_out(names[::-1], 0.1, 0)
    assert choose_held_out(names, 0.1, 0) != choose_held_out(names, 0.1, 1)


def test_validation_images_below_the_image_folder_are_not_trained_on(photo_folder, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder, folder)
    shutil.copytree(photo_folder, folder / "val")
    settings, _ = parse([*flags(folder, tmp_path), "--val_folder", str(folder / "val")])
    training, validation = make_datasets(settings, None)
    assert len(training) == len(validation) == 6
    assert not set(training.paths) & set(validation.paths)


@pytest.mark.slow
def test_two_runs_of_one_second_have_a_folder_each(photo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    for _ in range(2):
        assert main(flags(photo_folder, tmp_path, "--max_steps", "1")) == 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "v_prediction_20260101-000000",
        "v_prediction_20260101-000000-2",
    ]


@pytest.mark.slow
def test_a_run_can_be_resumed_from_another_working_folder(photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(photo_folder.parent)
    places = ["--log_dir", str(tmp_path / "logs"), "--checkpoint_dir", str(tmp_path / "checkpoints")]
    assert main([*TINY, "--image_folder", photo_folder.name, *places, "--max_steps", "2"]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    path = str(newest(tmp_path))
    assert main(["--weights_path", path]) == 0
    assert "finished" in capsys.readouterr().out
    assert main(["--weights_path", path, "--max_steps", "3"]) == 0
    assert "3 steps long instead of 2" in capsys.readouterr().out
    assert len(list((tmp_path / "logs").iterdir())) == 1


@pytest.mark.slow
def test_a_run_that_another_process_holds_is_not_resumed(finished, capsys):
    path = newest(finished[0])
    with locked(path.parent):
        assert main(["--weights_path", str(path), "--max_steps", "9"]) == 2
    assert str(path.parent) in capsys.readouterr().err


def test_what_a_killed_save_left_is_removed_by_the_next_run(finished):
    folder = newest(finished[0]).parent
    (folder / ".0123.tmp").write_bytes(b"half a checkpoint")
    with locked(folder):
        assert not (folder / ".0123.tmp").exists()


@pytest.mark.slow
def test_weights_of_another_enlargement_or_process_are_no_start(finished, photo_folder, tmp_path, capsys):
    start = ["--init_weights", str(newest(finished[0])), "--max_steps", "1"]
    assert main([*flags(photo_folder, tmp_path), *start, "--downscale_factor", "4"]) == 2
    assert "enlarges by 2," in capsys.readouterr().err
    assert main([*flags(photo_folder, tmp_path), *start, "--diffusion_mode", "clean"]) == 2
    assert "clean" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_memory_that_runs_out_is_one_line_with_the_remedy(photo_folder, tmp_path, capsys, monkeypatch):
    def out_of_memory(*_, **__):
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
        )

    monkeypatch.setattr(DiffusionModel, "loss", out_of_memory)
    assert main(flags(photo_folder, tmp_path, "--max_steps", "1")) == 1
    error = capsys.readouterr().err
    assert "--batch_size" in error
    assert "Traceback" not in error


def test_a_run_too_short_to_learn_says_so_before_it_starts(finished):
    assert "warning: 6 steps" in finished[1]


@pytest.mark.slow
def test_images_left_out_are_counted_and_the_measured_residual_std_can_be_overruled(
    photo_folder, tmp_path, capsys
):
    folder = tmp_path / "photos"
    shutil.copytree(photo_folder, folder)
    (folder / "broken.png").write_bytes(b"no image")
    assert main(flags(folder, tmp_path, "--max_steps", "1", "--residual_std", "1")) == 0
    assert "1 left out" in capsys.readouterr().out
    unet = load_model(newest(tmp_path), UNet).network
    assert float(unet.residual_std) == 1
    assert float(unet.scale) == 2


def test_an_empty_path_is_refused(capsys):
    assert main(["--weights_path", ""]) == 2
    assert "--weights_path" in capsys.readouterr().err


def test_eight_bit_adamw_that_does_not_import_is_replaced_where_nobody_asked_for_it(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    assert optimizer_for(TrainingConfig(), torch.device("cuda")) == "adamw"
    assert "bitsandbytes" in caplog.text
    with pytest.raises(ValueError, match="adamw8bit"):
        new_state(torch.nn.Linear(2, 2), TrainingConfig(optimizer="adamw8bit"))


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(
    photo_folder, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(DiffusionModel, "loss", None)  # a step would fail
    places = ["--checkpoint_dir", str(tmp_path / "file" / "runs"), "--max_steps", "1"]
    assert main([*flags(photo_folder, tmp_path), *places]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err
