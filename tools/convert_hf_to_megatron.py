"""Writes a megatron-core checkpoint from an HF folder: `megafork convert hf-to-megatron`.

python tools/convert_hf_to_megatron.py --hf DIR --megatron DIR [--max-file-gb 5]
"""

import sys

from megafork.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["convert", "hf-to-megatron"]
    main()
