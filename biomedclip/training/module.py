"""One step of contrastive training as a LightningModule: batch to loss, gradients, optimiser and schedule.

Reads the batches of `biomedclip.stream` (uint8 images, normalised here on the device); embeds them, takes the objective
and the terms of continual learning on `StepTensors`, and steps. The model inside is a plain open_clip model, so it can
be exported at any step. Optimisation is manual, one path for whole batches and for parts (`micro_batch_size`). The
number of steps comes from the config: asking the Trainer for it (`estimated_stepping_batches`) makes Lightning load the
data before the state of the loader is restored, and a resumed run silently starts its data at the beginning.

Dropout and patch dropout draw from a seed made of the run's seed, the step, the process and the part: nothing of it
need be stored, a second pass over a part repeats the first, and a run resumed on other machines stays defined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from biomedclip.errors import ConfigError
from biomedclip.stream.plan import draw_int
from biomedclip.training.config import TrainConfig
from biomedclip.training.gather import rank, world_size
from biomedclip.training.gradient_cache import Embeddings, cached_backward
from biomedclip.training.objectives.objective import Objective
from biomedclip.training.objectives.softmax import at_least_float32
from biomedclip.training.optim import make_optimizer, rate_factor
from biomedclip.training.pair_validation import score_pairs
from biomedclip.training.terms import Continual, StepTensors
from biomedclip.training.towers import (
    encode_image,
    encode_text,
    frozen_positions,
    set_up_towers,
    split_by_length,
    text_padding,
)

Batch = dict[str, Any]


class ContrastiveModule(LightningModule):
    """Trains an open_clip model. `latest` holds the numbers of the last step, for callbacks to log."""

    # Buffers of the normalisation, named for the type checker.
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, config: TrainConfig, continual: Continual | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.config = model, config
        # Not a module of this one: neither optimizer, EMA nor checkpoint may see the teacher.
        self._continual = [continual or Continual()]
        self.objective = Objective(config.loss)
        set_up_towers(model, config.towers)
        # In a list: a parameter of the model must not have a second name in checkpoints.
        self._positions = [frozen_positions(model, config.towers.freeze_positions)]
        self._choose_scalars()
        if config.channels_last:
            model.visual.to(memory_format=torch.channels_last)  # type: ignore[call-overload, union-attr]
        visual: Any = model.visual
        facts = visual.preprocess_cfg
        self.register_buffer("mean", 255 * torch.tensor(facts["mean"]).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(facts["std"]).view(-1, 1, 1), persistent=False)
        self.padding = None if config.towers.compile else text_padding(model)
        self.latest: dict[str, Any] = {}
        self._validation: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms beside the objective."""
        return tuple(term.name for term in self._continual[0].terms)

    def _choose_scalars(self) -> None:
        """A parameter without a gradient would make several processes wait for it forever."""
        model: Any = self.model
        model.logit_scale.requires_grad_(self.config.loss.learn_logit_scale)
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias.requires_grad_(self.config.loss.name == "siglip")

    def configure_model(self) -> None:
        """Shard the model over the processes (fsdp) and compile its towers, where the config says so."""
        if self.config.strategy == "fsdp" and not getattr(self, "_sharded", False):
            from biomedclip.training.sharding import shard_model

            shard_model(self.model, self.device_mesh)  # type: ignore[arg-type]
            self._sharded = True
        if self.config.towers.compile:
            model: Any = self.model
            model.visual.compile()
            (model.text if hasattr(model, "text") else model.transformer).compile()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Embed, take the loss, leave gradients, step. The numbers of the step are in `latest`."""
        optimizer: Any = self.optimizers()
        self.latest = {}
        parts = self._parts(batch)
        if len(parts) == 1:
            self._backward(self._embed_part(0, batch), batch)
        else:
            cached_backward(
                parts, self._embed_part, lambda embedded: self._backward(embedded, batch),
                exchange=self._exchange, backward_part=self._backward_part,
            )  # fmt: skip
        self._exchange_scalars()
        with self._held_positions():
            optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self._clamp_scale()

    @contextmanager
    def _held_positions(self) -> Iterator[None]:
        """Puts the frozen rows of the text positions back after a step: weight decay moves rows without a gradient."""
        table, count = self._positions[0], self.config.towers.freeze_positions
        before = None if table is None else table.detach()[:count].clone()
        yield
        if table is not None and before is not None:
            with torch.no_grad():
                table[:count] = before

    def _parts(self, batch: Batch) -> list[Batch]:
        size, count = self.config.micro_batch_size, len(batch["image"])
        if not size or size >= count:
            return [batch]
        names = [name for name in ("image", "text", "second_text") if name in batch]
        return [{name: batch[name][first : first + size] for name in names} for first in range(0, count, size)]

    def _embed_part(self, number: int, batch: Batch) -> Embeddings:
        torch.manual_seed(draw_int(self.config.seed, "dropout", self.global_step, rank(), number) >> 1)
        texts = [batch[name] for name in ("text", "second_text") if name in batch]
        with self._precision():
            image = self._embed_images(batch["image"])
            text = self._embed_texts(torch.cat(texts))
        return (image, *text.split(len(image)))

    def _backward(self, embedded: Embeddings, batch: Batch) -> None:
        with self._precision():
            loss = self._loss(embedded, batch)
        self.manual_backward(loss)

    def _loss(self, embedded: Embeddings, batch: Batch) -> Tensor:
        """Objective plus weighted terms; what it is made of goes to `latest`."""
        step = self._step_tensors(embedded, batch)
        objective, samples = self.objective(step)
        self.latest |= {"logit_scale": step.logit_scale.detach(), "sample_losses": samples}
        self.latest["sources"] = batch.get("source", [])
        loss = objective
        for term in self._continual[0].terms:
            value = term(step)
            self.latest[f"loss/{term.name}"] = value.detach()
            loss = loss + term.weight * value
        self.latest["loss"] = loss.detach()
        return loss

    def _step_tensors(self, embedded: Embeddings, batch: Batch) -> StepTensors:
        model: Any = self.model
        terms, teacher = self._continual[0].terms, self._continual[0].teacher
        taught: tuple[Tensor | None, Tensor | None] = (None, None)
        if teacher is not None and any(term.needs_teacher for term in terms):
            taught = teacher.embed(self.normalise(batch["image"]), batch["text"])
        bias = getattr(model, "logit_bias", None)
        return StepTensors(
            image=embedded[0], text=embedded[1], second_text=embedded[2] if len(embedded) > 2 else None,
            logit_scale=self.logit_scale, logit_bias=None if bias is None else bias.reshape(()),
            teacher_image=taught[0], teacher_text=taught[1], batch=batch, model=model, normalise=self.normalise,
            step=self.global_step,
        )  # fmt: skip

    def _backward_part(self, surrogate: Tensor, last: bool) -> None:
        """Backward of a part, never scaled: its gradient comes from the loss, which was."""
        if last:
            # What got its gradient with the loss alone takes part here with none, so that it is exchanged as well.
            for parameter in self._scalars():
                surrogate = surrogate + 0.0 * parameter.sum()
            self.trainer.strategy.pre_backward(surrogate)
        surrogate.backward()

    def _exchange(self, wanted: bool) -> AbstractContextManager[object]:
        """A context in which gradients stay in this process, unless their exchange is wanted."""
        strategy: Any = self.trainer.strategy
        if wanted or world_size() == 1:
            return nullcontext()
        blocked: AbstractContextManager[object] = strategy.block_backward_sync()
        return blocked

    def _exchange_scalars(self) -> None:
        """Sharded training leaves scalars whole, so their gradients are averaged here."""
        if self.config.strategy == "fsdp" and world_size() > 1:
            for parameter in self._scalars():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= world_size()

    def _scalars(self) -> list[nn.Parameter]:
        model: Any = self.model
        scalars = (model.logit_scale, getattr(model, "logit_bias", None))
        return [parameter for parameter in scalars if parameter is not None and parameter.requires_grad]

    def _precision(self) -> AbstractContextManager[object]:
        """The autocast of the run: the loop enters it around a step, validation and tests may not."""
        return self.trainer.precision_plugin.forward_context() if self._trainer is not None else nullcontext()

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 pixels (N, 3, H, W) as the image tower takes them."""
        normal = (pixels.to(self.mean.dtype) - self.mean) / self.std
        return normal.contiguous(memory_format=torch.channels_last) if self.config.channels_last else normal

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit embeddings (B, D) of a batch's images and texts, in float32."""
        return self._embed_images(batch["image"]), self._embed_texts(batch["text"])

    def _embed_images(self, pixels: Tensor) -> Tensor:
        return _unit(encode_image(self.model, self.normalise(pixels), self._size_px() if self.training else None))

    def _embed_texts(self, tokens: Tensor) -> Tensor:
        # Captions compiled from labels repeat within a batch: each different one goes through the tower once.
        texts, place = torch.unique(tokens, dim=0, return_inverse=True)
        if self.padding is None:
            return _unit(encode_text(self.model, texts))[place]
        # Every process of sharded training must call a tower as often as the others do.
        count = 1 if self.config.strategy == "fsdp" else self.config.towers.text_buckets
        order, parts = split_by_length(texts, self.padding, count)
        embedded = _unit(torch.cat([encode_text(self.model, part) for part in parts]))
        return embedded[torch.argsort(order)[place]]

    def _size_px(self) -> int | None:
        """Picture size of this step's stage; None for the model's own."""
        stages = self.config.towers.stages
        return next((stage.size_px for stage in stages if self.global_step < stage.until_step), None)

    @property
    def logit_scale(self) -> Tensor:
        """The factor of the cosine similarities (exponentiated), a scalar."""
        parameter: Any = self.model.logit_scale
        return parameter.exp().reshape(())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps the embeddings of a validation batch until the last one is in."""
        self._validation.append((batch["number"], *self.embed(batch)))

    def on_validation_epoch_end(self) -> None:
        """Adds the loss and recall@1 over the validation pairs of all processes to `latest`."""
        if self._validation:
            numbers, image, text = (torch.cat(parts) for parts in zip(*self._validation, strict=True))
            self._validation.clear()
            self.latest |= score_pairs(numbers, image, text, self.logit_scale)

    def configure_optimizers(self) -> Any:
        """AdamW over decaying and not decaying parameters, its rate set at every step."""
        # A fused step would unscale fp16 gradients itself, after they were clipped.
        fused = self.config.precision != "fp16" and self.config.strategy != "fsdp"
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigError("towers", "both towers are locked: nothing is trained", todo="unlock one")
        optimizer = make_optimizer(self.model, self.config.optim, fused=fused)
        steps, schedule = self.config.max_steps, self.config.schedule
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clips the global norm as the config says and keeps the norm before clipping for the log."""
        if (table := self._positions[0]) is not None and table.grad is not None:
            table.grad[: self.config.towers.freeze_positions] = 0  # rows that stay count for nothing in the norm
        limit = self.config.optim.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.latest["grad_norm"] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _clamp_scale(self) -> None:
        """Keeps the logit scale within [1, max_logit_scale], as CLIP does (Radford et al. 2021, section 2.5)."""
        with torch.no_grad():
            parameter: Any = self.model.logit_scale
            parameter.clamp_(0, math.log(self.config.loss.max_logit_scale))


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(at_least_float32(embeddings), dim=1)
