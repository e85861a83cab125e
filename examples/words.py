"""Words that steer: captions as tokens, tried on pictures whose fill is lost at an eighth of the size.

    python -m examples.words draw words_demo          # pictures, each with a caption NAME.txt
    python -m examples.words tokens words_demo/train  # NAME.npy from each NAME.txt, of any pictures
    python train_diffusion.py @recipes/words.args --image_folder words_demo/train --tokens words_demo/train
    python -m examples.words measure words_demo --weights_path <the model>

Tokens are the static word vectors that wordllama carries; extra `words`.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evaluation.lpips import Lpips
from evaluation.metrics import Comparison, psnr
from examples.dead_leaves import dead_leaves
from imaging.files import list_images, to_unit_range, write_image
from models import load_model
from restoration import RestoreConfig, Restorer
from util import ImageDataset

MOST_WORDS = 4  # of a caption; fewer are filled up with zeros
TRAIN_SIDE, TEST_SIDE, SCALE, AMPLITUDE = 32, 64, 8, 40
# (4, 4) tiles of mean 0: nothing of them is left in the mean of 8 x 8 pixels.
FILLS = {
    "stripes": np.tile([[1.0], [1], [-1], [-1]], (1, 4)),
    "dots": np.kron([[3.0, -1], [-1, -1]], np.ones((2, 2))) / 3**0.5,
    "flat": np.zeros((4, 4)),
}


def draw(folder: Path, count: int, side: int, seed: int) -> None:
    """Dead leaves under one fill each, with its name as the caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        word = list(FILLS)[index % len(FILLS)]
        leaves = dead_leaves(side, np.random.default_rng([seed, index]), min_radius=6)
        fill = AMPLITUDE * np.tile(FILLS[word], (side // 4, side // 4))[..., None]
        image = np.rint(70 + leaves * (115 / 255) + fill).clip(0, 255).astype(np.uint8)
        write_image(folder / f"{index:04d}.png", image)
        (folder / f"{index:04d}.txt").write_text(word)


@lru_cache(maxsize=1)
def encoder() -> Any:  # noqa: ANN401  # wordllama is optional
    """From the package's own folder: nothing is fetched."""
    import wordllama

    home = Path(wordllama.__file__).parent
    return wordllama.WordLlama.load(cache_dir=home, disable_download=True)


def word_tokens(caption: str) -> NDArray[np.float32]:
    """(MOST_WORDS, 256): a vector of unit power for each word."""
    words = caption.lower().split()[:MOST_WORDS]
    vectors = encoder().embed(words, norm=True) * 256**0.5 if words else np.zeros((0, 256))
    tokens: NDArray[np.float32] = np.zeros((MOST_WORDS, 256), np.float32)
    tokens[: len(words)] = vectors
    return tokens


def measure(folder: Path, weights: Path) -> None:
    """Error and LPIPS of the test pictures without words, with the right and with a wrong one."""
    paths, lpips = list_images(folder / "test"), Lpips()
    samples = [ImageDataset(paths, TEST_SIDE, SCALE, train=False)[index] for index in range(len(paths))]
    low_res, truth = (
        to_unit_range(torch.stack([getattr(one, name) for one in samples]))
        for name in ("low_res", "original")
    )
    right = [path.with_suffix(".txt").read_text() for path in paths]
    wrong = [list(FILLS)[list(FILLS).index(word) - 1] for word in right]
    model = load_model(weights)
    rows = [("none", None, 1.0), ("right", right, 1.0), ("right", right, 2.0), ("wrong", wrong, 1.0)]
    print("| mode | words | guidance | PSNR | LPIPS |\n|---|---|---:|---:|---:|")
    for mode, (name, captions, guidance) in itertools.product(("fidelity", "detail"), rows):
        tokens = None if captions is None else torch.from_numpy(np.stack(list(map(word_tokens, captions))))
        how = RestoreConfig(mode=mode, guidance=guidance)  # type: ignore[arg-type]  # the two are presets
        restored = Restorer(model, how, torch.device("cpu"))(low_res, tokens)
        error, distance = psnr(restored, truth, Comparison(0)).mean(), lpips(restored, truth).mean()
        print(f"| {mode} | {name} | {guidance:g} | {error:.2f} | {distance:.3f} |", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.words", description=__doc__)
    parser.add_argument("command", choices=["draw", "tokens", "measure"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights_path", type=Path)
    args = parser.parse_args(argv)
    if args.command == "draw":
        draw(args.folder / "train", 480, TRAIN_SIDE, 0)
        draw(args.folder / "test", 24, TEST_SIDE, 1)
    elif args.command == "tokens":
        for path in sorted(args.folder.glob("*.txt")):
            np.save(path.with_suffix(".npy"), word_tokens(path.read_text()))
    else:
        measure(args.folder, args.weights_path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
