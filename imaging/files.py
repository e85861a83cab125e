"""Image files in and out, and the two range conversions.

Shapes: H height, W width, C channels. Ranges: uint8 [0, 255] or uint16 [0, 65535] in files, [0, 1] ("unit")
in metrics, [-1, 1] ("model range") inside the model.

libvips reads PNG, JPEG and TIFF, and writes TIFF and PNG of 16 bits; Pillow does the others.
"""

import io
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import pyvips
import torch
from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from imaging.atomic import write_atomically
from imaging.metadata import (
    DAMAGE_ERRORS,
    DESCRIPTIVE_TAGS,
    EXIF_DIRECTORY,
    GPS_DIRECTORY,
    Metadata,
    common_options,
    orientation_of,
    png_frames,
    png_is_whole,
    png_options,
    png_with_metadata,
    read_exif,
    read_metadata,
    read_orientation,
    read_pillow_exif,
    read_pillow_metadata,
)

logger = logging.getLogger(__name__)
logging.getLogger("pyvips").setLevel(logging.ERROR)  # it repeats what its errors say
pyvips.cache_set_max(0)  # a file that changes under the same name is read again

Pixels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

MAX_PIXELS = 2**30  # 3 GB of 8-bit RGB: more is taken for a decompression bomb

_FORMAT_OF_SUFFIX = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **{".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"},
}
WRITABLE_SUFFIXES = frozenset(_FORMAT_OF_SUFFIX)
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {".gif", ".avif"}

_LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383, "BMP": 2**31 - 1, "PNG": 2**31 - 1, "TIFF": 2**31 - 1}
_RAW_SUFFIXES = frozenset(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 "
    ".rwl .sr2 .srf .srw .x3f".split()
)
_HEIC_SUFFIXES = frozenset({".heic", ".heif", ".hif"})
_OTHER_SUFFIXES = frozenset(".exr .hdr .j2k .jp2 .jxl .pbm .pgm .pnm .ppm .psd .svg .tga".split())
_DEVELOP = "camera raw is not a picture yet: develop it first, into a TIFF or JPEG"
_CONVERT = "save it as PNG, JPEG or TIFF first"
_ROWS = 256  # decoded at a time
_NEW_SUBFILE_TYPE, _EXTRA_SAMPLES, _DNG_VERSION = 254, 338, 50706
_STRIP_OFFSETS, _STRIP_LENGTHS, _TILE_OFFSETS, _TILE_LENGTHS = 273, 279, 324, 325
_DTYPES: dict[str, type[np.uint8] | type[np.uint16]] = {"uchar": np.uint8, "ushort": np.uint16}
_LARGEST_FILE = 2**32 - 2**24  # offsets of 32 bits
_JPEG_SEGMENT = 65500


class UnreadableImageError(ValueError):
    """A file that cannot be read as an image; the message names the file and says why.

    It takes the message alone, so that data-loader workers can hand it to the process that waits for them.
    """


@dataclass(frozen=True)
class DecodedImage:
    """One picture as its file holds it, turned upright.

    Attributes:
        path: the file it came from.
        pixels: (H, W) grey or (H, W, 3) RGB, uint8 or uint16, without the effect of alpha.
        alpha: (H, W) of the same dtype (0 transparent), or None where the file has no transparency.
        metadata: what else the file says. The profile of CMYK is used up: its pixels are sRGB.
        frames: how many frames or pages the file has; ``pixels`` is the first.
    """

    path: Path
    pixels: Pixels
    alpha: Pixels | None = None
    metadata: Metadata = field(default_factory=Metadata)
    frames: int = 1


# ------------------------------------------------------------------------------------------- range conversion


def to_model_range(unit: Tensor) -> Tensor:
    """Convert values of any shape from [0, 1] to [-1, 1]."""
    return unit * 2 - 1


def to_unit_range(model: Tensor) -> Tensor:
    """Convert values of any shape from [-1, 1] to [0, 1]; the inverse of ``to_model_range``."""
    return (model + 1) / 2


