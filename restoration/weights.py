"""Finds and loads weights: the project's, by name, and any other, by path."""

import argparse
from pathlib import Path

from engine.checkpoint import CheckpointError
from engine.options import path
from models import LoadedModel
from models import load_model as load_file
from network import NETWORK_FLAG, Network, name_of
from restoration.scales import plan_chain
from unet import UNet

RELEASED = Path(__file__).parent.parent / "weights"
KINDS = {"clean": "x", "photo": "photo_x"}  # released weights, and how their names begin


def released(kind: str) -> dict[float, Path]:
    """List the files of the project's own weights of this kind by their enlargement."""
    files = {file.stem.removeprefix(KINDS[kind]): file for file in RELEASED.glob("*.safetensors")}
    return {float(name): file for name, file in files.items() if name.replace(".", "").isdecimal()}


def find_weights(name: str | Path | None = None, scale: float | None = None) -> list[Path]:
    """List the files to enlarge by `scale` with: of "photo" or "clean", the project's own, or of a path.

    Without a name they are photo, as far as its largest enlargement reaches; beyond that clean follows.
    """
    if name is not None and name not in KINDS:
        if not Path(name).is_file():
            raise CheckpointError(f"{name} is no file: give {', '.join(KINDS)} or the file of a model")
        return [Path(name)]
    wanted, photo = 4.0 if scale is None else scale, released("photo")
    kind = str(name or ("photo" if wanted <= max(photo, default=0) else "clean"))
    files = released(kind)
    if not files:
        raise CheckpointError(f"no {kind} weights in {RELEASED}: give a file of your own")
    first, *others = dict.fromkeys(plan_chain(wanted, list(files)))
    cleaning = photo if name is None and first in photo else files
    return [cleaning[first], *(files[factor] for factor in others)]


def load_models(
    name: str | Path | None, scale: float | None, network: type[Network] = UNet
) -> dict[Path, LoadedModel]:
    """Load the files that find_weights lists; CheckpointError."""
    return {file: load_file(file, network) for file in find_weights(name, scale)}


def load_model(
    name: str | Path = "photo", scale: float | None = None, network: type[Network] = UNet
) -> LoadedModel:
    """Load "photo", "clean" or a file, as find_weights chooses it; CheckpointError."""
    return load_file(find_weights(name, scale)[0], network)


def add_weights_flags(group: argparse._ActionsContainer, default: str) -> None:
    """Add --weights, whose `default` is said in words, and --network."""
    weights = f"photo or clean, the project's own, or a .pth or .safetensors file (default: {default})"
    group.add_argument("--weights_path", "--weights", metavar="photo|clean|FILE", type=path, help=weights)
    group.add_argument("--network", default=name_of(UNet), **NETWORK_FLAG)
