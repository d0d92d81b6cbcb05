"""``python -m fiak_ext``, the same as ``fiak``."""

from __future__ import annotations

import sys

from fiak_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
