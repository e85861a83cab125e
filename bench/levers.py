"""What each choice of the training step is worth, one change at a time: python -m bench.levers."""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn

from bench.contenders import OURS, our_network
from bench.networks import denoising_step, training_step
from bench.tables import table
from bench.timing import in_turns
from engine.device import autocast_dtype, compile_network, select_device
from training import TrainingConfig, make_optimizer
from unet import Condition, UNet

BATCH, CROP = 16, 64


def planar(network: nn.Module) -> nn.Module:
    """The network with its weights in (out, in, height, width) order."""
    return network.to(memory_format=torch.contiguous_format)


def in_bfloat16(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step under autocast."""

    def autocast_step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            step()

    return autocast_step


def updates(device: torch.device) -> dict[str, Callable[[], None]]:
    """The optimisers alone, on gradients that are there."""
    works = {}
    for name in ("fused AdamW", "AdamW, one tensor at a time", "AdamW8bit"):
        network = our_network(device)
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        if name == "AdamW8bit":
            works[name] = make_optimizer(network, TrainingConfig(1, optimizer="adamw8bit")).step
        else:
            fused = name.startswith("fused")
            works[name] = torch.optim.AdamW(network.parameters(), 1e-4, fused=fused, foreach=False).step
    return works


def steps(device: torch.device, compiled: bool) -> dict[str, Callable[[], None]]:
    """Training steps, each with one thing changed."""

    def build(network: nn.Module) -> Callable[[], None]:
        return training_step(network, BATCH, CROP, device)

    def shaped(**settings: object) -> nn.Module:
        config = {**our_network(device).config.to_dict(), **settings}
        return UNet(**config).to(device, memory_format=torch.channels_last)

    works = {
        OURS: build(our_network(device)),
        "weights not channels-last": build(planar(our_network(device))),
        "group normalisation": build(shaped(norm="group")),
        "no trunk (context_blocks 0)": build(shaped(context_blocks=0)),
        "patch 2 (base 32, 1 2 4)": build(shaped(patch_size=2, base_dim=32, dim_mults=(1, 2, 4))),
        "patch 1 (base 16, 1 2 4 8)": build(shaped(patch_size=1, base_dim=16, dim_mults=(1, 2, 4, 8))),
    }
    if autocast_dtype(device, "bf16") is not None:
        works["bfloat16 autocast"] = in_bfloat16(build(our_network(device)), device)
    if compiled:
        network = our_network(device)
        if compile_network(network, device):
            works["torch.compile"] = build(network)
    return works


def encoding(device: torch.device) -> dict[str, Callable[[], object]]:
    """What encoding the condition once per image saves at every step after the first."""
    network = our_network(device).eval()
    image = torch.zeros(1, 3, 256, 256, device=device)

    def encode() -> None:
        with torch.inference_mode():
            network.encode_context(Condition(image, image[..., ::4, ::4]))

    return {"a denoising step": denoising_step(network, 256, device), "encoding the condition": encode}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="a minute more")
    args = parser.parse_args(argv)
    device = select_device(args.device)
    autocast_dtype(device, "bf16" if device.type == "cpu" else "auto")  # before anything is computed
    groups = {
        f"a training step, {BATCH} crops of {CROP}²": steps(device, args.compile),
        "updating the weights": updates(device),
        "one image of 256²": encoding(device),
    }
    for title, works in groups.items():
        timings = in_turns(works, args.rounds, device, warm_up=2)
        first = next(iter(timings.values())).median
        rows = [[name, one.seconds(1000), f"{one.median / first:.2f}"] for name, one in timings.items()]
        print("\n".join(table([title, "ms (range)", "relative"], rows)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
