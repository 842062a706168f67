#!/usr/bin/env python
"""The command `megatron-dwm tokenizer` under its old path."""

import sys
from pathlib import Path

# The package beside this file, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_dwm.cli.tokenizer import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
