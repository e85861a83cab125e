"""Reads and writes image files by libvips; Pillow decodes BMP, GIF and WebP."""

import itertools
import logging
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyvips
from PIL import Image
from PIL.ImageFile import ImageFile
from tqdm.contrib.concurrent import thread_map

from imaging.atomic import write_atomically
from imaging.kinds import DEVELOP, WRITABLE_SUFFIXES, kind_of, refusal
from imaging.metadata import DAMAGE_ERRORS, Metadata, read_metadata
from imaging.pixels import Pixels, as_rgb8, spread_colours

logger = logging.getLogger(__name__)
logging.getLogger("pyvips").setLevel(logging.ERROR)  # it repeats what its errors say
pyvips.cache_set_max(0)  # a file that changes under the same name is read again
Image.init()  # all of Pillow's formats

MAX_PIXELS = 2**30  # 3 GB of 8-bit RGB: more is taken for a decompression bomb
MANY = 2000  # from this many files on, reading their headers shows its progress
THREADS = 16  # reading headers mostly waits, most of all on a network drive

_DTYPES: dict[str, type[np.uint8] | type[np.uint16]] = {"uchar": np.uint8, "ushort": np.uint16}
_LARGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}
_SAVING: dict[str, dict[str, Any]] = {
    "PNG": {"filter": "all"},
    "JPEG": {"Q": 95, "subsample_mode": "off"},
    "TIFF": {"compression": "deflate", "predictor": "horizontal", "resunit": "inch"},
    "WEBP": {"Q": 95, "exact": True},  # colours under full transparency are kept
}
_SUBFILE_TYPE, _PHOTOMETRIC, _EXTRA_SAMPLES, _DNG_VERSION = 254, 262, 338, 50706  # of a TIFF
_LAB, _ALPHA = (8, 9, 10), (1, 2)  # values of two of these
# Chunks of a PNG are found with their lengths, since a text may name them, too.
# What says sRGB in a PNG: gamma 1 / 2.2, and the primaries and white of ITU-R BT.709, all x 100000.
_SRGB = {
    b"\0\0\0\x04gAMA": struct.pack(">I", 45455),
    b"\0\0\0\x20cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
}
# Primaries and transfer by the numbers of ITU-T H.273, in a PNG or an AVIF. Like sRGB are BT.709 or
# unspecified primaries, with transfers like its own.
_CICP = re.compile(rb"(?:\0\0\0\x04cICP|colrnclx\0)(.)\0?(.)", re.DOTALL)
_CICP_LIKE_SRGB = set(itertools.product((1, 2), (1, 2, 6, 13, 14, 15)))
_HDR_TRANSFERS = {16, 18}


class UnreadableImageError(ValueError):
    """Takes only the message, so that it can be pickled."""


@dataclass(frozen=True)
class DecodedImage:
    """Holds one upright picture at the bit depth of its file."""

    pixels: Pixels  # (H, W) grey or (H, W, 3) RGB, without the effect of alpha
    alpha: Pixels | None = None  # (H, W) of the same dtype, 0 for transparent
    metadata: Metadata = field(default_factory=Metadata)
    frames: int = 1  # in the file; this is the first

    @property
    def visible(self) -> Pixels:
        """Replace hidden colours, under full transparency, by the nearest that are seen."""
        return self.pixels if self.alpha is None else spread_colours(self.pixels, self.alpha)


