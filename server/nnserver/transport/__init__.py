"""Sockets in, calls out: one module a transport; no protobuf and no models here."""