def pixels_to_unit(pixels: Pixels) -> Tensor:
    """Convert (H, W) or (H, W, C) uint8 or uint16 pixels to a float32 tensor (C, H, W) in [0, 1].

    Raises:
        ValueError: for another dtype or shape.
    """
    _check_integer_pixels(pixels)
    if pixels.ndim not in {2, 3}:
        raise ValueError(f"pixels of shape {pixels.shape}: expected (H, W) or (H, W, C)")
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)  # (C, H, W)
    unit = planes.astype(np.float32, order="C")
    unit /= np.iinfo(pixels.dtype).max
    return torch.from_numpy(unit)


def unit_to_pixels(image: Tensor, dtype: npt.DTypeLike = np.uint8) -> Pixels:
    """Convert one image (C, H, W) from [0, 1] to pixels: (1, H, W) -> (H, W), (3, H, W) -> (H, W, 3).

    Values outside [0, 1] are clamped, then rounded half up to ``dtype``: uint8 (x 255) or uint16 (x 65535).

    Raises:
        ValueError: for another shape or dtype, or where a value is not a number.
    """
    if image.ndim != 3 or image.shape[0] not in {1, 3}:
        raise ValueError(f"an image of shape {tuple(image.shape)}: expected (1, H, W) or (3, H, W)")
    if np.dtype(dtype) not in {np.dtype(np.uint8), np.dtype(np.uint16)}:
        raise ValueError(f"pixels of {np.dtype(dtype)}: expected uint8 or uint16")
    # float64: at 65535 a float32 has too few bits left to round half up.
    unit = image.detach().cpu().to(torch.float64).clamp(0, 1)
    if bool(unit.isnan().any()):
        raise ValueError("an image that holds NaN cannot become pixels; find where the NaN was made")
    planes = (unit * int(np.iinfo(dtype).max) + 0.5).numpy().astype(dtype)  # (C, H, W); the cast floors
    return planes[0] if len(planes) == 1 else np.stack(list(planes), axis=-1)


# ---------------------------------------------------------------------------------------------------- reading


