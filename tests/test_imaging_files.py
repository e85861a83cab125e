"""Tests of imaging/files.py and metadata.py: every kind of file, against what other libraries put in it."""

import io
import itertools
import multiprocessing
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
import pyvips
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, ImageOps

from imaging import files
from imaging.files import UnreadableImageError, check_format, decode_image, image_size, read_rgb, write_image
from imaging.kinds import WRITABLE_SUFFIXES
from imaging.metadata import Metadata
from imaging.pixels import as_rgb8, spread_colours

HEIGHT, WIDTH = 9, 14
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = PROFILE[:16] + b"GRAY" + PROFILE[20:]
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description%b>%b</rdf:Description></x:xmpmeta>'


def random_pixels(channels=3, dtype=np.uint8, seed=0):
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def exif_block(orientation=None, width=None):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:02:03 04:05:06"
    exif.get_ifd(0x8769)[0xA005] = {1: "R98", 2: b"0100"}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    exif.update({tag: value for tag, value in {0x0112: orientation, 0x0100: width}.items() if value})
    return exif.tobytes()


def parsed_exif(block):
    exif = Image.Exif()
    exif.load(block)
    return exif


def png_with_chunks(encoded, chunks):
    """A PNG with more (kind, content) chunks."""
    at = encoded.index(b"IDAT") - 4
    parts = [(struct.pack(">I", len(data)), kind + data) for kind, data in chunks]
    inserted = b"".join(length + body + struct.pack(">I", zlib.crc32(body)) for length, body in parts)
    return encoded[:at] + inserted + encoded[at:]


def assert_decodes_to(path, pixels, alpha=None):
    decoded = decode_image(path)
    assert decoded.pixels.dtype == pixels.dtype
    assert np.array_equal(decoded.pixels, pixels)
    assert decoded.pixels.flags.writeable
    assert decoded.pixels.flags.c_contiguous
    assert (decoded.alpha is None) == (alpha is None)
    if alpha is not None:
        assert decoded.alpha.dtype == pixels.dtype
        assert np.array_equal(decoded.alpha, alpha)
    assert image_size(path) == pixels.shape[:2]
    return decoded


def assert_unreadable(path, reason):
    for read in (decode_image, image_size):
        with pytest.raises(UnreadableImageError, match=reason) as raised:
            read(path)
        assert str(raised.value).startswith(f"{path}: ")
        assert str(raised.value).count(str(path)) == 1


# Round trips


@st.composite
def pictures(draw):
    """A suffix of a lossless format, and pixels, alpha and metadata, of which it may hold a part."""
    dtype, grey = draw(st.sampled_from([np.uint8, np.uint16])), draw(st.booleans())
    size = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    pixels = draw(arrays(dtype, size if grey else (*size, 3)))
    alpha = draw(st.none() | arrays(dtype, size))
    values = {
        "icc_profile": st.sampled_from([PROFILE, GREY_PROFILE, b"junk", PROFILE[:-10]]),
        "exif": st.just(exif_block(width=7)),
        "xmp": st.just(XMP % (b"", b"")),
        "dpi": st.sampled_from([(300.0, 300.0), (96.0, 48.0)]),
        "text": st.dictionaries(
            st.sampled_from(["Author", "Two words"]), st.sampled_from(["Me", "日本", "é" * 9])
        ),
    }
    said = draw(st.fixed_dictionaries({}, optional=values))
    return draw(st.sampled_from([".png", ".tif"])), pixels, alpha, said


