"""Every encoder with every seed, the same head without a picture, and one table.

Reads a VqaTrainConfig; writes a run folder: config, vocabulary.json, for each encoder and seed the answers to the test
questions (answers.jsonl, also with each question shown another image) and the weights (head.safetensors), then
results.json and table.md. The epoch is the one that is best on validation; test questions are answered once, by it. A
finished encoder and seed is recognised by its answers, so a run that was cut off goes on with `--resume`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from biomedclip.evaluation.embed import choose_device, embed_images
from biomedclip.evaluation.vqa.baselines import answer_from_words, answer_majority, shuffle_images
from biomedclip.evaluation.vqa.datasets import read_questions
from biomedclip.evaluation.vqa.questions import QuestionTable, read_picture
from biomedclip.evaluation.vqa.score import bound_marks, compare_marks, mark_answers, score_answers
from biomedclip.files import split_lines, write_bytes, write_json, write_text
from biomedclip.models.load import load
from biomedclip.progress import Progress, silent
from biomedclip.runs import Run, open_run
from biomedclip.training.trainer import quiet_lightning
from biomedclip.training.vqa.config import VqaEncoderConfig, VqaTrainConfig
from biomedclip.training.vqa.examples import Examples, Splits, Vocabulary, divide, encode, learn_vocabulary
from biomedclip.training.vqa.module import AnswerModule, Pictures
from biomedclip.training.vqa.table import results_table

BLIND = "question_only"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What came of one encoder and seed."""

    answers: dict[str, str]
    shuffled: dict[str, str]
    epoch: int
    validation: float
    questions_per_s: float


def train_answers(config: VqaTrainConfig, out: str | Path, *, resume: bool = False, progress: Progress = silent) -> str:
    """Train, choose, answer and score; returns the table. Raises DataError for data that cannot be used so."""
    table = read_questions(config.data.root, config.data.layout, language=config.data.language)
    splits = divide(table, config.data.validation_share)
    vocabulary = learn_vocabulary(splits.train.rows)
    run = open_run(out, kind="medvqa", config=config, seed=config.seeds[0], resume=resume)
    write_json(run.folder / "vocabulary.json", asdict(vocabulary))
    run.log(f"{len(table.rows):,} questions, dropped {table.dropped}, repaired {dict(table.notes)}")
    places = {row.sample_id: i for i, row in enumerate(table.manifest().rows)}
    parts = [
        encode(t.rows, vocabulary, places, config.max_words) for t in (splits.train, splits.validation, splits.test)
    ]
    fitted: dict[str, list[Fitted]] = {}
    blind = VqaEncoderConfig(name=BLIND, model=BLIND)
    for encoder in (*config.encoders, blind):
        pending = [seed for seed in config.seeds if not _answers_file(run, encoder.name, seed).exists()]
        make = _look(config, encoder, table, progress) if pending else None
        fitted[encoder.name] = [
            _fit(config, encoder.name, make, splits, parts, vocabulary, seed, run) if make and seed in pending
            else _read_fitted(_answers_file(run, encoder.name, seed))
            for seed in config.seeds
        ]  # fmt: skip
    results = _score(config, table, splits, vocabulary, fitted, sum(part.cut for part in parts))
    write_json(run.folder / "results.json", results)
    text = results_table(results)
    write_text(run.folder / "table.md", text + "\n")
    run.finish({"encoders": len(config.encoders), "seeds": len(config.seeds)})
    return text


Look = Callable[[], tuple[Pictures, Any]]


def _look(config: VqaTrainConfig, encoder: VqaEncoderConfig, table: QuestionTable, progress: Progress) -> Look:
    """Pictures and a fresh tower (None where it is frozen) for each seed."""
    manifest = table.manifest()
    if encoder.name == BLIND:
        features = torch.zeros(len(manifest.rows), 8)
        return lambda: (Pictures(features=features, width=8), None)
    grey = _read_grey(manifest, config.head.autoencoder_px) if config.head.autoencoder else None
    random = encoder.init == "random"

    def loaded() -> Any:
        torch.manual_seed(0)
        return load(encoder.model, random_init=random, checkpoint=encoder.checkpoint)

    model, preprocess, _ = loaded()
    if encoder.tower == "frozen":
        device = choose_device(config.device)
        found = embed_images(model.to(device), preprocess, manifest, read=read_picture, device=device, max_excluded=0.0,
                             batch_size=config.embed_batch_size, workers=config.workers, progress=progress)  # fmt: skip
        vectors = torch.from_numpy(np.array(found.vectors))
        pictures = Pictures(features=vectors, grey=grey, width=vectors.shape[1])
        return lambda: (pictures, None)
    pixels = torch.stack([preprocess(read_picture(manifest, row)) for row in manifest.rows])
    with torch.inference_mode():
        width = model.encode_image(pixels[:2]).shape[1]
    pictures = Pictures(features=None, pixels=pixels, grey=grey, width=width)
    return lambda: (pictures, loaded()[0].requires_grad_(True).train())


