"""Kernels, a folder an architecture; `common` holds what they share."""
