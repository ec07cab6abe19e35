"""
Flags, environment and a TOML file in, one frozen Config out.

Each setting is defined once, below: its default, unit, bounds and help. It can be given as a
flag (--max-message-bytes), in the environment (NNSERVER_MAX_MESSAGE_BYTES) or in a TOML file
(max_message_bytes = ...), and is taken from the first of these that has it.
"""

from __future__ import annotations

import argparse
import difflib
import ipaddress
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nnserver import __version__
from nnserver.errors import ConfigError

ENV_PREFIX = "NNSERVER_"

# What Kubernetes puts into the environment for a service that is called "nnserver".
_OF_KUBERNETES = re.compile(rf"{ENV_PREFIX}(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_\w+)?)")

# A name, an IPv4 address or a bracketed IPv6 address; a port.
_HOST_PORT = re.compile(r"([^\s:/\[\]]+|\[[0-9A-Fa-f:.]+(%\w+)?\]):([0-9]{1,5})")

_BOOLEANS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}


# What a running server can change; everything else needs a restart.
LIVE = ("models", "tokens", "tls_certificate", "tls_key", "tls_client_ca", "grace_s", "log_level")


def _setting(
    default: Any,
    help_: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    return field(default=default, metadata={"help": help_, "low": low, "high": high, "choices": choices})


# ngh2 has no wheels elsewhere that were tested here.
_DEFAULT_TRANSPORT = "h2" if sys.platform in ("linux", "darwin") else "grpcio"


def _usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """Every setting of the server, checked; raises ConfigError, naming the setting."""

    models: tuple[str, ...] = field(
        default=(), metadata={"help": "model files or folders of them; none: the bundled models"}
    )
    listen: str = _setting("127.0.0.1:50051", "address to serve on: HOST:PORT (port 0: any) or unix:PATH")
    transport: str = _setting(
        _DEFAULT_TRANSPORT,
        "what speaks HTTP/2: ngh2 in an event loop, or grpcio in threads",
        choices=("h2", "grpcio"),
    )
    max_message_bytes: int = _setting(
        16 << 20, "largest message taken or sent, in bytes", low=1024, high=512 << 20
    )
    max_batch_rows: int = _setting(4096, "rows that waiting requests are grouped into, at most", low=1)
    max_queue_requests: int = _setting(4096, "requests that may wait for one model", low=1)
    max_queue_rows: int = _setting(1 << 20, "rows that may wait for one model", low=1)
    max_queue_bytes: int = _setting(256 << 20, "rows that may wait for one model, in bytes", low=1)
    max_queue_ms: int = _setting(
        500,
        "milliseconds of work that may wait before a request: one that would wait longer is refused at once; "
        "not on streams, whose clients are held back instead; 0: no bound",
        low=0,
    )
    max_total_queue_requests: int = _setting(16384, "requests that may wait for all models together", low=1)
    max_total_queue_bytes: int = _setting(
        512 << 20, "rows that may wait for all models together, in bytes", low=1
    )
    max_streams: int = _setting(256, "streams that may be open at once", low=1, high=10_000)
    stream_window: int = _setting(64, "requests of one stream taken and not yet answered, at most", low=1)
    max_concurrent_calls: int = _setting(1024, "calls that may be open at once, streams included", low=1)
    max_connection_calls: int = _setting(
        256, "calls that one connection may have open at once (h2)", low=1, high=1 << 20
    )
    max_connections: int = _setting(10_000, "connections that may be open at once (h2)", low=1)
    max_buffered_bytes: int = _setting(
        512 << 20,
        "requests and answers in memory that wait for their clients, in bytes; beyond it the connection "
        "that holds most is closed (h2)",
        low=1 << 20,
    )
    unary_threads: int = _setting(8, "threads that answer unary calls", low=1, high=256)
    kernel_threads: int = _setting(0, "threads that run long kernels; 0: one a core", low=0, high=1024)
    grace_s: float = _setting(
        30.0, "seconds that calls in flight get to finish after SIGTERM or SIGINT", low=0.0, high=86400
    )
    tls_certificate: str = _setting("", "PEM file with the server's certificate chain; turns TLS on")
    tls_key: str = _setting("", "PEM file with the private key of --tls-certificate")
    tls_client_ca: str = _setting(
        "", "PEM file with the authorities of clients' certificates; turns mutual TLS on"
    )
    tokens: str = _setting(
        "",
        "TOML file of who may call, by token or client certificate, what for and how often; its lines are "
        "made by `nnserver token`",
    )
    model_control: bool = _setting(
        False,
        "let clients load and unload models; without --tokens on a loopback address or a Unix socket only",
    )
    compress_answers: bool = _setting(
        False,
        "compress answers of 1 KiB to 1 MiB with gzip for clients that take it (h2; grpcio does not look at "
        "what a client takes)",
    )
    reuse_port: bool = _setting(
        False,
        "let further servers listen on the port, too (SO_REUSEPORT); each gets a share of the connections",
    )
    busy_poll_us: int = _setting(
        0,
        "microseconds for which the event loop goes on looking for requests before it sleeps (h2): shortens "
        "what a lone request waits, and keeps a core busy meanwhile",
        low=0,
        high=100_000,
    )
    reload: bool = _setting(
        False,
        "load, reload and unload models when their files change; what fails goes on being served as it was",
    )
    reload_interval_s: float = _setting(
        1.0,
        "seconds between two looks at the files; a change is acted on when two have seen it",
        low=0.05,
        high=3600.0,
    )
    reject_nonfinite: bool = _setting(
        False, "answer NaN and infinite inputs with INVALID_ARGUMENT, naming row and column"
    )
    reflection: bool = _setting(True, "serve gRPC reflection, for grpcurl and its like")
    metrics_listen: str = _setting("", "address to serve metrics for Prometheus on, over HTTP: HOST:PORT")
    access_log_sample: float = _setting(
        0.0,
        "share of requests that are logged when they have ended, in [0, 1]; those that failed by a fault of "
        "the server are logged in any case",
        low=0.0,
        high=1.0,
    )
    trace_endpoint: str = _setting(
        "", "URL of an OpenTelemetry collector (OTLP over gRPC) that traces are sent to; needs the extra otel"
    )
    trace_sample: float = _setting(
        0.01,
        "share of the requests without a traceparent that are traced; with one, it decides",
        low=0.0,
        high=1.0,
    )
    log_format: str = _setting("text", "how log lines are written", choices=("text", "json"))
    log_level: str = _setting(
        "warning", "least severity that is logged", choices=("debug", "info", "warning", "error")
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            _check(setting, getattr(self, setting.name))
        if not self.kernel_threads:
            object.__setattr__(self, "kernel_threads", _usable_cores())
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ConfigError("tls_certificate and tls_key go together; only one of them is set")
        if self.tls_client_ca and not self.tls_certificate:
            raise ConfigError("tls_client_ca needs tls_certificate and tls_key")
        if self.trace_endpoint and not self.trace_endpoint.startswith(("http://", "https://")):
            raise ConfigError(f"trace_endpoint is {self.trace_endpoint!r}; expected http:// or https://")
        if self.metrics_listen:
            _check_host_port("metrics_listen", self.metrics_listen)
        if not self.listen.startswith("unix:"):
            _check_host_port("listen", self.listen, "HOST:PORT or unix:PATH")
        elif self.listen == "unix:":
            raise ConfigError("listen is 'unix:'; expected unix:PATH")
        if self.compress_answers and self.transport != "h2":
            raise ConfigError(
                f"compress_answers needs transport h2; {self.transport} would compress for clients as well "
                "that cannot read it"
            )
        if self.reuse_port and self.listen.startswith("unix:"):
            raise ConfigError(
                f"reuse_port is for TCP; {self.listen} is a Unix socket, which cannot be shared"
            )
        if self.model_control and not self.tokens and not is_local(self.listen):
            raise ConfigError(
                f"model_control lets whoever reaches {self.listen} load and unload models; expected tokens, "
                "a file that says who may, or listen to be a loopback address (127.0.0.1, [::1], localhost) "
                "or unix:PATH"
            )


def read_config(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """
    Return the settings of flags *argv*, then *environ*, then the file, then the defaults.

    Raises ConfigError for what is wrong in the environment or the file; a wrong flag exits
    with status 2, as argparse does.
    """
    # Intermixed: a path may follow a flag that follows a path.
    parsed = vars(_parser().parse_intermixed_args(argv))
    given = {name: value for name, value in parsed.items() if value is not None and name != "check"}
    models = tuple(given.pop("models"))
    if models:
        given["models"] = models
    file = given.pop("config", None) or environ.get(f"{ENV_PREFIX}CONFIG")
    from_file = _read_file(Path(file)) if file else {}
    return Config(**{**from_file, **_read_environment(environ), **given})


def wants_check(argv: Sequence[str]) -> bool:
    """Whether *argv* asks for a check; a wrong flag exits with status 2, as argparse does."""
    return bool(_parser().parse_intermixed_args(argv).check)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnserver",
        description="Serve trained MLPs over gRPC.",
        allow_abbrev=False,  # A later setting would change what an abbreviation means.
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "Every setting can also be given in the environment (NNSERVER_MAX_MESSAGE_BYTES=...) or in the\n"
            "file that --config names (max_message_bytes = ...); a flag wins over the environment, and the\n"
            "environment over the file.\n\n"
            "examples:\n"
            "  nnserver                               serve the bundled models on 127.0.0.1:50051\n"
            "  nnserver iris.safetensors models/      serve a file and every model in a folder\n"
            "  nnserver --listen unix:/run/nn.sock    serve on a Unix socket\n"
            "  nnserver warm                          compile the kernels now, so that starts are quick\n"
            "  nnserver token alice                   make a token for --tokens\n"
        ),
    )
    for setting in fields(Config):
        help_ = setting.metadata["help"]
        if setting.name == "models":
            parser.add_argument("models", nargs="*", metavar="PATH", help=help_)
            continue
        flag = "--" + setting.name.replace("_", "-")
        if isinstance(setting.default, bool):
            parser.add_argument(
                flag,
                action=argparse.BooleanOptionalAction,
                default=None,
                help=f"{help_} (default: {'on' if setting.default else 'off'})",
            )
        else:
            parser.add_argument(
                flag,
                type=type(setting.default),
                choices=setting.metadata["choices"],
                metavar=None if setting.metadata["choices"] else _metavar(setting),
                help=f"{help_} (default: {setting.default})" if setting.default != "" else help_,
            )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file with settings; SIGHUP has it read again (docs/security.md)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check settings, models, certificates and tokens, say what is wrong and serve nothing; "
        "exits with status 0, or 2",
    )
    parser.add_argument("--version", action="version", version=f"nnserver {__version__}")
    return parser


