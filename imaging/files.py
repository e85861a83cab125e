"""Image files in and out, and the two range conversions.

Shapes: H height, W width, C channels. Ranges: uint8 [0, 255] or uint16 [0, 65535] in files, [0, 1] ("unit")
in metrics, [-1, 1] ("model range") inside the model.

Reading decodes with Pillow, which also verifies the whole file; colours of 16 bits are then taken from
OpenCV, because Pillow cuts them to 8. Writing replaces the target file in one step: it holds either the old
bytes or all of the new ones.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from torch import Tensor

from imaging.atomic import write_atomically

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})

Pixels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

# A closed list: Pillow would otherwise run an external program to open PostScript.
_READABLE_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")
_FORMAT_OF_SUFFIX = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
# What Pillow's parsers raise on damaged bytes (found by feeding them such bytes).
_DAMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)
_GREY_MODES = {"1", "L", "LA", "La"}
_COLOUR_MODES = {"P", "PA", "RGB", "RGBA", "RGBa", "RGBX"}

_ORIENTATION_TAG = 0x0112
# TIFF keeps the layout of the pixels and the description of the picture in one directory. These are the
# description: text, resolution, date, author, XMP, rights, and the Exif and GPS directories.
_DESCRIPTIVE_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 700, 33432, 34665, 34853}
# Where Pillow finds an orientation in a PNG: the EXIF chunk, ImageMagick's text form of it, and XMP.
_PNG_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp")
# EXIF orientation -> what turns the stored samples (H, W, ...) upright.
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda samples: samples,
    2: lambda samples: samples[:, ::-1],
    3: lambda samples: samples[::-1, ::-1],
    4: lambda samples: samples[::-1],
    5: lambda samples: samples.swapaxes(0, 1),
    6: lambda samples: samples.swapaxes(0, 1)[:, ::-1],
    7: lambda samples: samples[::-1, ::-1].swapaxes(0, 1),
    8: lambda samples: samples.swapaxes(0, 1)[::-1],
}


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
        icc_profile: the colour profile that describes ``pixels``, or None. The profile of a CMYK file is left
            out: it does not describe the RGB values made from it.
        exif: the EXIF block with its orientation removed (it has been applied), or None where the file has
            none or one too damaged to parse. From a TIFF only the tags that describe the picture are kept.
        frames: how many frames or pages the file has; ``pixels`` is the first.
    """

    path: Path
    pixels: Pixels
    alpha: Pixels | None
    icc_profile: bytes | None
    exif: bytes | None
    frames: int


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

    With ``recursive`` its subfolders are searched too. Hidden files and folders (".name") are skipped.

    Raises:
        ValueError: where the folder is missing, is not a folder, or holds no image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder; give the path of a folder of images")
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder; give the folder that holds the images")
    found = sorted(
        path
        for path in folder.glob("**/*" if recursive else "*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not found:
        where = "or its subfolders" if recursive else "itself (subfolders were not searched)"
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder}: no image in this folder {where}; looked for files named {suffixes}")
    return found


def decode_image(path: str | Path) -> DecodedImage:
    """Read one image file of any kind in IMAGE_SUFFIXES (or GIF), upright, at its own bit depth.

    Grey stays grey; palette, CMYK and other colour spaces become RGB; one bit becomes 0 and 255. Samples of
    16 bits stay so, except in CMYK. Of an animation or a multi-page file the first frame is read.

    Raises:
        UnreadableImageError: where the file is missing, may not be read, is empty, damaged, cut short or not
            an image, holds more pixels than Pillow's MAX_IMAGE_PIXELS (a decompression bomb), or holds
            samples of more than 8 bits that are not 16-bit integers (float, 32-bit, 12-bit).
    """
    path = Path(path)
    encoded = _read_file(path)
    with _naming(path), Image.open(io.BytesIO(encoded), formats=_READABLE_FORMATS) as image:
        image.verify()  # the checksums of a PNG, which decoding passes over; leaves the image unusable
    with _naming(path), Image.open(io.BytesIO(encoded), formats=_READABLE_FORMATS) as image:
        _check_pixel_count(image)
        # The further pictures of an MPO are a phone's previews and depth maps, not frames.
        frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
        exif, orientation = _split_exif(image)
        deep = _bits_per_sample(image, encoded) == 16 and image.mode not in {"CMYK", "I", "F"}
        image.load()  # decodes everything, and so verifies the file for the 16-bit path too
        samples: Pixels = _deep_samples(image, encoded) if deep else _shallow_samples(image)
        described = image.mode in _GREY_MODES | _COLOUR_MODES or deep
        icc_profile = image.info.get("icc_profile") if described else None
    samples = _UPRIGHT[orientation](samples)  # (H, W, 1 to 4), alpha last
    pixels = samples[..., :3] if samples.shape[-1] >= 3 else samples[..., 0]
    return DecodedImage(
        path=path,
        pixels=pixels.copy(),  # contiguous, and free of the alpha channel's memory
        alpha=samples[..., -1].copy() if samples.shape[-1] in {2, 4} else None,
        icc_profile=icc_profile or None,
        exif=exif,
        frames=frames,
    )


def read_rgb(path: str | Path) -> npt.NDArray[np.uint8]:
    """Read an image file as (H, W, 3) uint8 RGB, upright.

    Grey is repeated, 16 bits are rounded to the nearest of 8 (x / 257, exact at both ends), and alpha is
    dropped, not composited: the colours come back as the file stores them.

    Raises:
        UnreadableImageError: as ``decode_image``.
    """
    pixels = decode_image(path).pixels
    if pixels.dtype == np.uint16:
        # 257 is odd, so no value lies half-way and adding 128 rounds exactly.
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels.astype(np.uint8, copy=False)


def image_size(path: str | Path) -> tuple[int, int]:
    """Read (height, width) of the upright image from a file's header, without decoding its pixels.

    Raises:
        UnreadableImageError: where the file is missing, may not be read, or has no valid header. Damage
            behind the header goes unnoticed.
    """
    path = Path(path)
    with _naming(path), path.open("rb") as file, Image.open(file, formats=_READABLE_FORMATS) as image:
        width, height = image.size
        # Pillow decodes a whole PNG to look for an orientation behind the pixels: ask only where one may be.
        known = any(key in image.info for key in _PNG_ORIENTATION_KEYS)
        asked = image.format != "PNG" or known or _has_late_metadata(file)
        orientation = _split_exif(image)[1] if asked else 1
    return (width, height) if orientation >= 5 else (height, width)


def _unreadable(path: Path, reason: str) -> UnreadableImageError:
    """Name the file and the reason in one line."""
    return UnreadableImageError(f"{path}: {reason}")


def _read_file(path: Path) -> bytes:
    """Read a file whole, so that both decoders see the same bytes."""
    with _naming(path):
        encoded = path.read_bytes()
    if not encoded:
        raise _unreadable(path, "the file is empty")
    return encoded


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into an UnreadableImageError that names ``path``."""
    try:
        yield
    except UnreadableImageError as error:
        raise _unreadable(path, str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _unreadable(path, f"{error} Set PIL.Image.MAX_IMAGE_PIXELS higher to read it") from error
    except Image.UnidentifiedImageError as error:
        raise _unreadable(
            path, "not an image of a kind that can be read, or its header is damaged"
        ) from error
    except _DAMAGE_ERRORS as error:
        # Only the operating system's errors have a number; Pillow's speak of the file's content.
        if isinstance(error, OSError) and error.errno is not None:
            raise _unreadable(path, f"cannot be read ({error.strerror})") from error
        raise _unreadable(path, f"damaged or cut short ({error})") from error


def _check_pixel_count(image: Image.Image) -> None:
    """Refuse between once and twice Pillow's limit too, where Pillow only warns."""
    limit = Image.MAX_IMAGE_PIXELS
    width, height = image.size
    if limit is not None and width * height > limit:
        raise Image.DecompressionBombError(
            f"{width} x {height} = {width * height} pixels, more than the limit of {limit}."
        )


def _split_exif(image: Image.Image) -> tuple[bytes | None, int]:
    """Give an image's EXIF block without its orientation, and the orientation (1 to 8) yet to be applied."""
    orientation, kept = 1, None
    try:
        original = image.getexif()
        # Pillow turns a TIFF upright itself while it decodes.
        orientation = 1 if image.format == "TIFF" else original.get(_ORIENTATION_TAG, 1)
        # A copy, because it does so by the tag in the original.
        exif = Image.Exif()
        exif.load(original.tobytes())
        exif.pop(_ORIENTATION_TAG, None)
        if image.format == "TIFF":
            _keep_descriptive_tags(exif)
        kept = exif.tobytes() if len(exif) else None
    except _DAMAGE_ERRORS:
        pass  # the picture is whole even where its description is not, and what was found so far holds
    return kept, orientation if orientation in _UPRIGHT else 1


def _keep_descriptive_tags(exif: Image.Exif) -> None:
    """Drop from a TIFF's directory, in place, the tags that say how its samples are stored."""
    for tag in set(exif) - _DESCRIPTIVE_TAGS:
        del exif[tag]


def _has_late_metadata(file: BinaryIO) -> bool:
    """Say whether a PNG file has EXIF or text chunks behind its pixels, from the chunk headers alone."""
    resume_at = file.tell()
    file.seek(8)
    found, behind_pixels = False, False
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        behind_pixels = behind_pixels or kind == b"IDAT"
        found = found or (behind_pixels and kind in {b"eXIf", b"tEXt", b"zTXt", b"iTXt"})
        file.seek(length + 4, os.SEEK_CUR)  # the data and their checksum
    file.seek(resume_at)
    return found


def _bits_per_sample(image: Image.Image, encoded: bytes) -> int:
    """Find the bit depth that the file stores, which Pillow's mode does not tell."""
    if image.format == "PNG":
        return encoded[24]  # in the header chunk, which always comes first
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(258, 1)
        return int(bits[0] if isinstance(bits, tuple) else bits)
    return 8


def _shallow_samples(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Give the samples (H, W, 1 to 4), alpha last, of a decoded image of at most 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        kind = "float" if image.mode == "F" else "integer"
        raise UnreadableImageError(
            f"holds {kind} samples that are not 8 or 16 bits deep; save it with 8 or 16"
        )
    if image.mode in _GREY_MODES:
        mode = "LA" if image.has_transparency_data else "L"
    else:
        mode = "RGBA" if image.has_transparency_data else "RGB"
    samples = np.array(image.convert(mode), dtype=np.uint8)  # a copy, which may be written to
    return samples.reshape(*samples.shape[:2], -1)


def _deep_grey_samples(image: Image.Image) -> npt.NDArray[np.uint16]:
    """Give the samples (H, W, 1 or 2), alpha last, of a decoded 16-bit grey image."""
    grey = np.asarray(image).astype(np.uint16)  # (H, W); in the file they may be big-endian
    transparent = image.info.get("transparency")
    if transparent is not None:
        return np.stack([grey, np.where(grey == transparent, 0, 65535).astype(np.uint16)], axis=-1)
    if isinstance(image, TiffImageFile) and image.tag_v2.get(262) == 0:
        grey = 65535 - grey  # stored with 0 for white, which Pillow undoes for 8 bits only
    return grey[..., None]


def _deep_samples(image: Image.Image, encoded: bytes) -> npt.NDArray[np.uint16]:
    """Give the samples (H, W, 1 to 4), alpha last, of a 16-bit file that Pillow decoded into ``image``."""
    if image.mode.startswith("I;16"):
        return _deep_grey_samples(image)
    import cv2

    try:
        stored = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)  # (H, W, 3 or 4)
    except cv2.error as error:
        raise UnreadableImageError(f"its 16-bit samples cannot be decoded ({error})") from error
    if stored is None or stored.dtype != np.uint16 or stored.shape[:2] != (image.height, image.width):
        raise UnreadableImageError("its 16-bit samples cannot be decoded; save it as a plain 16-bit PNG")
    has_alpha = image.has_transparency_data and stored.shape[-1] == 4
    samples = stored[..., [2, 1, 0, 3] if has_alpha else [2, 1, 0]]  # OpenCV's order is BGR
    # Pillow keeps the upper byte of each sample. Any layout that the two read differently (separate planes,
    # premultiplied alpha) is refused rather than guessed at.
    upper_bytes = np.asarray(image)
    compared = min(upper_bytes.shape[-1], samples.shape[-1])
    if not np.array_equal(samples[..., :compared] >> 8, upper_bytes[..., :compared]):
        raise UnreadableImageError("its layout of 16-bit samples is not known; save it as a plain 16-bit PNG")
    grey_and_alpha = image.format == "PNG" and encoded[25] == 4
    return samples[..., [0, 3]] if grey_and_alpha else samples


# ---------------------------------------------------------------------------------------------------- writing


def write_image(
    path: str | Path,
    pixels: Pixels,
    alpha: Pixels | None = None,
    *,
    icc_profile: bytes | None = None,
    exif: bytes | None = None,
    quality: int = 95,
) -> None:
    """Write an image file, replacing an older one in a single step; a failure leaves the older one as it was.

    Args:
        path: its suffix picks the format. PNG and TIFF (lossless) hold uint8 and uint16, alpha and metadata;
            WebP holds uint8, alpha and metadata; JPEG holds uint8 and metadata; BMP uint8 pixels alone.
        pixels: (H, W) grey or (H, W, 3) RGB, uint8 or uint16.
        alpha: (H, W) of the same dtype, 0 for transparent.
        icc_profile: the colour profile of ``pixels``.
        exif: an EXIF block as ``decode_image`` gives it. A TIFF keeps the tags that describe the picture.
        quality: 1 to 100, for JPEG (at full chroma resolution) and WebP, which is lossless at 100.

    Raises:
        ValueError: for wrong shapes or dtypes, an unknown suffix, a missing folder, what the format cannot
            hold (nothing is dropped silently), or what its encoder refuses.
        OSError: where the disk is full or the folder may not be written.
    """
    path = Path(path)
    format_name = _FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if format_name is None:
        raise ValueError(
            f"{path}: unknown suffix {path.suffix!r}; use one of {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    if not 1 <= quality <= 100:
        raise ValueError(f"quality {quality}: give a value from 1 to 100")
    samples = _joined_samples(pixels, alpha)
    _check_format_holds(path, format_name, samples, has_metadata=bool(icc_profile or exif))
    try:
        if format_name == "TIFF":
            encoded = _encode_tiff(samples, icc_profile, exif)
        elif samples.dtype == np.uint16:
            encoded = _encode_deep_png(samples, icc_profile, exif)
        else:
            encoded = _encode_shallow(samples, format_name, icc_profile, exif, quality)
    except _DAMAGE_ERRORS as error:
        raise ValueError(f"{path}: cannot be encoded as {format_name} ({error})") from error
    _replace_file(path, encoded)


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
    samples = pixels.reshape(*pixels.shape[:2], -1)
    if alpha is None:
        return samples
    if alpha.shape != pixels.shape[:2] or alpha.dtype != pixels.dtype:
        raise ValueError(
            f"alpha of shape {alpha.shape} and {alpha.dtype}: expected {pixels.shape[:2]} and {pixels.dtype}"
        )
    return np.concatenate([samples, alpha[..., None]], axis=-1)


def _check_format_holds(path: Path, format_name: str, samples: Pixels, has_metadata: bool) -> None:
    """Refuse what the format would lose."""
    if samples.dtype == np.uint16 and format_name not in {"PNG", "TIFF"}:
        raise ValueError(
            f"{path}: {format_name} cannot hold 16 bits; write .png or .tiff, or convert to uint8"
        )
    if samples.shape[-1] in {2, 4} and format_name in {"JPEG", "BMP"}:
        raise ValueError(
            f"{path}: {format_name} cannot hold alpha; write .png, .tiff or .webp, or leave it out"
        )
    if samples.dtype == np.uint16 and samples.shape[-1] == 2 and format_name == "TIFF":
        raise ValueError(f"{path}: few readers know a 16-bit grey TIFF with alpha; write .png, or RGB pixels")
    if has_metadata and format_name == "BMP":
        raise ValueError(f"{path}: BMP cannot hold a profile or EXIF; write .png or .tiff, or leave them out")


def _encode_shallow(
    samples: Pixels, format_name: str, icc_profile: bytes | None, exif: bytes | None, quality: int
) -> bytes:
    """Encode uint8 samples (H, W, 1 to 4) as PNG, JPEG, BMP or WebP."""
    options: dict[str, bytes | int | bool] = {}
    if icc_profile:
        options["icc_profile"] = icc_profile
    if exif:
        options["exif"] = exif
    if format_name == "JPEG":
        options |= {"quality": quality, "subsampling": 0}
    if format_name == "WEBP":
        # exact: colours under full transparency are kept as well
        options |= {"quality": quality, "lossless": quality == 100, "exact": True}
    buffer = io.BytesIO()
    image = Image.fromarray(samples[..., 0] if samples.shape[-1] == 1 else samples)
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def _encode_deep_png(samples: Pixels, icc_profile: bytes | None, exif: bytes | None) -> bytes:
    """Encode uint16 samples (H, W, 1 to 4) as PNG (ISO/IEC 15948), which Pillow does for grey alone."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 2  # filter "up": every row is stored as its difference from the row above
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))]
    if icc_profile:
        chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile)))
    if exif:
        chunks.append((b"eXIf", exif.removeprefix(b"Exif\0\0")))  # the prefix belongs to JPEG
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")]
    encoded = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        encoded += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return encoded


def _encode_tiff(samples: Pixels, icc_profile: bytes | None, exif: bytes | None) -> bytes:
    """Encode uint8 or uint16 samples (H, W, 1 to 4) as TIFF 6.0: one Deflate strip behind one directory."""
    height, width, channels = samples.shape
    strip = zlib.compress(samples.astype(samples.dtype.newbyteorder("<")).tobytes())
    directory = ImageFileDirectory_v2(prefix=b"II")
    if exif:
        description = Image.Exif()
        description.load(exif)
        _keep_descriptive_tags(description)
        for tag, value in description.items():
            directory[tag] = description.get_ifd(tag) if tag in {34665, 34853} else value
    if icc_profile:
        directory[34675] = icc_profile
    directory[256], directory[257] = width, height
    directory[258] = (8 * samples.dtype.itemsize,) * channels
    directory[259] = 8  # compression: Deflate
    directory[262] = 2 if channels >= 3 else 1  # RGB, or grey with 0 for black
    directory[273] = 0  # where the strip starts: counted from the directory's end, which save() adds
    directory[277] = channels
    directory[278] = height  # rows in the strip
    directory[279] = len(strip)
    if channels in {2, 4}:
        directory[338] = 2  # the extra sample is alpha, not multiplied into the colours
    buffer = io.BytesIO()
    directory.save(buffer)
    return buffer.getvalue() + strip


def _replace_file(path: Path, encoded: bytes) -> None:
    """Put ``encoded`` on the disk under ``path`` in one step."""
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; create it first")
    write_atomically(path, lambda temporary: temporary.write_bytes(encoded))
