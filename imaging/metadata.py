"""Hands on what an image file says besides its pixels, as libvips reads and writes it."""

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pyvips
from PIL import Image

_ORIENTATION, _EXIF_DIRECTORY, _COLOUR_SPACE = 0x0112, 0x8769, 0xA001
_UNKNOWN_DPI = (72.0, 72.0)  # as libvips reads a file that states none; its savers always state one
_LARGEST_SEGMENT = 65500  # bytes of EXIF or XMP in a JPEG
_BLOBS = {"icc_profile": "icc-profile-data", "exif": "exif-data", "xmp": "xmp-data"}
# TIFF keeps the layout of the samples and the description of the picture in one directory. This is the
# description: text, camera, date, author, rights, and the Exif and GPS directories.
_DESCRIPTIVE_TAGS = {270, 271, 272, 305, 306, 315, 33432, _EXIF_DIRECTORY, 0x8825}
DAMAGE_ERRORS = (  # what Pillow raises on damaged EXIF
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError),
    *(AttributeError, ArithmeticError, RuntimeError, struct.error),
)

# XMP by its customary prefixes. Motion photos, gain maps, depth maps and extended XMP are parts of a file
# that are not handed on, so what is said of them is not either.
_GONE = rb"(?:G?Camera|MicroVideo|hdrgm|HDRGainMap|Container|Item|GDepth|GImage|GAudio|apdi|xmpNote):\w+"
_GONE_ATTRIBUTE = re.compile(rb"\s(" + _GONE + rb")\s*=\s*(?:\"[^\"]*\"|'[^']*')")
_GONE_ELEMENT = re.compile(rb"<(" + _GONE + rb")\b[^>]*?(?:/>|>.*?</\1\s*>)", re.DOTALL)
_WIDTHS = rb"exif:PixelXDimension|tiff:ImageWidth|stDim:w"
_HEIGHTS = rb"exif:PixelYDimension|tiff:ImageLength|stDim:h"
_PANORAMA = re.compile(rb"(GPano:\w*(Width|Left|Height|Top)Pixels(?:\s*=\s*[\"']|>))(\d+)")


@dataclass(frozen=True)
class Metadata:
    """Describes an upright picture."""

    icc_profile: bytes | None = None
    exif: bytes | None = None  # without an orientation
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None  # horizontal, vertical
    text: Mapping[str, str] = field(default_factory=dict)  # of a PNG, by keyword
    size: tuple[int, int] | None = field(default=None, compare=False)  # (height, width) of the picture

    def fitted(self, name: str, height: int, width: int, colours: int) -> tuple["Metadata", list[str]]:
        """Return metadata that is true of a picture in the format `name`, and what had to be left out.

        `colours` is 1 for grey and 3 for RGB.
        """
        if name == "BMP":
            said = [what for what in (*_BLOBS, "text") if getattr(self, what)]
            return Metadata(dpi=self.dpi), [f"{what} (BMP holds none)" for what in said]
        lost: list[str] = []
        fitted = self
        if self.icc_profile and not _describes(self.icc_profile, colours):
            lost.append("a colour profile that is damaged or of another colour space")
            fitted = replace(fitted, icc_profile=None)
        if self.exif and name == "TIFF":
            lost.append("EXIF (none is written into TIFF)")
            fitted = replace(fitted, exif=None)
        foreign = [key for key, value in self.text.items() if name != "PNG" or not _is_plain(key, value)]
        if foreign:
            lost.append(
                f"the texts {', '.join(foreign)} (only PNG is given texts, in ASCII, by keys of one word)"
            )
            fitted = replace(fitted, text={key: self.text[key] for key in self.text if key not in foreign})
        fitted = fitted._resized(name, height, width, lost)
        if name == "JPEG" and max(len(fitted.exif or b""), len(fitted.xmp or b"")) > _LARGEST_SEGMENT:
            lost.append(f"EXIF and XMP, which are more than {_LARGEST_SEGMENT} bytes")
            fitted = replace(fitted, exif=None, xmp=None)
        return fitted, lost

    def _resized(self, name: str, height: int, width: int, lost: list[str]) -> "Metadata":
        """Return metadata whose EXIF and XMP state this size; what they say no longer goes to `lost`."""
        xmp, gone = _true_xmp(self.xmp, self.size or (height, width), (height, width))
        if gone:
            lost.append(f"what XMP says of parts that are not handed on ({', '.join(gone)})")
        exif = Image.Exif()
        try:
            exif.load(self.exif or b"")
            exif.update({tag: size for tag, size in {0x0100: width, 0x0101: height}.items() if tag in exif})
            directory = exif.get_ifd(_EXIF_DIRECTORY)
            directory.update({0xA002: width, 0xA003: height})
            # libvips would make one up: 1 is sRGB, 0xFFFF says "by the profile"
            directory.setdefault(_COLOUR_SPACE, 0xFFFF if self.icc_profile else 1)
            # JPEG and WebP have no other place for the resolution
            wanted = self.exif or (self.dpi and name in ("JPEG", "WEBP"))
            return replace(self, xmp=xmp, exif=exif.tobytes() if wanted else None)
        except DAMAGE_ERRORS as error:
            lost.append(f"EXIF, which cannot be written ({error})")
            return replace(self, xmp=xmp, exif=None)

    def attach(self, image: pyvips.Image) -> pyvips.Image:
        """Give the image this description, for a saver whose `keep` is `self.keep`."""
        horizontal, vertical = self.dpi or _UNKNOWN_DPI
        image = image.copy(xres=horizontal / 25.4, yres=vertical / 25.4)  # pixels per mm
        for name, vips_name in _BLOBS.items():
            if getattr(self, name):
                image.set_type(pyvips.GValue.blob_type, vips_name, getattr(self, name))
        for number, (key, value) in enumerate(self.text.items()):
            image.set_type(pyvips.GValue.gstr_type, f"png-comment-{number}-{key}", value)
        return image

    @property
    def keep(self) -> str:
        # asked to keep EXIF where there is none, libvips makes one up
        return "icc|xmp|other|exif" if self.exif else "icc|xmp|other"


