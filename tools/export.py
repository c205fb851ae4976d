"""Export the fine-tuned thin network of a run: python tools/export.py --config runs/NAME/config.yaml [--export.formats=[onnx]]"""

from wtn_pretrain.cli import main
from wtn_pretrain.exchange.command import export_run

if __name__ == "__main__":
    main(export_run, __doc__)
