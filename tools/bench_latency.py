"""Latency, size on disk and peak memory of thin and wide networks in ONNX Runtime (fused), torch eager, torch.compile and Hugging Face.

    python tools/bench_latency.py [--preset ci|benchmark|full] [--model bert|resnet] [--compile] [--threads N] [--json FILE] [--plot FILE]

Weights are random: they do not matter here. Batches of 1 and 32, sequences of 16, 128 and 512 tokens. Every arm has three turns in rotating
order in one process; a figure is the median over the turns, a ratio that of two turns of the same round. Peak memory is what a process
of its own grows by when it loads the network and runs it at the largest shape. JSON keys: `ort_over_hf_eager`, Hugging Face's p50 over
ONNX Runtime's for the thin network at batch 1, the geometric mean over lengths and of the two models the smaller; `models`. Goal: 1.5.
"""

import sys

from wtn_pretrain.arguments import command
from wtn_pretrain.exchange.bench import run

if __name__ == "__main__":
    sys.exit(command(lambda: run(__doc__, sys.argv[1:])))
