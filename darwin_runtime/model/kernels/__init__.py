"""Kernels: the arithmetic of steps of known estimators, without their checks."""
