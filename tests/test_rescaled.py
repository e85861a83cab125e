"""Any enlargement with any model, against the model applied by hand and the whole image shrunk by bicubic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bicubic import resize
from engine.options import OptionError
from examples.dead_leaves import dead_leaves
from imaging.files import DecodedImage, decode_image, write_image
from infer import main
from restoration import RestoreConfig, Restorer, restore
from restoration.scales import chain_to, check, plan_chain, restore_to
from tests.networks import random_model

CPU = torch.device("cpu")


def restorer(scale=2.0, **options):
    return Restorer(random_model(scale), RestoreConfig(**({"steps": 1} | options)), CPU)


@pytest.mark.parametrize(
    ("scale", "factors", "expected"),
    [
        (3, [2, 4], (4,)),
        (4, [2, 4], (4,)),
        (1.5, [2, 4], (2,)),
        (6, [2, 4], (4, 2)),
        (16, [2, 4], (4, 4)),
        (5, [3], (3, 3)),
    ],
)
def test_the_fewest_models_that_exceed_the_scale_least(scale, factors, expected):
    assert plan_chain(scale, factors) == expected


@given(scale=st.floats(1.01, 16), factors=st.sets(st.sampled_from([1.5, 2, 3, 4, 8]), min_size=1))
def test_a_chain_reaches_the_scale_and_no_shorter_one_of_its_models_does(scale, factors):
    chain = plan_chain(scale, sorted(factors))
    assert math.prod(chain) > scale - 1e-6
    assert all(math.prod(chain) / factor < scale for factor in set(chain))


def test_the_scale_of_the_model_is_the_model_itself_and_one_beside_it_is_not():
    doubling = restorer(2.4)  # kept in single precision
    for scale in (2.4, None):
        assert chain_to(scale, [doubling]).restorers == (doubling,)
        assert chain_to(scale, [doubling]).excess.fraction == 1
    near = chain_to(2.4001, [doubling])
    assert float(near.scale) == pytest.approx(2.4001, abs=3e-6)
    assert len(near.restorers) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "passes"), [(1.5, 1), (3.0, 2), (3.7, 2), (4.0, 2)])
def test_a_result_is_the_repeated_models_shrunk_as_a_whole(scale, passes):
    """70 rows become more than one band."""
    doubling, low_res = restorer(), np.random.default_rng(0).integers(256, size=(70, 9, 3), dtype=np.uint8)
    result, expected = restore_to(chain_to(scale, [doubling]), low_res).pixels, low_res
    for _ in range(passes):
        expected = doubling.restore(expected).pixels
    whole = torch.from_numpy(expected).permute(2, 0, 1)
    shrunk = resize(whole, scale=scale / 2**passes)[:, : result.shape[0], : result.shape[1]]
    assert result.shape == (math.ceil(round(scale * 70, 9)), math.ceil(round(scale * 9, 9)), 3)
    assert np.array_equal(result, shrunk.permute(1, 2, 0))


def test_pictures_keep_depth_alpha_and_grey():
    seen = []
    pixels = (dead_leaves((10, 12), np.random.default_rng(0)).astype(np.uint16) * 257)[..., 0]
    alpha = np.linspace(0, 65535, 120).reshape(10, 12).astype(np.uint16)
    image = DecodedImage(pixels, alpha)
    result = restore_to(chain_to(3.0, [restorer()]), image, progress=seen.append)
    assert result.pixels.shape == result.alpha.shape == (30, 36)
    assert result.pixels.dtype == result.alpha.dtype == np.uint16
    assert abs(result.pixels.mean() / pixels.mean() - 1) < 0.3
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1)


def test_the_deviation_is_shrunk_too():
    chain = chain_to(1.5, [restorer(steps=2, num_images=2)])
    result = restore_to(chain, np.zeros((8, 8, 3), np.uint8), deviation=True)
    assert result.deviation.shape == (12, 12)
    assert result.deviation.min() >= 0


@pytest.mark.parametrize("scale", [1.0, 0.5, 17.0, float("nan")])
def test_a_scale_out_of_range_is_refused(scale):
    with pytest.raises(OptionError, match=f"{scale}"):
        plan_chain(scale, [2.0])


def test_what_several_passes_cannot_do_is_refused_without_a_picture():
    with pytest.raises(OptionError, match="consistency"):
        chain_to(3.0, [restorer(consistency=True)])
    with pytest.raises(OptionError, match=r"3\.0.*x2 and x2"):
        check(chain_to(3.0, [restorer(steps=2, num_images=2)]), deviation=True)


@pytest.mark.slow
def test_the_script_and_python_enlarge_by_the_released_models(tmp_path):
    """x8 is x4, then x2."""
    photo = dead_leaves((9, 7), np.random.default_rng(1))
    write_image(tmp_path / "a.png", photo)
    flags = [str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    flags += ["--precision", "fp32"]
    for scale in ("8", "2.5", "4.0001"):
        assert main([*flags, "--scale", scale]) == 0
    largest = decode_image(tmp_path / "out" / "a_x8.png").pixels
    here = {"device": "cpu", "precision": "fp32"}
    twice = restore(restore(photo, scale=4, **here).pixels, "clean", scale=2, **here).pixels
    np.testing.assert_array_equal(largest, twice)
    assert decode_image(tmp_path / "out" / "a_x2.5.png").pixels.shape == (23, 18, 3)
    assert decode_image(tmp_path / "out" / "a_x4.0001.png").pixels.shape == (37, 29, 3)
    assert main([*flags, "--scale", "8", "--export", str(tmp_path / "x.safetensors")]) == 2
