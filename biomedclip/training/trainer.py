"""A config to Lightning's Trainer: devices, strategy, precision, loggers.

Everything that depends on where a run happens stands here, and nothing that changes what is learnt. Lightning offers to
save, log and draw progress itself; here the run folder has one writer, `biomedclip.runs`, so it is told not to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from biomedclip.errors import ConfigError, MissingExtra
from biomedclip.training.config import TrainConfig

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_LOGGERS = {
    "tensorboard": ("TensorBoardLogger", "tensorboard"),
    "wandb": ("WandbLogger", "wandb"),
    "mlflow": ("MLFlowLogger", "mlflow"),
}
"""Name in a config -> Lightning's logger, and the package it needs."""


def is_first_process() -> bool:
    """Whether this process writes the run folder: the first one of the first machine, by what launchers set."""
    names: tuple[str, ...] = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    if "RANK" in os.environ:
        names = ("RANK",)
    return all(os.environ.get(name, "0") == "0" for name in names)


def make_trainer(config: TrainConfig, folder: Path, callbacks: Sequence[Any], *, validates: bool) -> Trainer:
    """The Trainer of a run. Raises ConfigError where the machine lacks what the config asks for."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    every = config.validation.every_steps if validates else 0
    precision = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[config.precision]
    plugins = _half_on_cpu() if config.precision == "fp16" and not _on_gpu(config) else []
    settings: dict[str, Any] = dict(
        accelerator=config.device,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config),
        precision=None if plugins else precision,
        plugins=plugins or None,
        max_steps=config.max_steps,
        log_every_n_steps=config.log_every_steps,
        logger=_loggers(config, folder) if is_first_process() else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=None if every else 0,
        val_check_interval=every or None,
        check_val_every_n_epoch=None if every else 1,
        # The plan deals the slots of a batch to the processes; a sampler of Lightning's would deal them twice.
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    )
    try:
        return Trainer(**settings)
    except (MisconfigurationException, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError("device, devices, strategy", "this machine cannot run it so", found=text[:200],
                          todo="change them") from None  # fmt: skip


def _strategy(config: TrainConfig) -> Any:
    if config.strategy == "fsdp":
        from lightning.pytorch.strategies import ModelParallelStrategy

        return ModelParallelStrategy(data_parallel_size=config.devices * config.num_nodes, tensor_parallel_size=1,
                                     save_distributed_checkpoint=False)  # fmt: skip
    if config.devices * config.num_nodes == 1:
        return "auto"
    from lightning.pytorch.strategies import DDPStrategy

    unused = config.strategy == "ddp_find_unused_parameters_true"
    return DDPStrategy(find_unused_parameters=unused, gradient_as_bucket_view=True)


def _on_gpu(config: TrainConfig) -> bool:
    import torch

    return config.device != "cpu" and torch.cuda.is_available()


def _half_on_cpu() -> list[Any]:
    """Lightning knows fp16 on GPUs only and would take bf16 without a word in the results; torch has it on both."""
    import torch
    from lightning.pytorch.plugins.precision import MixedPrecision

    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]


def _loggers(config: TrainConfig, folder: Path) -> list[Any] | bool:
    import lightning.pytorch.loggers as known

    made: list[Any] = []
    for name in config.loggers:
        kind, package = _LOGGERS[name]
        places: dict[str, dict[str, Any]] = {
            "tensorboard": {"save_dir": folder, "name": "", "version": "tensorboard", "default_hp_metric": False},
            "wandb": {"save_dir": folder, "name": folder.name, "project": "biomedclip"},
            "mlflow": {"experiment_name": "biomedclip", "run_name": folder.name,
                       # MLflow 3.17 refuses to write runs into plain folders; a database is what it asks for.
                       "tracking_uri": os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}",
                       "artifact_location": str(folder / "mlartifacts")},
        }  # fmt: skip
        try:
            made.append(getattr(known, kind)(**places[name]))
        except ModuleNotFoundError:
            raise MissingExtra(
                "train", package, todo=f"run: pip install {package}, or leave it out of loggers"
            ) from None
    return made or False


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's device table and advice off the terminal; warnings still pass."""
    import logging
    import warnings

    names = ("lightning.pytorch", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 compares with a class that torch 2.15 renames.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            # The run folder holds the checkpoints; nothing of Lightning's would be lost with its logger.
            warnings.filterwarnings("ignore", message=r".*`isinstance\(treespec")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
