"""
`nnserver warm`: the settings of a server in, its compiled kernels in the cache.

What a first start would compile is compiled now, where it keeps nobody waiting: when a container's image is
built, or after an upgrade.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

import nncore
from nnserver.config import Config, read_config
from nnserver.errors import ConfigError

_DESCRIPTION = """\
Compile the kernels that serving needs into the cache, and see whether the server could start.
One that starts afterwards compiles nothing.
"""
_EPILOG = """\
The cache is $NNCORE_CACHE_DIR, else "nncore" in the user's cache folder. It holds code for this machine's
processor, this version and these Python packages; where any of them differs, a server compiles again.

examples:
  nnserver warm                          for the bundled models
  nnserver warm --config nnserver.toml   with the models and settings of this file

in a Dockerfile, after the installation:
  ENV NNCORE_CACHE_DIR=/var/cache/nncore
  RUN nnserver warm
"""


def read_warm_config(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """The server's settings for the command line *argv*, as `nnserver.config.read_config` finds them."""
    parser = argparse.ArgumentParser(
        prog="nnserver warm",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("models", nargs="*", metavar="PATH", help="as for the server: models to load")
    parser.add_argument("--config", metavar="FILE", help="TOML file with the server's settings")
    arguments = parser.parse_args(argv)
    from_file = ["--config", arguments.config] if arguments.config else []
    return read_config([*from_file, *arguments.models], environ)


def warm(config: Config) -> str:
    """
    Fill the cache; return a line that says where it lies, how large it is and how long it took.

    Raises ConfigError if code cannot be kept, or a model not be loaded.
    """
    # Late, so that --help and a wrong setting answer at once.
    from nncore.compilation import cache_content, cache_folder, create_cache, not_kept
    from nnserver.app import App, refuse_shared_cache

    started = time.perf_counter()
    refuse_shared_cache(cache_folder())
    try:
        create_cache()
    except OSError as error:
        raise ConfigError(_unkept(cache_folder(), error.strerror or str(error))) from error
    # All that a start does, but to listen; and what the first requests of each kind may need beyond that.
    App(config)
    nncore.warm()
    if failures := not_kept():
        raise ConfigError(_unkept(cache_folder(), next(iter(failures.values()))))
    content = cache_content()
    return (
        f"warm after {time.perf_counter() - started:.1f} s; "
        f"{content.files} kernels, {content.nbytes / 1e6:.1f} MB, in {content.folder}"
    )


def _unkept(folder: object, reason: str) -> str:
    return (
        f"compiled kernels cannot be kept in {folder}: {reason}; "
        "set NNCORE_CACHE_DIR to a folder that can be written to"
    )
