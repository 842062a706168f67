#!/usr/bin/env python
"""The command `megatron-dwm inspect` under its old path."""

import sys
from pathlib import Path

# The package beside this file, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_dwm.cli.inspect import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