def _metavar(setting: Field[Any]) -> str:
    if setting.name.endswith("_s"):
        return "SECONDS"
    if setting.name.endswith("_bytes"):
        return "BYTES"
    if setting.name.endswith("_sample"):
        return "SHARE"
    if setting.name.endswith("_endpoint"):
        return "URL"
    if setting.name.startswith("tls_") or setting.name == "tokens":
        return "FILE"
    return "ADDRESS" if setting.name.endswith("listen") else "N"


def _read_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    by_name = {setting.name: setting for setting in fields(Config)}
    for key, text in environ.items():
        if not key.startswith(ENV_PREFIX) or key == f"{ENV_PREFIX}CONFIG" or _OF_KUBERNETES.fullmatch(key):
            continue
        name = key.removeprefix(ENV_PREFIX).lower()
        if name not in by_name:
            hint = _did_you_mean(name, list(by_name), lambda near: ENV_PREFIX + near.upper())
            raise ConfigError(f"unknown setting {key} in the environment{hint}")
        found[name] = _parse(by_name[name], text, key)
    return found


def _parse(setting: Field[Any], text: str, where: str) -> Any:
    if setting.name == "models":
        return tuple(path for path in text.split(os.pathsep) if path)
    if isinstance(setting.default, bool):
        value = _BOOLEANS.get(text.lower())
        if value is None:
            raise ConfigError(f"{where} is {text!r}; expected true or false")
        return value
    try:
        kind: type[Any] = type(setting.default)
        return kind(text)
    except ValueError:
        raise ConfigError(f"{where} is {text!r}; expected {_kind(setting)}") from None