def _read_grey(manifest: Any, size_px: int) -> Tensor:
    """(N, 1, S, S) grey pictures in [0, 1]."""
    arrays = [
        np.asarray(read_picture(manifest, row).convert("L").resize((size_px, size_px)), dtype=np.float32) / 255
        for row in manifest.rows
    ]
    return torch.from_numpy(np.stack(arrays))[:, None]


class _KeepBest(Callback):
    """The weights of the epoch that is best on validation; the first of equals."""

    def __init__(self, examples: Examples, table: QuestionTable, vocabulary: Vocabulary) -> None:
        self.examples, self.table, self.vocabulary = examples, table, vocabulary
        self.best, self.epoch, self.state = -1.0, -1, {}  # type: ignore[var-annotated]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer the validation questions and keep the weights where they are better than before."""
        answers = _answer(pl_module, self.examples, self.examples.image, self.table, self.vocabulary)  # type: ignore[arg-type]
        value = float(mark_answers(self.table, answers).exact.mean())
        if value > self.best:
            self.best, self.epoch = value, trainer.current_epoch + 1
            self.state = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}


def _answer(
    module: AnswerModule, examples: Examples, image: Tensor, table: QuestionTable, vocabulary: Vocabulary
) -> dict[str, str]:
    training, found = module.training, []
    module.eval()
    for start in range(0, len(image), 256):
        part = slice(start, start + 256)
        found += module.answer(image[part].to(module.device), examples.words[part].to(module.device)).tolist()
    module.train(training)
    return {row.question_id: vocabulary.answers[i] for row, i in zip(table.rows, found, strict=True)}


