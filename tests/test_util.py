"""Tests of util.py: the blocks against their definitions, the dataset against hand-made folders."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from bicubic import resize
from degradation import Degradation
from imaging.files import write_image
from tests.networks import randomised
from util import (
    ImageDataset,
    MultiHeadAttentionBlock,
    PixelNorm,
    ResidualBlock,
    Sample,
    SinusoidalPositionEmbeddings,
    normalisation,
)

# ------------------------------------------------------------------------------------------------- blocks


def test_position_embeddings_are_the_sines_and_cosines_of_the_paper():
    embedding = SinusoidalPositionEmbeddings(8)(torch.tensor([0, 3, 999]))
    for row, t in zip(embedding, (0, 3, 999), strict=True):
        for i in range(4):
            angle = t / 10_000 ** (i / 3)
            assert row[i] == pytest.approx(math.sin(angle), abs=1e-4)
            assert row[4 + i] == pytest.approx(math.cos(angle), abs=1e-4)


def test_pixel_norm_is_layer_norm_over_channels_and_sees_one_pixel():
    norm, x = randomised(PixelNorm(6)), torch.randn(2, 6, 9, 9)
    pixel = x[1, :, 2, 3]
    expected = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x)[1, :, 2, 3], expected)
    torch.testing.assert_close(norm(x)[..., 2:6, 3:7], norm(x[..., 2:6, 3:7]))


@pytest.mark.parametrize(("channels", "groups"), [(32, 8), (12, 4), (7, 1)])
def test_group_norm_takes_groups_that_divide_the_channels(channels, groups):
    assert normalisation("group", channels).num_groups == groups


@pytest.mark.parametrize("norm", ["group", "pixel"])
def test_a_residual_block_starts_as_the_identity_and_is_its_formula(norm):
    x, time = torch.randn(2, 8, 5, 6), torch.randn(2, 16)
    torch.testing.assert_close(ResidualBlock(8, 8, time_dim=16, norm=norm)(x, time), x)
    block = randomised(ResidualBlock(8, 12, time_dim=16, norm=norm))
    scale, shift = block.modulation(F.silu(time))[:, :, None, None].chunk(2, dim=1)
    hidden = block.norm2(block.conv1(F.silu(block.norm1(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, time), block.shortcut(x) + block.conv2(F.silu(hidden)))


def test_attention_starts_as_the_identity_and_moves_with_the_pixels():
    block, x = MultiHeadAttentionBlock(12, num_heads=3, norm="pixel"), torch.randn(2, 12, 4, 5)
    torch.testing.assert_close(block(x), x)
    assert not torch.allclose(randomised(block)(x), x)
    torch.testing.assert_close(block(x.flip(-1)), block(x).flip(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "value"),
    [
        (lambda: SinusoidalPositionEmbeddings(2), "2"),
        (lambda: SinusoidalPositionEmbeddings(7), "7"),
        (lambda: normalisation("batch", 8), "batch"),
        (lambda: ResidualBlock(8, 8, 16)(torch.zeros(1, 8, 4, 4)), "time_dim"),
        (lambda: ResidualBlock(8, 8)(torch.zeros(1, 8, 4, 4), torch.zeros(1, 16)), "time_dim"),
    ],
)
def test_what_a_block_cannot_do_is_refused(build, value):
    with pytest.raises(ValueError, match=value):
        build()


# ------------------------------------------------------------------------------------------------- dataset


def test_a_sample_holds_four_images_and_the_low_resolution_is_what_a_file_would_hold(photo_folder):
    sample = ImageDataset(photo_folder, 32, 4, train=False)[0]
    assert sample.low_res.shape == (3, 8, 8)
    assert sample.upscaled.shape == sample.original.shape == sample.residual.shape == (3, 32, 32)
    for image in (sample.low_res, sample.upscaled, sample.original):
        assert image.dtype == torch.float32
        assert -1 <= image.min() <= image.max() <= 1
    torch.testing.assert_close(sample.upscaled + sample.residual, sample.original)
    pixels = ((sample.original + 1) * 127.5).round().to(torch.uint8)
    expected = resize(pixels, scale=0.25, rounding="uint8").float()
    torch.testing.assert_close((sample.low_res + 1) * 127.5, expected, atol=1e-3, rtol=0)


def test_the_upscale_function_takes_image_and_factor(photo_folder):
    def nearest(low_res, factor):
        return low_res.repeat_interleave(int(factor), -1).repeat_interleave(int(factor), -2)

    sample = ImageDataset(photo_folder, 32, 2, nearest)[0]
    assert torch.equal(sample.upscaled[:, ::2, ::2], sample.low_res)


def test_validation_takes_the_central_crop_unflipped(photo_folder):
    dataset = ImageDataset(photo_folder, 32, 4, train=False)
    pixels = np.asarray(Image.open(dataset.paths[2]))
    expected = pixels[8:40, 12:44].transpose(2, 0, 1)
    assert np.array_equal(dataset.crop(2).high_res.numpy(), expected)
    assert torch.equal(dataset.crop((5, 2)).high_res, dataset.crop(2).high_res)


@pytest.mark.parametrize(
    "degradation", [Degradation(), Degradation("photo", clean_share=0)], ids=["bicubic", "photo"]
)
def test_a_sample_depends_on_seed_epoch_and_index_alone(photo_folder, degradation):
    one, again, other = (
        ImageDataset(photo_folder, 32, degradation=degradation, seed=seed) for seed in (3, 3, 4)
    )
    order = [(epoch, index) for epoch in range(2) for index in range(6)]
    batches = DataLoader(again, batch_sampler=[order[:5], order[5:]], num_workers=2)
    for part, from_workers in zip(Sample._fields, zip(*batches, strict=True), strict=True):
        here = torch.stack([getattr(one[key], part) for key in order])
        assert torch.equal(torch.cat(from_workers), here)
    for key, dataset in (((0, 1), other), ((1, 1), one)):
        assert not torch.equal(dataset[key].low_res, one[0, 1].low_res)


@pytest.mark.parametrize("scale", [4.0, 2.0, 1.5])
@pytest.mark.parametrize("train", [True, False])
def test_both_resolutions_of_a_crop_lie_over_each_other(tmp_path, scale, train):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 131, 3), dtype=np.uint8)
    write_image(tmp_path / "only.png", pixels)
    dataset = ImageDataset(
        tmp_path,
        72,
        augment="dihedral",
        train=train,
        degradation=Degradation("photo", scale=scale, clean_share=1),
    )
    for epoch in range(10):
        high_res, low_res, _ = dataset.crop((epoch, 0))
        assert high_res.shape == (3, 72, 72)
        expected = Degradation(scale=scale)(high_res)
        assert low_res.shape == expected.shape
        inner = (slice(None), slice(4, -4), slice(4, -4))  # where the crop's edge is not seen
        assert torch.equal(low_res[inner], expected[inner])


@pytest.mark.parametrize("size", [32, 34, 60])
def test_images_without_room_for_a_margin_are_taken(tmp_path, size):
    write_image(tmp_path / "only.png", np.full((size, 33, 3), 90, np.uint8))
    low_res, high_res = ImageDataset(tmp_path, 32, degradation=Degradation("photo"))[0][:3:2]
    assert (low_res.shape, high_res.shape) == ((3, 8, 8), (3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize(("augment", "count"), [("none", 1), ("flip", 2), ("dihedral", 8)])
def test_augmentations_are_the_flips_and_rotations_they_say(tmp_path, augment, count):
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    write_image(tmp_path / "only.png", pixels)
    dataset = ImageDataset(tmp_path, 16, 2, augment=augment)
    seen = {dataset.crop((epoch, 0)).high_res.numpy().tobytes() for epoch in range(100)}
    turned = [np.rot90(pixels, k) for k in range(4)]
    all_eight = turned + [image[:, ::-1] for image in turned]
    allowed = {np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes() for image in all_eight}
    assert len(seen) == count
    assert seen <= allowed


def test_small_and_unreadable_images_are_named_and_left_out(tmp_path, caplog):
    nested = tmp_path / "a" / "b"
    nested.mkdir(parents=True)
    good = np.full((32, 32, 3), 90, np.uint8)
    write_image(nested / "good.jpg", good)
    write_image(tmp_path / "small.png", good[:16])
    for number in range(4):
        (tmp_path / f"broken_{number}.png").write_bytes(b"not a picture")
    dataset = ImageDataset(tmp_path, 32, 4)
    assert [path.name for path in dataset.paths] == ["good.jpg"]
    assert sorted({path.name[:6] for path in dataset.left_out}) == ["broken", "small."]
    (warning,) = (record.message for record in caplog.records)
    assert warning.startswith("5 of 6 images")
    assert warning.count(str(tmp_path)) == 3  # names


@pytest.mark.parametrize(
    ("folder", "img_size", "factor", "named"),
    [
        ("missing", 32, 4, "missing"),
        ("empty", 32, 4, "empty"),
        ("small", 32, 4, r"16x16.*32"),
        ("small", 14, 4, "14"),
        ("small", 16, 1, "1"),
        ("small", 16, math.nan, "nan"),
        ("small", 4, 2, "4"),
        ("small", 16, 0.5, r"0\.5"),
    ],
)
def test_images_or_crops_that_cannot_be_are_refused(tmp_path, folder, img_size, factor, named):
    for name in ("empty", "small"):
        (tmp_path / name).mkdir()
    write_image(tmp_path / "small" / "0.png", np.zeros((16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=named):
        ImageDataset(tmp_path / folder, img_size, factor)


def test_a_file_that_breaks_later_is_replaced_and_marked_until_all_are_gone(tmp_path, caplog):
    for index in range(3):
        write_image(tmp_path / f"{index}.png", np.full((16, 16, 3), 50 * index, np.uint8))
    dataset = ImageDataset(tmp_path, 16, 4)
    (tmp_path / "1.png").unlink()
    assert int(dataset.crop(1).high_res[0, 0, 0]) == 100
    assert (dataset.failures(), list(dataset.failed)) == (1, [False, True, False])
    assert "1.png" in caplog.text
    for index in (0, 2):
        (tmp_path / f"{index}.png").unlink()
    with pytest.raises(RuntimeError, match="3 images"):
        dataset.crop(0)


def test_an_index_out_of_range_ends_iteration(photo_folder):
    assert sum(1 for _ in ImageDataset(photo_folder, 32, 4)) == 6
