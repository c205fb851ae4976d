"""Stage 1 where silence is noticed after two seconds and one rank's data takes five for a step: slow_data.py --config FILE ..."""

import os
import sys
import time
from typing import Any

from wtn_pretrain.cli import main
from wtn_pretrain.data.stream import BatchStream
from wtn_pretrain.training import loop

if __name__ == "__main__":
    loop.SILENCE = 2.0
    plain = BatchStream.micro_batch

    def slow(stream: BatchStream, step: int, number: int) -> Any:
        if step == 7 and os.environ["RANK"] == "1":
            time.sleep(5)
        return plain(stream, step, number)

    BatchStream.micro_batch = slow  # type: ignore[method-assign]
    main(lambda stages: stages.wide(), __doc__, sys.argv[1:])
