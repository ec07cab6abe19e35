"""`nncore convert`: a model file of another tool -> a model file of nncore, checked before it is written."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from nncore.errors import ConversionError, NncoreError

if TYPE_CHECKING:
    from nncore.convert import sources, verification
    from nncore.model import Mlp

EXAMPLES = """\
examples:
  nncore convert iris.onnx -o iris.safetensors
  nncore convert net.pt2 -o net.safetensors --labels cat,dog
  nncore convert model.keras -o model.safetensors --dtype float64
  nncore convert weights.npz --description layers.json -o net.safetensors
  nncore convert pipeline.pkl -o pipeline.safetensors

The kind is known by the file's ending: .onnx, .pt2, .keras, .h5, .tflite; .npz, .safetensors, .pt
and .pth hold weights alone and need a description; .pkl and .joblib hold a scikit-learn estimator,
and reading them runs code that is in them. What is supported: docs/formats.md.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `nncore convert` takes."""
    parser.add_argument("source", metavar="SOURCE", help="the model file to convert")
    parser.add_argument(
        "-o", metavar="MODEL", dest="out", required=True, help="model file to write (.safetensors)"
    )
    parser.add_argument(
        "--name", help="the model's name (default: the description's, or SOURCE without its ending)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float64"), help="default: that of the source's weights"
    )
    parser.add_argument("--labels", metavar="A,B,...", help="class labels, or @FILE with one a line")
    parser.add_argument("--feature-names", metavar="A,B,...", help="names of the inputs, or @FILE")
    parser.add_argument("--output", metavar="NAME", help="which output of an ONNX graph, if it has several")
    parser.add_argument(
        "--description", metavar="FILE", help="JSON that describes the layers of bare weights"
    )
    parser.add_argument(
        "--rows", metavar="ROWS", help="rows to check on as well: a .npy array, a CSV file, or -"
    )
    parser.add_argument(
        "--tolerance",
        type=_positive,
        metavar="X",
        help="largest difference allowed, over the largest answer of like rows (default: 1e-4 for float32,"
        " 1e-9 for float64)",
    )
    parser.add_argument("--no-verify", action="store_true", help="write the model without checking it")


def run(arguments: argparse.Namespace) -> None:
    """Convert, check, write and report."""
    # Late, like all imports of commands, so that --help and wrong usage are answered at once.
    from nncore.convert import sources

    source, out = Path(arguments.source), Path(arguments.out)
    if out.suffix != ".safetensors":
        raise ConversionError(f"{out.name} should end in .safetensors")
    if out.exists() and out.samefile(source):
        raise ConversionError("SOURCE and MODEL are the same file")
    kind = sources.kind_of(source)
    if kind == "sklearn":
        _say("warning: a pickle runs code when it is read; convert only files that you trust")
    _say(f"reading {source.name} ({sources.KINDS[kind]})")
    options = sources.Options(
        dtype=arguments.dtype,
        name=arguments.name,
        labels=_names(arguments.labels),
        feature_names=_names(arguments.feature_names),
        output=arguments.output,
        description=None if arguments.description is None else Path(arguments.description),
    )
    with warnings.catch_warnings():
        # Libraries warn about themselves, at length.
        warnings.simplefilter("ignore")
        converted = sources.convert(source, kind, options)
        report = None if arguments.no_verify else _checked(converted, arguments)
    converted.mlp.save(out)
    print(f"{out.name}: {_described(converted.mlp)}")
    print(report or f"not checked{': ' + converted.why if converted.why else ''}")


def _checked(converted: sources.Converted, arguments: argparse.Namespace) -> verification.Report | None:
    from nncore.convert import verification

    if converted.open_source is None:
        return None
    rows = None
    if arguments.rows is not None:
        from nncore import row_files

        rows = row_files.read_rows(arguments.rows, converted.mlp).astype(float)
    try:
        source = converted.open_source()
    except NncoreError:
        raise
    except Exception as error:  # of a library that does not take what was converted
        raise ConversionError(
            f"the source cannot be run, so that nothing can be checked: {error};"
            " --no-verify writes the model unchecked"
        ) from None
    _say(f"checking against {source.name}")
    return verification.check(converted.mlp, source, arguments.tolerance, rows)


def _described(mlp: Mlp) -> str:
    sizes = "-".join(str(n) for n in (mlp.n_in, *(layer.n_out for layer in mlp.layers)))
    activations = ", ".join(layer.activation for layer in mlp.layers)
    text = f"{sizes} ({activations}), {mlp.dtype}, {mlp.parameter_count:,} parameters"
    return text if mlp.labels is None else f"{text}, {len(mlp.labels):,} labels"


def _names(text: str | None) -> tuple[str, ...] | None:
    """Names in "a,b,c", or one a line in the file after @."""
    if text is None:
        return None
    if text.startswith("@"):
        try:
            return tuple(Path(text[1:]).read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise ConversionError(f"{text[1:]} is no text in UTF-8") from None
    return tuple(text.split(","))


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0.0:
        raise ValueError
    return value


_positive.__name__ = "positive number"  # as argparse calls it


def _say(message: str) -> None:
    print(f"nncore: {message}", file=sys.stderr, flush=True)