@given(picture=pictures())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_picture_comes_back_as_written_and_what_is_lost_beside_it_is_said(tmp_path, caplog, picture):
    suffix, pixels, alpha, said = picture
    path = tmp_path / f"image{suffix}"
    caplog.clear()
    write_image(path, pixels, alpha, metadata=Metadata(**said))
    warned = caplog.text
    assert not warned or str(path) in warned
    found = assert_decodes_to(path, pixels, alpha).metadata
    visible = pixels if alpha is None else spread_colours(pixels, alpha)
    assert np.array_equal(read_rgb(path), as_rgb8(visible))
    if alpha is None:
        stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)  # colours from blue to red
        assert np.array_equal(stored if pixels.ndim == 2 else stored[..., ::-1], pixels)
    assert found.icc_profile == said.get("icc_profile") or "profile" in warned
    assert found.xmp == said.get("xmp")
    if found.exif and "exif" in said:
        exif = parsed_exif(found.exif)
        assert (exif[0x010F], exif.get(0x0100)) == ("Maker", None)
        assert exif.get_ifd(0x8825) == {1: "N", 2: (1.0, 2.0, 3.0)}
        assert exif.get_ifd(0xA005) == {1: "R98", 2: b"0100"}
        written = exif.get_ifd(0x8769)
        size = (written[0xA003], written[0xA002])
        assert (size, written[0x9003]) == (pixels.shape[:2], "2020:02:03 04:05:06")
    else:
        assert "exif" not in said or "EXIF" in warned
    if "dpi" in said:
        assert found.dpi == pytest.approx(said["dpi"], abs=0.02)
    for key, text in said.get("text", {}).items():
        assert found.text.get(key) == text or f"text '{key}'" in warned


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_files_stay_close_and_say_what_they_can(tmp_path, suffix, caplog):
    rows, columns = np.mgrid[0:64, 0:64]
    pixels = np.stack([rows * 3, columns * 3, (rows + columns) % 2 * 60 + 90], axis=-1).astype(np.uint8)
    path, xmp = tmp_path / f"i{suffix}", XMP % (b"", b"")
    write_image(path, pixels, metadata=Metadata(PROFILE, exif_block(), xmp, (300, 300)))
    decoded = assert_decodes_to(path, np.array(Image.open(path)))
    # blue alternates: halved chroma would lose it
    assert np.abs(decoded.pixels.astype(int) - pixels).mean() < (2 if suffix == ".jpg" else 16)
    with Image.open(path) as image:
        assert (image.info["icc_profile"], image.info["xmp"]) == (PROFILE, xmp)
        assert image.getexif()[0x011A] == 300
    assert not caplog.text


def test_large_files_hold_a_large_profile_and_text(tmp_path):
    profile = struct.pack(">I", len(PROFILE) + 3_000_000) + PROFILE[4:] + bytes(3_000_000)
    pixels = np.random.default_rng(0).integers(0, 65535, (700, 300, 3), np.uint16)
    said = Metadata(profile, text={"Notes": "abc" * 1_000_000})
    for name in ("i.tif", "i.png"):
        write_image(tmp_path / name, pixels, metadata=said)
        found = assert_decodes_to(tmp_path / name, pixels).metadata
        assert found.icc_profile == profile
    assert found.text == said.text


# Files of others


def assert_decodes_as_pillow_does(path):
    """Also upright; of 8 bits."""
    with Image.open(path) as opened:
        expected = np.array(ImageOps.exif_transpose(opened).convert("RGBA"))
    decoded = decode_image(path)
    assert np.array_equal(as_rgb8(decoded.pixels), expected[..., :3])
    assert np.array_equal(255 if decoded.alpha is None else decoded.alpha, expected[..., 3]) or (
        decoded.alpha is None and (expected[..., 3] == 255).all()
    )
    assert image_size(path) == expected.shape[:2]
    return decoded


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif"])
def test_files_of_pillow_are_read_as_pillow_reads_them(tmp_path, suffix):
    palette = Image.fromarray(random_pixels(3)).quantize(9)
    images = [Image.fromarray(random_pixels(channels)) for channels in (1, 3)]
    images += [Image.fromarray(random_pixels(1) > 127), palette]
    if suffix in (".png", ".tif"):
        images += [Image.fromarray(random_pixels(channels)) for channels in (2, 4)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}{suffix}")
        grey = assert_decodes_as_pillow_does(tmp_path / f"{number}{suffix}").pixels.ndim == 2
        assert suffix == ".gif" or grey == (image.mode in ("1", "L", "LA"))
    if suffix == ".png":
        colour = tuple(map(int, random_pixels(3)[3, 4]))  # of a pixel of the second image
        for image, hidden in ((palette, 2), (palette, bytes(range(9))), (images[1], colour)):
            image.save(tmp_path / "hidden.png", transparency=hidden)
            assert assert_decodes_as_pillow_does(tmp_path / "hidden.png").alpha.min() == 0


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_becomes_srgb_through_its_profile_as_littlecms_does(tmp_path, suffix):
    image = pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb")
    cmyk_profile = image.icc_transform("cmyk", input_profile="srgb").get("icc-profile-data")
    path = tmp_path / f"print{suffix}"
    image = Image.fromarray(np.kron(random_pixels(3), np.ones((8, 8, 1), np.uint8))).convert("CMYK")
    image.save(path, icc_profile=cmyk_profile)
    profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(cmyk_profile)), ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    expected = ImageCms.profileToProfile(Image.open(path), profile, srgb, intent, outputMode="RGB")
    decoded = decode_image(path)
    assert np.abs(decoded.pixels.astype(int) - np.array(expected)).max() <= 2
    assert decoded.metadata.icc_profile is None