def _read_file(path: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} is not TOML: {error}") from None
    names = [setting.name for setting in fields(Config)]
    for name in found:
        if name not in names:
            raise ConfigError(f"unknown setting {name!r} in {path}{_did_you_mean(name, names)}")
    if "models" in found:
        models = found["models"]
        if not isinstance(models, list) or not all(isinstance(model, str) for model in models):
            raise ConfigError(f"models in {path} is {models!r}; expected a list of paths")
        found["models"] = tuple(models)
    return found


def _check(setting: Field[Any], value: Any) -> None:
    if setting.name == "models":
        return
    kind = type(setting.default)
    is_right = type(value) is kind or (kind is float and type(value) is int)
    if not is_right:
        raise ConfigError(f"{setting.name} is {value!r}; expected {_kind(setting)}")
    low, high, choices = (setting.metadata[key] for key in ("low", "high", "choices"))
    # Written so that NaN is refused too.
    if low is not None and not value >= low:
        raise ConfigError(f"{setting.name} is {value}; expected at least {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{setting.name} is {value}; expected at most {high}")
    if choices is not None and value not in choices:
        raise ConfigError(f"{setting.name} is {value!r}; expected one of {', '.join(choices)}")


def _check_host_port(name: str, listen: str, expected: str = "HOST:PORT") -> None:
    match = _HOST_PORT.fullmatch(listen)
    if match is None or int(match[3]) > 65535:
        raise ConfigError(f"{name} is {listen!r}; expected {expected}")


def changes(old: Config, new: Config) -> tuple[Config, list[str], list[str]]:
    """
    Return *old* with what of *new* a running server can take; the names of what it took, and of the rest.

    What is off cannot be turned on, nor off what is on: connections and methods were made for it.
    """
    different = [
        name for name in (f.name for f in fields(Config)) if getattr(old, name) != getattr(new, name)
    ]
    switched = ("tokens", "tls_certificate", "tls_key", "tls_client_ca")
    taken = [
        name
        for name in different
        if name in LIVE and (name not in switched or bool(getattr(old, name)) == bool(getattr(new, name)))
    ]
    both = replace(old, **{name: getattr(new, name) for name in taken})
    return both, taken, [name for name in different if name not in taken]


def is_local(listen: str) -> bool:
    """Whether only this machine's own processes can connect to *listen*."""
    if listen.startswith("unix:"):
        return True
    host = listen.rpartition(":")[0].strip("[]").partition("%")[0]
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _kind(setting: Field[Any]) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names[type(setting.default)]


def _did_you_mean(name: str, known: Sequence[str], spell: Callable[[str], str] = str) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {spell(close[0])}?" if close else ""
