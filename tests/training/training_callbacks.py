"""Callbacks that several test files use."""

import signal

from torch_feather.training.callbacks import Callback


class StopAt(Callback):
    """Sends Ctrl-C after that many steps, in the first process only; 0: never."""

    def __init__(self, step):
        self.left = step

    def step(self, images):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)
