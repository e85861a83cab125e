"""Hands on what an image file says besides its pixels, as libvips reads and writes it."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import pyvips
from PIL import Image

# Each file states its own orientation and size; those of the Exif directory are set by libvips.
_STATED_TAGS = {0x0112, 0x0100, 0x0101}
# TIFF keeps the layout of the samples and the description of the picture in one directory. This is the
# description: text, camera, date, author, rights, and the Exif and GPS directories.
_DESCRIPTIVE_TAGS = {270, 271, 272, 305, 306, 315, 33432, 0x8769, 0x8825}
_UNKNOWN_DPI = (72.0, 72.0)  # as libvips reads a file that states none; its savers always state one
_BLOBS = {"icc_profile": "icc-profile-data", "exif": "exif-data", "xmp": "xmp-data"}
DAMAGE_ERRORS = (  # what Pillow raises on damaged EXIF
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError),
    *(AttributeError, ArithmeticError, RuntimeError, struct.error),
)

# XMP by its customary prefixes. Sizes are true of one picture only, and each file states its own. Motion
# photos, gain maps, depth maps and extended XMP are parts of a file that are not handed on.
_SIZES = rb"exif:Pixel[XY]Dimension|tiff:(?:Orientation|ImageWidth|ImageLength)|stDim:[wh]"
_PARTS = (
    rb"(?:G?Camera|MicroVideo|hdrgm|HDRGainMap|Container|Item|GPano|GDepth|GImage|GAudio|apdi|xmpNote):\w+"
)
_NAME = rb"(" + _SIZES + rb"|" + _PARTS + rb")"
_UNTRUE = re.compile(
    rb"\s" + _NAME + rb"\s*=\s*(?:\"[^\"]*\"|'[^']*')|<" + _NAME + rb"\b[^>]*?(?:/>|>.*?</\2\s*>)", re.DOTALL
)


@dataclass(frozen=True)
class Metadata:
    """Describes an upright picture of any size."""

    icc_profile: bytes | None = None
    exif: bytes | None = None  # without orientation and size
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None  # horizontal, vertical
    text: Mapping[str, str] = field(default_factory=dict)  # of a PNG, by keyword

    def attach(self, image: pyvips.Image, colours: int) -> pyvips.Image:
        """Describe an image that is to be saved by what is true of it; `colours` is 1 for grey, 3 for RGB."""
        horizontal, vertical = self.dpi or _UNKNOWN_DPI
        image = image.copy(xres=horizontal / 25.4, yres=vertical / 25.4)  # pixels per mm
        profile = self.icc_profile if _describes(self.icc_profile or b"", colours) else None
        xmp = _UNTRUE.sub(b"", self.xmp or b"")
        exif = _descriptive_exif(self.exif or b"")
        for name, value in zip(_BLOBS.values(), (profile, exif, xmp), strict=True):
            if value:
                image.set_type(pyvips.GValue.blob_type, name, value)
        for number, (key, text) in enumerate(self.text.items()):
            if re.fullmatch(r"[!-~]{1,79}", key) and text.isascii():  # libvips spoils others
                image.set_type(pyvips.GValue.gstr_type, f"png-comment-{number}-{key}", text)
        return image

    def lost_in(self, written: "Metadata") -> list[str]:
        """List what of this description a file lacks that was written with it."""
        said = {"a colour profile": "icc_profile", "EXIF": "exif", "XMP": "xmp"}
        lost = [what for what, name in said.items() if getattr(self, name) and not getattr(written, name)]
        lost += [f"text {key!r}" for key in self.text if key not in written.text]
        gone = {match[1] or match[2] for match in _UNTRUE.finditer(self.xmp or b"")}
        parts = sorted(name.decode() for name in gone if not re.fullmatch(_SIZES, name))
        return lost + ([f"what XMP says of parts of the file ({', '.join(parts)})"] if parts else [])


def read_metadata(image: pyvips.Image, tiff: Image.Exif | None = None) -> tuple[Metadata, list[str]]:
    """Read what libvips says of a picture, and list what is damaged of that.

    `tiff` is the directory of a TIFF, in which libvips sees no EXIF.
    """
    blobs = {name: image.get(vips) for name, vips in _BLOBS.items() if image.get_typeof(vips)}
    comments = [name for name in image.get_fields() if name.startswith("png-comment-")]
    known = {round(image.xres, 2), round(image.yres, 2)} - {1.0, round(_UNKNOWN_DPI[0] / 25.4, 2)}
    exif, damaged = None, []
    try:
        exif = _descriptive_exif(blobs.get("exif") or b"", tiff)
    except DAMAGE_ERRORS as error:
        damaged.append(f"EXIF, which is damaged ({error})")
    metadata = Metadata(
        None if image.interpretation == "cmyk" else blobs.get("icc_profile") or None,  # RGB is made of it
        exif,
        blobs.get("xmp"),
        dpi=(image.xres * 25.4, image.yres * 25.4) if known else None,
        text={name.split("-", 3)[3]: image.get(name) for name in comments},
    )
    return metadata, damaged


def _descriptive_exif(block: bytes, tiff: Image.Exif | None = None) -> bytes | None:
    exif = tiff
    if exif is None:
        exif = Image.Exif()
        exif.load(block)
    for tag in set(exif) & _STATED_TAGS if tiff is None else set(exif) - _DESCRIPTIVE_TAGS:
        del exif[tag]
    return exif.tobytes() if len(exif) else None


def _describes(profile: bytes, colours: int) -> bool:
    """Tell whether an ICC profile is whole and of grey or RGB as the picture is (ICC.1, section 7.2)."""
    whole = len(profile) == int.from_bytes(profile[:4], "big") and profile[36:40] == b"acsp"
    return whole and profile[16:20] == {1: b"GRAY", 3: b"RGB "}[colours]
