"""Files that hold a model: written whole or not at all, verified when read.

A checkpoint (.pth) is a dict that loads with `weights_only=True`:

    format, version    of this layout, and of the project
    network, process, objective, degradation, training, data, run     a section per class of options
    network_class      "module:Class"; without it, unet:UNet
    model, ema         state dicts: trained and averaged weights
    optimizer          {"name", "state"}
    step, best_score, skipped       see training.TrainState

An exported model (.safetensors): averaged weights in half precision, sections as JSON, a checksum.
"""

import hashlib
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import VERSION
from imaging.atomic import Write, write_atomically

FORMAT = 2
READABLE = (1, FORMAT)  # what models can be read from; format 1 cannot be resumed
StateDict = Mapping[str, Tensor]
NOT_A_CHECKPOINT = "is not a checkpoint of this project"


class CheckpointError(ValueError):
    """Names the file and the remedy."""


class Checkpoint(NamedTuple):
    path: Path
    content: dict[str, Any]


def save_checkpoint(path: Path, content: dict[str, object]) -> None:
    """Write a checkpoint, or raise CheckpointError."""
    whole = {"format": FORMAT, "version": VERSION, **content}
    _write(path, lambda stream: torch.save(whole, stream))


def _write(path: Path, write: Write) -> None:
    try:
        write_atomically(path, write)
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"could not write {path}: {reason}; earlier files are intact") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint or an exported model, told apart by content, and verify every byte.

    CheckpointError: missing, altered, foreign, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise CheckpointError(f"{path} is {what}: give the path of a checkpoint or of an exported model")
    with path.open("rb") as file:
        exported = file.read(9)[8:] == b"{"  # the first byte of a safetensors header, after its length
    content: Any = _read_safetensors(path) if exported else _read_pth(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found not in READABLE:
        raise CheckpointError(
            f"{path} {NOT_A_CHECKPOINT}, or of a later version: its format is {found}, not up to {FORMAT}"
        )
    return {"network" if name == "unet" else name: part for name, part in content.items()}  # of format 1


def read_for_resume(path: str | Path) -> Checkpoint:
    """Read a checkpoint to go on from; CheckpointError where training cannot."""
    content = load_checkpoint(path)
    if content["format"] != FORMAT or "optimizer" not in content:
        raise CheckpointError(f"{path} holds no training to go on with: start from it, as init_weights")
    return Checkpoint(Path(path), content)


def _read_pth(path: Path) -> object:
    if damage := _damage(path):
        others = sorted(path.parent.glob("*_step*.pth"), reverse=True)
        intact = next((other for other in others if not other.samefile(path) and not _damage(other)), None)
        offer = f"{intact} is intact" if intact else "there is no intact one by step beside it"
        raise CheckpointError(f"{path} {damage}; {offer}")
    try:
        with path.open("rb") as file:  # torch would trust the suffix of a name
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        # The message is left out: it advises to run what is in the file.
        raise CheckpointError(f"{path} {NOT_A_CHECKPOINT}: {type(error).__name__} when read") from error


def _damage(path: Path) -> str | None:
    try:  # torch.load does not compare the checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError) as error:
        return f"{NOT_A_CHECKPOINT}, or is truncated ({error})"
    return None if damaged is None else f"is damaged (the checksum of {damaged} is wrong)"


def load_weights(model: nn.Module, weights: StateDict, source: str | Path) -> None:
    """Load all weights or none; CheckpointError names what does not fit."""
    here, there = (
        {key: tuple(value.shape) for key, value in one.items()} for one in (model.state_dict(), weights)
    )
    unfit = [key for key in here | there if here.get(key) != there.get(key)]
    if unfit:
        shown = (f"{key} is {there.get(key, 'missing')}, not {here.get(key, 'known')}" for key in unfit[:3])
        raise CheckpointError(f"{source} does not fit this model in {len(unfit)} places: {'; '.join(shown)}")
    model.load_state_dict(weights)


def export_model(path: str | Path, sections: Mapping[str, object], weights: StateDict) -> None:
    """Write a .safetensors file in half precision, or raise CheckpointError."""
    from safetensors.torch import save

    halves = {  # single numbers, which every pixel depends on, stay in single precision
        name: (value.half() if value.ndim else value).cpu().contiguous() for name, value in weights.items()
    }
    header = {"format": str(FORMAT), "version": VERSION, "sha256": _digest(halves)}
    header |= {name: json.dumps(values) for name, values in sections.items()}
    # Not save_file, which makes a file that its owner alone can read.
    encoded = save(halves, metadata=header)
    _write(Path(path), lambda stream: stream.write(encoded))


def _digest(weights: StateDict) -> str:
    """Hash names and bytes of weights, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_safetensors(path: Path) -> dict[str, object]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = {"network", "network_class", "unet", "process", "degradation", "format", "step"} & set(header)
        sections = {name: json.loads(header[name]) for name in names}
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} {NOT_A_CHECKPOINT}, or is damaged: {error}") from error
    if "sha256" in header and header["sha256"] != _digest(weights):
        raise CheckpointError(f"{path} is damaged: its weights have another checksum than when written")
    return {**sections, "ema": {name: weight.float() for name, weight in weights.items()}}
