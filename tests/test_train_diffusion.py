"""Tests of train_diffusion.py: as a user runs it, and every way to get it wrong."""

import contextlib
import errno
import io
import os
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from diffusion import DiffusionModel
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.processes import Processes
from engine.run import RunFiles, locked, new_folder
from models import export_safetensors, load_model
from tests.runs import TINY, assert_equal, flags, logged, newest, start
from train_diffusion import (
    describe_end,
    flags_for_few_images,
    keep_global_batch,
    main,
    make_datasets,
    parse,
    parse_flags,
)
from training import TrainingConfig, make_optimizer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------- flags


def test_the_defaults_are_the_ones_the_mission_names():
    settings, _ = parse([])
    places = settings.data.image_folder, settings.run.log_dir, settings.run.checkpoint_dir
    assert places == tuple(map(os.path.abspath, ("data", "logs", "checkpoints")))
    assert (settings.data.img_size, settings.degradation.scale) == (256, 4)
    training, process, network = settings.training, settings.process, settings.network
    assert (training.epochs, training.batch_size, training.accumulation_steps) == (40, 32, 64)
    assert (training.learning_rate, process.timesteps, process.mode) == (2e-5, 1000, "v_prediction")
    assert (network.base_dim, network.dim_mults) == (32, (1, 2, 4))


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.args")), ids=lambda path: path.name)
def test_every_recipe_is_understood(recipe):
    settings, checkpoint = parse([f"@{recipe}", "--init_weights", "clean"])
    assert settings.training.max_steps
    assert checkpoint is None


def test_epochs_become_steps():
    config = TrainingConfig(epochs=3, batch_size=4, accumulation_steps=2)
    assert config.resolved(20).max_steps == 9
    assert config.resolved(20, world_size=2).max_steps == 6


