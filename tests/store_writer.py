"""A process that saves tuned rows, for tests that run several of it or kill it.

    python store_writer.py forever FIRST    a row for each batch from FIRST on
    python store_writer.py COUNT FIRST      that many
    python store_writer.py stuck FIRST      stops for good before the first file is replaced

Prints the batch of each row that is kept.

Begins when a line comes on its standard input, so that several begin together.
"""

from __future__ import annotations

import itertools
import os
import sys
import time

import tables

from mla_triton.configs import store


def stop_for_good(*_: object) -> None:
    print("stuck", flush=True)
    time.sleep(600)


def main(how: str, first: str) -> None:
    batches = itertools.count(int(first))
    if how == "stuck":
        os.replace = stop_for_good
    elif how != "forever":
        batches = itertools.islice(batches, int(how))
    print("ready", flush=True)
    sys.stdin.readline()
    for batch in batches:
        store.save(tables.CARD, tables.header(), [tables.row(batch)])
        print(batch, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