def list_images(folder: str | Path, recursive: bool = True) -> list[Path]:
    """List the image files of a folder (those with one of IMAGE_SUFFIXES in either case), sorted by path.

    With ``recursive`` its subfolders are searched too, linked ones as well, each once. Hidden files and
    folders (".name") are skipped. Pictures of a kind that cannot be read, links to nothing and folders that
    may not be entered are counted in one warning.

    Raises:
        ValueError: where the folder is missing, is not a folder, or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; give the path of a folder of images")
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; give the folder that holds the images")
    passed_over: Counter[str] = Counter()
    found = []
    for path in _files_below(folder, recursive, passed_over):
        suffix = path.suffix.lower()
        if suffix in _RAW_SUFFIXES:
            passed_over[f"{suffix} ({_DEVELOP})"] += 1
        elif suffix in _HEIC_SUFFIXES | _OTHER_SUFFIXES:
            passed_over[f"{suffix} ({_CONVERT})"] += 1
        elif suffix in IMAGE_SUFFIXES and path.is_file():
            found.append(path)
        elif suffix in IMAGE_SUFFIXES:
            passed_over[f"{suffix} that is a link to nothing or no ordinary file"] += 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items()))
    if kinds:
        logger.warning("%s: passed over: %s", folder, kinds)
    if not found:
        where = "or its subfolders" if recursive else "itself (subfolders were not searched)"
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(
            f"{folder}: no image in this folder {where}; looked for files named {suffixes}"
            + (f"; passed over: {kinds}" if kinds else "")
        )
    return sorted(found)


def _files_below(folder: Path, recursive: bool, passed_over: Counter[str]) -> Iterator[Path]:
    """Every file that is not hidden; each folder once, so that links cannot lead in circles."""
    entered: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        passed_over[f"folder that may not be read ({error.filename})"] += 1

    for name, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(name)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        visible = [inner for inner in folders if not inner.startswith(".")] if recursive else []
        # a folder's own name before a link's
        folders[:] = sorted(visible, key=lambda inner: (os.path.islink(os.path.join(name, inner)), inner))
        yield from (Path(name, file) for file in files if not file.startswith("."))


def decode_image(path: str | Path) -> DecodedImage:
    """Read one file of a kind in IMAGE_SUFFIXES, or HEIC where libvips can, upright and at its own bit depth.

    Grey stays grey; palettes become RGB; CMYK becomes sRGB through its profile; one bit becomes 0 and 255;
    premultiplied alpha is divided out. Of an animation or a multi-page file the first frame is read.

    Raises:
        UnreadableImageError: where the file is missing, may not be read, is empty, damaged, cut short or not
            an image, is camera raw, has more than MAX_PIXELS, does not fit in memory, or holds samples that
            are not 8- or 16-bit integers.
    """
    return _decode(Path(path), with_metadata=True)


def _decode(path: Path, *, with_metadata: bool) -> DecodedImage:
    with _naming(path), path.open("rb") as file:
        plugin = _pillow_plugin(path, file)
        if plugin is not None:
            return _decode_with_pillow(path, plugin(file), with_metadata=with_metadata)
        image = _open(path)
        exif = read_exif(image, file)
        _check_readable(image, exif)
        _check_whole(image, exif, file)
        frames = _count_frames(image, file)
        metadata = read_metadata(image, file, exif) if with_metadata else Metadata()
        if image.interpretation == "cmyk":
            metadata = replace(metadata, icc_profile=None)
        samples = _upright(_read_samples(_as_grey_or_rgb(image)), read_orientation(image, exif))
    colours = 3 if samples.shape[-1] >= 3 else 1
    extra = exif.get(_EXTRA_SAMPLES) if exif else None  # 0: not alpha
    has_alpha = image.hasalpha() and samples.shape[-1] > colours and extra not in {0, (0,)}
    return _split(path, samples, colours + has_alpha, metadata, frames)


def _decode_with_pillow(path: Path, image: ImageFile, *, with_metadata: bool) -> DecodedImage:
    """Decode what libvips does not read, or reads with threads of its own (see _read_samples)."""
    _check_pixel_count(image.width, image.height)
    exif = read_pillow_exif(image)
    metadata = read_pillow_metadata(image, exif, path) if with_metadata else Metadata()
    orientation = orientation_of(exif, image.info.get("xmp"))
    mode = ("L" if image.mode in {"1", "L", "LA"} else "RGB") + ("A" if image.has_transparency_data else "")
    samples = np.array(image.convert(mode), np.uint8).reshape(image.height, image.width, len(mode))
    frames = getattr(image, "n_frames", 1)
    return _split(path, _upright(samples, orientation), len(mode), metadata, frames)


def _split(path: Path, samples: Pixels, used: int, metadata: Metadata, frames: int) -> DecodedImage:
    """Part the first `used` bands of (H, W, bands) into colour and alpha."""
    pixels = _contiguous(samples[..., :3] if used >= 3 else samples[..., 0])
    alpha = _contiguous(samples[..., used - 1]) if used in {2, 4} else None
    return DecodedImage(path, pixels, alpha, metadata, frames)


def read_rgb(path: str | Path) -> npt.NDArray[np.uint8]:
    """Read an image file as (H, W, 3) uint8 RGB, upright.

    Grey is repeated, 16 bits are rounded to the nearest of 8 (x / 257, exact at both ends), and alpha is
    dropped, not composited: the colours come back as the file stores them.

    Raises:
        UnreadableImageError: as ``decode_image``.
    """
    return as_rgb8(_decode(Path(path), with_metadata=False).pixels)


def as_rgb8(pixels: Pixels) -> npt.NDArray[np.uint8]:
    """(H, W) or (H, W, 3) uint8 or uint16 as (H, W, 3) uint8, rounded to the nearest."""
    if pixels.dtype == np.uint16:
        # 257 is odd, so no value lies half-way and adding 128 rounds exactly.
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels.astype(np.uint8, copy=False)


def image_size(path: str | Path) -> tuple[int, int]:
    """Read (height, width) of the upright image from a file's header, without decoding its pixels.

    Raises:
        UnreadableImageError: where the file is missing, may not be read, has no valid header, or says there
            what ``decode_image`` refuses. Damage behind the header goes unnoticed.
    """
    path = Path(path)
    with _naming(path), path.open("rb") as file:
        plugin = _pillow_plugin(path, file)
        if plugin is not None:
            image = plugin(file)
            _check_pixel_count(image.width, image.height)
            orientation = orientation_of(read_pillow_exif(image), image.info.get("xmp"))
        else:
            image = _open(path)
            exif = read_exif(image, file)
            _check_readable(image, exif)
            orientation = read_orientation(image, exif)
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into an UnreadableImageError that names ``path``."""
    try:
        yield
    except UnreadableImageError as error:
        raise UnreadableImageError(f"{path}: {error}") from error
    except (pyvips.Error, MemoryError, *DAMAGE_ERRORS) as error:
        raise UnreadableImageError(f"{path}: {_reason(path, error)}") from error


