"""Message bytes in, message bytes out: one module a service; no sockets here."""