@pytest.mark.parametrize(
    ("suffix", "count"), [(".png", 2), (".tif", 2), (".webp", 2), (".gif", 2), (".mpo", 1)]
)
def test_the_first_of_several_frames_is_read_and_previews_are_none(tmp_path, suffix, count):
    path = tmp_path / f"i{suffix}"
    frames = [Image.fromarray(np.full((5, 6, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert assert_decodes_to(path, np.array(frames[0])).frames == count


@pytest.mark.parametrize("depth", [8, 10])
def test_avif_is_read_with_all_its_bits(tmp_path, depth):
    dtype = np.uint8 if depth == 8 else np.uint16
    pixels = np.kron(random_pixels(3, dtype), np.ones((8, 8, 1), dtype))
    pyvips.Image.new_from_array(pixels, interpretation="auto").heifsave(
        str(tmp_path / "i.avif"), compression="av1", Q=100, bitdepth=depth
    )
    decoded = decode_image(tmp_path / "i.avif")
    assert decoded.pixels.dtype == dtype
    assert np.abs(decoded.pixels.astype(int) - pixels).mean() < 4 * np.iinfo(dtype).max / 255


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_premultiplied_alpha_is_divided_out(tmp_path, dtype):
    largest = np.iinfo(dtype).max
    alpha, colours = random_pixels(1, dtype) // 2 + largest // 2, random_pixels(3, dtype)
    premultiplied = np.round(colours.astype(float) * alpha[..., None] / largest).astype(dtype)
    samples = np.concatenate([premultiplied, alpha[..., None]], axis=-1)
    tifffile.imwrite(tmp_path / "image.tif", samples, photometric="rgb", extrasamples=["assocalpha"])
    decoded = decode_image(tmp_path / "image.tif")
    assert np.array_equal(decoded.alpha, alpha)
    assert np.abs(decoded.pixels.astype(int) - colours).max() <= 2


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("photometric", "extras", "alpha"),
    [
        ("minisblack", ["unspecified"] * 3, None),
        ("minisblack", ["unassalpha", "unspecified"], 1),
        ("rgb", ["unspecified"], None),
        ("rgb", ["unspecified", "unassalpha"], 4),
    ],
)
def test_bands_of_data_are_no_transparency_and_are_said(tmp_path, caplog, dtype, photometric, extras, alpha):
    colours = 1 if photometric == "minisblack" else 3
    samples = random_pixels(colours + len(extras), dtype)
    samples[:2] = 0
    tifffile.imwrite(tmp_path / "i.tif", samples, photometric=photometric, extrasamples=extras)
    read_rgb(tmp_path / "i.tif")
    assert caplog.records == []
    pixels = samples[..., 0] if colours == 1 else samples[..., :3]
    assert_decodes_to(tmp_path / "i.tif", pixels, None if alpha is None else samples[..., alpha])
    (record,) = caplog.records
    assert f"{extras.count('unspecified')} band" in record.getMessage()
    assert str(tmp_path / "i.tif") in record.getMessage()


def test_the_fourth_band_of_a_tiff_that_says_nothing_of_it_is_alpha(tmp_path):
    """As OpenCV writes it."""
    samples = random_pixels(4, np.uint16)
    cv2.imwrite(str(tmp_path / "i.tif"), samples)
    assert_decodes_to(tmp_path / "i.tif", samples[..., 2::-1], samples[..., 3])


def test_a_forked_worker_decodes_after_its_parent_has_read_and_written(tmp_path):
    photo = pyvips.Image.black(300, 300, bands=3).copy(interpretation="srgb")
    photo.pngsave(str(tmp_path / "interlaced.png"), interlace=True)
    photo.jpegsave(str(tmp_path / "progressive.jpg"), interlace=True)
    photo.tiffsave(str(tmp_path / "tiled.tif"), tile=True, pyramid=True)
    photo.heifsave(str(tmp_path / "i.avif"), compression="av1")
    photo.icc_transform("cmyk", input_profile="srgb").jpegsave(str(tmp_path / "cmyk.jpg"))
    for name in ("i.bmp", "i.gif", "i.webp"):
        Image.fromarray(random_pixels(3)).save(tmp_path / name)
    for name in ("deep.png", "deep.tif"):
        write_image(tmp_path / name, random_pixels(3, np.uint16))

    def decode_all():
        for path in sorted(tmp_path.iterdir()):
            assert decode_image(path).pixels.shape[:2] == image_size(path)

    decode_all()
    worker = multiprocessing.get_context("fork").Process(target=decode_all)
    worker.start()
    worker.join(30)
    ended = worker.exitcode
    worker.kill()
    assert ended == 0


# Orientation


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_pictures_are_turned_upright_as_pillow_does(tmp_path, suffix):
    for orientation in (*range(1, 9), *([] if suffix == ".tif" else [99])):  # which does not exist
        path = tmp_path / f"{orientation}{suffix}"
        Image.fromarray(random_pixels(3)).save(path, exif=exif_block(orientation))
        exif = parsed_exif(assert_decodes_as_pillow_does(path).metadata.exif)
        assert 0x0112 not in exif
        assert (exif[0x010F], exif.get_ifd(0x8769)[0x9003]) == ("Maker", "2020:02:03 04:05:06")


# What a file says besides its pixels


@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"])
def test_damaged_exif_does_not_cost_the_picture_and_is_said_once(tmp_path, caplog, block):
    path = tmp_path / "image.jpg"
    Image.fromarray(random_pixels(3)).save(path, exif=block)
    read_rgb(path)
    assert caplog.records == []
    assert decode_image(path).metadata.exif is None
    assert len(caplog.records) <= 1
    assert all(str(path) in record.getMessage() for record in caplog.records)


def test_a_tiff_hands_on_what_describes_the_picture_and_not_its_layout(tmp_path):
    Image.fromarray(random_pixels(3)).save(tmp_path / "image.tif", exif=exif_block(), dpi=(300, 300))
    assert set(parsed_exif(decode_image(tmp_path / "image.tif").metadata.exif)) == {0x010F, 0x8769, 0x8825}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_xmp_says_nothing_of_sizes_and_of_parts_that_are_gone(tmp_path, caplog, suffix):
    attributes = (
        b' tiff:Orientation="6" tiff:ImageWidth="14" GPano:FullPanoWidthPixels="28" GCamera:MotionPhoto="1" '
        b'hdrgm:Version="1.0" dc:format="image/jpeg"'
    )
    elements = (
        b"<exif:PixelYDimension>9</exif:PixelYDimension>"
        b'<Container:Directory><rdf:Seq><rdf:li><Container:Item Item:Mime="video/mp4"/></rdf:li></rdf:Seq>'
        b"</Container:Directory><xmpNote:HasExtendedXMP>1F</xmpNote:HasExtendedXMP><dc:title>a</dc:title>"
    )
    source, target = tmp_path / "i.png", tmp_path / f"o{suffix}"
    Image.fromarray(random_pixels(3)).save(source)
    chunk = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % (attributes, elements))
    source.write_bytes(png_with_chunks(source.read_bytes(), [chunk]))
    write_image(target, np.zeros((36, 56, 3), np.uint8), metadata=decode_image(source).metadata)
    expected = XMP % (b' dc:format="image/jpeg"', b"<dc:title>a</dc:title>")
    assert decode_image(target).metadata.xmp == expected
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in ("GCamera:MotionPhoto", "hdrgm:Version", "GPano"))
    assert "tiff" not in record.getMessage()


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([], ""),
        ([(b"gAMA", struct.pack(">I", 45455))], ""),
        ([(b"gAMA", struct.pack(">I", 100000)), (b"sRGB", b"\0")], ""),
        ([(b"gAMA", struct.pack(">I", 100000))], "gAMA"),
        ([(b"tEXt", b"Comment\0not sRGB"), (b"cHRM", struct.pack(">8I", *range(1, 9)))], "cHRM"),
        ([(b"cICP", bytes([1, 13, 0, 1]))], ""),
        ([(b"cICP", bytes([12, 13, 0, 1]))], "primaries 12"),
    ],
)
def test_another_colour_space_than_srgb_is_said(tmp_path, caplog, chunks, said):
    path = tmp_path / "i.png"
    write_image(path, random_pixels(3))
    path.write_bytes(png_with_chunks(path.read_bytes(), chunks))
    assert_decodes_to(path, random_pixels(3))
    assert [said in record.getMessage() for record in caplog.records] == ([True] if said else [])


