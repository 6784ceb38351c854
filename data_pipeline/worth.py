"""The former name of `python -m data_pipeline.ablation`."""

import sys

from data_pipeline.ablation.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
