"""Export the thin network of a run, each format compared with the original before it counts as written.

python tools/export.py runs/NAME [--to FORMATS] [--stage finetune] [--export.opset=20]

Formats: hf, onnx, onnx_fused, onnx_int8, onnx_int8_dynamic, torchvision, timm, torch_export.
"""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.exchange.command import export_run

if __name__ == "__main__":
    sys.exit(command(lambda: export_run(__doc__, sys.argv[1:])))