def _reason(path: Path, error: BaseException) -> str:
    """Why a file cannot be read, in one line."""
    text = " ".join(str(error).split())
    # Only the operating system's errors have a number; a decoder's speak of the file's content.
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, MemoryError) or "out of memory" in text:
        return "does not fit in memory; cut it into pieces or close other programs"
    if path.suffix.lower() in _HEIC_SUFFIXES:
        return f"HEIC that this installation of libvips cannot decode; {_CONVERT}"
    if "known format" in text:
        return "not an image of a kind that can be read, or its header is damaged"
    return f"damaged or cut short ({text})"


def _pillow_plugin(path: Path, file: BinaryIO) -> type[ImageFile] | None:
    """What of Pillow reads a file, None where libvips does; refuses empty files and camera raw.

    The plugins themselves, because Image.open has a limit of 89 megapixels for the whole process.
    """
    if path.suffix.lower() in _RAW_SUFFIXES:
        raise UnreadableImageError(_DEVELOP)
    start = file.read(12)
    file.seek(0)
    if not start:
        raise UnreadableImageError("the file is empty")
    if start[4:] in {b"ftypavif", b"ftypavis"}:
        return AvifImageFile
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return WebPImageFile
    return GifImageFile if start[:4] == b"GIF8" else BmpImageFile if start[:2] == b"BM" else None


def _open(path: Path) -> pyvips.Image:
    """Read the header; the pixels are decoded from top to bottom as they are asked for."""
    # By descriptor: a name need not be UTF-8, and libvips would read options in its brackets. A descriptor of
    # its own, because it remembers where it is in the file.
    with path.open("rb") as file:
        source = pyvips.Source.new_from_descriptor(file.fileno())
    image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on="error")
    if image.get("vips-loader").startswith("svg"):
        raise UnreadableImageError("a drawing, not an image of a kind that can be read")
    return image


def _check_readable(image: pyvips.Image, exif: Image.Exif | None) -> None:
    """Refuse what is no picture yet, too large or too deep."""
    # in a camera's TIFF the first picture is a preview
    is_tiff = image.get("vips-loader").startswith("tiff")
    if is_tiff and exif and (exif.get(_NEW_SUBFILE_TYPE, 0) & 1 or _DNG_VERSION in exif):
        raise UnreadableImageError(_DEVELOP)
    _check_pixel_count(image.width, image.height)
    if image.format not in _DTYPES:
        raise UnreadableImageError(f"holds samples of type {image.format}; save it with 8 or 16 bits")


def _check_pixel_count(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            f"{width} x {height} = {width * height} pixels, more than {MAX_PIXELS}; cut it into pieces"
        )


