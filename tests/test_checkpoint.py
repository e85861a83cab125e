"""Tests of checkpoint.py: what is written can be trusted, what cannot be trusted is refused."""

import os
import pickle
import re

import pytest
import torch

from engine import VERSION, checkpoint
from engine.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    read_for_resume,
    save_checkpoint,
)
from models import LoadedModel, export_safetensors, load_model
from network import Condition
from tests.networks import BICUBIC, PROCESS, tiny_unet
from unet import UNet


@pytest.fixture
def saved(tmp_path):
    unet = tiny_unet()
    path = tmp_path / "model.pth"
    content = {
        "network": unet.config.to_dict(),
        "process": PROCESS.to_dict(),
        "degradation": BICUBIC.to_dict(),
        "ema": unet.state_dict(),
        "step": 7,
    }
    save_checkpoint(path, content)
    return path, unet


def test_a_model_is_rebuilt_from_its_file_alone(saved):
    path, unet = saved
    loaded = load_model(path, UNet)
    noisy, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    condition = Condition(torch.randn(1, 3, 32, 32), torch.randn(1, 3, 16, 16))
    context, _ = unet.encode_context(condition)
    torch.testing.assert_close(loaded.network(noisy, t, context), unet(noisy, t, context))
    assert loaded.process == PROCESS
    assert loaded.degradation == BICUBIC
    assert loaded.step == 7
    assert float(loaded.network.residual_std) == pytest.approx(0.1)
    assert not loaded.network.training


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_one_flipped_byte_is_noticed(saved, place):
    path, _ = saved
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_checkpoint(path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, keep):
    path, _ = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        load_checkpoint(path)


def test_a_missing_file_says_what_is_wanted(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth"):
        load_checkpoint(tmp_path / "gone.pth")


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Malicious()}, "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth|bare\.pth"):
        load_checkpoint("evil.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match=r"evil\.pth|bare\.pth"):
        load_checkpoint("bare.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [[1, 2], {"weights": 1}, {"format": 99}])
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        load_checkpoint(tmp_path / "other.pth")


def test_a_checkpoint_without_a_network_is_refused(tmp_path):
    save_checkpoint(tmp_path / "empty.pth", {"step": 1})
    with pytest.raises(CheckpointError, match=r"empty\.pth"):
        load_model(tmp_path / "empty.pth", UNet)


def test_weights_that_do_not_fit_change_nothing():
    small, large = tiny_unet(), tiny_unet(base_dim=12, seed=1)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"here\.pth.*stem\.weight.*\(8, 12, 3, 3\).*\(12,"):
        load_weights(large, small.state_dict(), "here.pth")
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())


def test_missing_and_unknown_keys_are_listed():
    unet = tiny_unet()
    weights = dict(unet.state_dict())
    weights["extra"] = weights.pop("stem.weight")
    with pytest.raises(CheckpointError, match=r"stem\.weight.*extra"):
        load_weights(unet, weights, "here.pth")


def test_a_failed_save_leaves_the_old_file(saved, monkeypatch):
    path, _ = saved
    old = path.read_bytes()

    def disk_full(content, target):
        target.write(b"half a fi")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", disk_full)
    with pytest.raises(CheckpointError, match=r"model\.pth"):
        save_checkpoint(path, {"step": 8})
    assert path.read_bytes() == old
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_an_exported_model_restores_the_same(saved, tmp_path):
    path, unet = saved
    exported = tmp_path / "model.safetensors"
    export_safetensors(load_model(path, UNet), exported)
    assert exported.stat().st_size < 0.6 * path.stat().st_size
    loaded = load_model(exported, UNet)
    assert loaded.process == PROCESS
    assert loaded.network.config == unet.config
    assert float(loaded.network.residual_std) == pytest.approx(0.1, rel=1e-6)
    for name, value in loaded.network.state_dict().items():
        torch.testing.assert_close(value, unet.state_dict()[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("data", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"garbage" * 30])
def test_a_damaged_export_is_refused(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(path, UNet)


def test_exporting_where_nothing_can_be_written_is_an_error(saved, tmp_path):
    _, unet = saved
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export_safetensors(LoadedModel(unet, PROCESS, BICUBIC, 1), tmp_path / "file" / "model.safetensors")


def test_one_flipped_byte_of_an_export_is_noticed(saved, tmp_path):
    path = tmp_path / "model.safetensors"
    export_safetensors(load_model(saved[0], UNet), path)
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(path, UNet)


def test_a_model_of_format_1_loads_and_is_not_resumed(saved, tmp_path):
    _, unet = saved
    config = unet.config.to_dict()
    del config["attention_levels"]  # was not there yet
    content = {"format": 1, "unet": config, "process": PROCESS.to_dict(), "ema": unet.state_dict(), "step": 7}
    torch.save(content, tmp_path / "old.pth")
    loaded = load_model(tmp_path / "old.pth", UNet)
    assert loaded.network.config == unet.config
    assert loaded.degradation == BICUBIC
    with pytest.raises(CheckpointError, match="format 1"):
        read_for_resume(tmp_path / "old.pth")


def test_the_version_that_wrote_a_file_is_in_it(saved):
    assert load_checkpoint(saved[0])["version"] == VERSION


def test_a_model_under_another_suffix_is_read_by_what_it_is(saved, tmp_path):
    export_safetensors(load_model(saved[0], UNet), tmp_path / "x4.SAFETENSORS")
    (tmp_path / "renamed.pth").write_bytes((tmp_path / "x4.SAFETENSORS").read_bytes())
    for name in ("x4.SAFETENSORS", "renamed.pth"):
        assert load_model(tmp_path / name, UNet).step == 7


@pytest.mark.parametrize("header", [{"network": "[1]"}, {"process": "3"}, {"step": "many"}, {"network": "{"}])
def test_a_header_with_a_wrong_kind_of_value_is_one_line(saved, tmp_path, header):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "model.safetensors"
    export_safetensors(load_model(saved[0], UNet), path)
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **header}
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as found:
        load_model(path, UNet)
    assert "\n" not in str(found.value)


def test_weights_of_another_origin_are_refused_in_one_plain_line(tmp_path):
    network = torch.nn.Linear(2, 2)
    torch.save(network, tmp_path / "module.pth")
    torch.save(network.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("module.pth", "old.pth", "."):
        with pytest.raises(CheckpointError) as found:
            load_model(tmp_path / name, UNet)
        message = str(found.value)
        assert str(tmp_path) in message
        assert "\n" not in message
        assert "\x1b" not in message
        assert "weights_only" not in message
