"""What the tests of this folder need."""

import pytest
import torch

REASON = "no accelerator"
needed = pytest.mark.skipif(not torch.accelerator.is_available(), reason=REASON)