def _check_whole(image: pyvips.Image, exif: Image.Exif | None, file: BinaryIO) -> None:
    """Refuse a file without its last bytes, which decoding may not need."""
    loader = image.get("vips-loader")
    length = file.seek(0, os.SEEK_END)
    whole = not loader.startswith("png") or png_is_whole(file)
    if loader.startswith("tiff") and exif:
        for tags in ((_STRIP_OFFSETS, _STRIP_LENGTHS), (_TILE_OFFSETS, _TILE_LENGTHS)):
            offsets, lengths = (np.atleast_1d(exif.get(tag, ())) for tag in tags)
            if offsets.shape == lengths.shape:  # a directory may leave out the lengths
                whole = whole and bool((offsets + lengths <= length).all())
    if not whole:
        raise UnreadableImageError("damaged or cut short (its end is missing)")


def _count_frames(image: pyvips.Image, file: BinaryIO) -> int:
    """Pages of a TIFF, frames of an animated PNG."""
    if image.get("vips-loader").startswith("png"):
        return png_frames(file)
    return int(image.get("n-pages")) if image.get_typeof("n-pages") else 1


def _as_grey_or_rgb(image: pyvips.Image) -> pyvips.Image:
    """The image in its own grey or RGB; other colour spaces become sRGB."""
    if image.interpretation == "cmyk":
        depth = 16 if image.format == "ushort" else 8
        return image.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=depth)
    return image if image.interpretation in {"b-w", "grey16", "srgb", "rgb16"} else image.colourspace("srgb")


def _read_samples(image: pyvips.Image) -> Pixels:
    """Decode (H, W, bands)."""
    dtype = _DTYPES[image.format]
    samples: Pixels = np.empty((image.height, image.width, image.bands), dtype)
    # A region decodes in this thread: libvips' own threads are gone after the fork of a data loader, and a
    # worker that asked for them would wait for ever. So do its loaders of WebP, GIF and AVIF, region or not.
    region = pyvips.Region.new(image)
    for top in range(0, image.height, _ROWS):
        rows = samples[top : top + _ROWS]
        fetched = region.fetch(0, top, image.width, len(rows))
        rows[:] = np.frombuffer(fetched, dtype).reshape(rows.shape)
    return samples


def _contiguous(samples: Pixels) -> Pixels:
    """The same, copied only where it is a part of something larger."""
    return samples if samples.flags.c_contiguous else samples.copy()


def _upright(samples: Pixels, orientation: int) -> Pixels:
    """Turn (H, W, bands) by EXIF's orientation: 5 to 8 are 1 to 4 of the transposed."""
    turned = samples.swapaxes(0, 1) if orientation >= 5 else samples
    flips = {1: (), 2: (1,), 3: (0, 1), 4: (0,), 5: (), 6: (1,), 7: (0, 1), 8: (0,)}[orientation]
    flipped: Pixels = np.flip(turned, flips)
    return flipped


# ---------------------------------------------------------------------------------------------------- writing


def check_format(
    path: str | Path,
    height: int,
    width: int,
    dtype: npt.DTypeLike = np.uint8,
    *,
    has_alpha: bool = False,
    metadata: Metadata | None = None,
) -> str:
    """Refuse before any work what the format of this suffix cannot hold; returns the format's name.

    Raises:
        ValueError: an unknown suffix, or a picture that is too large, too deep, transparent or described in a
            way that the format has no place for.
    """
    path, metadata = Path(path), metadata or Metadata()
    name = _FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if name is None:
        known = ", ".join(sorted(WRITABLE_SUFFIXES))
        raise ValueError(f"{path}: unknown suffix {path.suffix!r} for writing; use one of {known}")
    size = height * width * (4 if has_alpha else 3) * np.dtype(dtype).itemsize
    side = max(height, width)
    if side > _LARGEST_SIDE[name]:
        raise ValueError(
            f"{path}: {name} holds up to {_LARGEST_SIDE[name]} pixels a side, not {side}; write .png"
        )
    if name in {"TIFF", "BMP"} and size > _LARGEST_FILE:
        raise ValueError(f"{path}: {name} holds up to 4 GB, not {size} bytes; write .png")
    if np.dtype(dtype) == np.uint16 and name not in {"PNG", "TIFF"}:
        raise ValueError(f"{path}: {name} cannot hold 16 bits; write .png or .tiff")
    if has_alpha and name in {"JPEG", "BMP"}:
        raise ValueError(f"{path}: {name} cannot hold alpha; write .png, .tiff or .webp")
    if name == "BMP" and (metadata.icc_profile or metadata.exif):
        raise ValueError(f"{path}: BMP cannot hold a profile or EXIF; write .png or .tiff")
    if metadata.colour and name != "PNG":
        kinds = ", ".join(kind.decode() for kind in metadata.colour)
        raise ValueError(f"{path}: {name} cannot hold the colour space that {kinds} state; write .png")
    if name == "JPEG" and max(len(metadata.exif or b""), len(metadata.xmp or b"")) > _JPEG_SEGMENT:
        raise ValueError(f"{path}: JPEG holds up to {_JPEG_SEGMENT} bytes of EXIF or XMP; write .png")
    return name


