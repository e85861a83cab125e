"""What a picture's file says besides its pixels, read from a file and made ready for another one."""

import io
import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import pyvips
from PIL import Image, PngImagePlugin
from PIL.ImageFile import ImageFile

logger = logging.getLogger(__name__)

# Pillow's limit of 1 MB for a PNG's text also holds for its profile; editing programs write more.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

ORIENTATION, EXIF_DIRECTORY, GPS_DIRECTORY = 0x0112, 0x8769, 0x8825
_WIDTH_TAGS, _HEIGHT_TAGS = (0x0100, 0xA002), (0x0101, 0xA003)  # of the picture, in the two directories
# TIFF keeps the layout of the samples and the description of the picture in one directory. This is the
# description: text, resolution, date, author, XMP, rights, and the Exif and GPS directories.
DESCRIPTIVE_TAGS = {
    *(270, 271, 272, 282, 283, 296, 305, 306, 315, 700, 33432),
    *(EXIF_DIRECTORY, GPS_DIRECTORY),
}
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"acTL", b"fcTL", b"fdAT"}
_PNG_OF_ONE_PIXEL = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010800000000 3a7e9b55")
_XMP_KEY, _TEXT_EXIF_KEY = "XML:com.adobe.xmp", "Raw profile type exif"
# What says sRGB: gamma 1 / 2.2, the primaries and white of ITU-R BT.709 (both x 100000), and H.273's numbers.
_SRGB_COLOUR = {
    b"gAMA": struct.pack(">I", 45455),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    b"cICP": bytes([1, 13, 0, 1]),
}
# What Pillow raises on damaged EXIF and PNG text.
DAMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    struct.error,
)


@dataclass(frozen=True)
class Metadata:
    """What a file says about a picture that is upright.

    Attributes:
        icc_profile: describes the pixels.
        exif: an EXIF block without orientation. From a TIFF, only the tags that describe the picture.
        xmp: an XMP packet.
        dpi: horizontal and vertical resolution in pixels per inch.
        text: the texts of a PNG by their keywords.
        colour: a PNG's chunks gAMA, cHRM and cICP, where they say another colour space than sRGB and no
            profile overrules them. The pixels are not converted.
    """

    icc_profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    text: dict[str, str] = field(default_factory=dict)
    colour: dict[bytes, bytes] = field(default_factory=dict)

    def resized(self, height: int, width: int, path: Path) -> "Metadata":
        """The same with the sizes that EXIF and XMP state replaced, for the file that is to hold it."""
        xmp = self.xmp
        for name, size in ((b"PixelXDimension", width), (b"PixelYDimension", height)):
            xmp = xmp and re.sub(rb"(exif:" + name + rb"(?:=[\"']|>))\d+", rb"\g<1>%d" % size, xmp)
        if self.exif is None:
            return replace(self, xmp=xmp)
        exif = Image.Exif()
        try:
            exif.load(self.exif)
            for tags, size in ((_WIDTH_TAGS, width), (_HEIGHT_TAGS, height)):
                for directory in (exif, exif.get_ifd(EXIF_DIRECTORY)):
                    directory.update({tag: size for tag in tags if tag in directory})
            return replace(self, xmp=xmp, exif=exif.tobytes())
        except DAMAGE_ERRORS as error:
            logger.warning("%s: EXIF that cannot be written (%s): left out", path, error)
            return replace(self, xmp=xmp, exif=None)


def read_exif(image: pyvips.Image, file: BinaryIO) -> Image.Exif | None:
    """The EXIF of an image that was opened from file, orientation included; None where it is damaged."""
    exif = Image.Exif()
    try:
        loader = image.get("vips-loader")
        if loader.startswith("tiff"):
            file.seek(0)
            exif.load_from_fp(file)
        elif loader.startswith("png"):
            with Image.open(io.BytesIO(png_without_pixels(file)), formats=["PNG"]) as head:
                exif = Image.Image.getexif(head)  # a PNG's own would look for more behind the pixels
        elif image.get_typeof("exif-data"):
            exif.load(image.get("exif-data"))
    except DAMAGE_ERRORS:
        return None
    return exif


