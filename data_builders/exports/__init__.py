"""Dataset folders in the shapes that other projects read; `run.export` is the door."""