def write_image(
    path: str | Path,
    pixels: Pixels,
    alpha: Pixels | None = None,
    *,
    metadata: Metadata | None = None,
    quality: int = 95,
) -> None:
    """Write an image file, replacing an older one in a single step; a failure leaves the older one as it was.

    Args:
        path: its suffix picks the format. PNG and TIFF (lossless) hold uint8 and uint16, alpha and metadata;
            WebP holds uint8, alpha and metadata (the resolution in EXIF alone); JPEG holds uint8 and
            metadata; BMP uint8 pixels alone.
        pixels: (H, W) grey or (H, W, 3) RGB, uint8 or uint16.
        alpha: (H, W) of the same dtype, 0 for transparent.
        metadata: as ``decode_image`` gives it. The sizes in EXIF and XMP become those of the pixels. What
            the format has no place for is an error where it says how the pixels look, else a warning.
        quality: 1 to 100, for JPEG (at full chroma resolution) and WebP, which is lossless at 100.

    Raises:
        ValueError: for wrong shapes or dtypes, a missing folder, what ``check_format`` refuses, or what an
            encoder refuses.
        OSError: where the disk is full or the folder may not be written.
    """
    path, metadata = Path(path), metadata or Metadata()
    if not 1 <= quality <= 100:
        raise ValueError(f"quality {quality}: give a value from 1 to 100")
    samples = _joined_samples(pixels, alpha)
    height, width = samples.shape[:2]
    has_alpha = alpha is not None
    name = check_format(path, height, width, samples.dtype, has_alpha=has_alpha, metadata=metadata)
    _warn_of_losses(path, name, metadata)
    encoded = _encode(path, name, samples, metadata.resized(height, width, path), quality)
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first")
    write_atomically(path, lambda temporary: temporary.write_bytes(encoded))


def _encode(path: Path, name: str, samples: Pixels, metadata: Metadata, quality: int) -> bytes:
    """Encode (H, W, 1 to 4) in the format of this name; ValueError where its encoder fails."""
    try:
        if name == "TIFF":
            return _encode_tiff(samples, metadata)
        if samples.dtype == np.uint16:
            return png_with_metadata(_as_vips(samples).pngsave_buffer(filter="all", keep="none"), metadata)
        return _encode_with_pillow(samples, name, metadata, quality)
    except (pyvips.Error, zlib.error, *DAMAGE_ERRORS) as error:
        raise ValueError(f"{path}: cannot be encoded as {name} ({error})") from error


def _check_integer_pixels(pixels: Pixels) -> None:
    """Refuse everything but uint8 and uint16."""
    if pixels.dtype not in {np.dtype(np.uint8), np.dtype(np.uint16)}:
        raise ValueError(
            f"pixels of {pixels.dtype}: expected uint8 or uint16 (unit_to_pixels converts floats)"
        )


