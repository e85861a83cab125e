"""Tests of checkpoint.py: what is written can be trusted, what cannot be trusted is refused."""

import io
import os
import pickle
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from engine import VERSION
from engine.checkpoint import CheckpointError, load_checkpoint, load_weights, read_for_resume, save_checkpoint
from models import LoadedModel, export_safetensors, load_model
from network import Condition
from tests.networks import BICUBIC, PROCESS, tiny_unet


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture(scope="module")
def files(unet, tmp_path_factory):
    """The bytes of a checkpoint and of an exported model, by suffix."""
    folder = tmp_path_factory.mktemp("files")
    sections = {"process": PROCESS.to_dict(), "degradation": BICUBIC.to_dict()}
    content = {"network": unet.config.to_dict(), **sections, "ema": unet.state_dict(), "step": 7}
    save_checkpoint(folder / "model.pth", content)
    export_safetensors(load_model(folder / "model.pth"), folder / "model.safetensors")
    return {path.suffix: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (".pth", "model.pth"),
        (".pth", "renamed.safetensors"),
        (".safetensors", "x4.SAFETENSORS"),
        (".safetensors", "renamed.pth"),
    ],
)
def test_a_model_is_rebuilt_from_its_file_alone_whatever_its_suffix(files, unet, tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(files[kind])
    loaded = load_model(path)
    noisy, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    condition = Condition(torch.randn(1, 3, 32, 32), torch.randn(1, 3, 16, 16))
    (context, _), (expected, _) = (one.encode_context(condition) for one in (loaded.network, unet))
    rounding = {} if kind == ".pth" else {"rtol": 1e-2, "atol": 1e-2}  # of half precision
    torch.testing.assert_close(
        loaded.network(noisy, t, context), unet(noisy, t, expected).detach(), **rounding
    )
    assert (loaded.process, loaded.degradation, loaded.step) == (PROCESS, BICUBIC, 7)
    assert float(loaded.network.residual_std) == pytest.approx(0.1, rel=1e-6)
    assert not loaded.network.training


def test_an_export_is_half_as_large_and_a_checkpoint_names_the_version_that_wrote_it(files, tmp_path):
    assert len(files[".safetensors"]) < 0.6 * len(files[".pth"])
    (tmp_path / "model.pth").write_bytes(files[".pth"])
    assert load_checkpoint(tmp_path / "model.pth")["version"] == VERSION


class Malicious:
    def __reduce__(self):
        return os.system, ("touch owned",)


def flipped(data, place):
    place = int(place * len(data))
    return data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]


def written(content):
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def with_header(data, folder, **changed):
    (folder / "whole").write_bytes(data)
    with safe_open(folder / "whole", framework="pt") as file:
        metadata = {**file.metadata(), **changed}
    return save(load_file(folder / "whole"), metadata=metadata)


NO_MODEL = {
    **{f"flipped at {at}": lambda pth, *_, at=at: flipped(pth, at) for at in (0.2, 0.5, 0.9)},
    **{f"cut to {part}": lambda pth, *_, part=part: pth[: int(part * len(pth))] for part in (0, 0.5, 0.99)},
    "a list": lambda *_: written([1, 2]),
    "no format": lambda *_: written({"weights": 1}),
    "a later format": lambda *_: written({"format": 99}),
    "no network": lambda *_: written({"format": 2, "step": 1}),
    "a module": lambda *_: written(torch.nn.Linear(2, 2)),
    "code": lambda *_: written({"format": 1, "model": Malicious()}),
    "bare code": lambda *_: pickle.dumps(Malicious()),
    "an export flipped": lambda _, export, __: flipped(export, 0.99),
    "an export cut": lambda _, export, __: export[: len(export) // 2],
    **{
        f"a header of {name} {value}": lambda _, export, folder, name=name, value=value: with_header(
            export, folder, **{name: value}
        )
        for name, value in (("network", "[1]"), ("step", "many"), ("network", "{"))
    },
    "an empty header": lambda *_: b"\x08\0\0\0\0\0\0\0{}      ",
    "garbage": lambda *_: b"garbage" * 30,
}


@pytest.mark.parametrize("fault", NO_MODEL)
def test_what_is_no_whole_model_is_refused_in_one_plain_line(files, tmp_path, monkeypatch, fault):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pth"
    path.write_bytes(NO_MODEL[fault](files[".pth"], files[".safetensors"], tmp_path))
    with pytest.raises(CheckpointError) as found:
        load_model(path)
    message = str(found.value)
    assert str(path) in message
    assert not any(part in message for part in ("\n", "\x1b", "weights_only"))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["gone.pth", "gone.safetensors", "."])
def test_a_path_without_a_file_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_model(tmp_path / name)


def test_weights_that_do_not_fit_change_nothing_and_are_named(unet):
    large = tiny_unet(base_dim=12, seed=1)
    before = {name: value.clone() for name, value in large.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"here\.pth.*stem\.weight.*\(8, 12, 3, 3\).*\(12,"):
        load_weights(large, unet.state_dict(), "here.pth")
    renamed = dict(before)
    renamed["extra"] = renamed.pop("stem.weight")
    with pytest.raises(CheckpointError, match=r"stem\.weight.*extra"):
        load_weights(large, renamed, "here.pth")
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())


def test_exporting_where_nothing_can_be_written_is_an_error(unet, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        export_safetensors(LoadedModel(unet, PROCESS, BICUBIC, 1), tmp_path / "file" / "model.safetensors")


def test_a_model_of_format_1_loads_and_is_not_resumed(unet, tmp_path):
    config = unet.config.to_dict()
    del config["attention_levels"]  # was not there yet
    content = {"format": 1, "unet": config, "process": PROCESS.to_dict(), "ema": unet.state_dict(), "step": 7}
    torch.save(content, tmp_path / "old.pth")
    loaded = load_model(tmp_path / "old.pth")
    assert (loaded.network.config, loaded.degradation) == (unet.config, BICUBIC)
    with pytest.raises(CheckpointError, match="init_weights"):
        read_for_resume(tmp_path / "old.pth")
