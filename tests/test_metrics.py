"""Metrics against public libraries, published tables, closed forms and the properties each must have."""

import hashlib
import math
import re
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import lpips as lpips_package
from torchmetrics.functional.image import structural_similarity_index_measure

from bicubic import resize
from evaluation import lpips as lpips_module
from evaluation.lpips import Lpips, MetricUnavailableError, PerceptualFeatures
from evaluation.metrics import Comparison, high_frequency_energy, low_resolution_psnr, psnr, ssim, to_luma
from imaging.files import read_rgb
from imaging.pixels import to_uint8

WHOLE = Comparison(crop=0, channel="rgb")

# Bicubic rows of the accepted tables: PSNR in dB and SSIM on luma, `scale` pixels cropped from each border.
PUBLISHED = {
    ("Set5", 2): (33.66, 0.9299),
    ("Set5", 3): (30.39, 0.8682),
    ("Set5", 4): (28.42, 0.8104),
    ("BSD100", 2): (29.56, 0.8431),
    ("BSD100", 3): (27.21, 0.7385),
    ("BSD100", 4): (25.96, 0.6675),
}


def texture(seed: int, channels: int = 3, height: int = 48, width: int = 56) -> torch.Tensor:
    """A correlated random image (1, C, H, W) in [0.1, 0.9]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, channels, height + 2, width + 2, generator=generator, dtype=torch.float64)
    smooth = F.avg_pool2d(noise, 3, stride=1)
    return 0.5 + 0.4 * smooth / smooth.abs().max()


def noisy(image: torch.Tensor, deviation: float, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return image + deviation * torch.randn(image.shape, generator=generator, dtype=image.dtype)


def rounded(image: torch.Tensor) -> torch.Tensor:
    """As an 8-bit file holds it, in [0, 1]."""
    return to_uint8(image).double() / 255


# ---------------------------------------------------------------- psnr and ssim


def compared_by_skimage(image: torch.Tensor, protocol: Comparison) -> np.ndarray:
    """What `protocol` compares of (C, H, W), (h, w, C) in [0, 255], luma converted by skimage."""
    pixels = np.floor(image.permute(1, 2, 0).numpy() * 255 + 0.5)
    pixels = pixels[protocol.crop : -protocol.crop, protocol.crop : -protocol.crop]
    return pixels if protocol.channel == "rgb" else rgb2ycbcr(pixels / 255)[..., :1]


@pytest.mark.parametrize("channel", ["luma", "rgb"])
def test_psnr_and_ssim_of_each_image_of_a_batch_are_those_of_skimage_and_torchmetrics(channel):
    truth, protocol = torch.cat([texture(0), texture(1)]), Comparison(crop=3, channel=channel)
    restored = torch.cat([noisy(truth[:1], 0.02), noisy(truth[1:], 0.03)])
    decibels, similarities = psnr(restored, truth, protocol), ssim(restored, truth, protocol)
    assert decibels.dtype == similarities.dtype == torch.float64
    for one, other, decibel, similarity in zip(restored, truth, decibels, similarities, strict=True):
        ours, theirs = (compared_by_skimage(image, protocol) for image in (one, other))
        expected = peak_signal_noise_ratio(theirs, ours, data_range=255)
        assert decibel.item() == pytest.approx(expected, abs=1e-9)
        planes = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in (ours, theirs))
        how = {"sigma": 1.5, "data_range": 255.0, "return_full_image": True}
        _, full = structural_similarity_index_measure(*planes, **how)
        expected = full[..., 5:-5, 5:-5].mean().item()  # the valid windows are centred 5 pixels inside
        assert similarity.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scale"), PUBLISHED)
def test_published_bicubic_rows(name, scale, sr_data):
    """The luma, rounded to uint8, shrunk and enlarged in double precision, rounded once at the end."""
    protocol, scores = Comparison(crop=scale), []
    paths = sorted((sr_data / "test" / name).glob("*.[pj][np]g"))
    assert len(paths) == {"Set5": 5, "BSD100": 100}[name]
    for path in paths:
        image = torch.from_numpy(read_rgb(path).transpose(2, 0, 1).copy())[None].double() / 255
        height, width = (length - length % scale for length in image.shape[-2:])
        truth = rounded(to_luma(image[..., :height, :width]))
        restored = resize(resize(truth, scale=1 / scale), scale=scale)
        scores.append(torch.cat([psnr(restored, truth, protocol), ssim(restored, truth, protocol)]))
    decibel, similarity = torch.stack(scores).mean(dim=0).tolist()
    # The rows are printed with two and four digits: these bounds are little more than that rounding.
    assert decibel == pytest.approx(PUBLISHED[name, scale][0], abs=0.005)
    assert similarity == pytest.approx(PUBLISHED[name, scale][1], abs=0.0002)


@pytest.mark.parametrize("metric", [psnr, ssim, high_frequency_energy])
@pytest.mark.parametrize(
    ("restored", "truth", "message"),
    [
        (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 33), r"\(1, 3, 32, 32\).*\(1, 3, 32, 33\)"),
        (torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32), "4"),
        (torch.zeros(0, 3, 32, 32), torch.zeros(0, 3, 32, 32), r"\(0, 3, 32, 32\)"),
        (torch.zeros(1, 3, 32, 32).byte(), torch.zeros(1, 3, 32, 32).byte(), "uint8"),
        (torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 255.0), "255"),
        (torch.full((1, 3, 32, 32), torch.nan), torch.zeros(1, 3, 32, 32), "nan"),
    ],
)
def test_images_that_cannot_be_compared(metric, restored, truth, message):
    protocol = () if metric is high_frequency_energy else (Comparison(crop=0),)
    with pytest.raises(ValueError, match=message):
        metric(restored, truth, *protocol)


def test_images_smaller_than_window_and_crop():
    small = torch.zeros(1, 3, 18, 40)
    assert ssim(small[..., :17], small[..., :17], Comparison(crop=3)).item() == 1.0
    with pytest.raises(ValueError, match="10x32"):
        ssim(small, small, Comparison(crop=4))
    with pytest.raises(ValueError, match="0x22"):
        psnr(small, small, Comparison(crop=9))


# ---------------------------------------------------------------- consistency with the input


def test_low_resolution_psnr_shrinks_with_the_border_the_input_was_made_with():
    truth = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels = (truth * 255).round().to(torch.uint8)
    low_res = resize(pixels, size=(8, 8), border="replicate", rounding="uint8") / 255
    assert low_resolution_psnr(pixels / 255, low_res, "replicate").item() == math.inf
    assert low_resolution_psnr(pixels / 255, low_res).item() < 60
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\).*\(1, 3, 32, 32\)"):
        low_resolution_psnr(low_res, truth)
    flat, lower = torch.full((2, 3, 24, 20), 100 / 255), torch.full((2, 3, 8, 5), 103 / 255)
    assert low_resolution_psnr(flat, lower).tolist() == pytest.approx(
        [20 * math.log10(255 / 3)] * 2, abs=1e-9
    )


# ---------------------------------------------------------------- spectrum


@pytest.mark.parametrize("size", [(48, 56), (47, 57), (16, 16)])
def test_energy_goes_with_the_square_of_the_amplitude(size):
    truth = texture(0, height=size[0], width=size[1])
    for factor in (2.0, 0.5, 1.0):
        restored = 0.4 + factor * (truth - 0.5)
        assert high_frequency_energy(restored, truth).item() == pytest.approx(factor**2, rel=1e-9)


@pytest.mark.parametrize(
    ("frequency", "counted"), [(0.2, False), (0.45, True), (0.6, True), (0.8, True), (0.98, False)]
)
def test_only_the_band_is_counted(frequency, counted):
    """A wave of a given fraction of the Nyquist frequency, along the width and along the diagonal."""
    truth = texture(0, channels=1, height=96, width=96)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    for direction in (x, (x + y) / math.sqrt(2)):
        restored = truth + 0.2 * torch.sin(math.pi * frequency * direction)
        ratio = high_frequency_energy(restored, truth).item()
        assert (ratio > 1.5) if counted else (ratio == pytest.approx(1.0, abs=0.01))


def test_border_jump_is_not_detail():
    """A ramp has no detail, though its periodic continuation jumps."""
    truth = noisy(torch.full((1, 1, 64, 64), 0.5, dtype=torch.float64), 0.02)
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    assert high_frequency_energy(ramp, truth).item() < 1e-3


def test_energy_of_flat_images():
    flat = torch.full((1, 3, 32, 32), 0.3)
    truth = texture(0, height=32, width=32).float()
    both = high_frequency_energy(torch.cat([truth, flat]), torch.cat([flat, truth]))
    assert math.isnan(both[0].item())
    assert both[1].item() == pytest.approx(0.0, abs=1e-9)


# ---------------------------------------------------------------- lpips


@pytest.fixture(scope="module")
def untrained_features(tmp_path_factory):
    """A file of AlexNet features, all of them random, as torchvision names them."""
    from torchvision.models import alexnet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = {f"features.{name}": value for name, value in alexnet().features.state_dict().items()}
    path = tmp_path_factory.mktemp("alexnet") / "random.safetensors"
    save_file(features, path)
    return path


@pytest.fixture(scope="module")
def lpips(untrained_features):
    return Lpips(weights=untrained_features)


@pytest.mark.slow
def test_lpips_is_a_distance_per_image_that_takes_grey(lpips):
    truth = torch.cat([texture(0, height=64, width=64), texture(1, height=64, width=64)])
    restored = torch.cat([truth[:1], noisy(truth, 0.1)[1:]])
    distances = lpips(restored, truth)
    assert (distances[0].item(), distances.shape) == (0.0, (2,))
    assert lpips(restored[1:], truth[1:]).item() == pytest.approx(distances[1].item(), rel=1e-5)
    assert lpips(noisy(truth, 0.2), truth)[1] > distances[1] > 0
    assert not distances.requires_grad
    grey = texture(0, channels=1, height=64, width=64)
    as_rgb = lpips(noisy(grey, 0.2).expand(-1, 3, -1, -1), grey.expand(-1, 3, -1, -1))
    assert torch.equal(lpips(noisy(grey, 0.2), grey), as_rgb)
    with pytest.raises(ValueError, match="31x64"):
        lpips(grey[:, :, :31], grey[:, :, :31])


@pytest.mark.slow
def test_lpips_reads_pth_with_the_whole_network_and_the_variable(
    untrained_features, lpips, tmp_path, monkeypatch
):
    content = load_file(untrained_features) | {"classifier.1.weight": torch.zeros(2)}
    torch.save(content, tmp_path / "alexnet.pth")
    monkeypatch.setenv("SR_LPIPS_WEIGHTS", str(tmp_path / "alexnet.pth"))
    truth = texture(0, height=64, width=64)
    found = Lpips()
    assert torch.equal(found(noisy(truth, 0.1), truth), lpips(noisy(truth, 0.1), truth))
    digest = hashlib.sha256((tmp_path / "alexnet.pth").read_bytes()).hexdigest()
    assert "alexnet.pth" in found.note
    assert digest[:12] in found.note


@pytest.mark.slow
def test_lpips_of_wrong_weights_is_refused_and_not_replaced_by_a_download(untrained_features, tmp_path):
    features = load_file(untrained_features)
    save_file(features | {"features.3.bias": torch.zeros(5)}, tmp_path / "other.safetensors")
    del features["features.3.bias"]
    save_file(features, tmp_path / "incomplete.safetensors")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    torch.save([1], tmp_path / "list.pth")
    named = {"incomplete.safetensors": "features.3.bias", "other.safetensors": "3.bias"}
    for name in ("missing.pth", "text.pth", "text.safetensors", "list.pth", *named):
        with pytest.raises(ValueError, match=re.escape(named.get(name, name))):
            Lpips(weights=tmp_path / name)


@pytest.fixture
def nothing_fetched(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("SR_LPIPS_WEIGHTS", raising=False)


@pytest.mark.slow
def test_the_perceptual_distance_is_lpips_of_vgg16_and_has_a_gradient(tmp_path):
    from torchmetrics.functional.image.lpips import _LPIPS

    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = _LPIPS(net="vgg", pnet_rand=True)
    # net.slice2.5.weight is torchvision's features.5.weight
    named = {name.split(".", 2)[2]: value for name, value in whole.state_dict().items() if ".slice" in name}
    save_file({f"features.{name}": value for name, value in named.items()}, tmp_path / "vgg16.safetensors")
    perceptual = PerceptualFeatures("cpu", tmp_path / "vgg16.safetensors")
    truth = (2 * texture(0, height=32, width=48) - 1).float()
    restored = noisy(truth, 0.1).float().requires_grad_()
    features = perceptual(restored)
    assert [stage.shape[1] for stage in features] == list(perceptual.dims)
    found = perceptual.distance(features, perceptual(truth))
    torch.testing.assert_close(found, whole(restored, truth).flatten())
    (gradient,) = torch.autograd.grad(found.sum(), restored)
    assert gradient.any()
    with pytest.raises(ValueError, match="VGG16"):
        PerceptualFeatures("cpu", tmp_path / "missing.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(-2, "Name or service not known"),
        RuntimeError('invalid hash value (expected "7be5be79", got "00000000")'),
        ImportError("No module named 'torchvision'"),
        RuntimeError("operator torchvision::nms does not exist"),
    ],
)
def test_lpips_that_cannot_be_had_says_why_and_what_to_do(monkeypatch, nothing_fetched, error):
    def fail(*_args, **_kwargs):
        raise error

    broken = (lpips_package, "_LPIPS") if "torchvision" in str(error) else (torch.hub, "download_url_to_file")
    monkeypatch.setattr(*broken, fail)
    with pytest.raises(MetricUnavailableError, match=re.escape(str(error)) + ".*SR_LPIPS_WEIGHTS"):
        Lpips()
    assert socket.getdefaulttimeout() is None


@pytest.mark.slow
def test_lpips_from_a_silent_server_gives_up(monkeypatch, nothing_fetched):
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        download = torch.hub.download_url_to_file

        def from_silent_server(_url, *args, **kwargs):
            return download(f"http://127.0.0.1:{port}/alexnet.pth", *args, **kwargs)

        monkeypatch.setattr(lpips_module, "PATIENCE", 0.2)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(torch.hub, "download_url_to_file", from_silent_server)
        with pytest.raises(MetricUnavailableError, match="timed out"):
            Lpips()
