"""Runs predictions: admission, batching, and worker processes."""
