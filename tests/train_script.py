"""Trains as a config file says, in a process of its own or several: `train_script.py CONFIG OUT`."""

import sys

from biomedclip.config import load_config
from biomedclip.training.config import TrainConfig
from biomedclip.training.train import train

if __name__ == "__main__":
    train(load_config(sys.argv[1], TrainConfig), sys.argv[2], resume=True)