def read_pillow_exif(image: ImageFile) -> Image.Exif | None:
    """As read_exif, for an image that Pillow opened."""
    try:
        return image.getexif()
    except DAMAGE_ERRORS:
        return None


def read_orientation(image: pyvips.Image, exif: Image.Exif | None) -> int:
    """How the stored samples are turned, 1 to 8 as in EXIF."""
    if image.get("vips-loader").startswith("heif"):
        return 1  # turned while it is decoded
    return orientation_of(exif, image.get("xmp-data") if image.get_typeof("xmp-data") else None)


def orientation_of(exif: Image.Exif | None, xmp: bytes | None) -> int:
    """What EXIF says, or else XMP; 1 where both are silent or wrong."""
    found = re.search(rb"tiff:Orientation(?:=[\"']|>)([1-8])", xmp or b"")
    stated = exif.get(ORIENTATION) if exif else None
    orientation = stated or (int(found[1]) if found else 1)
    return orientation if orientation in range(1, 9) else 1


def read_pillow_metadata(image: ImageFile, exif: Image.Exif | None, path: Path) -> Metadata:
    """As read_metadata, for an image that Pillow opened."""
    dpi = image.info.get("dpi") if image.format == "BMP" else None  # the others state it in EXIF alone
    metadata = Metadata(image.info.get("icc_profile") or None, xmp=image.info.get("xmp") or None, dpi=dpi)
    return _for_upright(metadata, exif, path, is_tiff=False)


def read_metadata(image: pyvips.Image, file: BinaryIO, exif: Image.Exif | None) -> Metadata:
    """What the file of an opened image says, for the picture turned upright."""
    loader = image.get("vips-loader")
    if loader.startswith("png"):
        metadata = _of_png(png_without_pixels(file), file.name)
    else:
        icc_profile, xmp = (
            image.get(name) if image.get_typeof(name) else None for name in ("icc-profile-data", "xmp-data")
        )
        # in pixels per mm
        dpi = (image.xres * 25.4, image.yres * 25.4) if image.get_typeof("resolution-unit") else None
        metadata = Metadata(icc_profile, xmp=xmp, dpi=dpi)
    return _for_upright(metadata, exif, Path(file.name), is_tiff=loader.startswith("tiff"))


def _for_upright(metadata: Metadata, exif: Image.Exif | None, path: Path, *, is_tiff: bool) -> Metadata:
    """Add EXIF; the picture is going to be upright, whatever it and XMP say."""
    xmp = metadata.xmp and re.sub(rb"(tiff:Orientation(?:=[\"']|>))[2-8]", rb"\g<1>1", metadata.xmp)
    if exif is None:
        logger.warning("%s: its EXIF is damaged: left out", path)
        return replace(metadata, xmp=xmp)
    return replace(metadata, xmp=xmp, exif=_exif_block(exif, is_tiff, path))


def _exif_block(exif: Image.Exif, is_tiff: bool, path: Path) -> bytes | None:
    """The block without orientation and, from a TIFF, without what says how its samples are stored."""
    try:
        # A copy with all that the first one refers to.
        copied = Image.Exif()
        for tag, value in exif.items():
            inner = exif.get_ifd(tag) if tag in {EXIF_DIRECTORY, GPS_DIRECTORY} else value
            if tag != ORIENTATION and (tag in DESCRIPTIVE_TAGS or not is_tiff):
                copied[tag] = inner
        return copied.tobytes() if len(copied) else None
    except DAMAGE_ERRORS as error:
        logger.warning("%s: its EXIF cannot be written again (%s): left out", path, error)
        return None