@pytest.mark.slow  # bitsandbytes takes seconds to import
def test_eight_bit_adamw_is_the_default_on_cuda_where_it_imports(monkeypatch, caplog):
    def name(device, **options):
        return make_optimizer(torch.nn.Linear(2, 2), TrainingConfig(**options), torch.device(device))[0]

    assert [name(device) for device in ("cuda", "cpu", "mps")] == ["adamw8bit", "adamw", "adamw"]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    assert name("cuda") == "adamw"
    assert "bitsandbytes" in caplog.text
    with pytest.raises(ValueError, match="adamw8bit"):
        name("cpu", optimizer="adamw8bit")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strength", "0.5"], "--strength"),
        (["--image_folder", "/nowhere"], "/nowhere"),
        (["--img_size", "31"], "31"),
        (["--img_size", "64"], "64"),
        (["--device", "quantum"], "--device is 'quantum'"),
        (["--weights_path", "gone.pth"], "gone.pth"),
        (["--weights_path", ""], "--weights_path"),
        (["--weights_path", str(ROOT / "weights" / "x4.safetensors")], "init_weights"),
        (["--init_weights", "gone.pth"], "gone.pth"),
        (["--init_weights", "sharp"], "clean, photo"),
        (["--val_folder", "/nowhere"], "/nowhere"),
        (["--cache_gb", "nan"], "--cache_gb"),
        (["--seed", "-1"], "--seed"),
        (["--checkpoint_dir", f"{__file__}/runs"], "--checkpoint_dir"),
        (["--checkpoint_dir", __file__], "--checkpoint_dir"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(photo_folder, tmp_path, capsys, more, message):
    assert main([*flags(photo_folder, tmp_path), *more]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.strip().count("\n") == 0
    assert printed.err.startswith("train_diffusion.py: error: ")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------- the images


@pytest.fixture
def photos(photo_folder, tmp_path):
    return Path(shutil.copytree(photo_folder, tmp_path / "photos"))


def split(folder, *more, held_out=None):
    """The names that are trained on, and those that are validated on, of six images."""
    datasets = make_datasets(parse(flags(folder, folder, *more))[0], held_out)
    return [[path.relative_to(folder).as_posix() for path in dataset.paths] for dataset in datasets]


def test_the_split_is_disjoint_complete_and_belongs_to_the_names(photos):
    training, validation = split(photos, "--val_fraction", "0.3")
    assert len(validation) == 2
    assert sorted(training + validation) == [f"{number}.png" for number in range(6)]
    assert split(photos, "--val_fraction", "0.3") == [training, validation]
    assert split(photos, "--val_fraction", "0.3", "--seed", "1") != [training, validation]
    for name in ("a.png", "b.png", "c.png", "d.png"):
        shutil.copy(photos / "0.png", photos / name)
    assert split(photos, held_out=validation)[1] == validation  # a resumed run, after the folder has grown


def test_validation_images_that_are_gone_are_counted_and_refused_when_none_is_left(photos, caplog):
    names = ["0.png", "1.png"]
    (photos / "1.png").rename(photos / "renamed.png")
    assert split(photos, held_out=names)[1] == ["0.png"]
    assert "1 of 2 validation images are gone, such as 1.png" in caplog.text
    (photos / "0.png").unlink()
    with pytest.raises(ValueError, match=r"none of the 2 images .*0\.png"):
        split(photos, held_out=names)


def test_nothing_of_the_validation_folder_is_trained_on_and_all_is_validated_on(photos):
    (photos / "val").mkdir()
    for number in range(70):  # more than are held out of a folder
        shutil.copy(photos / "0.png", photos / "val" / f"{number}.png")
    (photos / "link.png").symlink_to(photos / "val" / "0.png")
    training, validation = split(photos, "--val_folder", str(photos / "val"))
    assert training == [f"{number}.png" for number in range(6)]
    assert len(validation) == 70
    with pytest.raises(ValueError, match="--val_folder"):
        split(photos, "--val_folder", str(photos))


# ------------------------------------------------------------------------------------------------- a run


LENGTH = "--max_steps 10 --save_every 4 --log_every 1 --validate_every 5 --warmup_steps 1".split()


@pytest.fixture(scope="module")
def finished(photo_folder, tmp_path_factory):
    """A run of the script: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(flags(photo_folder, folder, *LENGTH)) == 0
    return folder, printed.getvalue()


def test_a_run_says_what_it_does_and_writes_what_the_mission_says(finished):
    folder, printed = finished
    path = newest(folder, "best")
    assert re.fullmatch(r"v_prediction_\d{8}-\d{6}", path.parent.name)
    assert path.name == "diffusion_model_v_prediction_best.pth"
    assert list((folder / "logs" / path.parent.name).glob("events.*"))
    for said in (
        "UNet",
        f"tensorboard --logdir {shlex.quote(str(folder / 'logs'))}",
        f"--weights_path {shlex.quote(str(path))}",
        "warning: 10 steps",
    ):
        assert said in printed
    assert printed.isascii() or not str(folder).isascii()


def test_a_checkpoint_says_how_it_was_trained(finished):
    content = load_checkpoint(newest(finished[0]))
    assert content["training"]["optimizer"] == "adamw"  # what auto was
    assert (content["images"], content["world_size"], len(content["held_out"])) == (5, 1, 1)


def test_a_resumed_run_takes_its_flags_from_the_checkpoint(finished):
    path = ["--weights_path", str(newest(finished[0]))]
    settings, checkpoint = parse([*path, "--unet_base_dim", "8", "--max_steps", "20"])
    assert settings.network.dim_mults == (1, 2)
    assert (settings.data.img_size, settings.training.max_steps) == (32, 20)
    assert checkpoint.content["step"] == 10
    assert parse([*path, "--epochs", "2"])[0].training.max_steps is None
    with pytest.raises(ValueError, match=r"base_dim is 16: .* with 8"):
        parse([*path, "--unet_base_dim", "16"])


def test_another_number_of_processes_keeps_the_global_batch_or_is_refused(finished):
    settings, checkpoint = parse(["--weights_path", str(newest(finished[0]))])
    checkpoint.content["world_size"] = 6
    assert keep_global_batch(settings, checkpoint, Processes(CPU, 1, 6)) == settings
    assert keep_global_batch(settings, checkpoint, Processes(CPU, 1, 2)).training.accumulation_steps == 3
    with pytest.raises(ValueError, match="4 processes"):
        keep_global_batch(settings, checkpoint, Processes(CPU, 1, 4))


def test_the_printed_line_starts_the_run_as_it_was_started(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for world_size, start_line in ((1, "python"), (2, "torchrun --nproc_per_node 2")):
        *_, line = describe_end(RunFiles(tmp_path, tmp_path, "m", {}), signal.SIGTERM, world_size)
        path = shlex.quote(f"{tmp_path}/m_last.pth")
        assert line == f"resume: {start_line} train_diffusion.py --weights_path {path}"


def test_a_checkpoint_from_before_a_flag_existed_had_its_default_and_one_without_any_is_refused(
    finished, tmp_path
):
    content = load_checkpoint(newest(finished[0]))
    del content["objective"]["token_dropout"], content["sharpening"]
    save_checkpoint(tmp_path / "old_last.pth", content)
    path = ["--weights_path", str(tmp_path / "old_last.pth")]
    assert parse([*path, "--token_dropout", "0.1"])[0].objective.token_dropout == 0.1
    with pytest.raises(ValueError, match=r"token_dropout is 0\.5.*0\.1"):
        parse([*path, "--token_dropout", "0.5"])
    save_checkpoint(tmp_path / "bare.pth", {"step": 3})
    with pytest.raises(ValueError, match=r"bare\.pth"):
        parse(["--weights_path", str(tmp_path / "bare.pth")])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "saved"), [(signal.SIGTERM, 7), (signal.SIGKILL, 4)])
def test_resume_is_bit_exact_and_needs_only_the_checkpoint(
    number, saved, finished, photo_folder, tmp_path, monkeypatch
):
    """A signal to the whole job, as SLURM or systemd send it, and a power cut: in the middle of an epoch."""
    loss, calls = DiffusionModel.loss, []

    def interrupted(self, *arguments, **keywords):
        calls.append(1)
        if len(calls) == 7:
            os.killpg(os.getpid(), number)
        return loss(self, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(DiffusionModel, "loss", interrupted)
        more = [*LENGTH, "--num_workers", "2"]
        process = start(main, flags(photo_folder, tmp_path, *more), tmp_path / "printed")
    process.join(60)
    said = (tmp_path / "printed").read_text()
    assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number), said
    assert ("resume: python train_diffusion.py" in said) == (number == signal.SIGTERM)
    assert "Traceback" not in said
    assert load_checkpoint(newest(tmp_path))["step"] == saved
    time.sleep(1)  # TensorBoard orders the logs of two processes by the second in their names
    assert main(["--weights_path", str(newest(tmp_path)), "--num_workers", "0"]) == 0
    ours, theirs = load_checkpoint(newest(tmp_path)), load_checkpoint(newest(finished[0]))
    for part in ("model", "ema", "optimizer", "step", "best_score"):
        assert_equal(ours[part], theirs[part])
    assert logged(tmp_path / "logs") == logged(finished[0] / "logs")
    assert [step for step, _ in logged(tmp_path / "logs")] == list(range(1, 11))


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder_says_what_changed_and_is_held_by_one_process(
    finished, photos, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(photos.parent)
    places = ["--log_dir", str(tmp_path / "logs"), "--checkpoint_dir", str(tmp_path / "checkpoints")]
    assert main([*TINY, "--image_folder", photos.name, *places, "--max_steps", "2"]) == 0
    monkeypatch.chdir("/")
    shutil.copy(photos / "0.png", photos / "another.png")
    path = newest(tmp_path)
    capsys.readouterr()
    assert main(["--weights_path", str(path)]) == 0
    assert "finished" in capsys.readouterr().out
    with locked(path.parent):
        assert main(["--weights_path", str(path), "--max_steps", "3"]) == 2
    assert str(path.parent) in capsys.readouterr().err
    assert main(["--weights_path", str(path), "--max_steps", "3"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("3 steps long instead of 2", "6 training images instead of 5"))
    assert len(list((tmp_path / "logs").iterdir())) == 1


@pytest.mark.slow
def test_every_precision_learns_alike(photo_folder, tmp_path):
    """24 steps from the same start on the same data: the curves differ by less than one of them wanders."""
    curves = []
    for precision in ("fp32", "bf16", "fp16"):
        more = ["--max_steps", "24", "--log_every", "3", "--validate_every", "24", "--batch_size", "5"]
        assert main(flags(photo_folder, tmp_path / precision, *more, "--precision", precision)) == 0
        curves.append(torch.tensor([value for _, value in logged(tmp_path / precision / "logs")]))
    wander = (curves[0] - curves[0].mean()).abs().mean()
    for curve in curves[1:]:
        assert 0 < (curves[0] - curve).abs().mean() < 0.25 * wander


@pytest.mark.slow
def test_a_new_run_may_start_from_weights_of_its_kind(finished, photo_folder, tmp_path, capsys):
    beginning = tmp_path / "model.safetensors"
    export_safetensors(load_model(newest(finished[0])), beginning)
    begun = flags(photo_folder, tmp_path, "--init_weights", str(beginning), "--max_steps", "1")
    for flag, value, named in (("downscale_factor", "4", "by 2"), ("diffusion_mode", "clean", "clean")):
        assert main([*begun, f"--{flag}", value]) == 2
        assert named in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists()
    assert main([*begun, "--learning_rate", "1e-12", "--residual_std", "1"]) == 0
    after = load_checkpoint(newest(tmp_path))
    for name, value in load_model(beginning).network.state_dict().items():
        expected = torch.ones(()) if name == "residual_std" else value
        torch.testing.assert_close(after["model"][name], expected, atol=1e-9, rtol=0)


def test_two_runs_of_one_second_have_a_folder_each(tmp_path):
    assert [new_folder(tmp_path, "run").name for _ in range(3)] == ["run", "run-2", "run-3"]


def test_a_lock_clears_what_a_killed_save_left_and_a_file_system_without_locks_is_no_hindrance(
    tmp_path, monkeypatch, caplog
):
    def without_locks(self, **_):
        raise OSError(errno.ENOLCK, "No locks available")

    for _ in range(2):
        (tmp_path / ".0123.tmp").write_bytes(b"half a checkpoint")
        with locked(tmp_path):
            assert not (tmp_path / ".0123.tmp").exists()
        monkeypatch.setattr(FileLock, "acquire", without_locks)
    assert str(tmp_path) in caplog.text


# ------------------------------------------------------------------------------------------------- no flags


def chosen(folder, *more):
    given = ["--image_folder", str(folder), *more]
    return flags_for_few_images(parse_flags(given), parse(given)[0], Processes(CPU))


def test_few_images_get_the_recipe_unless_a_length_is_given(photo_folder, tmp_path, capsys):
    taken = chosen(photo_folder, "--img_size", "48")
    assert taken[-2:] == ["--max_steps", "6000"]
    assert "--predictor_blocks 6" in (said := capsys.readouterr().out)
    assert said.startswith("6 images would be 40 steps")
    settings, _ = parse([*taken, "--img_size", "48"])
    assert (settings.training.optimizer, settings.data.img_size) == ("muon", 48)
    for length in ("epochs", "max_steps", "accumulation_steps"):
        assert chosen(photo_folder, f"--{length}", "1") == []


@pytest.mark.slow
def test_a_bare_command_learns(tmp_path, monkeypatch):
    """Scaled down: no flag but those of a small network, and a short run, beat bicubic on held-out images."""
    from examples.dead_leaves import draw_dead_leaves_folder

    draw_dead_leaves_folder(tmp_path / "images", 24, 48, seed=0, min_radius=4)
    monkeypatch.setattr("train_diffusion.CPU_STEPS", 100)
    places = ["--log_dir", str(tmp_path / "logs"), "--checkpoint_dir", str(tmp_path / "checkpoints")]
    small = "--img_size 48 --unet_base_dim 16 --predictor_blocks 3 --warmup_steps 20 --ema_decay 0.98"
    more = f"{small} --device cpu --validate_every 200".split()
    assert main(["--image_folder", str(tmp_path / "images"), *places, *more]) == 0
    assert logged(tmp_path / "logs", "validation/psnr_over_bicubic")[-1][1] > 0.1  # 0.23 when written
    assert load_checkpoint(newest(tmp_path))["training"]["optimizer"] == "muon"
