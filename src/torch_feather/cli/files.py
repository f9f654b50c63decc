"""`feather export` and `feather bench`: using the network of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .lists import JsonOption
from .output import print_json
from .runs import RunArgument

DTYPES = ("float16", "bfloat16", "float32")


def export(  # long: each option has its help
    run: RunArgument,
    format: Annotated[
        str,
        typer.Option(
            help="sparse (small), safetensors (dense tensors), onnx, onnx-sparse (small, for ONNX "
            "Runtime), native (a library), c (C99), web (a page)."
        ),
    ] = "sparse",
    out: Annotated[
        Path | None,
        typer.Option(help="The file; for native, c and web, the folder. [default: one in RUN]"),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="For --format native: host, x86-64-v3, x86-64-v4, aarch64, riscv64 or wasm32. "
            "[default: host]"
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For --format web: folder of onnxruntime-web (npm install onnxruntime-web). The "
            "page can then time the dense network too.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="For --format sparse: store weights as float16, bfloat16 or float32."),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload to the Hugging Face Hub, with a card."),
    ] = None,
    data_path: Annotated[
        str | None,
        typer.Option(help="Folder of the data, if it has moved. Only for ONNX and old runs."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Export the network of RUN to a file.

    \f
    Example:
        >>> import tempfile
        >>> from .. import models
        >>> from ..training import Config
        >>> from ..training.checkpoint import RunDirectory, write_json
        >>> from ..training.schemas import example_results
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = RunDirectory(folder)
        ...     run.write_config(Config(network="resnet8"))
        ...     run.save_model(models.create("resnet8", num_classes=10, in_channels=1))
        ...     write_json(run.report_file, example_results())
        ...     export(Path(folder), format="safetensors", out=Path(folder) / "dense.safetensors")
        /...dense.safetensors: ... bytes, all zeros stored
    """
    import torch

    from ..training import export_run as exports
    from ..training.checkpoint import RunDirectory

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype}: float16, bfloat16 or float32 is required")
    if push is not None and format != "sparse":
        raise typer.BadParameter("--push puts the format sparse on the hub. Remove --format.")
    directory = RunDirectory(run)
    torch_dtype = getattr(torch, dtype) if dtype else None
    file = exports.export_run(directory, format, out, torch_dtype, data_path, target, compare)
    about = exports.describe(directory, file, format)
    address = exports.push(directory, file, push) if push is not None else None
    if json:
        size = None if file.is_dir() else file.stat().st_size
        found = {"file": str(file), "format": format, "bytes": size, "description": about}
        print_json(found | ({} if address is None else {"hub": address}))
        return
    typer.echo(f"{file}: {about}")
    if address is not None:
        typer.echo(f"on the hub: {address}")


def bench(  # long: each option has its help
    run: RunArgument,
    batch: Annotated[int, typer.Option(min=1, help="Images per call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    tuning: Annotated[
        Path | None,
        typer.Option(
            "--tuning",
            help="File of tuning results (how each layer runs): read if it exists, otherwise "
            "written.",
        ),
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(hidden=True, help="Deprecated name of --tuning.")
    ] = None,
    data_path: Annotated[
        str | None, typer.Option(help="Folder of the data, if it has moved. Only for old runs.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Time the network of RUN on this CPU: dense in PyTorch, and compiled sparse.

    Prints the times of each layer, dense and sparse, and which of the two is used.

    \f
    Example:
        >>> from ..training.errors import RunError
        >>> try:
        ...     bench(Path("runs/absent"))
        ... except RunError as error:
        ...     print(error)
        runs/absent: no such run directory
    """
    import torch

    from ..runtime import compile_sparse
    from ..runtime.timing import alternate
    from ..training.checkpoint import RunDirectory
    from ..training.export_run import load_network

    if choices is not None:
        _warn_choices()
        tuning = choices
    torch.set_num_threads(threads)
    model, example = load_network(RunDirectory(run), data_path)
    model.eval()
    x = example.repeat(batch, *[1] * (example.dim() - 1))
    if x.is_floating_point():
        x = torch.randn(x.shape)
    known = tuning if tuning is not None and tuning.exists() else None
    sparse = compile_sparse(model, x, threads=threads, tuning=known)
    if tuning is not None and known is None:
        sparse.save_tuning(tuning)
    with torch.inference_mode():
        dense_ms, sparse_ms = alternate([lambda: model(x), lambda: sparse(x)])
        expected, found = model(x), sparse(x)
    error = float((expected - found).abs().max() / expected.abs().max())
    if json:
        times = {"dense_ms": dense_ms, "sparse_ms": sparse_ms, "largest_difference": error}
        print_json({"run": str(run), "batch": batch, "threads": threads, **times})
        return
    typer.echo(f"{sparse}\n")
    typer.echo(
        f"batch {batch}, {threads} thread(s): PyTorch {dense_ms:.3f} ms, sparse {sparse_ms:.3f} "
        f"ms, {dense_ms / sparse_ms:.2f}× as fast; largest difference {error:.1e} of the largest "
        "output"
    )


def _warn_choices() -> None:
    from ..deprecation import warn_renamed

    warn_renamed("--choices", "--tuning")
