"""Config in, a running server out: puts the rooms together, starts them and drains them."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from google.protobuf import descriptor_pool

from nncore.compilation import cache_folder
from nnserver.access import Access
from nnserver.api.differentiate import DifferentiateApi
from nnserver.api.health import SERVICE as HEALTH_SERVICE
from nnserver.api.health import HealthApi
from nnserver.api.inference import SERVICE as INFERENCE_SERVICE
from nnserver.api.inference import InferenceApi, InferenceLimits
from nnserver.api.oip import POOL as OIP_POOL
from nnserver.api.oip import SERVICE as OIP_SERVICE
from nnserver.api.oip import OipApi
from nnserver.api.reflection import ReflectionApi
from nnserver.batcher import QueueLimits, QueueTotal
from nnserver.call import Method, Methods
from nnserver.catalog import Catalog
from nnserver.config import Config, changes, is_local
from nnserver.engine import Engine
from nnserver.errors import ConfigError
from nnserver.file_watch import FileWatch, FileWatcher
from nnserver.identities import Identities, read_identities
from nnserver.observation import Observer
from nnserver.reloader import Reloader
from nnserver.repository import Repository
from nnserver.request_watch import RequestWatch
from nnserver.transport.load import TransportLoad
from nnserver.transport.tls import TlsFiles, ssl_context

if TYPE_CHECKING:
    from nnserver.metrics.exposition import MetricsServer
    from nnserver.tracing import OtelTracer

logger = logging.getLogger(__name__)

# grpcio's threads have nothing else to do; h2's event loop has, and a hand-over costs it about 100 us.
_INLINE_LIMIT_S = {"grpcio": math.inf, "h2": 200e-6}


class App:
    """A server made from *config*: its models are loaded and warm once this returns."""

    def __init__(self, config: Config) -> None:
        refuse_shared_cache(cache_folder())
        self._config = config
        # Before the files are read: what changes from here on is seen.
        self._files = FileWatcher(self._watches(config), config.reload_interval_s)
        # Before models are loaded, which takes time: what is wrong with it is told at once.
        self._access = Access(identities_of(config)) if config.tokens else None
        self.repository = Repository()
        queue_limits = QueueLimits(
            max_requests=config.max_queue_requests,
            max_bytes=config.max_queue_bytes,
            max_batch_rows=config.max_batch_rows,
            max_rows=config.max_queue_rows,
            max_wait_s=1e-3 * config.max_queue_ms or math.inf,
            total=QueueTotal(config.max_total_queue_requests, config.max_total_queue_bytes),
        )
        services = [INFERENCE_SERVICE, OIP_SERVICE, HEALTH_SERVICE]
        self._health = HealthApi(lambda name: name in services or self.repository.has(name))
        self._tracer = _tracer(config)
        has_metrics = bool(config.metrics_listen)
        observer = None
        if config.access_log_sample or self._tracer is not None:
            observer = Observer(config.access_log_sample, self._tracer)
        watch = RequestWatch(counts=has_metrics, observer=observer) if has_metrics or observer else None
        self._catalog = Catalog(config.models, queue_limits, self.repository, detailed_statistics=has_metrics)
        self.repository.watch(self._health.refresh)
        self._catalog.load_all(may_be_empty=config.reload or config.model_control)
        self._reloader = Reloader(self._catalog, config.reload_interval_s) if config.reload else None
        self._engine = Engine(config.kernel_threads, _INLINE_LIMIT_S[config.transport])
        limits = InferenceLimits(config.max_message_bytes, config.stream_window, config.reject_nonfinite)
        methods: dict[str, Method] = {}
        methods |= InferenceApi(self.repository, self._engine, limits, watch).methods()
        methods |= DifferentiateApi(self.repository, self._engine, limits, watch).methods()
        self._oip = OipApi(
            self.repository,
            self._engine,
            limits,
            self._catalog,
            is_ready=self._health.is_serving,
            may_change=config.model_control,
            watch=watch,
        )
        methods |= self._oip.methods()
        methods |= self._health.methods()
        if config.reflection:
            methods |= ReflectionApi(services, OIP_POOL, descriptor_pool.Default()).methods()
        if self._access is not None:
            methods = self._access.guard(methods)
        self._transport = _transport(config, methods, self._engine.run_waiting)
        self._metrics_server: MetricsServer | None = None
        if watch is not None and has_metrics:
            self._metrics_server = self._metrics_of(watch)

    @property
    def metrics_address(self) -> str:
        """Where metrics are served; empty if they are not."""
        return self._metrics_server.address if self._metrics_server else ""

    def start(self) -> str:
        """Serve; return the address. Raises ConfigError if it cannot be listened on."""
        address = self._transport.start()
        if self._metrics_server is not None:
            self._metrics_server.start()
        if self._reloader is not None:
            self._reloader.start()
        self._files.start()
        return address

    def reload(self, config: Config) -> Config:
        """
        Take from *config* what a running server can: see config.LIVE; return the settings from now on.

        Files are read again as well, and models looked for. Raises ConfigError if anything is unfit: then
        nothing has changed, except that a model that can be loaded may have been.
        """
        new, taken, left = changes(self._config, config)
        # All of it is read before any of it is used.
        identities = identities_of(new) if self._access is not None else None
        tls = tls_files_of(new)
        if tls is not None:
            ssl_context(tls)
        try:
            self._catalog.look_again(new.models)
        except OSError as error:
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
        if self._access is not None and identities is not None:
            self._access.replace(identities)
        if tls is not None:
            self._transport.renew_tls(tls)
        self._config = new
        for name in left:
            logger.warning(
                "setting %s was changed and needs a restart; it stays %r", name, getattr(new, name)
            )
        logger.info("configuration reloaded changed=%s", ",".join(taken) or "nothing")
        return new

    def _watches(self, config: Config) -> list[FileWatch]:
        """Return what looks after the files of tokens and certificates, if there are any."""
        watches = []
        if config.tokens:
            watches.append(FileWatch("tokens", lambda: [self._config.tokens], self._reload_tokens))
        if config.tls_certificate:
            watches.append(FileWatch("certificates", self._tls_paths, self._reload_certificates))
        return watches

    def _reload_tokens(self) -> None:
        assert self._access is not None
        self._access.replace(identities_of(self._config))
        logger.info("tokens reloaded")

    def _tls_paths(self) -> list[str]:
        config = self._config
        return [path for path in (config.tls_certificate, config.tls_key, config.tls_client_ca) if path]

    def _reload_certificates(self) -> None:
        files = tls_files_of(self._config)
        assert files is not None
        self._transport.renew_tls(files)
        logger.info("certificates reloaded")

    def drain(self) -> None:
        """Report NOT_SERVING, finish what is in flight within the grace period, stop."""
        self._health.drain()
        self._transport.drain(self._config.grace_s)
        self._files.stop()
        if self._reloader is not None:
            self._reloader.stop()
        if self._access is not None:
            self._access.close()
        self._oip.close()
        self._engine.close()
        if self._metrics_server is not None:
            self._metrics_server.stop()  # Late: a drain is worth watching.
        if self._tracer is not None:
            self._tracer.close()

    def _metrics_of(self, watch: RequestWatch) -> MetricsServer:
        # Imported when asked for: they bring in prometheus_client.
        from nnserver.metrics.collection import Metrics
        from nnserver.metrics.exposition import MetricsServer

        config = self._config
        metrics = Metrics(
            self.repository,
            self._catalog,
            watch,
            self._transport,
            config.transport,
            self._health.is_serving,
        )
        return MetricsServer(config.metrics_listen, metrics.snapshot)


def _tracer(config: Config) -> OtelTracer | None:
    if not config.trace_endpoint:
        return None
    # Imported when asked for: it needs an extra.
    try:
        from nnserver.tracing import otlp_tracer

        return otlp_tracer(config.trace_endpoint, config.trace_sample)
    except ImportError as error:
        raise ConfigError(
            f"trace_endpoint needs the extra otel: pip install 'nnserve[otel]' ({error.name} is missing)"
        ) from error


class Transport(Protocol):
    """What app asks of a transport."""

    def start(self) -> str: ...

    def renew_tls(self, files: TlsFiles) -> None: ...

    def drain(self, grace_s: float) -> None: ...

    def load(self) -> TransportLoad: ...


def tls_files_of(config: Config) -> TlsFiles | None:
    """Return the files of TLS; None without it."""
    if not config.tls_certificate:
        return None
    return TlsFiles(config.tls_certificate, config.tls_key, config.tls_client_ca)


def identities_of(config: Config) -> Identities:
    """Return who may call; raises ConfigError for what does not go with the other settings."""
    identities = read_identities(config.tokens)
    if identities.have_certificates and not config.tls_client_ca:
        raise ConfigError(
            f"tokens {config.tokens} has certificates, and no client is asked for one; set tls_client_ca"
        )
    if not config.tls_certificate and not is_local(config.listen):
        logger.warning(
            "tokens are sent to %s without encryption, unless what stands before this server sees to it; "
            "set tls_certificate and tls_key",
            config.listen,
        )
    return identities


def _transport(config: Config, methods: Methods, after_messages: Callable[[], bool]) -> Transport:
    tls = tls_files_of(config)
    # Imported when chosen: each brings in a library that the other does without.
    if config.transport == "h2":
        from nnserver.transport.h2_server import H2Options, H2Server

        return H2Server(
            methods,
            after_messages,
            H2Options(
                listen=config.listen,
                max_message_bytes=config.max_message_bytes,
                max_streams=config.max_streams,
                max_concurrent_calls=config.max_concurrent_calls,
                max_connection_calls=config.max_connection_calls,
                max_connections=config.max_connections,
                max_buffered_bytes=config.max_buffered_bytes,
                compress_answers=config.compress_answers,
                reuse_port=config.reuse_port,
                busy_poll_us=config.busy_poll_us,
                tls=tls,
            ),
        )
    from nnserver.transport.grpcio_server import GrpcioOptions, GrpcioServer

    return GrpcioServer(
        methods,
        after_messages,
        GrpcioOptions(
            listen=config.listen,
            max_message_bytes=config.max_message_bytes,
            unary_threads=config.unary_threads,
            max_streams=config.max_streams,
            max_concurrent_calls=config.max_concurrent_calls,
            reuse_port=config.reuse_port,
            max_wait_s=1e-3 * config.max_queue_ms or math.inf,
            tls=tls,
            counts_connections=bool(config.metrics_listen),
        ),
    )


def refuse_shared_cache(folder: Path) -> None:
    """
    Raise ConfigError if anyone but this user (or root) could write compiled code into *folder*.

    Numba's cache is a pickle: whoever writes it runs code here.
    """
    if not hasattr(os, "geteuid"):
        return
    trusted = {0, os.geteuid()}
    real = folder.resolve()
    # Above a link's target and above the link itself: who writes to either chooses what is found.
    for path in dict.fromkeys((folder, real, *folder.parents, *real.parents)):
        try:
            found = path.stat()
        except OSError:
            continue  # Nothing can be loaded from there; nncore makes it later, writable by us alone, or not.
        # In a sticky folder (/tmp) nobody can rename what is ours, but anybody can add a file.
        is_sticky = bool(found.st_mode & stat.S_ISVTX) and path not in (folder, real)
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
            reason, remedy = f"others can write to {path}", f"run `chmod go-w {path}`, or "
        elif found.st_uid not in trusted:
            reason, remedy = f"{path} belongs to another user", ""
        else:
            continue
        raise ConfigError(
            f"the folder of compiled kernels {folder} is not safe: {reason}; "
            f"{remedy}set NNCORE_CACHE_DIR to a folder of your own"
        )
