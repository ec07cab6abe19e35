"""
Arrays in, predictions out: the Python client of nnserver.

    import numpy as np
    from nnclient import Client

    with Client("127.0.0.1:50051") as client:
        y = client.predict("digits", np.zeros((3, 64)), output="probabilities")

Names are loaded when first used: `import nnclient` by itself costs neither gRPC nor NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nnclient.aio import AsyncClient
    from nnclient.client import Client
    from nnclient.errors import (
        Cancelled,
        DeadlineExceeded,
        InternalError,
        InvalidInput,
        MessageTooLarge,
        NnclientError,
        NotFound,
        Overloaded,
        PermissionDenied,
        Unauthenticated,
        Unavailable,
    )
    from nnclient.labels import Labels, LabelScore
    from nnclient.models import LayerInfo, ModelInfo
    from nnclient.retry import RetryPolicy

_MODULE_OF = {
    "AsyncClient": "aio",
    "Client": "client",
    "Cancelled": "errors",
    "DeadlineExceeded": "errors",
    "InternalError": "errors",
    "InvalidInput": "errors",
    "MessageTooLarge": "errors",
    "NnclientError": "errors",
    "NotFound": "errors",
    "Overloaded": "errors",
    "PermissionDenied": "errors",
    "Unauthenticated": "errors",
    "Unavailable": "errors",
    "Labels": "labels",
    "LabelScore": "labels",
    "LayerInfo": "models",
    "ModelInfo": "models",
    "RetryPolicy": "retry",
}

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "InternalError",
    "InvalidInput",
    "LabelScore",
    "Labels",
    "LayerInfo",
    "MessageTooLarge",
    "ModelInfo",
    "NnclientError",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "RetryPolicy",
    "Unauthenticated",
    "Unavailable",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