def _joined_samples(pixels: Pixels, alpha: Pixels | None) -> Pixels:
    """Check the arrays that are to be written and join them to (H, W, 1 to 4), alpha last."""
    _check_integer_pixels(pixels)
    if pixels.size == 0 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(
            f"pixels of shape {pixels.shape}: expected (H, W) or (H, W, 3); alpha goes in alpha="
        )
    samples = _contiguous(pixels).reshape(*pixels.shape[:2], -1)
    if alpha is None:
        return samples
    if alpha.shape != pixels.shape[:2] or alpha.dtype != pixels.dtype:
        raise ValueError(
            f"alpha of shape {alpha.shape} and {alpha.dtype}: expected {pixels.shape[:2]} and {pixels.dtype}"
        )
    joined: Pixels = np.concatenate([samples, alpha[..., None]], axis=-1)
    return joined


def _warn_of_losses(path: Path, name: str, metadata: Metadata) -> None:
    """Say which descriptions the format has no place for."""
    if metadata.text and name != "PNG":
        logger.warning("%s: %s cannot hold a PNG's texts: left out", path, name)
    if metadata.xmp and name == "BMP":
        logger.warning("%s: BMP cannot hold XMP: left out", path)


def _encode_with_pillow(samples: Pixels, name: str, metadata: Metadata, quality: int) -> bytes:
    """Encode uint8 samples (H, W, 1 to 4) as PNG, JPEG, BMP or WebP."""
    options = png_options(metadata) if name == "PNG" else common_options(metadata)
    if name in {"JPEG", "WEBP"} and metadata.xmp:
        options["xmp"] = metadata.xmp
    if name == "JPEG":
        options |= {"quality": quality, "subsampling": 0}
    if name == "WEBP":
        # exact: colours under full transparency are kept as well
        options |= {"quality": quality, "lossless": quality == 100, "exact": True}
    buffer = io.BytesIO()
    image = Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples)
    image.save(buffer, name, **options)
    return buffer.getvalue()


def _as_vips(samples: Pixels) -> pyvips.Image:
    """(H, W, 1 to 4) without copying them."""
    height, width, bands = samples.shape
    format_name = "uchar" if samples.dtype == np.uint8 else "ushort"
    spaces = {"uchar": ("b-w", "srgb"), "ushort": ("grey16", "rgb16")}[format_name]
    image = pyvips.Image.new_from_memory(samples.data, width, height, bands, format_name)
    return image.copy(interpretation=spaces[bands >= 3])


def _encode_tiff(samples: Pixels, metadata: Metadata) -> bytes:
    """Encode uint8 or uint16 samples (H, W, 1 to 4) as TIFF, with Deflate.

    libvips writes no EXIF into a TIFF: Pillow writes its directory again, in front of the same strips.
    """
    encoded: bytes = _as_vips(samples).tiffsave_buffer(
        compression="deflate", predictor="horizontal", keep="none"
    )
    stream = io.BytesIO(encoded)
    directory = ImageFileDirectory_v2(encoded[:8])
    stream.seek(directory.next)
    directory.load(stream)
    directory.update(dict(directory))  # what is not parsed would not be written
    for tag in (282, 283, 296):  # a resolution that nobody knows
        del directory[tag]
    if metadata.exif:
        description = Image.Exif()
        description.load(metadata.exif)
        for tag in DESCRIPTIVE_TAGS & set(description):
            inner = tag in {EXIF_DIRECTORY, GPS_DIRECTORY}
            directory[tag] = description.get_ifd(tag) if inner else description[tag]
    if metadata.dpi:
        directory[282], directory[283], directory[296] = *metadata.dpi, 2
    if metadata.xmp:
        directory[700] = metadata.xmp
    if metadata.icc_profile:
        directory[34675] = metadata.icc_profile
    end_of_strips = directory[_STRIP_OFFSETS][-1] + directory[_STRIP_LENGTHS][-1]
    # counted from the directory's end, which save() adds
    directory[_STRIP_OFFSETS] = tuple(offset - 8 for offset in directory[_STRIP_OFFSETS])
    buffer = io.BytesIO()
    directory.save(buffer)
    return buffer.getvalue() + encoded[8:end_of_strips]
