"""One short training per choice, everything else equal, measured on photos that no training here sees.

python -m bench.ablate --photos $SR_DATA/train/BSDS500            # all rows, one after the other
python -m bench.ablate --photos $SR_DATA/train/BSDS500 --rows base patch_2
python -m bench.ablate                                            # the table of what has been measured
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.tables import table
from imaging.files import list_images

RECIPE = "recipes/ablation.args"
HELD_OUT_EVERY = 16
MEASURED_IMAGES = 12
ROWS: dict[str, str] = {
    "base": "",
    "raw_residual": "--residual_std 1",
    "cross_attention": "--conditioning cross_attention",
    "both": "--conditioning both",
    "trunk_4": "--context_blocks 4",
    "trunk_8": "--context_blocks 8",
    "patch_1": "--patch_size 1 --unet_base_dim 16 --unet_dim_mults 1 2 4 8",
    "patch_2": "--patch_size 2 --unet_base_dim 32 --unet_dim_mults 1 2 4",
    "noise": "--diffusion_mode noise",
    "clean": "--diffusion_mode clean",
    "regression": "--diffusion_mode regression",
    "logit_normal": "--timestep_density logit_normal",
    "high_noise": "--timestep_density high_noise",
    "clean_high_noise": "--diffusion_mode clean --timestep_density high_noise",
    "min_snr_5": "--min_snr_gamma 5",
    "no_ema": "--ema_decay 0",
    "ema_0.95": "--ema_decay 0.95",
    "rate_5e-4": "--learning_rate 5e-4",
    "rate_2e-3": "--learning_rate 2e-3",
    "constant_rate": "--final_learning_rate 1",
    "crop_32": "--img_size 32 --batch_size 64",
    "crop_128": "--img_size 128 --batch_size 4",
}
HEADINGS = ("change to the recipe", "seconds", "PSNR, 1 step", "PSNR, 10 steps", "HF energy", "SWD")


def split(photos: Path, out: Path) -> tuple[Path, Path]:
    """Folders of links to the photos: those to train on, and every 16th, which is held out."""
    for name in ("train", "held_out"):
        (out / name).mkdir(parents=True, exist_ok=True)
    for index, path in enumerate(list_images(photos)):
        link = out / ("train" if index % HELD_OUT_EVERY else "held_out") / path.name
        if not link.exists():
            link.symlink_to(path.resolve())
    return out / "train", out / "held_out"


def measure(name: str, out: Path, train: Path, held_out: Path) -> None:
    """Train one row, restore the held-out photos, and write what came of it to <out>/<name>.json."""
    flags = shlex.split(ROWS[name])
    data = ["--image_folder", str(train), "--val_folder", str(held_out)]
    files = ["--log_dir", str(out / "logs"), "--checkpoint_dir", str(out / "checkpoints" / name)]
    started = time.perf_counter()
    _run("train_diffusion.py", f"@{RECIPE}", *flags, *data, *files)
    seconds = time.perf_counter() - started
    weights = max((out / "checkpoints" / name).glob("*/*_last.pth"), key=lambda path: path.stat().st_mtime)
    steps = ["1"] if name == "regression" else ["1", "10"]
    found = out / f"{name}.measured.json"
    shown = ["--data", str(held_out), "--scale", "4", "--limit", str(MEASURED_IMAGES), "--no_lpips"]
    _run("evaluate.py", *shown, "--weights_path", str(weights), "--steps", *steps, "--json", str(found))
    rows = json.loads(found.read_text())
    (out / f"{name}.json").write_text(json.dumps({"seconds": seconds, "report": rows}))


def as_table(out: Path) -> list[str]:
    """The Markdown of every row that has been measured."""
    rows = []
    for name, flags in ROWS.items():
        path = out / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        by_steps = {row["steps"]: row for row in found["report"]["rows"]}
        sample = by_steps.get(10)
        ten = ["", "", ""]
        if sample is not None:
            ten = [f"{sample['psnr']:.2f}", f"{sample['hf_energy']:.2f}", f"{sample['swd']:.0f}"]
        label = f"`{flags}`" if flags else "(the recipe)"
        rows.append([label, f"{found['seconds']:.0f}", f"{by_steps[1]['psnr']:.2f}", *ten])
    return table(HEADINGS, rows)


def _run(*command: str) -> None:
    print("$ python", shlex.join(command), flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0] if __doc__ else None)
    parser.add_argument("--photos", type=Path, help="a folder of photos; without it, nothing is trained")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=Path, default=Path("out/ablation"))
    args = parser.parse_args(argv)
    if args.photos is not None:
        train, held_out = split(args.photos, args.out)
        for name in args.rows:
            measure(name, args.out, train, held_out)
    print("\n".join(as_table(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
