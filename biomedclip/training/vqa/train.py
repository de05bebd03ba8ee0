"""Every encoder with every seed, the same head without a picture, and one table.

Reads a VqaTrainConfig; writes a run folder: config, vocabulary.json, for each encoder and seed the answers to the test
questions (answers.jsonl, also with each question shown another image) and the weights (head.safetensors), then
results.json and table.md. The epoch is the one that is best on validation; test questions are answered once, by it. A
finished encoder and seed is recognised by its answers, so a run that was cut off goes on with `--resume`.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from biomedclip.evaluation.vqa.datasets import read_questions
from biomedclip.evaluation.vqa.questions import QuestionTable
from biomedclip.files import write_json, write_text
from biomedclip.progress import Progress, silent
from biomedclip.runs import Run, open_run
from biomedclip.training.vqa.config import VqaEncoderConfig, VqaTrainConfig
from biomedclip.training.vqa.examples import Splits, divide, stage
from biomedclip.training.vqa.fit import Fitted, Plan, fit_head, read_fitted, write_fitted
from biomedclip.training.vqa.pictures import blind_pictures, count_regions, look_at
from biomedclip.training.vqa.results import BLIND, score_run
from biomedclip.training.vqa.table import results_table


def train_answers(config: VqaTrainConfig, out: str | Path, *, resume: bool = False, progress: Progress = silent) -> str:
    """Train, choose, answer and score; returns the table. Raises DataError for data that cannot be used so."""
    table = read_questions(config.data.root, config.data.layout, language=config.data.language)
    splits = divide(table, config.data.validation_share, config.data.validation_fold)
    if config.scored == "validation":
        splits = replace(splits, test=splits.validation)
    run = open_run(out, kind="medvqa", config=config, seed=config.seeds[0], resume=resume)
    run.log(f"{len(table.rows):,} questions, dropped {table.dropped}, repaired {dict(table.notes)}")
    plan = _plan(config, table, splits, run)
    write_json(run.folder / "vocabulary.json", asdict(plan.last[0].vocabulary))
    blind = VqaEncoderConfig(name=BLIND, model=BLIND)
    fitted = {one.name: _fit_seeds(plan, one, table, run, progress) for one in (*config.encoders, blind)}
    results = score_run(plan, table, fitted)
    write_json(run.folder / "results.json", results)
    text = results_table(results)
    write_text(run.folder / "table.md", text + "\n")
    run.finish({"encoders": len(config.encoders), "seeds": len(config.seeds)})
    return text


def _plan(config: VqaTrainConfig, table: QuestionTable, splits: Splits, run: Run) -> Plan:
    places = {row.sample_id: i for i, row in enumerate(table.manifest().rows)}
    train, validation, test = splits.train.rows, splits.validation.rows, splits.test.rows
    words = config.head.words_first
    choose = stage(train, (validation, test), places, config.max_words, words_first=words)
    final = None
    if config.refit and splits.carved:
        final = stage((*train, *validation), (test,), places, config.max_words, words_first=words)
    elif config.refit:
        run.log("the data has a validation split of its own, which no head is trained on: refit does nothing")
    return Plan(config=config, splits=splits, choose=choose, final=final)


def _fit_seeds(
    plan: Plan, encoder: VqaEncoderConfig, table: QuestionTable, run: Run, progress: Progress
) -> list[Fitted]:
    """One `Fitted` a seed; those that are in the run folder are read."""
    config, name = plan.config, encoder.name
    files = {seed: run.folder / name / f"seed-{seed}" / "answers.jsonl" for seed in config.seeds}
    pending = [seed for seed, path in files.items() if not path.exists()]
    if pending and name == BLIND:
        pictures, tower = blind_pictures(len(table.manifest().rows), count_regions(config.regions)), lambda: None
    elif pending:
        pictures, tower = look_at(config, encoder, table, run.folder / "features", progress)  # type: ignore[assignment]
    for seed in pending:
        module, fitted = fit_head(plan, pictures, tower, seed, blind=name == BLIND)
        write_fitted(files[seed], module, fitted)
        run.log(f"{name} seed {seed}: epoch {fitted.epoch} of {fitted.epochs_trained}, validation"
                f" {fitted.validation:.3f}, {fitted.questions_per_s:,.0f} questions/s")  # fmt: skip
    return [read_fitted(path) for path in files.values()]
