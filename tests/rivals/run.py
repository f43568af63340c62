"""Runs other libraries' own test files against `mla_triton.compat`, unchanged.

The files are not part of this repository: they come from a checkout or a source distribution.
docs/compat.md says which of them concern MLA.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="root of the library's checkout")
    parser.add_argument("files", nargs="+", help="test files in it, relative to its root")
    parser.add_argument(
        "--cpu", action="store_true", help="in Triton's interpreter, sizes cut to what it can do"
    )
    parser.add_argument("--sample", type=int, help="the most tests of one function; all by default")
    return parser.parse_known_args()


def main() -> int:
    """Returns pytest's exit status; other arguments, as -k or -x, are pytest's."""
    options, rest = arguments()
    if options.cpu:
        # Triton reads this while it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    import pytest
    import rival_aliases
    import rival_on_cpu
    from rival_plugin import Rivals

    checkout = options.checkout.resolve()
    limit = rival_on_cpu.limited if options.cpu else None
    plugin = Rivals(sample=options.sample, limit=limit)
    files = [str(checkout / name) for name in options.files]
    # Neither this repository's pytest options nor the library's conftest files, which set up what
    # is not here.
    pytest_options = ["-c", os.devnull, f"--rootdir={checkout}", "--noconftest", "-q"]
    pytest_options += ["-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    with rival_on_cpu.pretended_card() if options.cpu else contextlib.nullcontext():
        rival_aliases.install(checkout)
        status = pytest.main([*pytest_options, *rest, *files], plugins=[plugin])
    print(f"\n{plugin.table()}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
