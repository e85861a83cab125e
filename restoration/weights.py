"""Finds and loads weights: the project's, by name, and any other, by path."""

from collections.abc import Callable
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


def released_scales(kind: str = "clean") -> list[float]:
    """List the enlargements that the project's own weights of this kind are for."""
    names = (path.stem.removeprefix(KINDS[kind]) for path in RELEASED.glob(f"{KINDS[kind]}*.safetensors"))
    return sorted(float(name) for name in names if name.replace(".", "").isdecimal())


def released_model(scale: float = 4, kind: str = "clean") -> Path:
    """Return the file of the project's own weights; CheckpointError if there is none for the enlargement."""
    file = RELEASED / f"{KINDS[kind]}{scale:g}.safetensors"
    if not file.is_file():
        there = ", ".join(f"x{known:g}" for known in released_scales(kind)) or "none"
        raise CheckpointError(
            f"no {kind} weights for x{scale:g} come with the project (there are: {there}); train your own "
            "with train_diffusion.py and give their --weights_path"
        )
    return file


def find_weights(name: str | Path | None = None, scale: float | None = None) -> list[Path]:
    """List the files to enlarge by `scale` with: of "photo" or "clean", the project's own, or of a path.

    Without a name they are photo, as far as its largest enlargement reaches; beyond that clean follows.
    """
    if name is not None and name not in KINDS:
        if not Path(name).is_file():
            raise CheckpointError(
                f"{name} is no file: give {', '.join(KINDS)} or a .pth or .safetensors file"
            )
        return [Path(name)]
    wanted, photo = 4.0 if scale is None else scale, released_scales("photo")
    kind = str(name or ("photo" if wanted <= max(photo, default=0) else "clean"))
    # Without any weights, released_model says so.
    first, *others = dict.fromkeys(plan_chain(wanted, released_scales(kind) or [4.0]))
    cleaning = "photo" if name is None and first in photo else kind
    return [released_model(first, cleaning), *(released_model(factor, kind) for factor in others)]


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


def add_weights_flags(add: Callable[..., object], default: str) -> None:
    """Add --weights, whose `default` is said in words, and --network to a group, by its `add_argument`."""
    weights = f"photo or clean, the project's own, or a .pth or .safetensors file (default: {default})"
    add(
        "--weights",
        "--weights_path",
        dest="weights_path",
        metavar="photo|clean|FILE",
        type=path,
        help=weights,
    )
    add("--network", default=name_of(UNet), **NETWORK_FLAG)