def _fit(
    config: VqaTrainConfig, name: str, look: Look, splits: Splits, parts: list[Examples], vocabulary: Vocabulary,
    seed: int, run: Run,
) -> Fitted:  # fmt: skip
    train, validation, test = parts
    seed_everything(seed, verbose=False)
    pictures, tower = look()
    # The tower is rebuilt from one seed; what comes after depends on the run's.
    torch.manual_seed(seed)
    data = TensorDataset(train.image, train.words, train.answer, train.kind)
    loader = DataLoader(data, config.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
    module = AnswerModule(
        config, pictures, num_words=len(vocabulary.words) + 2, closed=len(vocabulary.closed),
        opened=len(vocabulary.opened), tower=tower, blind=name == BLIND, max_steps=len(loader) * config.epochs,
    )  # fmt: skip
    keep = _KeepBest(validation, splits.validation, vocabulary)
    with quiet_lightning():
        trainer = Trainer(
            accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu"}[config.device], devices=1,
            max_epochs=config.epochs, gradient_clip_val=config.clip_norm, callbacks=[keep], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        start = time.perf_counter()
        trainer.fit(module, loader)
        seconds = time.perf_counter() - start
    module.load_state_dict(keep.state)
    other = torch.from_numpy(shuffle_images([row.group for row in splits.test.rows], seed))
    fitted = Fitted(
        answers=_answer(module, test, test.image, splits.test, vocabulary),
        shuffled=_answer(module, test, test.image[other], splits.test, vocabulary), epoch=keep.epoch,
        validation=keep.best, questions_per_s=len(data) * config.epochs / seconds,
    )  # fmt: skip
    _write_fitted(_answers_file(run, name, seed), module, fitted)
    run.log(f"{name} seed {seed}: epoch {keep.epoch}, validation {keep.best:.3f}, {fitted.questions_per_s:,.0f} q/s")
    return fitted


def _answers_file(run: Run, name: str, seed: int) -> Path:
    return run.folder / name / f"seed-{seed}" / "answers.jsonl"


def _write_fitted(path: Path, module: AnswerModule, fitted: Fitted) -> None:
    """Weights first: the answers' presence means that the seed is done."""
    from safetensors.torch import save

    write_bytes(
        path.with_name("head.safetensors"), save({k: v.cpu().contiguous() for k, v in module.state_dict().items()})
    )
    facts = {"epoch": fitted.epoch, "validation": fitted.validation, "questions_per_s": fitted.questions_per_s}
    write_json(path.with_name("fit.json"), facts)
    lines = [{"question_id": key, "answer": answer, "shuffled": fitted.shuffled[key]}
             for key, answer in fitted.answers.items()]  # fmt: skip
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _read_fitted(path: Path) -> Fitted:
    rows = [json.loads(line) for line in split_lines(path.read_text(encoding="utf-8"))]
    return Fitted(
        answers={row["question_id"]: row["answer"] for row in rows},
        shuffled={row["question_id"]: row["shuffled"] for row in rows},
        **json.loads(path.with_name("fit.json").read_bytes()),
    )


def _score(
    config: VqaTrainConfig, table: QuestionTable, splits: Splits, vocabulary: Vocabulary,
    fitted: dict[str, list[Fitted]], cut: int,
) -> dict[str, Any]:  # fmt: skip
    """Everything for results.json: a row an encoder, differences from what needs no image."""
    test, fitting = splits.test, splits.train

    def marks(answers: dict[str, str]) -> Any:
        return mark_answers(test, answers).exact

    earned = {name: np.mean([marks(one.answers) for one in fits], axis=0) for name, fits in fitted.items()}
    simple = {"majority": answer_majority(fitting, test), "question_words": answer_from_words(fitting, test)}
    references = {BLIND: earned[BLIND]} | {name: marks(answers) for name, answers in simple.items()}
    rows = []
    for name, fits in fitted.items():
        scores = bound_marks(test, earned[name], resamples=config.resamples)
        for metric, entry in scores.items():
            mask = np.asarray([metric == "accuracy" or metric.endswith(r.answer_type) for r in test.rows])
            entry["seeds"] = [float(marks(one.answers)[mask].mean()) for one in fits]
            entry["sd"] = statistics.stdev(entry["seeds"]) if len(fits) > 1 else None
            entry["shuffled"] = float(np.mean([marks(one.shuffled)[mask].mean() for one in fits]))
        rows.append({
            "encoder": name, "metrics": scores, "epochs": [one.epoch for one in fits],
            "validation": [one.validation for one in fits], "questions_per_s": [one.questions_per_s for one in fits],
            "first_seed": score_answers(test, fits[0].answers, train_answers=[r.answer for r in fitting.rows],
                                        resamples=config.resamples),
        })  # fmt: skip
    # One family of tests, all encoders against all references: Holm adjusts over all of them.
    family = _compare_all(test, {k: v for k, v in earned.items() if k != BLIND}, references, config.resamples)
    seen = {row.group for row in fitting.rows} | {row.group for row in splits.validation.rows}
    return {
        "data": {"name": table.name, "root": table.root, "sha256": table.sha256, "dropped": table.dropped,
                 "notes": dict(table.notes), "train": len(fitting.rows), "validation": len(splits.validation.rows),
                 "test": len(test.rows), "validation_carved_by_image": splits.carved, "questions_cut": cut,
                 "test_images": len({r.group for r in test.rows}),
                 "test_images_seen_in_training": len({r.group for r in test.rows} & seen)},
        "vocabulary": {"words": len(vocabulary.words), "closed": len(vocabulary.closed),
                       "open": len(vocabulary.opened)},
        "head": config.head.model_dump(), "seeds": list(config.seeds), "rows": rows,
        "baselines": {name: bound_marks(test, marks(answers), resamples=config.resamples)
                      for name, answers in simple.items()},
        "comparisons": family,
    }  # fmt: skip


def _compare_all(test: QuestionTable, ours: dict[str, Any], references: dict[str, Any], resamples: int) -> list[Any]:
    from biomedclip.evaluation.comparisons import holm

    family: list[dict[str, Any]] = []
    for name, earned in ours.items():
        family += [{"encoder": name, **row} for row in compare_marks(test, earned, references, resamples=resamples)]
    adjusted = holm([float("nan") if row["p"] is None else row["p"] for row in family])
    for row, p in zip(family, adjusted, strict=True):
        row["p_holm"] = None if p != p else p
    return family
