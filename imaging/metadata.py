"""What an image file says besides its pixels."""

import io
import logging
import os
import re
import struct
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyvips
from PIL import Image, PngImagePlugin
from PIL.ImageFile import ImageFile

logger = logging.getLogger(__name__)

# Pillow's limit of 1 MB for a PNG's text also holds for its profile; editing programs write more.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

_ORIENTATION, _EXIF_DIRECTORY, _GPS_DIRECTORY = 0x0112, 0x8769, 0x8825
_STRIP_OFFSETS, _STRIP_LENGTHS, _TILE_OFFSETS, _TILE_LENGTHS = 273, 279, 324, 325
_RESOLUTION = (282, 283, 296)  # horizontal, vertical, unit
# TIFF keeps the layout of the samples and the description of the picture in one directory. This is the
# description: text, resolution, date, author, XMP, rights, and the Exif and GPS directories.
_DESCRIPTIVE_TAGS = {270, 271, 272, 282, 283, 296, 305, 306, 315, 700, 33432, _EXIF_DIRECTORY, _GPS_DIRECTORY}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_OF_ONE_PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010800000000 3a7e9b55")
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"IEND"}  # and IDAT and fdAT, which are not read
_XMP_KEY, _TEXT_EXIF_KEY = "XML:com.adobe.xmp", "Raw profile type exif"
# What says sRGB: gamma 1 / 2.2, the primaries and white of ITU-R BT.709 (both x 100000), and H.273's numbers.
_SRGB_COLOUR = {
    b"gAMA": (45455,),
    b"cHRM": (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    b"cICP": (0x010D0001,),
}
DAMAGE_ERRORS = (  # what Pillow raises on damaged EXIF and PNG text
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError),
    *(AttributeError, ArithmeticError, RuntimeError, struct.error),
)


@dataclass(frozen=True)
class Metadata:
    """Of an upright picture."""

    icc_profile: bytes | None = None
    exif: bytes | None = None  # without orientation and a TIFF's layout
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None  # horizontal, vertical
    text: dict[str, str] = field(default_factory=dict)  # a PNG's, by keyword
    # a PNG's gAMA, cHRM and cICP where they, and no profile, say another colour space than sRGB
    colour: dict[bytes, bytes] = field(default_factory=dict)

    def resized(self, height: int, width: int, path: Path) -> "Metadata":
        """With this size in EXIF and XMP; warnings name ``path``."""
        xmp = _set_in_xmp(self.xmp, b"exif:PixelXDimension", width)
        xmp = _set_in_xmp(xmp, b"exif:PixelYDimension", height)
        sizes = {0x0100: width, 0x0101: height, 0xA002: width, 0xA003: height}  # in the two directories
        exif = Image.Exif()
        try:
            exif.load(self.exif or b"")
            for directory in (exif, exif.get_ifd(_EXIF_DIRECTORY)):
                directory.update({tag: size for tag, size in sizes.items() if tag in directory})
            return replace(self, xmp=xmp, exif=self.exif and exif.tobytes())
        except DAMAGE_ERRORS as error:
            logger.warning("%s: EXIF that cannot be written (%s): left out", path, error)
            return replace(self, xmp=xmp, exif=None)


def _set_in_xmp(xmp: bytes | None, name: bytes, value: int) -> bytes | None:
    return xmp and re.sub(rb"(" + name + rb"(?:=[\"']|>))\d+", rb"\g<1>%d" % value, xmp)


@dataclass(frozen=True)
class Header:
    """What a file says around its pixels."""

    length: int  # of the file in bytes
    orientation: int  # 1 to 8, by EXIF or else XMP; 1 where both are silent or wrong
    metadata: Metadata  # of the upright picture, but for EXIF
    exif: Image.Exif | None  # None if damaged
    tiff: dict[int, Any]  # a TIFF's tags
    chunks: dict[bytes, bytes]  # a PNG's by kind, without pixels

    @property
    def is_whole(self) -> bool:
        """Whether a PNG or TIFF has its end."""
        if self.chunks:
            return self.chunks.get(b"IEND") == _PNG_END
        offsets = self.tiff.get(_STRIP_OFFSETS, self.tiff.get(_TILE_OFFSETS, 0))
        lengths = self.tiff.get(_STRIP_LENGTHS, self.tiff.get(_TILE_LENGTHS, 0))  # they may be left out
        return bool((np.add(offsets, lengths) <= self.length).all())

    def with_exif(self, path: Path) -> Metadata:
        """What can be handed on; the rest is a warning that names ``path``."""
        try:
            if self.exif is None:
                raise ValueError("damaged")
            return replace(self.metadata, exif=self.exif.tobytes() if len(self.exif) else None)
        except DAMAGE_ERRORS as error:
            what = "EXIF, profile or texts" if self.chunks else "EXIF"
            logger.warning("%s: %s that cannot be handed on (%s): left out", path, what, error)
            return self.metadata


