"""Writes an HF folder from a megatron-core checkpoint: `megafork convert megatron-to-hf`.

python tools/convert_megatron_to_hf.py --megatron DIR --hf DIR [--like DIR] [--max-file-gb 5]
"""

import sys

from megafork.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "megatron-to-hf"]
    main()
