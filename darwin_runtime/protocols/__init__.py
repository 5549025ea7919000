"""Bytes to rows and back, a module for each protocol. Pure functions over `schema`."""