@dataclass(frozen=True)
class _Header:
    """Holds what a file says before its pixels are decoded."""

    kind: str
    image: pyvips.Image  # its size and fields; the pixels may be missing
    tiff: Image.Exif | None  # the directory of a TIFF
    start: bytes  # of a PNG up to its pixels, or of an AVIF

    def number(self, field: str) -> int:
        """Return a field of libvips, or 1 where there is none."""
        return int(self.image.get(field)) if self.image.get_typeof(field) else 1

    @property
    def orientation(self) -> int:
        """Return the orientation from 1 to 8; libvips has turned an AVIF already."""
        return 1 if self.kind == "AVIF" else self.number("orientation")

    @property
    def size(self) -> tuple[int, int]:
        """Return the upright height and width."""
        size = self.image.height, self.image.width
        return size[::-1] if self.orientation >= 5 else size

    @property
    def frames(self) -> int:
        return int.from_bytes(self.start.partition(b"\0\0\0\x08acTL")[2][:4], "big") or self.number("n-pages")

    @property
    def cicp(self) -> tuple[int, int]:
        """Return primaries and transfer, 2 for what is not stated."""
        stated = _CICP.search(self.start)
        return (stated[1][0], stated[2][0]) if stated else (2, 2)

    def alpha_band(self, extras: int) -> int | None:
        """Return which of the bands beyond the colours is alpha."""
        kinds = [1] * min(extras, 1)  # in a TIFF that does not say it, too: OpenCV writes alpha so
        if self.tiff is not None and (extras > 1 or _EXTRA_SAMPLES in self.tiff):
            kinds = [int(kind) for kind in np.atleast_1d(self.tiff.get(_EXTRA_SAMPLES, 0))][:extras]
        return next((number for number, kind in enumerate(kinds) if kind in _ALPHA), None)

    def other_colour_space(self) -> list[str]:
        """List what the file says of a colour space other than sRGB, without a profile."""
        if self.cicp not in _CICP_LIKE_SRGB:
            return ["the colour space with primaries {} and transfer {}".format(*self.cicp)]
        if _CICP.search(self.start) or b"\0\0\0\x01sRGB" in self.start or b"iCCP" in self.start:
            return []
        stated = {kind: self.start.partition(kind)[2][: len(value)] for kind, value in _SRGB.items()}
        others = [kind for kind, value in stated.items() if value not in (b"", _SRGB[kind])]
        return [f"the colour space that {kind[4:].decode()} states" for kind in others]


def decode_image(path: str | Path, *, with_metadata: bool = True) -> DecodedImage:
    """Decode the first frame of a file, upright; palettes and CMYK become RGB.

    UnreadableImageError: damaged, no image, camera raw, HDR, beyond MAX_PIXELS or the memory, or not of 8 or
    16 bits. With metadata, a warning says what of a file is left out.
    """
    path, metadata = Path(path), Metadata()
    with _opened(path) as (header, file):
        samples, has_alpha, lost = _decode(header, file)
        if with_metadata:
            metadata, damaged = read_metadata(header.image, header.tiff)
            lost += damaged + header.other_colour_space()
        if with_metadata and lost:
            logger.warning("%s: left out: %s", path, ", ".join(lost))
        turned: npt.NDArray[Any] = samples.swapaxes(0, 1) if header.orientation >= 5 else samples
        down, right = ((1, 1), (1, -1), (-1, -1), (-1, 1))[(header.orientation - 1) % 4]
        upright = turned[::down, ::right]  # (H, W, 1 to 4)
        colours = upright[..., :3] if upright.shape[2] >= 3 else upright[..., 0]
        alpha = np.ascontiguousarray(upright[..., -1]) if has_alpha else None
        return DecodedImage(np.ascontiguousarray(colours), alpha, metadata, header.frames)