# What cannot be read


def hdr_avif(path):
    Image.fromarray(random_pixels(3)).save(path)
    encoded = path.read_bytes()
    at = encoded.index(b"colrnclx") + 8
    path.write_bytes(encoded[:at] + struct.pack(">HHH", 9, 16, 9) + encoded[at + 6 :])


def hdr_png(path):
    write_image(path, random_pixels(3, np.uint16))
    path.write_bytes(png_with_chunks(path.read_bytes(), [(b"cICP", bytes([9, 18, 0, 1]))]))


def holding(content):
    return lambda path: path.write_bytes(content)


def tiff(dtype=np.uint8, **how):
    return lambda path: tifffile.imwrite(path, np.zeros((9, 9), dtype), **how)


HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(2000)


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("hdr.avif", hdr_avif, "HDR"),
        ("hdr.png", hdr_png, "HDR"),
        ("i.heic", holding(HEIC), "HEIC"),
        ("heic.jpg", holding(HEIC), "HEIC"),
        ("i.jxl", holding(b"\xff\x0a" + bytes(99)), "JPEG XL"),
        ("lab.tif", lambda path: Image.new("LAB", (9, 9)).save(path), "LAB"),
        ("eps.png", holding(b"%!PS-Adobe-3.0 EPSF-3.0"), "not an image"),
        ("empty.png", holding(b""), "not an image"),
        ("gone.png", lambda path: None, r"cannot be read \(No such file"),
        ("folder.png", lambda path: path.mkdir(), "cannot be read"),
        ("float.tif", tiff(np.float32), "float"),
        ("raw.mrw", holding(b"\0MRM" + bytes(99)), "raw"),
        ("raw.tif", tiff(subfiletype=1), "raw"),
        ("dng.tif", tiff(extratags=[(50706, "B", 4, (1, 4, 0, 0), False)]), "raw"),
        *((f"raw{suffix}", tiff(), "raw") for suffix in (".dng", ".NEF", ".cr2", ".arw")),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line_by_what_it_is(tmp_path, name, make, reason):
    make(tmp_path / name)
    assert_unreadable(tmp_path / name, reason)


