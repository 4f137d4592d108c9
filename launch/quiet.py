"""Keeps the libraries below from writing into a command's output: progress bars, remarks, the profiler's own log.

Only the commands use it, around their work; a program that imports farskip keeps its own settings. Warnings of Python
are not touched: none is expected, and one that appears should be seen.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_ENVIRONMENT = {
    # Read when `datasets` is imported, which the data pipeline does only where it needs it.
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # Kineto reports each start and stop above its level for errors; a trace that fails still raises in Python.
    "KINETO_LOG_LEVEL": "6",
}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Bars and remarks of transformers, datasets and the profiler are off inside the block.

    Note: what the user has set in the environment stays as it is.
    """
    from transformers.utils import logging

    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    os.environ.update(added)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
