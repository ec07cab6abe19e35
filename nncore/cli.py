"""Command line in; text, table, figure or model out: `nncore convert`, `inspect`, `predict` and `plot`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nncore import __version__
from nncore.convert import command as convert_command
from nncore.errors import NncoreError

if TYPE_CHECKING:
    from nncore.model import AnyLayer, Mlp

_EXAMPLES = """\
examples:
  nncore convert iris.onnx -o iris.safetensors
  nncore inspect digits.safetensors
  nncore predict digits.safetensors rows.csv --output labels --top-k 3
  nncore plot gelu swish -o activations.png
"""
_INSPECT_EXAMPLES = """\
examples:
  nncore inspect digits.safetensors
  nncore inspect digits.safetensors --json | jq .parameters
"""
_PREDICT_EXAMPLES = """\
examples:
  nncore predict digits.safetensors rows.csv
  nncore predict digits.safetensors rows.npy --output probabilities -o probabilities.npy
  zcat rows.csv.gz | nncore predict digits.safetensors - --output labels
"""
_PLOT_EXAMPLES = """\
examples:
  nncore plot -o activations.png          all of them
  nncore plot relu elu gelu -o three.svg
"""

# Exit statuses beside 0: argparse has 2 for wrong usage; a shell has 128 + the signal's number.
_FAILED = 1
_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in *argv* (by default the process's own) and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()  # here, where a closed pipe is caught
    except NncoreError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read our output has had enough. Python would complain while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _fail(message: str) -> int:
    print(f"nncore: error: {message}", file=sys.stderr)
    return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nncore",
        description="Convert, look into, run and plot multi-layer perceptrons.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nncore {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, description: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    convert = command(
        "convert",
        "make a model file of another tool's",
        "Convert a model of ONNX, PyTorch, Keras, TFLite or scikit-learn, or bare weights, check that it\n"
        "answers what its source answers, on random and edge rows, and write it as a model file.",
        convert_command.EXAMPLES,
    )
    convert_command.add_arguments(convert)
    convert.set_defaults(run=convert_command.run)

    inspect = command(
        "inspect",
        "describe a model file",
        "Describe a model file: layers, shapes, activations, parameters, dtype and memory.",
        _INSPECT_EXAMPLES,
    )
    inspect.add_argument("file", metavar="FILE", help="model file (.safetensors)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    predict = command(
        "predict",
        "run a model on the rows of a file",
        "Run a model on the rows of a file, without a server.\n\n"
        "A CSV file may begin with a header. If the model has feature names, the header's\n"
        "columns are matched with them by name; otherwise they count in their order.",
        _PREDICT_EXAMPLES,
    )
    predict.add_argument("file", metavar="FILE", help="model file (.safetensors)")
    predict.add_argument(
        "rows", metavar="ROWS", help="a .npy array (rows, n_in), a CSV file, or - for CSV on standard input"
    )
    predict.add_argument(
        "--output",
        choices=("outputs", "probabilities", "labels"),
        default="outputs",
        help="the last layer's outputs (default), probabilities, or the most probable labels",
    )
    predict.add_argument(
        "--top-k", type=_count, metavar="K", help="labels a row, with --output labels (default 1)"
    )
    predict.add_argument(
        "-o",
        metavar="OUT",
        dest="out",
        help="write to OUT instead of standard output: as .npy if it ends so (labels: the indices of the"
        " classes), else as CSV",
    )
    predict.set_defaults(run=_predict, parser=predict)

    plot = command(
        "plot",
        "draw activations and their derivatives",
        "Draw activation functions with their derivatives, all in one gallery or those named.",
        _PLOT_EXAMPLES,
    )
    plot.add_argument("names", metavar="NAME", nargs="*", help="activation to draw (default: all)")
    plot.add_argument(
        "-o", metavar="FILE", dest="out", required=True, help="figure to write: .png, .svg or .pdf"
    )
    plot.set_defaults(run=_plot)
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


_count.__name__ = "count"  # as argparse calls it: "invalid count value: '0'"


# nncore inspect


def _inspect(arguments: argparse.Namespace) -> None:
    from nncore.model_file import load

    mlp = load(arguments.file)
    if arguments.json:
        print(json.dumps(_as_dict(mlp), indent=2, ensure_ascii=False))
        return
    shape = "" if mlp.input_shape is None else f" {mlp.input_shape}"
    print(f"{mlp.name}: {_counted(mlp.n_in, 'input')}{shape} -> {_counted(mlp.n_out, 'output')}, {mlp.dtype}")
    print()
    rows = [("layer", "inputs", "outputs", "activation", "parameters", "memory")]
    rows += [
        (
            str(index),
            f"{layer.n_in:,}",
            f"{layer.n_out:,}",
            _layer_text(layer),
            f"{layer.parameter_count:,}",
            _memory_text(layer.nbytes),
        )
        for index, layer in enumerate(mlp.layers)
    ]
    rows.append(("total", "", "", "", f"{mlp.parameter_count:,}", _memory_text(mlp.nbytes)))
    _print_table(rows, left_columns=(0, 3))
    for title, names in (("labels", mlp.labels), ("features", mlp.feature_names)):
        if names is not None:
            print(f"\n{title}: {_shortened(names)}")


def _as_dict(mlp: Mlp) -> dict[str, Any]:
    import numpy as np

    return {
        "name": mlp.name,
        "dtype": str(mlp.dtype),
        "n_in": mlp.n_in,
        "n_out": mlp.n_out,
        "input_shape": mlp.input_shape,
        "parameters": mlp.parameter_count,
        "bytes": mlp.nbytes,
        "layers": [
            {
                "kind": _kind(layer),
                "n_in": layer.n_in,
                "n_out": layer.n_out,
                "activation": layer.activation,
                "alpha": None if layer.alpha is None else np.asarray(layer.alpha).tolist(),
                "parameters": layer.parameter_count,
                "bytes": layer.nbytes,
            }
            for layer in mlp.layers
        ],
        "labels": mlp.labels,
        "feature_names": mlp.feature_names,
    }


def _kind(layer: AnyLayer) -> str:
    return "layer_norm" if hasattr(layer, "epsilon") else "dense"


def _layer_text(layer: AnyLayer) -> str:
    text = _activation_text(layer)
    if _kind(layer) == "dense":
        return text
    return "layer norm" if text == "identity" else f"layer norm, {text}"


def _activation_text(layer: AnyLayer) -> str:
    if layer.alpha is None:
        return layer.activation
    if isinstance(layer.alpha, float):
        return f"{layer.activation} (alpha {layer.alpha:g})"
    return f"{layer.activation} (an alpha an output)"


def _memory_text(count: int) -> str:
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _shortened(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, … ({len(names):,} in all)"


def _print_table(rows: Sequence[Sequence[str]], left_columns: Sequence[int]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if index in left_columns else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


# nncore predict


def _predict(arguments: argparse.Namespace) -> None:
    if arguments.top_k is not None and arguments.output != "labels":
        arguments.parser.error("--top-k goes with --output labels")
    # Late, like all imports of commands, so that --help and wrong usage are answered at once.
    from nncore import row_files
    from nncore.model_file import load

    mlp = load(arguments.file)
    outputs = mlp.forward(row_files.read_rows(arguments.rows, mlp))
    array: Any
    table: Iterable[Iterable[object]]
    if arguments.output == "labels":
        k = arguments.top_k or 1
        indices, scores = mlp.top_labels_from(outputs, k)
        columns, table, array = _label_columns(k), _label_rows(mlp, indices, scores), indices
    else:
        array = outputs if arguments.output == "outputs" else mlp.probabilities_from(outputs)
        columns, table = _output_columns(mlp), array
    if arguments.out is not None and Path(arguments.out).suffix == ".npy":
        row_files.write_npy(arguments.out, array)
    elif arguments.out is not None:
        with open(arguments.out, "w", encoding="utf-8", newline="") as stream:
            row_files.write_csv(stream, columns, table)
    else:
        row_files.write_csv(sys.stdout, columns, table)


def _output_columns(mlp: Mlp) -> list[str]:
    if mlp.labels is not None and len(mlp.labels) == mlp.n_out:
        return list(mlp.labels)
    return [f"y{index}" for index in range(mlp.n_out)]


def _label_columns(k: int) -> list[str]:
    places = [""] if k == 1 else [f"_{place}" for place in range(1, k + 1)]
    return [f"{name}{place}" for place in places for name in ("label", "score")]


def _label_rows(mlp: Mlp, indices: Any, scores: Any) -> Iterator[list[object]]:
    for row_indices, row_scores in zip(indices, scores, strict=True):
        pairs = zip(row_indices, row_scores, strict=True)
        yield [cell for index, score in pairs for cell in (mlp.class_labels[index], score)]


# nncore plot


def _plot(arguments: argparse.Namespace) -> None:
    from nncore.plot import save_figure

    save_figure(arguments.names, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