# -------------------------------------------------------------------------------------------- chunks of a PNG


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Kind, first byte and end of every chunk, from the chunks' headers alone."""
    start = 8
    while len(header := _bytes_at(file, start, 8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        yield kind, start, start + 12 + length
        if kind == b"IEND":
            return  # what some programs put behind it is none of the PNG's
        start += 12 + length


def png_without_pixels(file: BinaryIO) -> bytes:
    """The header of a single pixel with all chunks that describe the picture: they may follow its pixels."""
    parts = [(start, end) for kind, start, end in png_chunks(file) if kind not in _PNG_PIXELS]
    return _PNG_OF_ONE_PIXEL + b"".join(_bytes_at(file, start, end - start) for start, end in parts)


def png_is_whole(file: BinaryIO) -> bool:
    """Whether a PNG has its last chunk, which decoding does not need."""
    return any(
        _bytes_at(file, start, 12) == _PNG_END for kind, start, _ in png_chunks(file) if kind == b"IEND"
    )


def png_frames(file: BinaryIO) -> int:
    """How many frames an animated PNG says it has, else 1."""
    found = [_bytes_at(file, start + 8, 4) for kind, start, _ in png_chunks(file) if kind == b"acTL"]
    return int.from_bytes(found[0], "big") if found else 1


def png_with_metadata(encoded: bytes, metadata: Metadata) -> bytes:
    """A PNG's pixels with the metadata that Pillow writes around a single pixel."""
    described = io.BytesIO()
    Image.new("L", (1, 1)).save(described, "PNG", **png_options(metadata))
    pixels = io.BytesIO(encoded)
    header, *rest = [_bytes_at(pixels, s, e - s) for kind, s, e in png_chunks(pixels) if kind != b"pHYs"]
    others = [
        _bytes_at(described, start, end - start)
        for kind, start, end in png_chunks(described)
        if kind not in {b"IHDR", b"IDAT", b"IEND"}
    ]
    return b"".join([encoded[:8], header, *others, *rest])


def png_options(metadata: Metadata) -> dict[str, object]:
    """What Pillow's PNG encoder takes."""
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.text.items():
        info.add_text(key, value, zip=len(value) > 1000)
    if metadata.xmp:
        info.add_itxt(_XMP_KEY, metadata.xmp.decode(errors="replace"))
    for kind, data in metadata.colour.items():
        info.add(kind, data)
    return {**common_options(metadata), "pnginfo": info}


def common_options(metadata: Metadata) -> dict[str, object]:
    """What all of Pillow's encoders take."""
    options = {"icc_profile": metadata.icc_profile, "exif": metadata.exif, "dpi": metadata.dpi}
    return {name: value for name, value in options.items() if value}


def _bytes_at(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _of_png(head: bytes, name: str) -> Metadata:
    """What the chunks of a PNG say, but for EXIF."""
    stream = io.BytesIO(head)
    chunks = {kind: head[start + 8 : end - 4] for kind, start, end in png_chunks(stream)}
    colour = {kind: data for kind, data in chunks.items() if kind in _SRGB_COLOUR}
    if b"sRGB" in chunks or b"iCCP" in chunks or b"cICP" in chunks:
        colour = {kind: data for kind, data in colour.items() if kind == b"cICP"}
    if all(_says_srgb(kind, data) for kind, data in colour.items()):
        colour = {}
    try:
        with Image.open(stream, formats=["PNG"]) as image:
            info = image.info
    except DAMAGE_ERRORS as error:
        logger.warning("%s: its profile and texts are damaged (%s): left out", name, error)
        return Metadata(colour=colour)
    text = {str(key): value for key, value in info.items() if isinstance(value, str)}
    packet = text.pop(_XMP_KEY, "").encode() or None
    text.pop(_TEXT_EXIF_KEY, None)  # Pillow reads it as EXIF
    return Metadata(info.get("icc_profile"), xmp=packet, dpi=info.get("dpi"), text=text, colour=colour)


def _says_srgb(kind: bytes, data: bytes) -> bool:
    """Whether a colour chunk is sRGB's, give or take what programs round."""
    expected = _SRGB_COLOUR[kind]
    if kind == b"cICP" or len(data) != len(expected):
        return data == expected
    count = len(expected) // 4
    pairs = zip(struct.unpack(f">{count}I", data), struct.unpack(f">{count}I", expected), strict=True)
    return all(abs(value - other) <= 100 for value, other in pairs)
