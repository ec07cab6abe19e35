"""A trained MLP in, a gRPC service out: the server of nnserve."""

__version__ = "0.1.0"