def read_header(image: pyvips.Image | ImageFile, file: BinaryIO) -> Header:
    """Damage is no error."""
    loader = str(image.format if isinstance(image, ImageFile) else image.get("vips-loader"))
    chunks = _png_chunks(file, {b"IDAT", b"fdAT"}) if loader.startswith("png") else []
    info: dict[Any, Any] = {}
    exif: Image.Exif | None = None
    tiff, orientation = {}, None
    with suppress(*DAMAGE_ERRORS):
        if chunks:  # those that describe the picture may follow its pixels
            described = b"".join(chunk for kind, chunk in chunks if kind not in _PNG_PIXELS)
            image = PngImagePlugin.PngImageFile(io.BytesIO(_PNG_OF_ONE_PIXEL + described + _PNG_END))
        info = image.info if isinstance(image, ImageFile) else _vips_info(image)
        # a PNG's own getexif would look for more behind the pixels
        found = Image.Image.getexif(image) if isinstance(image, ImageFile) else Image.Exif()
        if loader.startswith("tiff"):
            file.seek(0)
            found.load_from_fp(file)
            tiff = dict(found)
        elif not isinstance(image, ImageFile):
            found.load(info.get("exif", b""))
        orientation = found.pop(_ORIENTATION, None)
        if tiff:
            _keep_description(found)
        exif = found
    text = {str(key): str(value) for key, value in info.items() if chunks and isinstance(value, str)}
    icc_profile, xmp, dpi = (None if key in text else info.get(key) for key in ("icc_profile", "xmp", "dpi"))
    xmp = text.pop(_XMP_KEY, "").encode() or xmp or None
    text.pop(_TEXT_EXIF_KEY, None)  # Pillow reads it as EXIF
    in_xmp = re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])", xmp or b"")
    orientation = orientation or (int(in_xmp[1]) if in_xmp else 1)
    if orientation not in range(1, 9) or loader.startswith("heif"):  # which is turned while it is decoded
        orientation = 1
    xmp = _set_in_xmp(xmp, b"tiff:Orientation", 1)
    metadata = Metadata(icc_profile or None, None, xmp, dpi, text, _colour(dict(chunks)))
    return Header(os.fstat(file.fileno()).st_size, orientation, metadata, exif, tiff, dict(chunks))


def _keep_description(exif: Image.Exif) -> None:
    for tag in set(exif) - _DESCRIPTIVE_TAGS:
        del exif[tag]


def _vips_info(image: pyvips.Image) -> dict[Any, Any]:
    names = {"icc_profile": "icc-profile-data", "xmp": "xmp-data", "exif": "exif-data"}
    info = {name: image.get(field) for name, field in names.items() if image.get_typeof(field)}
    if image.get_typeof("resolution-unit"):
        info["dpi"] = image.xres * 25.4, image.yres * 25.4  # from pixels per mm
    return info


def _colour(chunks: dict[bytes, bytes]) -> dict[bytes, bytes]:
    kinds = {b"cICP"} if chunks.keys() & {b"sRGB", b"iCCP", b"cICP"} else {b"gAMA", b"cHRM"}
    colour = {kind: chunks[kind][8:-4] for kind in kinds & chunks.keys()}
    for kind, data in colour.items():
        expected, rounding = _SRGB_COLOUR[kind], 0 if kind == b"cICP" else 100  # as programs round
        same_length = len(data) == 4 * len(expected)
        if not (same_length and np.allclose(np.frombuffer(data, ">u4"), expected, rtol=0, atol=rounding)):
            return colour
    return {}


def _png_chunks(file: BinaryIO, skipped: Collection[bytes]) -> list[tuple[bytes, bytes]]:
    """Kind and bytes of each; skipped kinds are not read."""
    chunks = []
    file.seek(8)
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind in skipped:
            file.seek(length + 4, os.SEEK_CUR)
        else:
            chunks.append((kind, header + file.read(length + 4)))
        if kind == b"IEND":
            break
    return chunks


def save_options(metadata: Metadata) -> dict[str, object]:
    """Each of Pillow's encoders ignores what it does not know."""
    png = PngImagePlugin.PngInfo()
    for key, value in metadata.text.items():
        png.add_text(key, value, zip=len(value) > 1000)
    if metadata.xmp:
        png.add_itxt(_XMP_KEY, metadata.xmp.decode(errors="replace"))
    for kind, data in metadata.colour.items():
        png.add(kind, data)
    options = {name: getattr(metadata, name) for name in ("icc_profile", "exif", "xmp", "dpi")}
    return {"pnginfo": png, **{name: value for name, value in options.items() if value}}


def png_with_metadata(encoded: bytes, metadata: Metadata) -> bytes:
    """Added as Pillow writes it around another."""
    described = io.BytesIO()
    Image.new("L", (1, 1)).save(described, "PNG", **save_options(metadata))
    added = _png_chunks(described, {b"IHDR", b"IDAT", b"IEND"})
    first, *rest = _png_chunks(io.BytesIO(encoded), {b"pHYs"})
    return encoded[:8] + b"".join(chunk for _, chunk in [first, *added, *rest])


def tiff_with_metadata(encoded: bytes, metadata: Metadata) -> bytes:
    """The strips of a TIFF behind a directory by Pillow, as libvips writes no EXIF."""
    layout, directory = Image.Exif(), Image.Exif()
    layout.load(encoded)
    directory.load(metadata.exif or b"")
    directory.endian = layout.endian
    _keep_description(directory)
    offsets, lengths = (np.atleast_1d(layout[tag]) for tag in (_STRIP_OFFSETS, _STRIP_LENGTHS))
    # what libvips says about a resolution that nobody knows is left out
    tags = {tag: value for tag, value in layout.items() if tag not in _RESOLUTION}
    tags[_STRIP_OFFSETS] = tuple((offsets - 8).tolist())  # counted from the directory's end
    tags |= dict(zip(_RESOLUTION, (*metadata.dpi, 2), strict=True)) if metadata.dpi else {}
    others = {700: metadata.xmp, 34675: metadata.icc_profile}
    directory.update(tags | {tag: value for tag, value in others.items() if value})
    return directory.tobytes().removeprefix(b"Exif\0\0") + encoded[8 : offsets[-1] + lengths[-1]]
