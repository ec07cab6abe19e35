"""Parsed arguments -> exit status: one module a command of `nnclient`, loaded when it is run."""
