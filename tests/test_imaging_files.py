"""Tests of imaging/files.py and metadata.py: every kind of file, against what other libraries put in it."""

import io
import itertools
import multiprocessing
import os
import pickle
import stat
import struct
import zlib

import cv2
import numpy as np
import pytest
import pyvips
import tifffile
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageCms, ImageOps

from imaging import files as images
from imaging.files import (
    WRITABLE_SUFFIXES,
    UnreadableImageError,
    check_format,
    decode_image,
    image_size,
    list_images,
    pixels_to_unit,
    read_rgb,
    to_model_range,
    to_unit_range,
    unit_to_pixels,
    write_image,
)
from imaging.metadata import Metadata

HEIGHT, WIDTH = 9, 14
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def random_pixels(channels=3, dtype=np.uint8, seed=0):
    shape = (HEIGHT, WIDTH) if channels == 1 else (HEIGHT, WIDTH, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def exif_block(orientation=None):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0x9003] = "2020:02:03 04:05:06"
    if orientation is not None:
        exif[0x0112] = orientation
    return exif.tobytes()


def parsed_exif(block):
    exif = Image.Exif()
    exif.load(block)
    return exif


def png_with_chunks(encoded, chunks, before=b"IDAT"):
    """Insert (kind, data) chunks into an encoded PNG."""
    at = encoded.index(before) - 4
    inserted = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return encoded[:at] + inserted + encoded[at:]


def assert_decodes_to(path, pixels, alpha=None):
    decoded = decode_image(path)
    assert decoded.path == path
    assert decoded.pixels.dtype == pixels.dtype
    assert np.array_equal(decoded.pixels, pixels)
    assert decoded.pixels.flags.writeable
    assert decoded.pixels.flags.c_contiguous
    if alpha is None:
        assert decoded.alpha is None
    else:
        assert decoded.alpha is not None
        assert decoded.alpha.dtype == pixels.dtype
        assert np.array_equal(decoded.alpha, alpha)
    assert image_size(path) == pixels.shape[:2]
    return decoded


def assert_unreadable(path, reason):
    with pytest.raises(UnreadableImageError, match=reason) as raised:
        decode_image(path)
    assert str(raised.value).startswith(f"{path}: ")
    assert str(raised.value).count(str(path)) == 1
    return str(raised.value)


# Ranges


