"""`scripts/train_wide.py` on a CPU that says it has half precision: it has, only slowly, and DeepSpeed would not let it."""

import runpy
from pathlib import Path

from deepspeed.accelerator import get_accelerator

if __name__ == "__main__":
    get_accelerator().is_fp16_supported = lambda: True
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "train_wide.py"), run_name="__main__")
