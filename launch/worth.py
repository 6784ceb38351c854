"""The former name of `python -m launch.ablation`."""

import sys

from launch.ablation import main

if __name__ == "__main__":
    sys.exit(main())