def test_the_two_ranges_are_inverse_and_meet_at_their_ends():
    unit = torch.linspace(0, 1, 257, dtype=torch.float64)
    assert to_model_range(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1.0, 0.0, 1.0]
    assert to_unit_range(torch.tensor([-1.0, 0.0, 1.0])).tolist() == [0.0, 0.5, 1.0]
    torch.testing.assert_close(to_unit_range(to_model_range(unit)), unit, rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_pixel_value_survives_the_model_range(dtype):
    count = np.iinfo(dtype).max + 1
    pixels = np.arange(count, dtype=np.uint32).astype(dtype).reshape(256, -1)
    unit = pixels_to_unit(pixels)
    assert unit.shape == (1, *pixels.shape)
    assert unit.dtype == torch.float32
    assert (unit.min(), unit.max()) == (0, 1)
    assert np.array_equal(unit_to_pixels(unit, dtype), pixels)
    assert np.array_equal(unit_to_pixels(to_unit_range(to_model_range(unit)), dtype), pixels)


def test_channels_move_to_the_front_and_back():
    pixels = random_pixels(3)
    unit = pixels_to_unit(pixels)
    assert unit.shape == (3, HEIGHT, WIDTH)
    assert unit[2, 4, 5].item() == np.float32(pixels[4, 5, 2] / 255)
    assert np.array_equal(unit_to_pixels(unit), pixels)
    assert pixels_to_unit(random_pixels(4)[::-1]).shape == (4, HEIGHT, WIDTH)


def test_unit_to_pixels_clamps_and_rounds_half_up():
    values = torch.tensor([-0.7, 0.5 / 255, 0.499 / 255, 1.5 / 255, 2.5 / 255, 1.3], dtype=torch.float64)
    assert unit_to_pixels(values[None, None]).tolist() == [[0, 1, 0, 2, 3, 255]]
    deep = torch.tensor([0.5 / 65535, 65534.5 / 65535, 65534.49 / 65535], dtype=torch.float64)
    assert unit_to_pixels(deep[None, None], np.uint16).tolist() == [[1, 65535, 65534]]


def test_wrong_tensors_and_pixels_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 4\): expected \(1, H, W\)"):
        unit_to_pixels(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        unit_to_pixels(torch.full((1, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="int32: expected uint8 or uint16"):
        unit_to_pixels(torch.zeros(1, 4, 4), np.int32)
    with pytest.raises(ValueError, match="float64: expected uint8 or uint16"):
        pixels_to_unit(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="expected"):
        pixels_to_unit(np.zeros(4, np.uint8))


# Listing


def test_list_images_is_sorted_nested_and_blind_to_other_files(tmp_path):
    names = ["b.PNG", "a.jpeg", "sub/c.tif", "sub/deeper/d.WebP"]
    for name in [*names, "notes.txt", ".hidden.png", ".cache/e.png", "sub/._c.tif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert list_images(tmp_path) == sorted(tmp_path / name for name in names)
    assert list_images(str(tmp_path), recursive=False) == [tmp_path / "a.jpeg", tmp_path / "b.PNG"]


def test_list_images_says_what_it_looked_for(tmp_path):
    with pytest.raises(ValueError, match="missing: no such folder"):
        list_images(tmp_path / "missing")
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"no image.*or its subfolders.*\.jpeg.*\.png"):
        list_images(tmp_path)
    (tmp_path / "sub" / "file.png").touch()
    with pytest.raises(ValueError, match="subfolders were not searched"):
        list_images(tmp_path, recursive=False)
    with pytest.raises(ValueError, match="not a folder"):
        list_images(tmp_path / "sub" / "file.png")


# Reading: kinds of files


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_8_bit_files_of_pillow(tmp_path, suffix, channels):
    pixels = random_pixels(channels)
    Image.fromarray(pixels).save(tmp_path / f"image{suffix}")
    decoded = assert_decodes_to(tmp_path / f"image{suffix}", pixels)
    assert (decoded.frames, decoded.metadata.icc_profile) == (1, None)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_and_colour_with_alpha(tmp_path, suffix):
    for channels in (2, 4):
        samples = random_pixels(channels)
        path = tmp_path / f"image{channels}{suffix}"
        Image.fromarray(samples).save(path)
        grey_or_rgb = samples[..., 0] if channels == 2 else samples[..., :3]
        assert_decodes_to(path, grey_or_rgb, samples[..., -1])
        assert np.array_equal(read_rgb(path), grey_or_rgb if channels == 4 else samples[..., [0, 0, 0]])


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_files_decode_as_pillow_does(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(random_pixels(3)).save(path)
    assert_decodes_to(path, np.array(Image.open(path)))


def test_one_bit_becomes_black_and_white(tmp_path):
    bits = random_pixels(1) > 127
    for suffix in (".png", ".tif", ".bmp"):
        Image.fromarray(bits).save(tmp_path / f"bits{suffix}")
        decoded = decode_image(tmp_path / f"bits{suffix}")
        rgb = read_rgb(tmp_path / f"bits{suffix}")
        assert np.array_equal(rgb, np.stack([bits * np.uint8(255)] * 3, axis=-1))
        assert set(np.unique(decoded.pixels)) == {0, 255}


def test_palettes_with_and_without_transparency(tmp_path):
    indices = random_pixels(1) % 4
    palette = np.array([[255, 0, 0], [0, 255, 0], [1, 2, 3], [200, 100, 50]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    image.save(tmp_path / "plain.png")
    assert_decodes_to(tmp_path / "plain.png", palette[indices])
    image.save(tmp_path / "one.png", transparency=2)
    assert_decodes_to(tmp_path / "one.png", palette[indices], np.where(indices == 2, 0, 255).astype(np.uint8))
    opacities = np.array([0, 64, 128, 255], np.uint8)
    image.save(tmp_path / "all.png", transparency=opacities.tobytes())
    assert_decodes_to(tmp_path / "all.png", palette[indices], opacities[indices])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_colour_marked_as_transparent(tmp_path, channels, dtype):
    pixels = random_pixels(channels, dtype)
    marked = np.atleast_1d(pixels[3, 4]).astype(">u2")
    # a neighbour that differs from the marked colour in its last bit only stays opaque
    pixels[0, 0] = pixels[3, 4] ^ 1
    write_image(tmp_path / "plain.png", pixels)
    encoded = png_with_chunks((tmp_path / "plain.png").read_bytes(), [(b"tRNS", marked.tobytes())])
    (tmp_path / "marked.png").write_bytes(encoded)
    largest = np.iinfo(dtype).max
    matches = (pixels.reshape(HEIGHT, WIDTH, -1) == marked).all(axis=-1)
    assert matches.any()
    assert_decodes_to(tmp_path / "marked.png", pixels, np.where(matches, 0, largest).astype(dtype))


@pytest.fixture(scope="module")
def cmyk_profile():
    """The profile of printed CMYK that libvips carries."""
    image = pyvips.Image.black(8, 8, bands=3).copy(interpretation="srgb")
    return image.icc_transform("cmyk", input_profile="srgb").get("icc-profile-data")


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_becomes_srgb_through_its_profile_as_littlecms_does(tmp_path, suffix, cmyk_profile):
    path = tmp_path / f"print{suffix}"
    image = Image.fromarray(np.kron(random_pixels(3), np.ones((8, 8, 1), np.uint8))).convert("CMYK")
    image.save(path, icc_profile=cmyk_profile)
    profile = ImageCms.ImageCmsProfile(io.BytesIO(cmyk_profile))
    intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
    expected = ImageCms.profileToProfile(
        Image.open(path), profile, ImageCms.createProfile("sRGB"), intent, outputMode="RGB"
    )
    decoded = decode_image(path)
    assert np.abs(decoded.pixels.astype(int) - np.array(expected)).max() <= 2
    assert decoded.metadata.icc_profile is None


@pytest.mark.parametrize("profile", [None, PROFILE], ids=["none", "rgb"])
def test_cmyk_without_a_profile_of_its_own_is_read(tmp_path, profile):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "red.tif", icc_profile=profile)
    red, green, blue = decode_image(tmp_path / "red.tif").pixels[0, 0]
    assert red > 200
    assert max(green, blue) < 80


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_profiles_are_kept(tmp_path, suffix):
    Image.fromarray(random_pixels(3)).save(tmp_path / f"image{suffix}", icc_profile=PROFILE)
    assert decode_image(tmp_path / f"image{suffix}").metadata.icc_profile == PROFILE


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_the_first_frame_of_animations_and_pages_is_read(tmp_path, suffix):
    first, second = random_pixels(3, seed=1), random_pixels(3, seed=2)
    path = tmp_path / f"frames{suffix}"
    Image.fromarray(first).save(path, save_all=True, append_images=[Image.fromarray(second)])
    assert assert_decodes_to(path, first).frames == 2


def test_the_first_frame_of_an_animated_webp_is_read(tmp_path):
    frames = [Image.fromarray(random_pixels(3, seed=seed)) for seed in range(3)]
    path = tmp_path / "frames.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    decoded = decode_image(path)
    assert decoded.frames == 3
    assert np.array_equal(decoded.pixels, np.array(frames[0]))


def test_the_previews_of_a_phone_photo_are_not_frames(tmp_path):
    images_ = [Image.fromarray(random_pixels(3, seed=seed)) for seed in range(2)]
    images_[0].save(tmp_path / "photo.jpg", "MPO", save_all=True, append_images=images_[1:])
    assert decode_image(tmp_path / "photo.jpg").frames == 1


# Reading: 16 bits


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_files_of_opencv_keep_every_bit(tmp_path, suffix, channels):
    samples = random_pixels(channels, np.uint16)
    path = tmp_path / f"deep{suffix}"
    order = {1: slice(None), 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    assert cv2.imwrite(str(path), samples if channels == 1 else samples[..., order])
    pixels = samples if channels == 1 else samples[..., :3]
    assert_decodes_to(path, pixels, samples[..., 3] if channels == 4 else None)
    exact = np.floor(pixels.astype(np.float64) / 257 + 0.5).astype(np.uint8)
    assert np.array_equal(read_rgb(path), exact if channels > 1 else np.stack([exact] * 3, axis=-1))


def test_16_bits_are_rounded_to_8_exactly(tmp_path):
    every_value = np.arange(65536, dtype=np.uint32).astype(np.uint16).reshape(256, 256)
    write_image(tmp_path / "all.png", every_value)
    expected = np.rint(np.arange(65536) / 257).reshape(256, 256)
    assert np.array_equal(read_rgb(tmp_path / "all.png")[..., 1], expected)


def test_a_16_bit_tiff_that_stores_white_as_zero(tmp_path):
    pixels = random_pixels(1, np.uint16)
    write_image(tmp_path / "image.tif", pixels)
    entry = struct.pack("<HHI", 262, 3, 1)  # PhotometricInterpretation
    encoded = (tmp_path / "image.tif").read_bytes()
    assert encoded.count(entry + b"\1\0\0\0") == 1
    (tmp_path / "image.tif").write_bytes(encoded.replace(entry + b"\1\0\0\0", entry + b"\0\0\0\0"))
    assert_decodes_to(tmp_path / "image.tif", 65535 - pixels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_premultiplied_alpha_is_divided_out(tmp_path, dtype):
    largest = np.iinfo(dtype).max
    alpha = random_pixels(1, dtype) // 2 + largest // 2
    colours = random_pixels(3, dtype)
    premultiplied = np.round(colours.astype(float) * alpha[..., None] / largest).astype(dtype)
    samples = np.concatenate([premultiplied, alpha[..., None]], axis=-1)
    tifffile.imwrite(tmp_path / "image.tif", samples, photometric="rgb", extrasamples=["assocalpha"])
    decoded = decode_image(tmp_path / "image.tif")
    assert np.array_equal(decoded.alpha, alpha)
    assert np.abs(decoded.pixels.astype(int) - colours).max() <= 2


def test_a_fourth_sample_that_is_not_alpha_is_left_out(tmp_path):
    samples = random_pixels(4, np.uint16)
    write_image(tmp_path / "image.tif", samples[..., :3], samples[..., 3])
    entry = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples: 0 is "unspecified"
    encoded = (tmp_path / "image.tif").read_bytes()
    assert encoded.count(entry + b"\2\0\0\0") == 1
    (tmp_path / "image.tif").write_bytes(encoded.replace(entry + b"\2\0\0\0", entry + b"\0\0\0\0"))
    assert_decodes_to(tmp_path / "image.tif", samples[..., :3])


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.int16])
def test_other_samples_than_8_or_16_bits_are_refused(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "deep.tif", random_pixels(1).astype(dtype), photometric="minisblack")
    assert_unreadable(tmp_path / "deep.tif", {"f": "float", "i": "int|short"}[np.dtype(dtype).kind])
    with pytest.raises(UnreadableImageError):
        image_size(tmp_path / "deep.tif")


# Reading: EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_8_bit_images_are_turned_upright_as_pillow_does(tmp_path, suffix, orientation):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(random_pixels(3)).save(path, exif=exif_block(orientation))
    decoded = assert_decodes_to(path, np.array(ImageOps.exif_transpose(Image.open(path))))
    assert decoded.pixels.shape[0] == (WIDTH if orientation >= 5 else HEIGHT)
    exif = parsed_exif(decoded.metadata.exif)
    assert 0x0112 not in exif
    assert exif[0x010F] == "Maker"
    assert exif.get_ifd(0x8769)[0x9003] == "2020:02:03 04:05:06"


@pytest.mark.slow
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_images_are_turned_as_8_bit_ones(tmp_path, channels, orientation):
    pixels = random_pixels(channels, np.uint16)
    upper = Image.fromarray((pixels >> 8).astype(np.uint8))
    upper.getexif()[0x0112] = orientation
    write_image(tmp_path / "image.png", pixels, metadata=Metadata(exif=exif_block(orientation)))
    write_image(tmp_path / "plain.tif", pixels, metadata=Metadata(exif=exif_block()))
    upright = np.array(ImageOps.exif_transpose(upper))
    deep = decode_image(tmp_path / "image.png").pixels
    assert_decodes_to(tmp_path / "image.png", deep)
    assert np.array_equal(deep >> 8, upright)
    assert deep.shape[:2] == upright.shape[:2]
    # TIFF: one more tag in its directory, which Pillow and OpenCV act on by themselves
    oriented = tmp_path / "oriented.tif"
    oriented.write_bytes(tiff_with_orientation(tmp_path / "plain.tif", orientation))
    assert_decodes_to(oriented, deep)
    assert 0x0112 not in parsed_exif(decode_image(oriented).metadata.exif)


def tiff_with_orientation(path, orientation):
    """A TIFF with another orientation (tag 274) in its directory."""
    encoded = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", encoded, 4)
    (count,) = struct.unpack_from("<H", encoded, directory)
    places = [directory + 2 + 12 * entry for entry in range(count)]
    (place,) = (place for place in places if struct.unpack_from("<H", encoded, place)[0] == 274)
    struct.pack_into("<HHIHH", encoded, place, 274, 3, 1, orientation, 0)
    return bytes(encoded)


def test_exif_behind_the_pixels_of_a_png_is_found(tmp_path):
    write_image(tmp_path / "image.png", random_pixels(3))
    block = exif_block(6).removeprefix(b"Exif\0\0")
    encoded = png_with_chunks((tmp_path / "image.png").read_bytes(), [(b"eXIf", block)], before=b"IEND")
    (tmp_path / "late.png").write_bytes(encoded)
    assert_decodes_to(tmp_path / "late.png", random_pixels(3).swapaxes(0, 1)[:, ::-1])


def test_image_size_does_not_decode_the_pixels(tmp_path):
    for suffix in (".png", ".jpg", ".tif", ".bmp"):
        path = tmp_path / f"image{suffix}"
        Image.fromarray(np.zeros((300, 400, 3), np.uint8) + 7).save(path)
        encoded = path.read_bytes()
        if suffix != ".tif":  # its directory is at the end
            path.write_bytes(encoded[: len(encoded) * 3 // 4])
            assert_unreadable(path, "damaged or cut short")
        assert image_size(path) == (300, 400)


@pytest.mark.parametrize("block", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0"])
def test_damaged_exif_does_not_cost_the_picture(tmp_path, block):
    path = tmp_path / "image.jpg"
    Image.fromarray(random_pixels(3)).save(path, exif=block)
    decoded = decode_image(path)
    assert decoded.pixels.shape == (HEIGHT, WIDTH, 3)
    assert decoded.metadata.exif is None or not dict(parsed_exif(decoded.metadata.exif))


def test_an_orientation_holds_even_where_the_rest_of_the_exif_cannot_be_handed_on(tmp_path, monkeypatch):
    write_image(tmp_path / "image.png", random_pixels(3), metadata=Metadata(exif=exif_block(6)))

    def fail(exif, offset=8):
        raise struct.error("argument out of range")

    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    decoded = assert_decodes_to(tmp_path / "image.png", random_pixels(3).swapaxes(0, 1)[:, ::-1])
    assert decoded.metadata.exif is None


def test_an_orientation_that_does_not_exist_is_ignored(tmp_path):
    Image.fromarray(random_pixels(3)).save(tmp_path / "image.png", exif=exif_block(99))
    assert_decodes_to(tmp_path / "image.png", random_pixels(3))


def test_a_tiff_hands_on_what_describes_the_picture_and_not_its_layout(tmp_path):
    Image.fromarray(random_pixels(3)).save(tmp_path / "image.tif", exif=exif_block())
    assert 273 in Image.open(tmp_path / "image.tif").getexif()  # where its samples lie
    assert set(parsed_exif(decode_image(tmp_path / "image.tif").metadata.exif)) == {0x010F, 0x8769}


# Reading: what cannot be read


@pytest.mark.parametrize("suffix", sorted(WRITABLE_SUFFIXES))
def test_files_cut_short_at_any_place_are_refused(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    write_image(path, random_pixels(3))
    encoded = path.read_bytes()
    for length in (1, 10, len(encoded) // 3, len(encoded) // 2, len(encoded) * 3 // 4):
        path.write_bytes(encoded[:length])
        assert_unreadable(path, "damaged|cut short|not an image")


def test_a_16_bit_file_cut_short_is_refused(tmp_path):
    for suffix in (".png", ".tif"):
        path = tmp_path / f"image{suffix}"
        write_image(path, random_pixels(3, np.uint16))
        path.write_bytes(path.read_bytes()[:-150])
        assert_unreadable(path, "damaged or cut short")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_changed_bytes_of_a_png_are_noticed(tmp_path, channels, dtype):
    write_image(tmp_path / "image.png", random_pixels(channels, dtype))
    encoded = bytearray((tmp_path / "image.png").read_bytes())
    encoded[len(encoded) // 2] ^= 0xFF
    (tmp_path / "image.png").write_bytes(encoded)
    assert_unreadable(tmp_path / "image.png", "damaged or cut short")


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("this is not an image")
    assert_unreadable(tmp_path / "text.png", "not an image")
    (tmp_path / "empty.png").touch()
    assert_unreadable(tmp_path / "empty.png", "the file is empty")
    assert_unreadable(tmp_path / "vanished.png", "cannot be read .*No such file")
    assert_unreadable(tmp_path, "cannot be read")
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert_unreadable(tmp_path / "script.png", "not an image")
    with pytest.raises(UnreadableImageError, match=r"vanished.png: cannot be read \(No such file"):
        image_size(tmp_path / "vanished.png")
    for name in ("text.png", "empty.png", "script.png"):
        with pytest.raises(UnreadableImageError, match=name):
            image_size(tmp_path / name)


def test_a_refused_permission_is_named(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(images.Path, "open", refuse)
    assert_unreadable(tmp_path / "image.png", r"cannot be read \(Permission denied\)")


def test_the_limit_of_pixels_holds_before_anything_is_decoded(tmp_path, monkeypatch):
    write_image(tmp_path / "bomb.png", random_pixels(3))
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    assert_unreadable(tmp_path / "bomb.png", f"{HEIGHT * WIDTH} pixels")
    with pytest.raises(UnreadableImageError, match=f"{HEIGHT * WIDTH} pixels"):
        image_size(tmp_path / "bomb.png")
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH)
    decode_image(tmp_path / "bomb.png")


@pytest.mark.slow
def test_an_image_of_100_megapixels_is_read(tmp_path):
    pyvips.Image.black(10_000, 10_000).pngsave(str(tmp_path / "large.png"), bitdepth=1)
    assert image_size(tmp_path / "large.png") == (10_000, 10_000)
    assert decode_image(tmp_path / "large.png").pixels.shape == (10_000, 10_000)


def test_the_error_survives_the_way_out_of_a_worker_process():
    error = UnreadableImageError("image.png: the file is empty")
    copied = pickle.loads(pickle.dumps(error))
    assert isinstance(copied, UnreadableImageError)
    assert isinstance(copied, ValueError)
    assert str(copied) == str(error)


# Writing


@pytest.mark.slow
@pytest.mark.parametrize("with_metadata", [False, True])
@pytest.mark.parametrize(
    ("suffix", "channels", "dtype", "with_alpha"),
    [
        *itertools.product([".png", ".TIFF"], [1, 3], [np.uint8], [False, True]),
        *itertools.product([".webp"], [1, 3], [np.uint8], [False, True]),
        *itertools.product([".png"], [1, 3], [np.uint16], [False, True]),
        (".tif", 1, np.uint16, False),
        (".tif", 3, np.uint16, False),
        (".tif", 3, np.uint16, True),
    ],
)
def test_what_is_written_is_read_back(tmp_path, suffix, channels, dtype, with_alpha, with_metadata):
    path = tmp_path / f"image{suffix}"
    pixels = random_pixels(channels, dtype)
    alpha = random_pixels(1, dtype, seed=1) if with_alpha else None
    metadata = Metadata(PROFILE, exif_block()) if with_metadata else None
    write_image(path, pixels, alpha, quality=100, metadata=metadata)
    if suffix == ".webp" and channels == 1:
        pixels = np.stack([pixels] * 3, axis=-1)  # WebP has no grey
    decoded = assert_decodes_to(path, pixels, alpha)
    assert decoded.metadata.icc_profile == (PROFILE if with_metadata else None)
    if with_metadata:
        exif = parsed_exif(decoded.metadata.exif)
        assert exif[0x010F] == "Maker"
        assert exif.get_ifd(0x8769)[0x9003] == "2020:02:03 04:05:06"
    else:
        assert decoded.metadata.exif is None


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_colours_under_full_transparency_are_kept(tmp_path, suffix):
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    write_image(tmp_path / f"image{suffix}", random_pixels(3), alpha, quality=100)
    assert_decodes_to(tmp_path / f"image{suffix}", random_pixels(3), alpha)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_may_carry_a_profile_of_more_than_64_kib(tmp_path, dtype):
    profile = np.random.default_rng(0).bytes(70_000)
    pixels = np.tile(random_pixels(3, dtype), (20, 20, 1)) + np.arange(280, dtype=dtype)[:, None]
    write_image(tmp_path / "image.tif", pixels, metadata=Metadata(icc_profile=profile))
    assert assert_decodes_to(tmp_path / "image.tif", pixels).metadata.icc_profile == profile


@pytest.mark.parametrize("channels", [1, 3])
def test_a_bmp_is_read_back(tmp_path, channels):
    write_image(tmp_path / "image.bmp", random_pixels(channels))
    assert_decodes_to(tmp_path / "image.bmp", random_pixels(channels))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_opencv_reads_the_16_bit_files(tmp_path, suffix, channels):
    samples = random_pixels(channels, np.uint16)
    path = tmp_path / f"deep{suffix}"
    if channels == 4:
        write_image(path, samples[..., :3], samples[..., 3], metadata=Metadata(PROFILE, exif_block()))
    else:
        write_image(path, samples, metadata=Metadata(PROFILE, exif_block()))
    stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(stored if channels == 1 else stored[..., [2, 1, 0, 3][:channels]], samples)


def test_jpeg_keeps_colours_close_and_obeys_its_quality(tmp_path):
    rows, columns = np.mgrid[0:64, 0:64]
    pixels = np.stack([rows * 3, columns * 3, (rows + columns) % 2 * 60 + 90], axis=-1).astype(np.uint8)
    errors, sizes = [], []
    for quality in (100, 60):
        write_image(tmp_path / "i.jpg", pixels, quality=quality, metadata=Metadata(PROFILE, exif_block()))
        errors.append(np.abs(read_rgb(tmp_path / "i.jpg").astype(int) - pixels).max())
        sizes.append((tmp_path / "i.jpg").stat().st_size)
    assert errors[0] <= 4 < errors[1]  # blue alternates from pixel to pixel: halved chroma would lose it
    assert sizes[0] > sizes[1]
    decoded = decode_image(tmp_path / "i.jpg")
    assert decoded.metadata.icc_profile == PROFILE
    assert parsed_exif(decoded.metadata.exif)[0x010F] == "Maker"
    write_image(tmp_path / "grey.jpg", pixels[..., 0])
    assert decode_image(tmp_path / "grey.jpg").pixels.ndim == 2


@pytest.mark.parametrize(
    ("name", "arguments", "value"),
    [
        ("a.jpg", {"pixels": random_pixels(3, np.uint16)}, "JPEG.*16 bits"),
        ("a.webp", {"pixels": random_pixels(3, np.uint16)}, "WEBP.*16 bits"),
        ("a.jpg", {"pixels": random_pixels(3), "alpha": random_pixels(1)}, "JPEG.*alpha"),
        ("a.bmp", {"pixels": random_pixels(3), "alpha": random_pixels(1)}, "BMP.*alpha"),
        ("a.bmp", {"pixels": random_pixels(3), "metadata": Metadata(PROFILE)}, "BMP.*profile"),
        ("a.bmp", {"pixels": random_pixels(3), "metadata": Metadata(exif=exif_block())}, "BMP.*EXIF"),
        (
            "a.jpg",
            {"pixels": random_pixels(3), "metadata": Metadata(colour={b"cICP": bytes([9, 16, 0, 1])})},
            "JPEG.*cICP",
        ),
        ("a.jpg", {"pixels": random_pixels(3), "metadata": Metadata(exif=bytes(70000))}, "JPEG.*65500"),
        ("a.jpg", {"pixels": np.zeros((1, 65501), np.uint8)}, "JPEG.*65501"),
        ("a.webp", {"pixels": np.zeros((16384, 1), np.uint8)}, "WEBP.*16384"),
        ("a.gif", {"pixels": random_pixels(3)}, r"\.gif"),
        ("a", {"pixels": random_pixels(3)}, "''"),
        ("a.png", {"pixels": random_pixels(4)}, "4"),
        ("a.png", {"pixels": np.zeros((0, 4), np.uint8)}, r"\(0, 4\)"),
        ("a.png", {"pixels": np.zeros((4, 4))}, "float64"),
        ("a.png", {"pixels": random_pixels(3), "alpha": random_pixels(1, np.uint16)}, "uint16"),
        ("a.png", {"pixels": random_pixels(3), "alpha": random_pixels(1).T}, r"\(14, 9\)"),
        ("a.jpg", {"pixels": random_pixels(3), "quality": 0}, "0"),
        ("none/a.png", {"pixels": random_pixels(3)}, "none"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path, name, arguments, value):
    with pytest.raises(ValueError, match=value):
        write_image(tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_encoder_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    write_image(path, random_pixels(3))

    def fail_half_way(image, file, *args, **kwargs):
        file.write(b"half an image")
        raise OSError("encoder error")

    monkeypatch.setattr(Image.Image, "save", fail_half_way)
    with pytest.raises(ValueError, match=r"image.png: cannot be encoded as PNG \(encoder error"):
        write_image(path, random_pixels(3, seed=1))
    assert list(tmp_path.iterdir()) == [path]
    assert_decodes_to(path, random_pixels(3))


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "image.png"
    write_image(path, random_pixels(3))

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_image(path, random_pixels(3, seed=1))
    assert list(tmp_path.iterdir()) == [path]
    assert_decodes_to(path, random_pixels(3))


def test_the_bytes_are_on_the_disk_before_the_file_takes_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (events.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    write_image(tmp_path / "image.png", random_pixels(3))
    assert events == ["fsync", "replace"]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    write_image(tmp_path / "image.png", random_pixels(3))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_16_bit_png_is_compressed(tmp_path):
    ramp = np.arange(200 * 200, dtype=np.uint16).reshape(200, 200)
    write_image(tmp_path / "ramp.png", ramp)
    by_opencv = cv2.imencode(".png", ramp)[1]
    assert (tmp_path / "ramp.png").stat().st_size <= len(by_opencv)
    assert np.array_equal(np.array(Image.open(io.BytesIO((tmp_path / "ramp.png").read_bytes()))), ramp)


# Properties


@st.composite
def pictures(draw):
    """A suffix of a lossless format, pixels and alpha that it holds."""
    suffix = draw(st.sampled_from([".png", ".tif", ".webp", ".bmp"]))
    dtype = draw(st.sampled_from([np.uint8, np.uint16] if suffix in {".png", ".tif"} else [np.uint8]))
    size = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    grey = draw(st.booleans()) and suffix != ".webp"
    pixels = draw(arrays(dtype, size if grey else (*size, 3)))
    alpha = draw(arrays(dtype, size)) if suffix != ".bmp" and draw(st.booleans()) else None
    if suffix == ".webp" and alpha is not None and alpha.min() == 255:
        alpha = None  # WebP forgets an alpha that hides nothing
    return suffix, pixels, alpha


@pytest.mark.slow
@given(picture=pictures())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_picture_comes_back_as_written(tmp_path, picture):
    suffix, pixels, alpha = picture
    path = tmp_path / f"image{suffix}"
    write_image(path, pixels, alpha, quality=100)
    assert_decodes_to(path, pixels, alpha)


WHOLE_FILES = [
    (suffix, dtype, with_alpha)
    for suffix, dtypes, alphas in (
        (".png", (np.uint8, np.uint16), (False, True)),
        (".tif", (np.uint8, np.uint16), (False, True)),
        (".webp", (np.uint8,), (False, True)),
        (".jpg", (np.uint8,), (False,)),
        (".bmp", (np.uint8,), (False,)),
    )
    for dtype in dtypes
    for with_alpha in alphas
]


@pytest.mark.parametrize(("suffix", "dtype", "with_alpha"), WHOLE_FILES)
@given(
    share=st.floats(0, 1, exclude_max=True), channels=st.sampled_from([1, 3]), quality=st.integers(50, 100)
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_anywhere_is_never_half_a_picture(
    tmp_path, suffix, dtype, with_alpha, share, channels, quality
):
    path = tmp_path / f"image{suffix}"
    alpha = random_pixels(1, dtype, seed=1) if with_alpha else None
    write_image(path, random_pixels(channels, dtype), alpha, quality=quality)
    encoded = path.read_bytes()
    kept = int(share * len(encoded))
    # a BMP ends with what fills its last row up to four bytes
    assume(suffix != ".bmp" or len(encoded) - kept >= 4)
    path.write_bytes(encoded[:kept])
    with pytest.raises(UnreadableImageError):
        decode_image(path)


# Kinds of files


def test_avif_is_read(tmp_path):
    pixels = np.kron(random_pixels(3), np.ones((8, 8, 1), np.uint8))
    image = pyvips.Image.new_from_memory(pixels.tobytes(), *pixels.shape[1::-1], 3, "uchar")
    image.copy(interpretation="srgb").heifsave(str(tmp_path / "i.avif"), compression="av1", Q=100)
    decoded = decode_image(tmp_path / "i.avif")
    assert decoded.pixels.dtype == np.uint8
    assert np.abs(decoded.pixels.astype(int) - pixels).mean() < 4
    assert image_size(tmp_path / "i.avif") == pixels.shape[:2]


def test_the_first_frame_of_a_gif_is_read(tmp_path):
    frames = [Image.fromarray(np.full((5, 6, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(tmp_path / "i.gif", save_all=True, append_images=frames[1:])
    assert assert_decodes_to(tmp_path / "i.gif", np.full((5, 6, 3), 10, np.uint8)).frames == 2


@pytest.mark.parametrize("suffix", [".jpe", ".jfif"])
def test_other_names_of_jpeg_are_jpeg(tmp_path, suffix):
    write_image(tmp_path / f"i{suffix}", random_pixels(3))
    assert Image.open(tmp_path / f"i{suffix}").format == "JPEG"
    assert list_images(tmp_path) == [tmp_path / f"i{suffix}"]


def test_heic_without_a_decoder_is_refused_by_its_name(tmp_path):
    (tmp_path / "i.heic").write_bytes(struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic")
    assert_unreadable(tmp_path / "i.heic", "HEIC")


@pytest.mark.parametrize("tag", [(254, "I", 1, 1, False), (50706, "B", 4, (1, 4, 0, 0), False)])
def test_the_preview_in_a_camera_s_tiff_is_refused(tmp_path, tag):
    extra = {"subfiletype": 1} if tag[0] == 254 else {"extratags": [tag]}
    tifffile.imwrite(tmp_path / "raw.tif", random_pixels(3), photometric="rgb", **extra)
    assert_unreadable(tmp_path / "raw.tif", "raw")
    with pytest.raises(UnreadableImageError, match="raw"):
        image_size(tmp_path / "raw.tif")


@pytest.mark.parametrize("suffix", [".dng", ".NEF", ".cr2", ".arw"])
def test_camera_raw_is_refused_by_its_suffix(tmp_path, suffix):
    tifffile.imwrite(tmp_path / f"raw{suffix}", random_pixels(3), photometric="rgb")
    assert_unreadable(tmp_path / f"raw{suffix}", "raw")


def test_what_does_not_fit_in_memory_names_its_file(tmp_path, monkeypatch):
    write_image(tmp_path / "image.png", random_pixels(3))

    def refuse(shape, dtype):
        raise MemoryError

    monkeypatch.setattr(images.np, "empty", refuse)
    assert_unreadable(tmp_path / "image.png", "memory")


def test_names_that_are_not_utf_8_or_hold_brackets_work(tmp_path):
    for name in (os.fsdecode(b"caf\xe9.png"), "a[page=3].tif", "a b'c.jpg"):
        write_image(tmp_path / name, random_pixels(3))
        assert decode_image(tmp_path / name).pixels.shape == (HEIGHT, WIDTH, 3)
        assert image_size(tmp_path / name) == (HEIGHT, WIDTH)
    with pytest.raises(UnreadableImageError):
        decode_image(tmp_path / os.fsdecode(b"gone\xe9.png"))


def test_a_forked_worker_decodes_after_its_parent_has_read_and_written(tmp_path):
    paths = [tmp_path / name for name in ("i.png", "i.tif", "i.jpg", "i.webp", "i.bmp")]
    for path in paths:
        dtype = np.uint16 if path.suffix in {".png", ".tif"} else np.uint8
        write_image(path, random_pixels(3, dtype))
    photo = pyvips.Image.black(300, 300, bands=3).copy(interpretation="srgb")
    photo.pngsave(str(tmp_path / "interlaced.png"), interlace=True)
    photo.jpegsave(str(tmp_path / "progressive.jpg"), interlace=True)
    photo.tiffsave(str(tmp_path / "tiled.tif"), tile=True, pyramid=True)
    photo.heifsave(str(tmp_path / "i.avif"), compression="av1")
    photo.gifsave(str(tmp_path / "i.gif"))
    photo.icc_transform("cmyk", input_profile="srgb").jpegsave(str(tmp_path / "cmyk.jpg"))
    paths = sorted(tmp_path.iterdir())
    for path in paths:
        decode_image(path)
    worker = multiprocessing.get_context("fork").Process(target=lambda: [decode_image(p) for p in paths])
    worker.start()
    worker.join(30)
    stuck = worker.is_alive()
    worker.kill()
    assert not stuck
    assert worker.exitcode == 0


# Folders


def test_kinds_that_cannot_be_read_are_named_once_with_their_numbers(tmp_path, caplog):
    for name in ("a.png", "b.heic", "c.HEIC", "d.nef", "e.txt", "f.jxl"):
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert list_images(tmp_path) == [tmp_path / "a.png"]
    (record,) = caplog.records
    for said in ("2 .heic", "1 .nef", "1 .jxl", "1 .png"):
        assert said in record.getMessage()
    assert "txt" not in record.getMessage()


def test_a_folder_of_nothing_else_says_what_it_passed_over(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(ValueError, match=r"1 \.heic"):
        list_images(tmp_path)


def test_linked_folders_are_followed_once_and_not_in_circles(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos" / "b").mkdir(parents=True)
    for name in ("elsewhere/1.png", "photos/b/2.png"):
        (tmp_path / name).touch()
    (tmp_path / "photos" / "a_linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "a_twice").symlink_to(tmp_path / "photos" / "b")
    (tmp_path / "photos" / "circle").symlink_to(tmp_path / "photos")
    (tmp_path / "linked").symlink_to(tmp_path / "photos")
    for folder in (tmp_path / "photos", tmp_path / "linked"):
        assert list_images(folder) == [folder / "a_linked" / "1.png", folder / "b" / "2.png"]


# What a file says besides its pixels

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" exif:PixelXDimension="99"/>'
COLOURS = {
    b"gAMA": struct.pack(">I", 100000),
    b"cHRM": struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_png_hands_on_all_that_it_says(tmp_path, dtype):
    said = Metadata(
        PROFILE,
        exif_block(),
        XMP.replace(b'"6"', b'"1"').replace(b'"99"', b'"%d"' % WIDTH),
        (299.9994, 149.987),
        {"Author": "Mé", "Title": "日本", "Comment": "a" * 5000},
        {b"cICP": bytes([9, 16, 0, 1])},
    )
    write_image(tmp_path / "1.png", random_pixels(3, dtype), metadata=said)
    write_image(
        tmp_path / "2.png", random_pixels(3, dtype), metadata=decode_image(tmp_path / "1.png").metadata
    )
    assert decode_image(tmp_path / "2.png").metadata == said
    with Image.open(tmp_path / "2.png") as image:  # Pillow's own reading
        image.load()
        assert image.text["Title"] == "日本"
        assert image.info["icc_profile"] == PROFILE


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gamma_and_primaries_of_a_png_are_kept(tmp_path, dtype):
    write_image(tmp_path / "i.png", random_pixels(3, dtype), metadata=Metadata(colour=COLOURS))
    assert decode_image(tmp_path / "i.png").metadata.colour == COLOURS
    assert Image.open(tmp_path / "i.png").info["gamma"] == 1


@pytest.mark.parametrize(
    ("chunks", "kept"),
    [
        ({b"gAMA": struct.pack(">I", 45455)}, {}),
        ({**COLOURS, b"sRGB": b"\0"}, {}),
        ({b"cICP": bytes([1, 13, 0, 1])}, {}),
        ({**COLOURS, b"cICP": bytes([9, 16, 0, 1])}, {b"cICP": bytes([9, 16, 0, 1])}),
        (COLOURS, COLOURS),
    ],
)
def test_only_another_colour_space_than_srgb_is_kept(tmp_path, chunks, kept):
    write_image(tmp_path / "i.png", random_pixels(3))
    encoded = png_with_chunks((tmp_path / "i.png").read_bytes(), list(chunks.items()))
    (tmp_path / "i.png").write_bytes(encoded)
    assert decode_image(tmp_path / "i.png").metadata.colour == kept


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_the_resolution_is_kept(tmp_path, suffix):
    write_image(tmp_path / f"i{suffix}", random_pixels(3), metadata=Metadata(dpi=(300, 300)))
    assert decode_image(tmp_path / f"i{suffix}").metadata.dpi == pytest.approx((300, 300), abs=0.02)
    assert Image.open(tmp_path / f"i{suffix}").info["dpi"] == pytest.approx((300, 300), abs=0.02)
    write_image(tmp_path / f"none{suffix}", random_pixels(3))
    assert decode_image(tmp_path / f"none{suffix}").metadata.dpi == (
        None if suffix != ".bmp" else pytest.approx((96, 96), abs=0.02)  # Pillow always writes one
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_xmp_is_kept_for_the_upright_picture_and_its_new_size(tmp_path, suffix):
    path = tmp_path / f"i{suffix}"
    write_image(path, random_pixels(3), metadata=Metadata(xmp=XMP))
    decoded = decode_image(path)
    if suffix != ".tif":  # which states an orientation besides
        assert decoded.pixels.shape[:2] == (WIDTH, HEIGHT)  # turned by what XMP says alone
    write_image(path, np.zeros((50, 60, 3), np.uint8), metadata=decoded.metadata)
    assert decode_image(path).metadata.xmp == XMP.replace(b'"6"', b'"1"').replace(b'"99"', b'"60"')


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_exif_states_the_new_size(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0100], exif[0x0101] = 10, 20
    exif.get_ifd(0x8769).update({0xA002: 10, 0xA003: 20, 0x9003: "2020:02:03 04:05:06"})
    path = tmp_path / f"i{suffix}"
    write_image(path, np.zeros((50, 60, 3), np.uint8), metadata=Metadata(exif=exif.tobytes()))
    written = parsed_exif(decode_image(path).metadata.exif)
    assert (written.get_ifd(0x8769)[0xA002], written.get_ifd(0x8769)[0xA003]) == (60, 50)
    assert written.get_ifd(0x8769)[0x9003] == "2020:02:03 04:05:06"
    assert (written.get(0x0100, 60), written.get(0x0101, 50)) == (60, 50)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_the_directories_inside_exif_are_handed_on(tmp_path, suffix, endian):
    exif = Image.Exif()
    exif.endian = endian
    exif[0x8769] = {0x9003: "2020:02:03 04:05:06", 0xA005: {1: "R98", 2: b"0100"}}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    Image.fromarray(random_pixels(3)).save(tmp_path / "i.jpg", exif=exif.tobytes())
    write_image(tmp_path / f"o{suffix}", random_pixels(3), metadata=decode_image(tmp_path / "i.jpg").metadata)
    written = parsed_exif(decode_image(tmp_path / f"o{suffix}").metadata.exif)
    assert written.get_ifd(0x8825) == {1: "N", 2: (1.0, 2.0, 3.0)}
    assert written.get_ifd(0xA005) == {1: "R98", 2: b"0100"}


def test_exif_that_cannot_be_written_is_said_and_the_picture_is_written(tmp_path, caplog):
    write_image(tmp_path / "i.png", random_pixels(3), metadata=Metadata(exif=b"Exif\0\0garbage"))
    assert str(tmp_path / "i.png") in caplog.text
    assert_decodes_to(tmp_path / "i.png", random_pixels(3))


def test_damaged_exif_is_said_for_the_picture_and_not_at_every_reading_of_pixels(tmp_path, caplog):
    Image.fromarray(random_pixels(3)).save(tmp_path / "i.jpg", exif=b"Exif\0\0garbage")
    read_rgb(tmp_path / "i.jpg")
    assert caplog.records == []
    decode_image(tmp_path / "i.jpg")
    assert str(tmp_path / "i.jpg") in caplog.text


def test_texts_that_a_format_cannot_hold_are_said(tmp_path, caplog):
    write_image(tmp_path / "i.jpg", random_pixels(3), metadata=Metadata(text={"Author": "Me"}))
    assert str(tmp_path / "i.jpg") in caplog.text


def test_large_texts_and_profiles_of_a_png_are_read_and_written(tmp_path):
    profile = PROFILE + np.random.default_rng(0).bytes(3_000_000)
    said = Metadata(profile, text={"Notes": "abc" * 1_000_000})
    write_image(tmp_path / "i.png", random_pixels(3), metadata=said)
    assert assert_decodes_to(tmp_path / "i.png", random_pixels(3)).metadata == said


def test_a_tiff_of_many_strips_keeps_its_pixels_beside_exif(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65535, (700, 300, 3), np.uint16)
    write_image(tmp_path / "i.tif", pixels, metadata=Metadata(PROFILE, exif_block(), XMP.replace(b"6", b"1")))
    assert len(tifffile.TiffFile(tmp_path / "i.tif").pages[0].dataoffsets) > 1
    assert np.array_equal(cv2.imread(str(tmp_path / "i.tif"), cv2.IMREAD_UNCHANGED)[..., ::-1], pixels)
    assert_decodes_to(tmp_path / "i.tif", pixels)


def test_the_metadata_of_a_large_png_is_not_under_pillow_s_limit(tmp_path, monkeypatch):
    write_image(tmp_path / "i.png", random_pixels(3), metadata=Metadata(exif=exif_block(6), text={"a": "b"}))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    decoded = decode_image(tmp_path / "i.png")
    assert decoded.pixels.shape == (WIDTH, HEIGHT, 3)
    assert decoded.metadata.text == {"a": "b"}


# Before the work


@pytest.mark.parametrize(
    ("name", "size", "dtype", "value"),
    [
        ("a.webp", (100, 16384), np.uint8, "16384"),
        ("a.jpg", (65501, 100), np.uint8, "65501"),
        ("a.tif", (40_000, 40_000), np.uint8, "4 GB"),
        ("a.jpg", (1, 1), np.uint16, "16 bits"),
        ("a.pgn", (1, 1), np.uint8, r"\.pgn"),
    ],
)
def test_what_a_format_cannot_hold_is_known_from_sizes_alone(name, size, dtype, value):
    with pytest.raises(ValueError, match=value):
        check_format(name, *size, dtype)


@pytest.mark.parametrize(
    ("name", "size"), [("a.webp", (16383, 16383)), ("a.jpg", (65500, 9)), ("a.png", (99_999, 99_999))]
)
def test_what_just_fits_is_not_refused(name, size):
    check_format(name, *size)
