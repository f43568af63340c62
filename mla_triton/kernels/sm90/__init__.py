"""Kernels for Hopper (capability 9.0), in Gluon."""
