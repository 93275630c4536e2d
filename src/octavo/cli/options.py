"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face directory or id, an .onnx file, package.module:factory, demo:clip or demo:llama.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", metavar="R", help="A preset (see `octavo recipes`) or a YAML file.")
]
Leave = Annotated[
    list[str] | None,
    typer.Option("--leave", metavar="PATTERN", help="Leave out what matches: glob, re:REGEX, type:CLASS. Repeatable."),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        metavar="D",
        help="Calibration data: text, JSON lines, a folder of pictures, .npz or safetensors arrays, a datasets id, "
        "module:function, demo:NAME.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        "-t",
        metavar="[NAME=]KIND:DATA",
        help="zeroshot, classification, retrieval, perplexity or fidelity, and its data. Repeatable.",
    ),
]
Observer = Annotated[
    str | None,
    typer.Option("--observer", metavar="NAME", help="absmax, percentile, mse or entropy, where a rule names none."),
]
Samples = Annotated[
    int | None, typer.Option("--samples", min=1, help="Calibration samples; the recipe's number unless given.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples per forward pass.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=1, help="Tokens of a text, or of a window.")]
Stride = Annotated[int | None, typer.Option("--stride", min=1, help="Tokens between windows of perplexity.")]
Seed = Annotated[int, typer.Option("--seed", help="Which samples are drawn.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32 (default), float16, bfloat16, or auto.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that lies beside the weights.")]
RequireCoverage = Annotated[
    float | None,
    typer.Option(
        "--require-coverage",
        metavar="SHARE",
        help="Fail when a smaller share of the parameters gets a quantized weight: 0.95.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The directory to write.")]
Layout = Annotated[str, typer.Option("--layout", metavar="L", help="Checkpoint layout: modelopt or onnx.")]
Layouts = Annotated[
    list[str] | None, typer.Option("--layout", metavar="L", help="Also write this checkpoint, into RUN/L. Repeatable.")
]
Target = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="T",
        help="Where the files will run: onnxruntime-cpu, onnxruntime-cpu-vnni, onnxruntime-cuda, tensorrt, openvino.",
    ),
]
Processor = Annotated[
    str | None,
    typer.Option(
        "--processor", metavar="DIR", help="Tokenizer and image processor of an .onnx file, for texts or pictures."
    ),
]
