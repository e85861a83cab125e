"""A page in the browser that restores one picture at a time, on this computer alone; extra `app`.

python app.py
python app.py checkpoints/<run>/diffusion_model_clean_best.pth --port 7861
"""

import argparse
import html
import importlib.util
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from imaging.files import decode_image
from imaging.pixels import Pixels, as_rgb8
from models import load_model
from restoration import PRESETS, RestoreConfig, restore
from restoration.files import FILE_ERRORS, describe_failure
from restoration.weights import RELEASED

SIDE = 2048  # pixels of the longer side of what the slider shows; the download has them all
KEPT = 3600  # seconds until a picture is removed, where the page stays open
loaded = lru_cache(maxsize=1)(load_model)  # the model of a file is kept until another one is chosen
Result = tuple[tuple[Image.Image, Image.Image], str]


def restore_upload(upload: str | None, weights: str, mode: str, report: Any) -> Iterator[Result]:  # noqa: ANN401
    """Yields once: the slider's pictures and the file to download, which is removed afterwards.

    gradio.Error has the sentence that infer.py prints. `report` is called with the finished part of the work.
    """
    import gradio

    if upload is None:
        raise gradio.Error("no input: drop a picture first", print_exception=False)
    source = Path(upload)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / source.name
        try:
            model = loaded(Path(weights))
            target = target.with_name(f"{source.stem}_x{float(model.network.scale):g}.png")
            config = RestoreConfig(mode=mode)  # type: ignore[arg-type]  # one of PRESETS; checked there
            image = decode_image(source)
            result = restore(image, model, config, progress=report)
            result.save(target)
            pictures = slides(image.pixels, result.pixels)
        except FILE_ERRORS as error:
            sentence = describe_failure(error, source, target).replace(f"{source.parent}{os.sep}", "")
            raise gradio.Error(html.escape(sentence), duration=None, print_exception=False) from error
        yield pictures, str(target)


def slides(source: Pixels, result: Pixels) -> tuple[Image.Image, Image.Image]:
    """Input, enlarged by bicubic, and result: sides of at most SIDE, 8 bits, no alpha."""
    before, after = (Image.fromarray(as_rgb8(pixels)) for pixels in (source, result))
    after.thumbnail((SIDE, SIDE))
    return before.resize(after.size, Image.Resampling.BICUBIC), after


def build_page(weights: Sequence[Path]) -> Any:  # noqa: ANN401  # gradio is optional
    import gradio

    def work(
        upload: str | None,
        chosen: str,
        mode: str,
        progress: gradio.Progress = gradio.Progress(),  # noqa: B008  # how gradio knows that it is wanted
    ) -> Iterator[Result]:
        yield from restore_upload(upload, chosen, mode, lambda part: progress(part, desc="restoring"))

    choices = [(path.stem if path.parent == RELEASED else str(path), str(path)) for path in weights]
    with gradio.Blocks(title="Restore a picture", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.Markdown("# Restore a picture\nIt stays on this computer.")
        with gradio.Row():
            with gradio.Column(scale=1):
                picture = gradio.File(label="Picture: drop it here", elem_id="picture")
                model = gradio.Dropdown(choices, value=choices[0][1], label="Weights")
                dial = gradio.Radio(list(PRESETS), value=next(iter(PRESETS)), label="Faithful, or sharp?")
                start = gradio.Button("Restore", variant="primary", elem_id="start")
                result = gradio.File(label="Result at full quality", elem_id="result", interactive=False)
            with gradio.Column(scale=2):
                slider = gradio.ImageSlider(
                    label="Before and after",
                    elem_id="slider",
                    format="png",
                    interactive=False,
                    max_height=900,
                    buttons=["fullscreen"],
                )
        start.click(
            work, [picture, model, dial], [slider, result], concurrency_limit=1, show_progress_on=slider
        )
    return page


def serve(weights: Sequence[Path], port: int | None) -> None:
    """Serve the page on 127.0.0.1 until Ctrl-C or SIGTERM, then remove every file of it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="restoring-") as folder:
        work = Path(folder, "work")  # apart from gradio's, which copies what it is to serve from elsewhere
        work.mkdir()
        tempfile.tempdir = str(work)
        # Read when gradio is imported.
        os.environ |= {"GRADIO_TEMP_DIR": str(Path(folder, "page")), "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio

        build_page(weights).launch(
            server_name="127.0.0.1",
            server_port=port,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"]),  # of no other site
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("weights", nargs="*", type=Path, help="models of your own, offered first")
    parser.add_argument("--port", type=int, help="of 127.0.0.1 (default: the first free one from 7860)")
    args = parser.parse_args(argv)
    missing = [path for path in args.weights if not path.is_file()]
    if missing:
        parser.error(f"{missing[0]}: no such file")
    if importlib.util.find_spec("gradio") is None:
        parser.error("gradio is not installed: pip install -e '.[app]'")
    released = sorted(RELEASED.glob("*x*.safetensors"), key=lambda path: path.stem[::-1], reverse=True)
    serve([*args.weights, *released], args.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
