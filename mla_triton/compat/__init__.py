"""Other libraries' interfaces to Multi-head Latent Attention, over the operations of this package.

A module has the names, the arguments and the conventions of the library that it is named after, so
that code which calls that library changes an import. None of them computes anything of its own;
docs/compat.md says what each takes, and what it refuses.
"""
