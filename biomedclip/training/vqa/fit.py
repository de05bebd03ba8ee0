"""One head, one seed: trained, its epoch chosen on validation, perhaps trained again on all, and its answers.

Reads the tensors of a stage and pictures; yields `Fitted`, which is also what is written for each encoder and seed and
read back by a run that goes on. The epoch is the first of the best on validation; 0 is the head before training, which
says what the words say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from biomedclip.evaluation.vqa.baselines import shuffle_images
from biomedclip.evaluation.vqa.questions import QuestionTable
from biomedclip.evaluation.vqa.score import mark_answers
from biomedclip.files import split_lines, write_bytes, write_json, write_text
from biomedclip.training.trainer import quiet_lightning
from biomedclip.training.vqa.config import VqaTrainConfig
from biomedclip.training.vqa.examples import Examples, Splits, Stage, Vocabulary
from biomedclip.training.vqa.module import AnswerModule
from biomedclip.training.vqa.pictures import Pictures


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What came of one encoder and seed."""

    answers: dict[str, str]
    shuffled: dict[str, str]
    epoch: int
    """Chosen on validation; 0 is the head before training."""
    epochs_trained: int
    validation: float
    questions_per_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What every encoder and seed of a run shares."""

    config: VqaTrainConfig
    splits: Splits
    choose: Stage
    """Learns from the training split; answers the validation and the scored questions."""
    final: Stage | None
    """With `refit`: learns from training and held-out images; answers the scored questions."""

    @property
    def last(self) -> tuple[Stage, Examples]:
        """The stage whose head answers, and the scored questions in its vocabulary."""
        return (self.final, self.final.answered[0]) if self.final else (self.choose, self.choose.answered[1])


class _KeepBest(Callback):
    """The weights of the epoch that is best on validation; the first of equals."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.best, self.epoch = plan, -1.0, -1
        self.state: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the head before training."""
        self._judge(pl_module, 0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights where they are better than before; end the fit where patience has run out."""
        self._judge(pl_module, trainer.current_epoch + 1)
        patience = self.plan.config.patience
        if patience is not None and trainer.current_epoch + 1 - self.epoch >= patience:
            trainer.should_stop = True

    def _judge(self, module: LightningModule, epoch: int) -> None:
        table, stage = self.plan.splits.validation, self.plan.choose
        answers = answer_questions(module, stage.answered[0], table, stage.vocabulary, told=_told(self.plan.config))  # type: ignore[arg-type]
        value = float(mark_answers(table, answers).exact.mean())
        if value > self.best:
            self.best, self.epoch = value, epoch
            self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _told(config: VqaTrainConfig) -> bool:
    return config.answer_type == "told"


def answer_questions(
    module: AnswerModule, examples: Examples, table: QuestionTable, vocabulary: Vocabulary, *, told: bool,
    image: Tensor | None = None,
) -> dict[str, str]:  # fmt: skip
    """Question id to answer; `image` shows the questions other pictures than their own."""
    training, found = module.training, []
    shown = examples.image if image is None else image
    module.eval()
    for start in range(0, len(shown), 256):
        part = slice(start, start + 256)
        columns = [shown[part], examples.words[part], examples.start[part]] + [examples.kind[part]] * told
        found += module.answer(*(one.to(module.device) for one in columns)).tolist()
    module.train(training)
    return {row.question_id: vocabulary.answers[i] for row, i in zip(table.rows, found, strict=True)}


def fit_head(
    plan: Plan, pictures: Pictures, make_tower: Callable[[], nn.Module | None], seed: int, *, blind: bool
) -> tuple[AnswerModule, Fitted]:
    """The trained head and its answers to the scored questions."""
    config, table = plan.config, plan.splits.test
    keep = _KeepBest(plan)
    module, trained, speed = _train(config, plan.choose, pictures, make_tower(), seed, config.epochs, [keep], blind)
    if plan.final is None:
        module.load_state_dict(keep.state)
    else:
        module, _, _ = _train(config, plan.final, pictures, make_tower(), seed, keep.epoch, [], blind)
    stage, scored = plan.last
    other = torch.from_numpy(shuffle_images([row.group for row in table.rows], seed))
    told = _told(config)
    return module, Fitted(
        answers=answer_questions(module, scored, table, stage.vocabulary, told=told),
        shuffled=answer_questions(module, scored, table, stage.vocabulary, told=told, image=scored.image[other]),
        epoch=keep.epoch, epochs_trained=trained, validation=keep.best, questions_per_s=speed,
    )  # fmt: skip


def _train(
    config: VqaTrainConfig, stage: Stage, pictures: Pictures, tower: nn.Module | None, seed: int, epochs: int,
    callbacks: Sequence[Callback], blind: bool,
) -> tuple[AnswerModule, int, float]:  # fmt: skip
    """(head, epochs it was trained, questions a second)."""
    seed_everything(seed, verbose=False)
    # The tower was built from a seed of its own; what comes after depends on the run's.
    torch.manual_seed(seed)
    rows, vocabulary = stage.train, stage.vocabulary
    data = TensorDataset(rows.image, rows.words, rows.answer, rows.kind, rows.start)
    loader = DataLoader(data, config.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    module = AnswerModule(
        config, pictures, num_words=len(vocabulary.words) + 2, closed=len(vocabulary.closed),
        opened=len(vocabulary.opened), tower=tower, blind=blind, max_steps=len(loader) * config.epochs,
    )  # fmt: skip
    if epochs == 0:
        return module, 0, 0.0
    with quiet_lightning():
        trainer = Trainer(
            accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[config.device], devices=1, max_epochs=epochs,
            gradient_clip_val=config.clip_norm, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        start = time.perf_counter()
        trainer.fit(module, loader)
        seconds = time.perf_counter() - start
    return module, trainer.current_epoch, len(data) * trainer.current_epoch / seconds


def write_fitted(path: Path, module: AnswerModule, fitted: Fitted) -> None:
    """Weights first: the answers' presence means that the seed is done."""
    from safetensors.torch import save

    state = {name: tensor.cpu().contiguous() for name, tensor in module.state_dict().items()}
    write_bytes(path.with_name("head.safetensors"), save(state))
    facts: dict[str, Any] = asdict(fitted)
    answers, shuffled = facts.pop("answers"), facts.pop("shuffled")
    write_json(path.with_name("fit.json"), facts)
    lines = [{"question_id": key, "answer": said, "shuffled": shuffled[key]} for key, said in answers.items()]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_fitted(path: Path) -> Fitted:
    """What `write_fitted` wrote."""
    rows = [json.loads(line) for line in split_lines(path.read_text(encoding="utf-8")) if line]
    return Fitted(
        answers={row["question_id"]: row["answer"] for row in rows},
        shuffled={row["question_id"]: row["shuffled"] for row in rows},
        **json.loads(path.with_name("fit.json").read_bytes()),
    )
