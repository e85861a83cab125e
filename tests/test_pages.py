"""The pages are true: the commands and the Python of README.md and docs/ run as they stand, on stand-ins.

Flags added to a command cut down networks, crops and lengths of trainings; torchrun starts one process.
"""

import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import train_diffusion
from examples.dead_leaves import draw_dead_leaves_folder

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = {
    f"{page.relative_to(ROOT)} {number}": block.groups()
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
    for number, block in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")), start=1)
}
SMALL = (
    "--unet_base_dim 8 --unet_dim_mults 1 2 --predictor_blocks 1 --img_size 32 --batch_size 2"
    " --accumulation_steps 1 --max_steps 2 --warmup_steps 1 --validate_every 2"
).split()
NOT_RUN = {
    "git clone": "needs a network",
    "pip install": "needs a network",
    "python3 -m venv": "makes an environment",
    "tensorboard": "serves until it is stopped",
    "python app.py": "serves until it is stopped; see tests/test_app.py",
    "python -m pytest": "is this",
    "python -m bench": "takes minutes; see tests/test_bench.py",
    "make": "is these tests and the demo of tests/test_examples.py",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with what the pages name: photos, test images, and models trained for two steps."""
    folder = tmp_path_factory.mktemp("pages")
    draw_dead_leaves_folder(folder / "photos", 6, 48, 0)
    draw_dead_leaves_folder(folder / "Set5", 2, 64, 1)
    draw_dead_leaves_folder(folder / "one", 1, 24, 2)[0].rename(folder / "photo.png")
    for name in ("recipes", "weights"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for recipe in ([], ["@recipes/x4.args"]):
            assert train_diffusion.main([*recipe, "--image_folder", "photos", *SMALL]) == 0
    (clean,) = folder.glob("checkpoints/*/diffusion_model_clean_best.pth")
    for name in ("best.pth", "clean_best.pth"):
        shutil.copy(clean, folder / name)
    return folder


def arguments(words):
    """The words of a command, with the runs that are there, and cut down."""
    words = [find_run(word) if word.startswith("checkpoints/") else word for word in words]
    if words[0] == "evaluate.py" and "SR_LPIPS_WEIGHTS" not in os.environ:
        return [*words[1:], "--no_lpips"]  # nothing is fetched
    if words[0] != "train_diffusion.py":
        return words[1:]
    return [*words[1:], *(["--max_steps", "3"] if "--weights_path" in words else SMALL)]


def find_run(path):
    return str(max(Path("checkpoints").glob(f"*/{Path(path).name}"), key=lambda found: found.stat().st_mtime))


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_a_page_runs(workplace, tmp_path, monkeypatch, block):
    language, text = BLOCKS[block]
    monkeypatch.chdir(shutil.copytree(workplace, tmp_path / "copy", symlinks=True))
    if language == "python":
        exec(text, {})
        return
    run, skipped = 0, []
    for line in re.split(r"\n|&&", text.replace("\\\n", " ")):
        words = shlex.split(re.sub(r"<[^>]*>", "run", line), comments=True)
        script = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
        reason = next((why for start, why in NOT_RUN.items() if line.strip().startswith(start)), None)
        if re.search(r"--device cuda|--precision fp16", line):
            reason = "needs a GPU"
        if reason:
            skipped.append(reason)
        elif script is not None:
            main = importlib.import_module(words[script].removesuffix(".py")).main
            assert main(arguments(words[script:])) == 0, line
            run += 1
    assert run or skipped
    if not run:
        pytest.skip("; ".join(skipped))