def read_rgb(path: str | Path) -> npt.NDArray[np.uint8]:
    """(H, W, 3), as restoring sees it: grey repeated, 16 bits rounded, hidden colours replaced."""
    return as_rgb8(decode_image(path, with_metadata=False).visible)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the upright picture, without decoding; errors as decode_image."""
    with _opened(Path(path)) as (header, _):
        return header.size


def image_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | UnreadableImageError]:
    """Read the size of each of many files, or why it has none."""

    def read(path: Path) -> tuple[int, int] | UnreadableImageError:
        try:
            return image_size(path)
        except UnreadableImageError as error:
            return error

    return thread_map(read, paths, max_workers=THREADS, desc="image sizes", disable=len(paths) < MANY)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[_Header, BinaryIO]]:
    """Open a file; errors until the end name ``path`` and say why."""
    kind: str | None = None
    try:
        with path.open("rb") as file:
            kind = kind_of(path)
            if reason := refusal(kind, path.suffix.lower()):
                raise UnreadableImageError(reason)
            yield _read_header(path, file, str(kind)), file
    except (pyvips.Error, MemoryError, *DAMAGE_ERRORS) as error:
        text = " ".join(str(error).split())
        reason = f"{kind} that is damaged or cut short ({text})"
        if isinstance(error, UnreadableImageError):
            reason = text
        elif isinstance(error, OSError) and error.errno is not None:  # the system's: a decoder's have none
            reason = f"cannot be read ({error.strerror})"
        elif isinstance(error, MemoryError) or "out of memory" in text:
            reason = "does not fit in memory; cut it into pieces or close other programs"
        raise UnreadableImageError(f"{path}: {reason}") from error


def _read_header(path: Path, file: BinaryIO, kind: str) -> _Header:
    tiff = _read_tiff(file) if kind == "TIFF" else None
    start = file.read(2**16).partition(b"IDAT")[0] if kind in ("PNG", "AVIF") else b""
    if kind == "BMP":
        picture = _open_with_pillow(kind, file)
        dpi = picture.info.get("dpi", (25.4, 25.4))  # libvips, too, takes 1 pixel per mm for unknown
        image = pyvips.Image.black(*picture.size).copy(xres=dpi[0] / 25.4, yres=dpi[1] / 25.4)
    else:
        # By descriptor: a name need not be UTF-8, and libvips would read options in its brackets. By one of
        # its own, because it remembers where it is in the file.
        with path.open("rb") as other:
            source = pyvips.Source.new_from_descriptor(other.fileno())
        image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on="error")
    header = _Header(kind, image, tiff, start)
    height, width = header.size
    if height * width > MAX_PIXELS:
        size = f"{width} x {height} = {height * width} pixels"
        raise UnreadableImageError(f"{size}, more than {MAX_PIXELS}; cut it into pieces")
    if image.format not in _DTYPES:
        raise UnreadableImageError(f"holds samples of type {image.format}; save it with 8 or 16 bits")
    if header.cicp[1] in _HDR_TRANSFERS:
        raise UnreadableImageError("is HDR (PQ or HLG); save it with the ordinary range (sRGB)")
    return header


def _read_tiff(file: BinaryIO) -> Image.Exif:
    """Read the directory of a TIFF; UnreadableImageError for camera raw and LAB."""
    tiff = Image.Exif()
    file.seek(0)
    with suppress(*DAMAGE_ERRORS):
        tiff.load_from_fp(file)
    # in a camera's TIFF (reduced image, or a DNG version) the first picture is a preview
    if tiff.get(_SUBFILE_TYPE, 0) & 1 or _DNG_VERSION in tiff:
        raise UnreadableImageError(DEVELOP)
    if tiff.get(_PHOTOMETRIC) in _LAB:
        raise UnreadableImageError("holds LAB colours; save it as RGB")
    return tiff


def _open_with_pillow(kind: str, file: BinaryIO) -> ImageFile:
    file.seek(0)
    return Image.OPEN[kind][0](file, "")  # Image.open has a limit of 89 megapixels for the whole process


def _decode(header: _Header, file: BinaryIO) -> tuple[Pixels, bool, list[str]]:
    """(H, W, 1 to 4) as stored: grey or RGB, then alpha if there is one; and what was left out."""
    if header.kind in ("BMP", "GIF", "WEBP"):
        # libvips has no BMP, makes every animation transparent, and decodes WebP in threads, which are gone
        # after the fork of a data loader: it would wait for ever
        picture = _open_with_pillow(header.kind, file)
        has_alpha = picture.has_transparency_data
        mode = ("L" if picture.mode in {"1", "L"} else "RGB") + ("A" if has_alpha else "")
        samples = np.array(picture.convert(mode)).reshape(picture.height, picture.width, len(mode))
        return samples, has_alpha, []
    image = header.image
    colours = {"b-w": 1, "grey16": 1, "cmyk": 4}.get(image.interpretation, 3)
    extras = image.bands - colours
    alpha, joined = header.alpha_band(extras), image.extract_band(0, n=colours)
    if image.interpretation == "cmyk":
        depth = 16 if image.format == "ushort" else 8
        joined = joined.icc_transform("srgb", embedded=True, input_profile="cmyk", depth=depth)
    elif image.interpretation not in {"b-w", "grey16", "srgb", "rgb16"}:
        joined = joined.colourspace("srgb")
    if alpha is not None:
        joined = joined.bandjoin(image.extract_band(colours + alpha))
    left = extras - (alpha is not None)
    return _fetch(joined), alpha is not None, [f"{left} bands beyond colour and alpha"] if left else []


def _fetch(image: pyvips.Image) -> Pixels:
    samples: Pixels = np.empty((image.height, image.width, image.bands), _DTYPES[image.format])
    # A region decodes in this thread: libvips' own threads are gone after the fork of a data loader, and a
    # worker that asked for them would wait for ever.
    region = pyvips.Region.new(image)
    for top in range(0, image.height, 256):
        rows = samples[top : top + 256]
        fetched = region.fetch(0, top, image.width, len(rows))
        rows[:] = np.frombuffer(fetched, samples.dtype).reshape(rows.shape)
    return samples


def check_format(
    path: str | Path, height: int, width: int, dtype: npt.DTypeLike = np.uint8, *, has_alpha: bool = False
) -> str:
    """Name the format of the suffix, such as "JPEG"; ValueError where it cannot hold such a picture."""
    path = Path(path)
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        known = ", ".join(sorted(WRITABLE_SUFFIXES))
        raise ValueError(f"{path}: unknown suffix {path.suffix!r} for writing; use one of {known}")
    name = Image.registered_extensions()[path.suffix.lower()]
    size = height * width * (4 if has_alpha else 3) * np.dtype(dtype).itemsize
    side, largest = max(height, width), _LARGEST_SIDE.get(name, 2**31 - 1)
    refusals = {
        f"{side} pixels a side, but {largest}": side > largest,
        f"{size} bytes, but up to 4 GB": name == "TIFF" and size > 2**32 - 2**24,
        "16 bits": name not in {"PNG", "TIFF"} and np.dtype(dtype) == np.uint16,
        "alpha": name == "JPEG" and has_alpha,
    }
    for what, refused in refusals.items():
        if refused:
            raise ValueError(f"{path}: {name} cannot hold {what}; write .png")
    return name


def write_image(
    path: str | Path, pixels: Pixels, alpha: Pixels | None = None, *, metadata: Metadata | None = None
) -> None:
    """Write a picture in the format of the suffix, replacing an older file in one step or not at all.

    Args:
        pixels: (H, W) or (H, W, 1) grey or (H, W, 3) RGB; uint8, for PNG and TIFF also uint16.
        alpha: (H, W) of the same dtype, 0 for transparent.
        metadata: what the format cannot hold, or is not true of this picture, is left out with a warning.

    ValueError: what the format cannot hold.
    """
    path, metadata = Path(path), metadata or Metadata()
    samples = _joined_samples(pixels, alpha)
    height, width, _ = samples.shape
    name = check_format(path, height, width, pixels.dtype, has_alpha=alpha is not None)
    image = pyvips.Image.new_from_array(samples, interpretation="auto")
    image = metadata.attach(image, 3 if pixels.shape[2:] == (3,) else 1)
    # libvips makes up an EXIF where there is none: JPEG and WebP have no other place for the resolution
    has_exif = metadata.exif or (metadata.dpi and name != "PNG")
    keep = "icc|xmp|other|exif" if has_exif else "icc|xmp|other"
    try:
        encoded: bytes = image.write_to_buffer(f".{name.lower()}", keep=keep, **_SAVING[name])
        written, _ = read_metadata(pyvips.Image.new_from_buffer(encoded, ""))
    except pyvips.Error as error:
        raise ValueError(f"{path}: cannot be encoded as {name} ({error})") from error
    if lost := metadata.lost_in(written):
        logger.warning("%s: left out in this %s: %s", path, name, ", ".join(lost))
    write_atomically(path, lambda stream: stream.write(encoded))


def _joined_samples(pixels: Pixels, alpha: Pixels | None) -> Pixels:
    """Join colours and alpha to (H, W, 1 to 4); ValueError unless they fit together."""
    known = pixels.dtype in (np.uint8, np.uint16) and pixels.shape[2:] in ((), (1,), (3,))
    if not known or pixels.ndim < 2 or not pixels.size:
        expected = "expected (H, W) or (H, W, 3) of uint8 or uint16, alpha in alpha="
        raise ValueError(f"pixels of shape {pixels.shape} and {pixels.dtype}: {expected}")
    samples = np.ascontiguousarray(np.atleast_3d(pixels))
    if alpha is None:
        return samples
    if alpha.shape != pixels.shape[:2] or alpha.dtype != pixels.dtype:
        expected = f"expected {pixels.shape[:2]} and {pixels.dtype}, as the pixels"
        raise ValueError(f"alpha of shape {alpha.shape} and {alpha.dtype}: {expected}")
    return np.concatenate([samples, alpha[..., None]], axis=-1)
