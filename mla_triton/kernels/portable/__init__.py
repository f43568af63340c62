"""Triton kernels for every capability from 8.0 on, for AMD, and for Triton's interpreter."""
