"""The denoising network: a UNet below the full resolution, conditioned on the low-resolution image.

Shapes: B batch, C channels, H x W high-resolution pixels, h x w low-resolution ones, p patch size, D_i width
of level i, N tokens of width E (context_dim).
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.options import OptionError, Options, Plain, option, rare_option, takes_fields_of
from network import Condition, Network
from util import Norm, ResidualBlock, SinusoidalPositionEmbeddings, normalisation, zeroed

Conditioning = Literal["none", "concat", "cross_attention", "both", "tokens"]


@dataclass(frozen=True)
class UNetConfig(Options):
    """The options of UNet."""

    retired: ClassVar[Mapping[str, Plain]] = {"scales": [], "context_blocks": 0}

    in_channels: int = option(3, "image channels of the noisy input", has_flag=False, low=1)
    out_channels: int = option(3, "image channels of the prediction", has_flag=False, low=1)
    base_dim: int = option(32, "width of the first level, a multiple of 4", flag="unet_base_dim", low=4)
    dim_mults: tuple[int, ...] = option(
        (1, 2, 4), "width of each level over the first; each halves the size", flag="unet_dim_mults", low=1
    )
    context_dim: int = rare_option(512, "width of the cross-attention tokens", low=1)
    patch_size: Literal[1, 2, 4] = option(2, "side of the patches that the stem folds into channels")
    blocks_per_level: int = option(2, "residual blocks in each level of encoder and decoder", low=1)
    predictor_blocks: int = option(0, "residual blocks that predict the mean; 0: none", low=0, script=6)
    predictor_dim: int | None = rare_option(None, "width of the predictor; by default base_dim", low=4)
    conditioning: Conditioning = option(
        "both",
        "concat: the upscaled image at the stem; cross_attention: tokens of the low resolution; tokens: the "
        "upscaled image, and tokens of another encoder",
    )
    norm: Norm = rare_option("pixel", "pixel: over each pixel's channels, which makes tiles exact; or group")
    attention_window: int = option(8, "side in tokens of the windows of self-attention; 0: everything", low=0)
    attention_levels: tuple[int, ...] = option(
        (-1,), "levels that attend; -1: the deepest", may_be_empty=True
    )
    head_dim: int = rare_option(32, "width of one attention head", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_dim % 4:
            raise OptionError("base_dim", self.base_dim, "give a multiple of 4")
        depth = len(self.dim_mults)
        if any(not -depth <= level < depth for level in self.attention_levels):
            raise OptionError("attention_levels", self.attention_levels, f"there are {depth} levels")

    @property
    def cross_attends(self) -> bool:
        return self.conditioning in ("cross_attention", "both", "tokens")

    @property
    def size_multiple(self) -> int:
        """Pixels along a deepest token, to whose multiples inputs are padded."""
        return int(self.patch_size * 2 ** (len(self.dim_mults) - 1))

    def attends(self, level: int) -> bool:
        return level in {one % len(self.dim_mults) for one in self.attention_levels}


class Context(NamedTuple):
    """An encoded Condition, the same for every step."""

    features: Tensor | float = 0.0  # (B, D_0, H / p, W / p) of the padded size
    tokens: Tensor | None = None  # (B, N, E)


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, Eq. 1) whose output starts at 0."""

    def __init__(self, dim: int, source_dim: int, head_dim: int) -> None:
        super().__init__()
        most = max(1, dim // head_dim)
        self.heads = next(heads for heads in range(most, 0, -1) if dim % heads == 0)
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key_value = nn.Linear(source_dim, 2 * dim, bias=False)
        self.out = zeroed(nn.Linear(dim, dim))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """(B k, M, dim), (B, N, source_dim) -> (B k, M, dim): k windows of an image attend to its source."""
        query = self.to_query(x).reshape(len(source), -1, x.shape[-1])  # (B, k M, dim)
        key, value = self.to_key_value(source).chunk(2, dim=-1)  # (B, N, dim) each
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        attended = F.scaled_dot_product_attention(*heads)  # (B, heads, k M, dim / heads)
        result: Tensor = self.out(attended.transpose(1, 2).reshape(x.shape))
        return result


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward: each normalises its input and is added to it."""

    def __init__(self, dim: int, context_dim: int | None = None, *, head_dim: int = 32) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.self_attention = Attention(dim, dim, head_dim)
        self.cross_attention = None if context_dim is None else Attention(dim, context_dim, head_dim)
        self.norm2 = nn.Identity() if context_dim is None else nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B k, M, dim), tokens (B, N, context_dim) or None -> (B k, M, dim)."""
        normed = self.norm1(x)
        x = x + self.self_attention(normed, normed)
        if context is not None:
            if self.cross_attention is None:
                raise ValueError("this BasicTransformerBlock was built without a context_dim")
            x = x + self.cross_attention(self.norm2(x), context)
        x = x + self.feed_forward(self.norm3(x))
        return x


class WindowTransformer(nn.Module):
    """A transformer block over square windows, maybe shifted (Liu et al. 2021, section 3.2)."""

    # The cost is linear in the pixels, a window of a photo sees as much as one of a training crop did, and
    # shifting every other block by half a side leaves no seam in one place.

    def __init__(self, block: BasicTransformerBlock, window: int, shifted: bool) -> None:
        super().__init__()
        self.block = block
        self.window = window
        self.shift = window // 2 if shifted else 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, D, h, w), tokens (B, N, E) or None -> (B, D, h, w)."""
        batch, _, height, width = x.shape
        rows, top, bottom = self._partition(height)
        columns, left, right = self._partition(width)
        if top or bottom or left or right:  # never on a crop that one window covers
            x = F.pad(x, (left, right, top, bottom), mode="replicate")
        grid = (batch, x.shape[2] // rows, x.shape[3] // columns)
        windows = x.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
        windows = windows.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)  # (B grid, rows columns, D)
        windows = self.block(windows, context).unflatten(0, grid).unflatten(3, (rows, columns))
        mixed: Tensor = windows.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)  # (B, D, ...), padded
        return mixed[:, :, top : top + height, left : left + width]

    def _partition(self, length: int) -> tuple[int, int, int]:
        """Window side along one axis, padding before and after it."""
        if self.window == 0 or length <= self.window:
            return length, 0, 0
        return self.window, self.shift, -(length + self.shift) % self.window


