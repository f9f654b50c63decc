"""Export of a network as a web page: `export_web`."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from ..errors import ConfigurationError
from ..export import export_onnx
from ..files import to_path
from ..measure import sparsity
from ..runtime.kernels import compile_object
from .errors import NativeExportError
from .export import install, prepare
from .library_ir import LibraryText
from .package import template_text
from .program import Program
from .webassembly import BROWSER, to_module

ENGINE = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")  # of onnxruntime-web


# long: two thirds of it is documentation
def export_web(
    model: nn.Module,
    example_input: Tensor,
    directory: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    side: int | None = None,
    multi_label: bool = False,
    title: str = "Sparse network",
    compare: str | Path | None = None,
) -> list[Path]:
    """Write an image classifier as a web page, which computes it in WebAssembly.

    Any static web server can serve the folder. The page makes no other requests. Code and weights
    (without zeros) are in `model.wasm`; `model.js` is its interface for pages of your own.

    Args:
        model: takes images (1, channels, side, side), returns one number per class; computes in
            float32. It is not changed.
        example_input: (1, 1 or 3, n, n), float32. Only its shape matters.
        directory: folder of the files; it is created if it does not exist. Files of the same names
            are replaced.
        class_names: in the order of the outputs. [default: 0, 1, ...]
        mean: mean per channel, of pixels scaled to [0, 1]. [default: 0]
        std: standard deviation per channel. [default: 1]
        side: length in pixels to which the shorter side of an image is scaled before its center is
            cropped to n. [default: n]
        multi_label: whether an image may have several classes.
        title: of the page.
        compare: folder of the npm package onnxruntime-web, or one with its `dist` files. They are
            copied, with the network as ONNX. The page can then time both engines.

    Returns:
        The files; docs/native.md describes them.

    Raises:
        ConfigurationError: the shape of the example, or an argument, does not fit; or `compare` has
            no onnxruntime-web.
        CaptureError: torch.export cannot capture the model.
        NativeExportError: the network has an operation that is not supported.
        RuntimeMissingError: llvmlite is not installed.
        ImportError: `compare` requires a package for ONNX that is not installed.
        OSError: a file cannot be written.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
        ...     files = export_web(model, torch.zeros(1, 1, 8, 8), folder)
        ...     [file.name for file in files]
        ['index.html', 'model.js', 'model.wasm']
    """
    channels, size = _image_shape(example_input)
    engine = None if compare is None else find_engine(Path(compare))
    program, _, _ = prepare(model, example_input)
    classes = _classes(program)
    names = [str(i) for i in range(classes)] if class_names is None else list(class_names)
    side = size if side is None else side
    means, stds = list(mean or [0.0] * channels), list(std or [1.0] * channels)
    _check_preparation(names, classes, channels, size, side, means, stds)
    info = {
        "network": title,
        "classNames": names,
        "inputShape": list(example_input.shape),
        "outputShape": list(program.outputs[0].shape),
        "mean": means,
        "std": stds,
        "side": side,
        "multiLabel": multi_label,
        "sparsity": sparsity(model),
        "compare": engine is not None,
    }
    with TemporaryDirectory() as folder:
        made = Path(folder)
        text = LibraryText(program, BROWSER, "model").module()
        (made / "model.wasm").write_bytes(to_module(compile_object(BROWSER, text)))
        facts = json.dumps(info, indent=2)
        (made / "model.js").write_text(template_text("web_model.js", INFO=facts), "utf-8")
        page = template_text("web_page.html", TITLE=html.escape(title))
        (made / "index.html").write_text(page, "utf-8")
        if engine is not None:
            export_onnx(model, example_input, made / "dense.onnx")
            (made / "compare.js").write_text(template_text("web_compare.js"), "utf-8")
            copied = made / "onnxruntime-web"
            copied.mkdir()
            for file in ENGINE:
                shutil.copyfile(engine / file, copied / file)
        return install(made, to_path(directory))


def find_engine(folder: Path) -> Path:
    """Return the folder with the files of onnxruntime-web that a page needs.

    Args:
        folder: it, the npm package, `node_modules`, or the folder where npm installed it.

    Raises:
        ConfigurationError: they are in none of these.

    Example:
        >>> find_engine(Path("/absent"))
        Traceback (most recent call last):
        torch_feather.errors.ConfigurationError: /absent: has no ort.wasm.bundle.min.mjs and ...
    """
    package = Path("onnxruntime-web/dist")
    for found in (folder, folder / "dist", folder / package, folder / "node_modules" / package):
        if all((found / file).is_file() for file in ENGINE):
            return found
    raise ConfigurationError(
        f"{folder}: has no {' and '.join(ENGINE)}. Run npm install onnxruntime-web, and name the "
        "folder node_modules/onnxruntime-web."
    )


def _image_shape(example: Tensor) -> tuple[int, int]:
    """Return the number of channels and the side of an image."""
    shape = tuple(example.shape) if isinstance(example, Tensor) else ()
    if len(shape) != 4 or shape[0] != 1 or shape[1] not in (1, 3) or shape[2] != shape[3]:
        raise ConfigurationError(
            f"A page takes one square image, (1, 1 or 3, n, n), but the example is {shape}. Use "
            "export_native with target wasm32 for other inputs."
        )
    return int(shape[1]), int(shape[2])


def _classes(program: Program) -> int:
    shapes = [view.shape for view in program.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise NativeExportError(
            f"A page shows the classes of an image, (1, classes), but the outputs are {shapes}. "
            "Use export_native with target wasm32 for other outputs."
        )
    return shapes[0][1]


def _check_preparation(
    names: list[str],
    classes: int,
    channels: int,
    size: int,
    side: int,
    mean: list[float],
    std: list[float],
) -> None:
    if len(names) != classes:
        raise ConfigurationError(f"class_names has {len(names)} names for {classes} outputs.")
    if len(mean) != channels or len(std) != channels or not all(s > 0 for s in std):
        raise ConfigurationError(
            f"mean and std need {channels} numbers, and those of std above 0; got {mean} and {std}."
        )
    if side < size:
        raise ConfigurationError(f"side must be at least {size}, as the input; got {side}.")
