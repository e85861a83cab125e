"""A page in the browser that restores one picture at a time, on this computer alone; extra `app`.

python app.py
python app.py checkpoints/<run>/diffusion_model_clean_best.pth --port 7861
"""

import html
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from engine.cli import Parser, run_script
from engine.options import path
from imaging.files import decode_image
from imaging.pixels import Pixels, as_rgb8
from models import LoadedModel, load_model
from restoration import PRESETS, RestoreConfig, restore
from restoration.files import FILE_ERRORS, describe_failure
from restoration.weights import RELEASED, find_weights

SIDE = 2048  # pixels of the longer side of what the slider shows; the download has them all
KEPT = 3600  # seconds until a picture is removed, where the page stays open
HERE = "127.0.0.1"
Result = tuple[tuple[Image.Image, Image.Image], str]


@lru_cache(maxsize=1)
def loaded(weights: Path, changed: int) -> LoadedModel:
    """Load a file's model, kept until another one is chosen or the file was `changed`, in nanoseconds."""
    return load_model(weights)


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
            model = loaded(Path(weights), Path(weights).stat().st_mtime_ns)
            target = target.with_name(f"{source.stem}_x{float(model.network.scale):.7g}.png")
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


def serve(weights: Sequence[Path], host: str, port: int | None) -> None:
    """Serve the page until Ctrl-C or SIGTERM, then remove every file of it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="restoring-") as folder:
        work = Path(folder, "work")  # apart from gradio's, which copies what it is to serve from elsewhere
        work.mkdir()
        tempfile.tempdir = str(work)
        # Read when gradio is imported and when it asks its own page whether it answers.
        os.environ |= {"GRADIO_TEMP_DIR": str(Path(folder, "page")), "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ |= {"MPLBACKEND": "agg", "NO_PROXY": "*", "no_proxy": "*"}
        import gradio

        build_page(weights).launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            run_history=False,
            footer_links=[],
            theme=gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"]),  # of no other site
        )


def check_port(host: str, port: int) -> None:
    """Raise ValueError where nothing can be served at this address."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}:{port} cannot be used ({error}): give another --port or --host") from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("weights", nargs="*", type=path, help="models of your own, offered first")
    host = f"address to serve on; in a container 0.0.0.0, all that reach it may use it (default: {HERE})"
    parser.add_argument("--host", default=HERE, help=host)
    parser.add_argument("--port", type=int, help="number of the port (default: the first free one from 7860)")

    def work() -> int:
        args = parser.parse_args(argv)
        weights = [file for name in args.weights for file in find_weights(name)]
        if importlib.util.find_spec("gradio") is None:
            raise ValueError("gradio is not installed: pip install -e '.[app]'")
        check_port(args.host, args.port or 0)
        released = sorted(RELEASED.glob("*x*.safetensors"), key=lambda file: file.stem[::-1], reverse=True)
        serve([*weights, *released], args.host, args.port)
        return 0

    return run_script("app.py", work)


if __name__ == "__main__":
    sys.exit(main())