class ImageContextExtractor(nn.Module):
    """Describes an image of any size by grid * grid tokens."""

    def __init__(self, in_channels: int = 3, context_dim: int = 512, grid: int = 4, width: int = 32) -> None:
        super().__init__()
        self.grid = grid
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.project = nn.Linear(4 * width, context_dim)
        self.position = nn.Parameter(0.02 * torch.randn(grid * grid, context_dim))
        self.norm = nn.LayerNorm(context_dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, h, w) in [-1, 1] -> (B, N, E)."""
        pooled = F.adaptive_avg_pool2d(self.features(image), self.grid)  # (B, 4 width, grid, grid)
        tokens: Tensor = self.norm(self.project(pooled.flatten(2).transpose(1, 2)) + self.position)
        return tokens


class Predictor(nn.Module):
    """Predicts the residual's mean, and features to refine it from (Whang et al. 2022, section 3)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        width = config.predictor_dim or config.base_dim
        self.patch_size = config.patch_size
        self.stem = nn.Conv2d(config.in_channels * config.patch_size**2, width, 3, padding=1)
        self.blocks = nn.Sequential(
            *(ResidualBlock(width, width, norm=config.norm) for _ in range(config.predictor_blocks))
        )
        self.to_mean = zeroed(nn.Conv2d(width, config.out_channels * config.patch_size**2, 3, padding=1))
        self.to_features = nn.Conv2d(width, config.base_dim * config.dim_mults[0], 3, padding=1)

    def forward(self, folded: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C p p, H / p, W / p) upscaled -> mean (B, C, H, W), features (B, D_0, H / p, W / p)."""
        x = self.blocks(self.stem(folded))
        return F.pixel_shuffle(self.to_mean(x), self.patch_size), self.to_features(x)


class ResidualStage(nn.Module):
    """The residual blocks of a level."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, config: UNetConfig) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (config.blocks_per_level - 1)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, out_channels, time_dim, norm=config.norm) for width in widths
        )

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """(B, in_channels, h, w), (B, time_dim) -> (B, out_channels, h, w)."""
        for block in self.blocks:
            x = block(x, time_embedding)
        return x


