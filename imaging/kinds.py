"""Tells files apart by their first bytes, and lists the images of a folder."""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

WRITABLE_SUFFIXES = frozenset(".jfif .jpe .jpeg .jpg .png .tif .tiff .webp".split())
IMAGE_SUFFIXES = WRITABLE_SUFFIXES | {".avif", ".bmp", ".gif"}
READABLE = frozenset("AVIF BMP GIF JPEG PNG TIFF WEBP".split())

DEVELOP = "camera raw is not a picture yet: develop it first, into a TIFF or JPEG"
_CONVERT = "save it as PNG or TIFF first"
# Names of kinds that cannot be read. A camera's raw file is a TIFF by its first bytes.
_OTHER_SUFFIXES = frozenset(
    """.3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .exr .hdr .heic .heif .hif .iiq .j2k .jp2 .jxl .kdc .mef .mos
    .mrw .nef .nrw .orf .pbm .pef .pgm .pnm .ppm .psd .raf .raw .rw2 .rwl .sr2 .srf .srw .svg .tga .x3f
    """.split()
)
_FIRST_BYTES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
    "WEBP": rb"RIFF.{4}WEBP",
    "camera raw": rb"II\*\0.{4}CR|II.{4}HEAP|IIR[OS]|IIU\0|\0MRM|FUJIFILMCCD-RAW|FOVb|.{4}ftypcrx ",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb".{4}ftyp(?:avi[fs]|.{8,48}avif)",
    "HEIC": rb".{4}ftyp(?:hei|hev|mif1|msf1)",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
}


def kind_of(path: Path) -> str | None:
    """Name the kind of a file, such as "JPEG", by its first bytes, or None for what is no image; OSError."""
    with path.open("rb") as file:
        start = file.read(64)
    kinds = (kind for kind, begin in _FIRST_BYTES.items() if re.match(begin, start, re.DOTALL))
    return next(kinds, None)


def refusal(kind: str | None, suffix: str) -> str | None:
    """Say the reason why a file cannot be read, with a remedy, or None if it can."""
    if kind is None:
        return f"not an image of a kind that can be read, or its header is damaged; {_CONVERT}"
    if kind == "camera raw" or (kind == "TIFF" and suffix in _OTHER_SUFFIXES):
        return DEVELOP
    return None if kind in READABLE else f"{kind}, which cannot be decoded here; {_CONVERT}"


def list_images(folder: str | Path, recursive: bool = True) -> list[Path]:
    """List the images of a folder, sorted, without hidden ones; ValueError where there is none.

    Files named as images are taken, whatever they hold; those named as kinds that cannot be read are taken
    if their first bytes say otherwise, and are else passed over with a warning.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise ValueError(f"{folder}: {what}; give the folder that holds the images")
    passed_over: Counter[str] = Counter()
    images = []
    refused: list[OSError] = []
    for path in _files_below(folder, recursive, refused):
        suffix = path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES | _OTHER_SUFFIXES:
            continue
        reason = None if path.is_file() else "a link to nothing, or no ordinary file"
        if reason is None and suffix in _OTHER_SUFFIXES:
            try:
                reason = refusal(kind_of(path), suffix)
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
        if reason is None:
            images.append(path)
        else:
            passed_over[f"{suffix} ({reason})"] += 1
    passed_over.update(f"folder that may not be read ({error.filename})" for error in refused)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(passed_over.items())) or "nothing"
    if passed_over:
        logger.warning("%s: passed over: %s", folder, kinds)
    if not images:
        where = "or its subfolders" if recursive else "itself (subfolders were not searched)"
        wanted = ", ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"{folder}: no image in this folder {where}; wanted {wanted}; passed over: {kinds}")
    return sorted(images)


def _files_below(folder: Path, recursive: bool, refused: list[OSError]) -> Iterator[Path]:
    """Walk each folder once, as links may lead in circles."""
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
