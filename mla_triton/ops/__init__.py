"""The public operations, one module each."""
