"""`biomedclip train` with `task: text`: a small text tower takes over a sentence encoder's sense of likeness.

Reads sentences and the teacher's vectors of them; yields a folder in open_clip's format whose text tower is trained
and whose image tower is not yet, for `model.text_tower` of a pretraining config. Captions alone are too few to learn
that a leukocyte is a white blood cell; the sentences of a few hundred articles, each with the teacher's vector of it,
say more. The last percent of the sentences is held out and says how much of the teacher's sense was taken over.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from biomedclip.errors import DataError
from biomedclip.files import split_lines, write_json
from biomedclip.models.export import export_open_clip
from biomedclip.models.load import find_origin, load
from biomedclip.progress import Advance, Progress, silent
from biomedclip.runs import open_run
from biomedclip.stream.text import fast_tokenise
from biomedclip.training.optim import make_optimizer, rate_factor
from biomedclip.training.text.config import TextLossConfig, TextTrainConfig
from biomedclip.training.text.teacher import embed_sentences, reduce_width
from biomedclip.training.towers import context_length, encode_text, split_by_length
from biomedclip.training.trainer import quiet_lightning


@dataclass(frozen=True, slots=True)
class TextResult:
    """What a run came to."""

    final: Path
    cosine: float
    """Mean cosine between the tower's and the teacher's vector of a held-out sentence."""
    neighbours: float
    """Share of held-out sentences whose nearest other held-out sentence is the teacher's own choice."""
    held_out: int


def train_text(
    config: TextTrainConfig, out: str | Path, *, resume: bool = False, progress: Progress = silent
) -> TextResult:
    """Fit the text tower of the config and write the model to `out`/final.

    The teacher's vectors survive an interrupted run; the fit itself takes minutes and starts again. Raises DataError
    for sentences that are missing or too few, CheckpointError for a teacher or an architecture that is none.
    """
    run = open_run(out, kind="train", config=config, seed=config.seed, resume=resume)
    seed_everything(config.seed, verbose=False)
    sentences = _read(config)
    model: Any
    model, _, tokenizer = load(config.model, random_init=True)
    vectors = embed_sentences(sentences, config.teacher, run.folder / "teacher", max_tokens=config.teacher_tokens,
                              progress=progress)  # fmt: skip
    targets, kept = reduce_width(vectors, _width(model))
    run.log(f"{len(sentences):,} sentences; {kept:.3f} of the teacher's squared length is kept")
    tokens = torch.as_tensor(np.asarray(fast_tokenise(tokenizer)(sentences)))
    mixed = np.random.default_rng(config.seed).permutation(len(sentences))
    held = max(round(len(mixed) * config.held_out), 2)
    rows = torch.from_numpy(mixed)
    learn = TensorDataset(tokens[rows[held:]], torch.from_numpy(targets)[rows[held:]])
    steps = len(learn) // config.batch_size * config.epochs
    if not steps:
        raise DataError(
            config.sentences[0], f"gives no batch of {config.batch_size}", found=f"{len(learn)} sentences to learn"
        )
    loader = DataLoader(learn, batch_size=config.batch_size, shuffle=True, drop_last=True,
                        generator=torch.Generator().manual_seed(config.seed))  # fmt: skip
    with quiet_lightning(), progress("text tower", steps) as advance:
        trainer = Trainer(
            max_steps=steps, accelerator="auto", devices=1, gradient_clip_val=config.optim.clip_norm, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(_TextModule(model, config, steps, advance), loader)
    cosine, neighbours = _judge(model.cpu().eval(), tokens[rows[:held]], torch.from_numpy(targets)[rows[:held]])
    final = export_open_clip(
        model, run.folder / "final", model_cfg=find_origin(config.model, random_init=True).model_cfg
    )
    facts = {"sentences": len(sentences), "held_out": held, "cosine": cosine, "neighbours": neighbours, "kept": kept}
    write_json(run.folder / "results.json", facts)
    run.finish(facts)
    return TextResult(final, cosine, neighbours, held)


def distil_loss(found: Tensor, wanted: Tensor, settings: TextLossConfig) -> Tensor:
    """The loss of unit vectors (B, D) against the teacher's (B, D): 1 - cosine, and the divergence of the similarities.

    The second part is the mean Kullback-Leibler divergence of each row of softmax(found found' / t) from that of
    softmax(wanted wanted' / t), a sentence's likeness to itself left out.
    """
    loss = found.new_zeros(())
    if settings.cosine:
        loss = loss + settings.cosine * (1 - (found * wanted).sum(1)).mean()
    if settings.relations:
        own = torch.eye(len(found), dtype=torch.bool, device=found.device)
        ours, theirs = (
            (vectors @ vectors.T / settings.temperature).masked_fill(own, torch.finfo(vectors.dtype).min)
            for vectors in (found, wanted)
        )
        log_theirs = theirs.log_softmax(1)
        loss = loss + settings.relations * (log_theirs.exp() * (log_theirs - ours.log_softmax(1))).sum(1).mean()
    return loss


class _TextModule(LightningModule):
    """Only the text tower learns."""

    def __init__(self, model: Any, config: TextTrainConfig, steps: int, advance: Advance) -> None:
        super().__init__()
        self.model, self.config, self.steps, self.advance = model, config, steps, advance
        model.visual.requires_grad_(False)
        model.train()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch of token ids (B, L) and the teacher's vectors (B, D)."""
        del batch_idx
        loss = distil_loss(_embed(self.model, batch[0]), batch[1], self.config.loss)
        self.advance(1, f"loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW, its rate by the schedule of the config."""
        optimizer = make_optimizer(self.model, self.config.optim, fused=False)
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate_factor(step, self.steps, self.config.schedule)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def _embed(model: Any, tokens: Tensor) -> Tensor:
    """(B, D) unit vectors, in four parts of like length, so that little of the work is padding."""
    order, parts = split_by_length(tokens, 0, 4)
    found = torch.cat([encode_text(model, part) for part in parts])
    return F.normalize(found[order.argsort()], dim=-1)


@torch.inference_mode()
def _judge(model: Any, tokens: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Mean cosine to the teacher, and how often the nearest other sentence is the teacher's own choice."""
    found = torch.cat([_embed(model, part) for part in tokens.split(256)])
    nearest = [(vectors @ vectors.T).fill_diagonal_(-2).argmax(1) for vectors in (found, wanted)]
    return float((found * wanted).sum(1).mean()), float((nearest[0] == nearest[1]).float().mean())


def _read(config: TextTrainConfig) -> list[str]:
    """Every sentence once, in the order of the files."""
    found: dict[str, None] = {}
    for name in config.sentences:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(
                name, "cannot be read", found=error.strerror or "", todo="make it: biomedclip data sentences"
            ) from None  # fmt: skip
        except UnicodeDecodeError:
            raise DataError(name, "is not text in UTF-8") from None
        found |= dict.fromkeys(line for line in split_lines(text) if line.strip())
    return list(found)


def _width(model: Any) -> int:
    """Numbers of an embedding."""
    with torch.inference_mode():
        return int(model.encode_text(torch.zeros(1, context_length(model), dtype=torch.long)).shape[1])
