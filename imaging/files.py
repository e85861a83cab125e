"""Image files in and out, and value ranges: files hold uint8 or uint16, metrics [0, 1], the model [-1, 1]."""

import io
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyvips
import torch
from PIL import Image
from PIL.ImageFile import ImageFile
from torch import Tensor

from imaging.atomic import write_atomically
from imaging.metadata import (
    DAMAGE_ERRORS,
    Header,
    Metadata,
    png_with_metadata,
    read_header,
    save_options,
    tiff_with_metadata,
)

logger = logging.getLogger(__name__)
logging.getLogger("pyvips").setLevel(logging.ERROR)  # it repeats what its errors say
pyvips.cache_set_max(0)  # a file that changes under the same name is read again
pyvips.operation_block_set("VipsForeignLoadSvg", True)  # a drawing, whatever its name
Image.init()  # all of Pillow's formats

Pixels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

MAX_PIXELS = 2**30  # 3 GB of 8-bit RGB: more is taken for a decompression bomb

WRITABLE_SUFFIXES = frozenset(".bmp .jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {".gif", ".avif"}

_DEVELOP = "camera raw is not a picture yet: develop it first, into a TIFF or JPEG"
_RAW_SUFFIXES = (
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 "
    ".rwl .sr2 .srf .srw .x3f"
)
_OTHER_SUFFIXES = ".exr .hdr .heic .heif .hif .j2k .jp2 .jxl .pbm .pgm .pnm .ppm .psd .svg .tga"
_REMEDIES = {
    **dict.fromkeys(_RAW_SUFFIXES.split(), _DEVELOP),
    **dict.fromkeys(_OTHER_SUFFIXES.split(), "save it as PNG, JPEG or TIFF first"),
}
_DECODED_BY_PILLOW = ("AVIF", "WEBP", "GIF", "BMP")
_DTYPES: dict[str, type[np.uint8] | type[np.uint16]] = {"uchar": np.uint8, "ushort": np.uint16}
_LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}


class UnreadableImageError(ValueError):
    """Takes only the message, so that it can be pickled."""


@dataclass(frozen=True)
class DecodedImage:
    """One upright picture at the bit depth of its file."""

    path: Path
    pixels: Pixels  # (H, W) grey or (H, W, 3) RGB, without the effect of alpha
    alpha: Pixels | None = None  # (H, W) of the same dtype, 0 for transparent
    metadata: Metadata = field(default_factory=Metadata)
    frames: int = 1  # in the file; this is the first


def to_model_range(unit: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]."""
    return unit * 2 - 1


def to_unit_range(model: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]."""
    return (model + 1) / 2


def pixels_to_unit(pixels: Pixels) -> Tensor:
    """(H, W) or (H, W, C), uint8 or uint16, to float32 (C, H, W) in [0, 1]."""
    _check_dtype(pixels.dtype)
    if pixels.ndim not in {2, 3}:
        raise ValueError(f"pixels of shape {pixels.shape}: expected (H, W) or (H, W, C)")
    unit = np.atleast_3d(pixels).transpose(2, 0, 1).astype(np.float32, order="C")
    unit /= np.iinfo(pixels.dtype).max
    return torch.from_numpy(unit)


def unit_to_pixels(image: Tensor, dtype: npt.DTypeLike = np.uint8) -> Pixels:
    """(1 or 3, H, W) in [0, 1] to (H, W[, 3]), clamped and rounded; ValueError for NaN."""
    if image.ndim != 3 or image.shape[0] not in {1, 3}:
        raise ValueError(f"an image of shape {tuple(image.shape)}: expected (1, H, W) or (3, H, W)")
    _check_dtype(np.dtype(dtype))
    # float64: at 65535 a float32 has too few bits left to round half up.
    unit = image.detach().cpu().to(torch.float64).clamp(0, 1)
    if bool(unit.isnan().any()):
        raise ValueError("an image that holds NaN cannot become pixels; find where the NaN was made")
    planes = (unit * int(np.iinfo(dtype).max) + 0.5).numpy().astype(dtype)  # (C, H, W), half rounded up
    return planes[0] if len(planes) == 1 else np.stack(list(planes), axis=-1)