class Upsample(nn.Conv2d):
    """(B, D, h, w) -> (B, out_channels / 4, 2h, 2w), by sub-pixel convolution (Shi et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(super().forward(x), 2)


Attend = Callable[[Tensor, Tensor | None], Tensor]
Levels = Iterable[tuple[nn.Module, Attend, Callable[[Tensor], Tensor]]]


def unchanged(x: Tensor, context: Tensor | None = None) -> Tensor:
    """Pass on x where a level has no part to transform it."""
    return x


class UNet(Network):
    """Predicts a diffusion target (Ronneberger et al. 2015; Ho et al. 2020, appendix B).

    It is built from the fields of UNetConfig. With `checkpoint_activations`, stages are computed again in the
    backward pass (Chen et al. 2016).
    """

    Config = UNetConfig
    config: UNetConfig
    predictor: Predictor | None

    @takes_fields_of(UNetConfig)
    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        self.checkpoint_activations = False
        self.image_channels = config.in_channels
        self.cell = config.size_multiple
        self.window_multiple = self.cell * max(1, config.attention_window)
        if config.predictor_blocks:  # of two convolutions each, whose radius is a folded pixel
            self.mean_reach = config.patch_size * (2 * config.predictor_blocks + 2)
        dims = [config.base_dim * mult for mult in config.dim_mults]
        self._build_inputs(config, dims[0])
        self._build_levels(config, dims)
        self.out_norm = normalisation(config.norm, dims[0])
        self.out = zeroed(nn.Conv2d(dims[0], config.out_channels * config.patch_size**2, 3, padding=1))

    @classmethod
    def from_config(cls, config: UNetConfig) -> Self:
        """Build the network of these options, as UNet(**vars(config)) does."""
        return cls(**vars(config))

    def _build_inputs(self, config: UNetConfig, width: int) -> None:
        folded = config.in_channels * config.patch_size**2
        self.stem = nn.Conv2d(folded, width, 3, padding=1)
        self.time_embedding = nn.Sequential(
            SinusoidalPositionEmbeddings(width),
            nn.Linear(width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, 4 * width),
        )
        # A convolution of the concatenation [noisy, upscaled] is the sum of two convolutions; the second does
        # not change from step to step.
        self.predictor = Predictor(config) if config.predictor_blocks else None
        concatenates = config.conditioning in ("concat", "both", "tokens") and self.predictor is None
        self.upscaled_stem = nn.Conv2d(folded, width, 3, padding=1) if concatenates else None
        self.takes_tokens = config.cross_attends
        self.context_extractor: ImageContextExtractor | None = None
        if config.conditioning in ("cross_attention", "both"):
            self.context_extractor = ImageContextExtractor(config.in_channels, config.context_dim)

    def _build_levels(self, config: UNetConfig, dims: list[int]) -> None:
        time_dim = 4 * dims[0]
        self.encoder = nn.ModuleList(ResidualStage(width, width, time_dim, config) for width in dims)
        self.downsample = nn.ModuleList(
            nn.Conv2d(wide, deeper, 2, stride=2) for wide, deeper in itertools.pairwise(dims)
        )
        self.bottleneck = nn.ModuleList(
            ResidualBlock(dims[-1], dims[-1], time_dim, norm=config.norm) for _ in range(2)
        )
        self.decoder = nn.ModuleList(
            ResidualStage(2 * width, width, time_dim, config) for width in dims[::-1]
        )
        self.upsample = nn.ModuleList(
            Upsample(deeper, 4 * wide, 1) for deeper, wide in itertools.pairwise(dims[::-1])
        )
        context_dim = config.context_dim if config.cross_attends else None
        attended = [dims[level] for level in self._order() if config.attends(level)]
        self.transformers = nn.ModuleList(
            WindowTransformer(
                BasicTransformerBlock(width, context_dim, head_dim=config.head_dim),
                config.attention_window,
                shifted=place % 2 == 1,
            )
            for place, width in enumerate(attended)
        )

    def _order(self) -> list[int]:
        """The levels in the order in which they may attend: encoder, bottleneck, decoder."""
        levels = list(range(len(self.config.dim_mults)))
        return [*levels, levels[-1], *levels[::-1]]

    def encode_tokens(self, low_res: Tensor) -> Tensor | None:
        """(B, C, h, w) in [-1, 1] -> (B, N, E), or None where the network makes no tokens."""
        return None if self.context_extractor is None else self.context_extractor(low_res)

    def encode_context(self, condition: Condition) -> tuple[Context, Tensor | None]:
        """Encode what every step needs, and predict the mean (B, C, H, W) or None; ValueError of tokens."""
        features, mean = 0.0, None
        if self.predictor is not None:
            mean, features = self._run(self.predictor, self._fold(condition.upscaled))
            mean = mean[..., : condition.upscaled.shape[-2], : condition.upscaled.shape[-1]]
        elif self.upscaled_stem is not None:
            features = self.upscaled_stem(self._fold(condition.upscaled))
        return Context(features, self._tokens(condition)), mean

    def _tokens(self, condition: Condition) -> Tensor | None:
        """(B, N, E) that cross-attention reads, or None without it; ValueError."""
        tokens, kind, width = condition.tokens, self.config.conditioning, self.config.context_dim
        if not self.config.cross_attends:
            if tokens is not None:
                raise ValueError(f"conditioning {kind!r} takes no tokens: train with conditioning 'tokens'")
            return None
        if tokens is None and self.context_extractor is not None:
            if condition.low_res is None:
                raise ValueError(f"conditioning {kind!r} needs a low-resolution image or tokens")
            tokens = self.encode_tokens(condition.low_res)
        if tokens is None:
            return condition.upscaled.new_zeros(len(condition.upscaled), 1, width)
        if tokens.ndim != 3 or tokens.shape[-1] != width:
            raise ValueError(f"tokens must be (B, N, {width}), not {tuple(tokens.shape)}")
        return tokens

    def forward(self, noisy: Tensor, t: Tensor, context: Context) -> Tensor:
        """(B, C, H, W) of unit variance, (B,), an encoded condition -> (B, out_channels, H, W)."""
        encoder, attend_between, decoder = self._levels()
        x = self.stem(self._fold(noisy)) + context.features  # (B, D_0, H / p, W / p)
        embedding = self.time_embedding(t)  # (B, 4 D_0)
        skips = []
        for stage, attend, down in encoder:
            x = attend(self._run(stage, x, embedding), context.tokens)  # (B, D_i, h_i, w_i)
            skips.append(x)
            x = down(x)  # (B, D_i+1, h_i / 2, w_i / 2), or unchanged at the deepest
        x = self.bottleneck[0](x, embedding)  # (B, D_last, h_last, w_last)
        x = self.bottleneck[1](attend_between(x, context.tokens), embedding)
        for stage, attend, up in decoder:
            x = torch.cat([x, skips.pop()], dim=1)  # (B, 2 D_i, h_i, w_i)
            x = attend(self._run(stage, x, embedding), context.tokens)  # (B, D_i, h_i, w_i)
            x = up(x)  # (B, D_i-1, 2 h_i, 2 w_i), or unchanged at the top
        x = self.out(F.silu(self.out_norm(x)))  # (B, C p p, H / p, W / p)
        return F.pixel_shuffle(x, self.config.patch_size)[..., : noisy.shape[-2], : noisy.shape[-1]]

    def _levels(self) -> tuple[Levels, Attend, Levels]:
        """(stage, attention, resizing) of each level of the encoder and of the decoder, attention between."""
        transformers, depth = iter(self.transformers), len(self.encoder)
        attention = [
            next(transformers) if self.config.attends(level) else unchanged for level in self._order()
        ]
        encoder = zip(self.encoder, attention[:depth], (*self.downsample, unchanged), strict=True)
        decoder = zip(self.decoder, attention[depth + 1 :], (*self.upsample, unchanged), strict=True)
        return encoder, attention[depth], decoder

    def _run(self, part: nn.Module, *inputs: Tensor) -> Any:  # noqa: ANN401  # what the part gives
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def _fold(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C p p, H / p, W / p), edges repeated to whole tokens."""
        multiple = self.config.size_multiple
        bottom, right = (-image.shape[-2]) % multiple, (-image.shape[-1]) % multiple
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom), mode="replicate")
        folded = F.pixel_unshuffle(image, self.config.patch_size)
        return folded.contiguous(memory_format=torch.channels_last)