def read_metadata(
    image: pyvips.Image, size: tuple[int, int], tiff: Image.Exif | None
) -> tuple[Metadata, list[str]]:
    """Read the metadata of an upright picture (height, width), and what is damaged in it.

    `tiff` is the directory of a TIFF, in which libvips sees no EXIF.
    """
    found = {name: image.get(vips) for name, vips in _BLOBS.items() if image.get_typeof(vips)}
    xmp = found.get("xmp")
    comments = [name for name in image.get_fields() if name.startswith("png-comment-")]
    text = {name.split("-", 3)[3]: image.get(name) for name in comments}
    known = {round(image.xres, 2), round(image.yres, 2)} - {1.0, round(_UNKNOWN_DPI[0] / 25.4, 2)}
    metadata = Metadata(
        None if image.interpretation == "cmyk" else found.get("icc_profile") or None,  # RGB is made of it
        xmp=_set_in_xmp(xmp, rb"tiff:Orientation", 1) if xmp else None,
        dpi=(image.xres * 25.4, image.yres * 25.4) if known else None,
        text=text,
        size=size,
    )
    try:
        exif = tiff if tiff is not None else Image.Exif()
        if tiff is None:
            exif.load(found.get("exif") or b"")
        for tag in set(exif) - _DESCRIPTIVE_TAGS if tiff is not None else {_ORIENTATION} & set(exif):
            del exif[tag]
        return replace(metadata, exif=exif.tobytes() if len(exif) else None), []
    except DAMAGE_ERRORS as error:
        return metadata, [f"EXIF, which is damaged ({error})"]


def _is_plain(key: str, value: str) -> bool:
    """Tell whether others read a PNG's text that libvips writes: one of ASCII, by a key of one word."""
    return bool(re.fullmatch(r"[!-~]{1,79}", key)) and value.isascii()


def _describes(profile: bytes, colours: int) -> bool:
    """Tell whether an ICC profile is whole and of grey or RGB as the picture is (ICC.1, section 7.2)."""
    whole = len(profile) == int.from_bytes(profile[:4], "big") and profile[36:40] == b"acsp"
    return whole and profile[16:20] == {1: b"GRAY", 3: b"RGB "}[colours]


def _true_xmp(
    xmp: bytes | None, old: tuple[int, int], new: tuple[int, int]
) -> tuple[bytes | None, list[str]]:
    """Return XMP that is true after a resize from one (height, width) to another, and what left it."""
    if xmp is None:
        return None, []
    kinds = (_GONE_ELEMENT, _GONE_ATTRIBUTE)
    gone = sorted({match[1].decode() for kind in kinds for match in kind.finditer(xmp)})
    for kind in kinds:
        xmp = kind.sub(b"", xmp)
    for axis, names in enumerate((_HEIGHTS, _WIDTHS)):
        xmp = _set_in_xmp(xmp, names, new[axis])

    def enlarged(match: re.Match[bytes]) -> bytes:
        axis = 1 if match[2] in (b"Width", b"Left") else 0
        return match[1] + b"%d" % round(int(match[3]) * new[axis] / old[axis])

    return _PANORAMA.sub(enlarged, xmp), gone


def _set_in_xmp(xmp: bytes, names: bytes, value: int) -> bytes:
    return re.sub(rb"((?:" + names + rb")(?:\s*=\s*[\"']|>))\d+", rb"\g<1>%d" % value, xmp)
