"""`python -m megatron_dwm COMMAND`, which torchrun starts as `-m megatron_dwm COMMAND`."""

import sys

from megatron_dwm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
