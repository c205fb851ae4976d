"""Silence around libraries that talk."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters draw bars, report their progress on standard output and warn of their own deprecations."""
    names = ("torch.onnx", "transformers", "onnxscript", "onnxruntime", "onnxruntime.transformers", "onnx_ir")
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    root = logging.getLogger()
    level = root.level
    # ONNX Runtime's quantizer speaks through the root
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
