"""
`nnserver --check`: a server's settings in, a line for each thing that it needs out: fit, or what is wrong.

Everything is done that a start does but to listen, and what is wrong with one thing does not hide the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nncore.errors import NncoreError
from nnserver.config import Config, read_config
from nnserver.errors import ConfigError

FIT, UNFIT = 0, 2


def check(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print the report for the command line *argv*; return the exit status: 0, or 2 if anything is wrong."""
    try:
        config = read_config(argv, environ)
    except ConfigError as error:
        print(f"settings      error: {error}")
        return UNFIT
    print(f"settings      ok: serves on {config.listen} by {config.transport}")
    parts: dict[str, Callable[[Config], str]] = {
        "kernel cache": _cache,
        "certificates": _certificates,
        "tokens": _tokens,
        "models": _models,
    }
    status = FIT
    for name, examine in parts.items():
        try:
            print(f"{name:<13} ok: {examine(config)}")
        except (ConfigError, NncoreError) as error:
            print(f"{name:<13} error: {error}")
            status = UNFIT
    return status


def _cache(config: Config) -> str:
    from nncore.compilation import cache_folder
    from nnserver.app import refuse_shared_cache

    refuse_shared_cache(cache_folder())
    return str(cache_folder())


def _certificates(config: Config) -> str:
    from nnserver.app import tls_files_of
    from nnserver.transport.tls import ssl_context, valid_until

    files = tls_files_of(config)
    if files is None:
        return "none; connections are not encrypted"
    ssl_context(files)
    clients = "one, too" if files.client_ca else "none"
    return f"{files.certificate}, valid until {valid_until(files)}; clients show {clients}"


def _tokens(config: Config) -> str:
    from nnserver.app import identities_of

    if not config.tokens:
        return "none; whoever reaches the address may call"
    return ", ".join(f"{each.name} ({' '.join(sorted(each.scopes))})" for each in identities_of(config))


def _models(config: Config) -> str:
    from nnserver.batcher import QueueLimits
    from nnserver.catalog import load_repository

    repository = load_repository(config.models, QueueLimits(), config.reload or config.model_control)
    return ", ".join(f"{model.name} {model.version}" for model in repository) or "none"