@pytest.mark.parametrize("name", ["IMG_1.HEIC", "photo.dng", "i.tif", "i.jxl"])
def test_a_jpeg_is_read_whatever_its_name(tmp_path, name):
    Image.fromarray(random_pixels(3)).save(tmp_path / name, "JPEG")
    assert_decodes_to(tmp_path / name, np.array(Image.open(tmp_path / name)))


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        *itertools.product([".png", ".tif"], [np.uint8, np.uint16]),
        *itertools.product([".webp", ".jpg"], [np.uint8]),
    ],
)
@given(share=st.floats(0, 1, exclude_max=True), channels=st.sampled_from([1, 3]), has_alpha=st.booleans())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_anywhere_is_never_half_a_picture(
    tmp_path, suffix, dtype, share, channels, has_alpha
):
    path, pixels = tmp_path / f"image{suffix}", random_pixels(channels, dtype)
    write_image(path, pixels, random_pixels(1, dtype, seed=1) if has_alpha and suffix != ".jpg" else None)
    encoded, whole = path.read_bytes(), decode_image(path)
    kept = int(share * len(encoded))
    path.write_bytes(encoded[:kept])
    try:
        pixels = decode_image(path).pixels
    except UnreadableImageError:
        return
    assert np.array_equal(pixels, whole.pixels)  # only a checksum is missing
    assert kept > 0.9 * len(encoded)