def as_rgb8(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """(H, W) or (H, W, 3), uint8 or uint16, to (H, W, 3)."""
    if pixels.dtype == np.uint16:
        # 257 is odd, so no value lies half-way and adding 128 rounds exactly.
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels.astype(np.uint8, copy=False)


def _check_dtype(dtype: np.dtype[Any]) -> None:
    if dtype not in _DTYPES.values():
        raise ValueError(f"pixels of {dtype}: expected uint8 or uint16; unit_to_pixels converts floats")


def list_images(folder: str | Path, recursive: bool = True) -> list[Path]:
    """The images of a folder, sorted, but for hidden ones; ValueError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}; give the folder that holds the images")
    passed_over: Counter[str] = Counter()
    found = []
    refused: list[OSError] = []
    for path in _files_below(folder, recursive, refused):
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES and path.is_file():
            found.append(path)
        elif suffix in IMAGE_SUFFIXES or suffix in _REMEDIES:
            reason = _REMEDIES.get(suffix, "a link to nothing, or no ordinary file")
            passed_over[f"{suffix} ({reason})"] += 1
    passed_over.update(f"folder that may not be read ({error.filename})" for error in refused)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
    if kinds:
        logger.warning("%s: passed over: %s", folder, kinds)
    if not found:
        where = "or its subfolders" if recursive else "itself (subfolders were not searched)"
        wanted = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(
            f"{folder}: no image in this folder {where}; wanted {wanted}; passed over: {kinds or 'none'}"
        )
    return sorted(found)


def _files_below(folder: Path, recursive: bool, refused: list[OSError]) -> Iterator[Path]:
    """Each folder once, as links may lead in circles."""
    entered: set[str] = set()
    for name, folders, files in os.walk(folder, onerror=refused.append, followlinks=True):
        real = os.path.realpath(name)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        visible = [inner for inner in folders if not inner.startswith(".")] if recursive else []
        # a folder's own name before a link's
        folders[:] = sorted(visible, key=lambda inner: (os.path.islink(os.path.join(name, inner)), inner))
        yield from (Path(name, file) for file in files if not file.startswith("."))


def decode_image(path: str | Path, *, with_metadata: bool = True) -> DecodedImage:
    """The first frame of a file, upright; palettes and CMYK become RGB.

    UnreadableImageError: damaged, no image, camera raw, beyond MAX_PIXELS or the memory, not of 8 or 16 bits.
    """
    path = Path(path)
    with _opened(path) as (image, header):
        metadata = header.with_exif(path) if with_metadata else Metadata()
        if isinstance(image, ImageFile):
            mode = "L" if image.mode in {"1", "L", "LA"} else "RGB"
            mode += "A" if image.has_transparency_data else ""
            samples: Pixels = np.array(image.convert(mode)).reshape(image.height, image.width, len(mode))
            frames = getattr(image, "n_frames", 1)
        else:
            if not header.is_whole:
                raise UnreadableImageError("damaged or cut short (its end is missing)")
            samples = _decode_with_libvips(image, header)
            pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
            frames = int.from_bytes(header.chunks.get(b"acTL", b"")[8:12], "big") or pages
            if image.interpretation == "cmyk":
                metadata = replace(metadata, icc_profile=None)
        turned: npt.NDArray[Any] = samples.swapaxes(0, 1) if header.orientation >= 5 else samples
        down, right = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(header.orientation - 1) % 4]
        upright = turned[::down, ::right]  # (H, W, 1 to 4)
        bands = upright.shape[2]
        pixels = np.ascontiguousarray(upright[..., :3] if bands >= 3 else upright[..., 0])
        alpha = np.ascontiguousarray(upright[..., -1]) if bands in {2, 4} else None
    return DecodedImage(path, pixels, alpha, metadata, frames)


def read_rgb(path: str | Path) -> npt.NDArray[np.uint8]:
    """(H, W, 3): grey repeated, 16 bits rounded, alpha dropped; errors as decode_image."""
    return as_rgb8(decode_image(path, with_metadata=False).pixels)


def image_size(path: str | Path) -> tuple[int, int]:
    """Upright, without decoding; errors as decode_image."""
    with _opened(Path(path)) as (image, header):
        return (image.width, image.height) if header.orientation >= 5 else (image.height, image.width)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[pyvips.Image | ImageFile, Header]]:
    """Errors until the end name ``path`` and say why."""
    try:
        with path.open("rb") as file:
            yield _open(path, file)
    except (pyvips.Error, MemoryError, *DAMAGE_ERRORS) as error:
        text, suffix = " ".join(str(error).split()), path.suffix.lower()
        reason = f"damaged or cut short ({text})"
        if isinstance(error, UnreadableImageError):
            reason = text
        elif isinstance(error, OSError) and error.errno is not None:  # the system's: a decoder's have none
            reason = f"cannot be read ({error.strerror})"
        elif isinstance(error, MemoryError) or "out of memory" in text:
            reason = "does not fit in memory; cut it into pieces or close other programs"
        elif suffix in _REMEDIES:
            reason = f"{suffix[1:].upper()} that this libvips cannot decode; {_REMEDIES[suffix]}"
        elif "known format" in text:
            reason = "not an image of a kind that can be read, or its header is damaged"
        raise UnreadableImageError(f"{path}: {reason}") from error


def _open(path: Path, file: BinaryIO) -> tuple[pyvips.Image | ImageFile, Header]:
    start = file.read(16)
    file.seek(0)
    if not start:
        raise UnreadableImageError("the file is empty")
    # Pillow's plugins themselves, because Image.open has a limit of 89 megapixels for the whole process. The
    # two names of a container are HEIC's as often as AVIF's.
    container = start[8:12] in {b"mif1", b"msf1"}
    plugins = (Image.OPEN[name] for name in _DECODED_BY_PILLOW if not container)
    plugin = next((plugin for plugin, accept in plugins if accept and accept(start) is True), None)
    # libvips by descriptor: a name need not be UTF-8, and it would read options in its brackets. A descriptor
    # of its own, because it remembers where it is in the file.
    image: pyvips.Image | ImageFile
    if plugin:
        image = plugin(file, "")
    else:
        with path.open("rb") as other:
            source = pyvips.Source.new_from_descriptor(other.fileno())
        image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on="error")
    header = read_header(image, file)
    # in a camera's TIFF (reduced image, or a DNG version) the first picture is a preview
    is_preview = header.tiff.get(254, 0) & 1 or 50706 in header.tiff
    if is_preview or _REMEDIES.get(path.suffix.lower()) == _DEVELOP:
        raise UnreadableImageError(_DEVELOP)
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height} = {image.width * image.height} pixels"
        raise UnreadableImageError(f"{size}, more than {MAX_PIXELS}; cut it into pieces")
    if not isinstance(image, ImageFile) and image.format not in _DTYPES:
        raise UnreadableImageError(f"holds samples of type {image.format}; save it with 8 or 16 bits")
    return image, header


def _decode_with_libvips(image: pyvips.Image, header: Header) -> Pixels:
    """(H, W, 1 to 4): grey or RGB, then alpha."""
    if image.interpretation == "cmyk":
        depth = 16 if image.format == "ushort" else 8
        image = image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=depth)
    elif image.interpretation not in {"b-w", "grey16", "srgb", "rgb16"}:
        image = image.colourspace("srgb")
    samples: Pixels = np.empty((image.height, image.width, image.bands), _DTYPES[image.format])
    # A region decodes in this thread: libvips' own threads are gone after the fork of a data loader, and a
    # worker that asked for them would wait for ever. So do its loaders of WebP, GIF and AVIF, region or not.
    region = pyvips.Region.new(image)
    for top in range(0, image.height, 256):
        rows = samples[top : top + 256]
        fetched = region.fetch(0, top, image.width, len(rows))
        rows[:] = np.frombuffer(fetched, samples.dtype).reshape(rows.shape)
    colours = 3 if image.bands >= 3 else 1
    # the last condition: a TIFF's extra sample is not "unspecified"
    has_alpha = image.hasalpha() and image.bands > colours and header.tiff.get(338) not in {0, (0,)}
    return samples[..., : colours + has_alpha]


def check_format(
    path: str | Path,
    height: int,
    width: int,
    dtype: npt.DTypeLike = np.uint8,
    *,
    has_alpha: bool = False,
    metadata: Metadata | None = None,
) -> str:
    """Of the suffix; ValueError where it cannot hold such a picture."""
    path, metadata = Path(path), metadata or Metadata()
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        known = ", ".join(sorted(WRITABLE_SUFFIXES))
        raise ValueError(f"{path}: unknown suffix {path.suffix!r} for writing; use one of {known}")
    name = Image.registered_extensions()[path.suffix.lower()]
    size = height * width * (4 if has_alpha else 3) * np.dtype(dtype).itemsize
    side, largest = max(height, width), _LARGEST_SIDE.get(name, 2**31 - 1)
    kinds = ", ".join(kind.decode() for kind in metadata.colour)
    segment = max(len(metadata.exif or b""), len(metadata.xmp or b""))
    refusals = {
        f"{side} pixels a side, but {largest}": side > largest,
        f"{size} bytes, but up to 4 GB": name in {"TIFF", "BMP"} and size > 2**32 - 2**24,
        "16 bits": name not in {"PNG", "TIFF"} and np.dtype(dtype) == np.uint16,
        "alpha": name in {"JPEG", "BMP"} and has_alpha,
        "a profile": name == "BMP" and metadata.icc_profile,
        "EXIF": name == "BMP" and metadata.exif,
        f"the colour space that {kinds} state": name != "PNG" and kinds,
        "more than 65500 bytes of EXIF or XMP": name == "JPEG" and segment > 65500,
    }
    for what, refused in refusals.items():
        if refused:
            raise ValueError(f"{path}: {name} cannot hold {what}; write .png")
    return name


def write_image(
    path: str | Path,
    pixels: Pixels,
    alpha: Pixels | None = None,
    *,
    metadata: Metadata | None = None,
    quality: int = 95,
) -> None:
    """In the format of the suffix, replacing an older file in one step or not at all.

    Args:
        pixels: (H, W) grey or (H, W, 3) RGB; uint8, for PNG and TIFF also uint16.
        alpha: (H, W) of the same dtype, 0 for transparent.
        metadata: sizes in EXIF and XMP become those of the pixels.
        quality: 1 to 100, for JPEG (4:4:4) and WebP (lossless at 100).

    ValueError: what the format cannot hold, or a missing folder.
    """
    path, metadata = Path(path), metadata or Metadata()
    if not 1 <= quality <= 100:
        raise ValueError(f"quality {quality}: give a value from 1 to 100")
    samples = _joined_samples(pixels, alpha)
    height, width, _ = samples.shape
    has_alpha = alpha is not None
    name = check_format(path, height, width, pixels.dtype, has_alpha=has_alpha, metadata=metadata)
    if (metadata.text and name != "PNG") or (metadata.xmp and name == "BMP"):
        logger.warning("%s: %s cannot hold a PNG's texts, BMP no XMP either: left out", path, name)
    encoded = _encode(path, name, samples, metadata.resized(height, width, path), quality)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first")
    write_atomically(path, lambda stream: stream.write(encoded))


def _joined_samples(pixels: Pixels, alpha: Pixels | None) -> Pixels:
    """(H, W, 1 to 4)."""
    _check_dtype(pixels.dtype)
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(f"pixels of shape {pixels.shape}: expected (H, W) or (H, W, 3), alpha in alpha=")
    samples = np.ascontiguousarray(np.atleast_3d(pixels))
    if alpha is None:
        return samples
    if alpha.shape != pixels.shape[:2] or alpha.dtype != pixels.dtype:
        raise ValueError(
            f"alpha of shape {alpha.shape} and {alpha.dtype}: expected {pixels.shape[:2]} and {pixels.dtype}"
        )
    return np.concatenate([samples, alpha[..., None]], axis=-1)


def _encode(path: Path, name: str, samples: Pixels, metadata: Metadata, quality: int) -> bytes:
    buffer = io.BytesIO()
    try:
        if name == "TIFF" or samples.dtype == np.uint16:
            image = pyvips.Image.new_from_array(samples, interpretation="auto")
            if name == "TIFF":
                encoded = image.tiffsave_buffer(compression="deflate", predictor="horizontal", keep="none")
                return tiff_with_metadata(encoded, metadata)
            return png_with_metadata(image.pngsave_buffer(filter="all", keep="none"), metadata)
        options = {"quality": quality, "subsampling": 0, "lossless": quality == 100}
        options["exact"] = True  # WebP keeps colours under full transparency
        image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
        image.save(buffer, name, **options, **save_options(metadata))
        return buffer.getvalue()
    except (pyvips.Error, zlib.error, *DAMAGE_ERRORS) as error:
        raise ValueError(f"{path}: cannot be encoded as {name} ({error})") from error
