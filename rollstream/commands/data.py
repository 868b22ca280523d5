"""`rollstream data` and `rollstream model`: what a run needs before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

data_app = typer.Typer(no_args_is_help=True)
model_app = typer.Typer(no_args_is_help=True)
Destination = Annotated[Path, typer.Argument(help="folder to write")]
Seed = Annotated[int, typer.Option(help="seed")]


@data_app.command("import")
def import_data(
    kind: Annotated[Literal["voc", "coco", "labelme"], typer.Argument(help="format of SRC")],
    src: Annotated[Path, typer.Argument(help="folder of the data set")],
    dst: Destination,
    strict: Annotated[bool, typer.Option(help="refuse the whole set for one broken annotation")] = False,
) -> None:
    """Import a data set with boxes or polygons in pixels."""
    from rollstream.datasets.importing import describe_summary, import_dataset

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"importing {src}", total=None)
        summary = import_dataset(
            kind,
            src,
            dst,
            strict=strict,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    Console(soft_wrap=True, highlight=False).print(describe_summary(summary), markup=False)


@data_app.command()
def scenes(
    dst: Destination,
    num_train: Annotated[int, typer.Option(help="training scenes")] = 2000,
    num_val: Annotated[int, typer.Option(help="validation scenes")] = 128,
    seed: Seed = 0,
    image_size: Annotated[int, typer.Option(help="pixels a side")] = 128,
) -> None:
    """Generate scenes of scanned handwritten digits, with boxes and polygons."""
    from rollstream.datasets.scenes import make_scenes

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("drawing scenes", total=None)
        summary = make_scenes(
            dst,
            num_train=num_train,
            num_val=num_val,
            seed=seed,
            image_size=image_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    Console(soft_wrap=True, highlight=False).print(str(summary), markup=False)


@model_app.command()
def tiny(
    dst: Destination,
    preset: Annotated[Literal["scenes", "photos"], typer.Option(help="image size it suits")] = "scenes",
    seed: Seed = 0,
) -> None:
    """Make a tiny Qwen3-VL with random weights, as an ordinary Hugging Face folder."""
    from rollstream.models.tiny_model import make_tiny_model

    console = Console(stderr=True)
    with console.status("making a tiny model"):
        summary = make_tiny_model(dst, preset=preset, seed=seed)
    Console(soft_wrap=True, highlight=False).print(str(summary), markup=False)