def test_changed_bytes_of_a_png_are_noticed(tmp_path):
    write_image(tmp_path / "i.png", random_pixels(3))
    encoded = bytearray((tmp_path / "i.png").read_bytes())
    encoded[len(encoded) // 2] ^= 0xFF
    (tmp_path / "i.png").write_bytes(encoded)
    with pytest.raises(UnreadableImageError, match="PNG that is damaged"):
        decode_image(tmp_path / "i.png")


def test_image_size_does_not_decode_the_pixels(tmp_path):
    for suffix in (".png", ".jpg", ".bmp"):
        path = tmp_path / f"image{suffix}"
        Image.fromarray(np.zeros((300, 400, 3), np.uint8) + 7).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
        assert image_size(path) == (300, 400)
        with pytest.raises(UnreadableImageError, match="damaged or cut short"):
            decode_image(path)


def test_the_limit_of_pixels_is_this_module_s_own_and_holds_before_decoding(tmp_path, monkeypatch):
    write_image(tmp_path / "bomb.png", random_pixels(3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert_decodes_to(tmp_path / "bomb.png", random_pixels(3))
    monkeypatch.setattr(files, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    assert_unreadable(tmp_path / "bomb.png", f"{HEIGHT * WIDTH} pixels")


def test_a_lack_of_memory_names_the_file(tmp_path, monkeypatch):
    def exhaust(shape, dtype):
        raise MemoryError

    write_image(tmp_path / "image.png", random_pixels(3))
    monkeypatch.setattr(files.np, "empty", exhaust)
    with pytest.raises(UnreadableImageError, match=r"image\.png: .*memory"):
        decode_image(tmp_path / "image.png")


def test_names_that_are_not_utf_8_or_hold_brackets_work(tmp_path):
    for name in (os.fsdecode(b"caf\xe9.png"), "a[page=3].tif", "a b'c.jpg"):
        write_image(tmp_path / name, random_pixels(3))
        assert decode_image(tmp_path / name).pixels.shape == (HEIGHT, WIDTH, 3)
        assert image_size(tmp_path / name) == (HEIGHT, WIDTH)
    with pytest.raises(UnreadableImageError):
        decode_image(tmp_path / os.fsdecode(b"gone\xe9.png"))


# What cannot be written


@pytest.mark.parametrize(
    ("name", "size", "how", "value"),
    [
        ("a.webp", (100, 16384), {}, "16384"),
        ("a.jpg", (65501, 100), {}, "65501"),
        ("a.tif", (40_000, 40_000), {}, "4 GB"),
        ("a.pgn", (1, 1), {}, r"\.pgn"),
        ("a.jpg", (1, 1), {"dtype": np.uint16}, "JPEG.*16 bits"),
        ("a.jpg", (1, 1), {"has_alpha": True}, "JPEG.*alpha"),
    ],
)
def test_what_a_format_cannot_hold_is_known_before_it_is_written(name, size, how, value):
    with pytest.raises(ValueError, match=value):
        check_format(name, *size, **how)


def test_the_largest_that_a_format_holds_is_not_refused():
    sizes = {"a.webp": (16383, 16383), "a.jpg": (65500, 9), "a.png": (99_999, 99_999)}
    assert [check_format(name, *size) for name, size in sizes.items()] == ["WEBP", "JPEG", "PNG"]


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"pixels": random_pixels(4)}, "4"),
        ({"pixels": np.zeros((0, 4), np.uint8)}, r"\(0, 4\)"),
        ({"pixels": np.zeros((4, 4))}, "float64"),
        ({"pixels": random_pixels(3), "alpha": random_pixels(1, np.uint16)}, "uint16"),
        ({"pixels": random_pixels(3), "alpha": random_pixels(1).T}, r"\(14, 9\)"),
    ],
)
def test_what_is_no_picture_is_refused_and_leaves_nothing(tmp_path, arguments, value):
    with pytest.raises(ValueError, match=value):
        write_image(tmp_path / "a.png", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_every_suffix_is_written_as_its_format_or_the_old_file_stays(tmp_path, monkeypatch):
    for suffix in WRITABLE_SUFFIXES:
        write_image(tmp_path / f"i{suffix}", random_pixels(3))
        assert Image.open(tmp_path / f"i{suffix}").format == Image.registered_extensions()[suffix]

    def fail(*args, **options):
        raise pyvips.Error("encoder error")

    monkeypatch.setattr(pyvips.Image, "write_to_buffer", fail)
    with pytest.raises(ValueError, match=r"i\.png: cannot be encoded as PNG.*encoder error"):
        write_image(tmp_path / "i.png", random_pixels(3, seed=1))
    assert_decodes_to(tmp_path / "i.png", random_pixels(3))
