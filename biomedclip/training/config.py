"""A training run as data: what `configs/train/*.yaml` may hold. Imports no torch.

One file is one run: the model it starts from, the mixture it reads, how long, with what optimiser and objective, and
what it writes. All numbers a run depends on are here, so two runs of one resolved config on one machine are the same.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from biomedclip.config import Config
from biomedclip.stream.captions import CaptionMix
from biomedclip.stream.fetch import FetchConfig
from biomedclip.stream.metaclip import KeepConfig
from biomedclip.stream.pipes import is_unindexed
from biomedclip.stream.presets import Augmentation, resolve_setting
from biomedclip.training.continual.config import ContinualConfig, GuardConfig, ProbeConfig

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class PreprocessConfig(Config):
    """Entries of the model's preprocessing to change; None keeps the model's own. Stored with the trained weights."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None


class ModelConfig(Config):
    """Where training starts."""

    name: str
    """Whatever `biomedclip.load` accepts: a run folder, `ViT-B-32/openai`, or an architecture with `init: random`."""
    init: Literal["pretrained", "random"] = "pretrained"
    image_weights: str | None = None
    """A weights file of the image tower's backbone, trained elsewhere: fills the trunk, not the projection."""
    text_tower: str | None = None
    """A model whose text tower is taken over: the folder of a `task: text` run, or whatever `biomedclip.load` takes."""
    init_logit_scale: Positive | None = None
    """The logit scale to start from; None keeps the model's own (1 / 0.07 for a random start)."""
    context_length: Count | None = None
    """Tokens of a caption; None keeps the model's own. More than it has stretches CLIP's positions as Long-CLIP does
    (77 to 248: the first 20 stay); BERT-family towers read up to their 512."""
    preprocess: PreprocessConfig = PreprocessConfig()


def _check_weight(weight: float | dict[int, float]) -> float | dict[int, float]:
    values = list(weight.values()) if isinstance(weight, dict) else [weight]
    if not values or min(values) < 0 or max(values) <= 0:
        raise ValueError("should be above 0, or steps with weights of at least 0 of which one is above")
    return weight


class SourceConfig(Config):
    """One source of the mixture."""

    name: str
    path: str = ""
    """A dataset folder of ours, here or at `https://`, `hf://datasets/…` or `s3://…`; or foreign WebDataset tars, here
    or there: `/data/{00000..00099}.tar`, `/data/*.tar`."""
    shards: tuple[str, ...] = ()
    """Foreign WebDataset tars as a list, instead of `path`."""
    allow_pipe: bool = False
    """Run the commands of `pipe:` addresses in a shell. Their tars, standard input (`-`) and `sftp:`, `ftps:`, `scp:`,
    `gs:`, `htgs:` and `ais:` have no index: no exact resume, and of this source's settings only weight and augmentation
    apply."""
    article_key: str | None = None
    """Foreign tars: the key of a sample's json that names its article, so that a batch holds one figure of each."""
    article_pattern: str | None = None
    """Foreign tars: a regular expression that finds the article in a sample's key."""
    weight: Annotated[float | dict[int, float], AfterValidator(_check_weight)] = 1.0
    """Share of every batch, relative to the other sources; or step -> weight, with straight lines between the points:
    `{0: 1, 1000: 0.5}` goes from 1 to 0.5 over 1,000 steps and stays there, `{999: 1, 1000: 0}` stops at step 1,000."""
    split: Literal["train", "val", "test"] = "train"
    where: str | None = None
    """An SQL condition over the index: `licence in ('CC0', 'CC BY') and modality = 'CT'`; `article.published >= '2020'`
    asks the facts of the sample's article."""
    caps: dict[Literal["label", "concept"], Count] = Field(default_factory=dict)
    """The most samples of each label or concept that an epoch takes, as `{label: 5000}`: other ones each epoch."""
    keep: KeepConfig | None = None
    """How often an epoch keeps a sample, by what its caption says: `{metaclip: {entries: e.parquet, tail: 0.06}}`."""
    balance: bool | Literal["weights"] = False
    """True gives each class (first label) of the source the same share; `weights` uses the class weights that the
    data set's recipe asked for when it was compiled."""
    captions: CaptionMix | None = None
    """How often each kind of text is read: `{original: 0.5, rewrite: 0.3, mention: 0.1, panel: 0.1}`; kinds that a
    sample lacks leave their share to the others. By default one of the captions, each as likely."""
    augmentation: Annotated[str | Augmentation, AfterValidator(resolve_setting)] = "auto"
    """auto (by each sample's modality), a preset (`biomedclip data augmentations` shows them), a .yaml file, or the
    settings themselves: `{like: radiology, turn_deg: 4}`. A run records what a file said."""

    @model_validator(mode="after")
    def _says_where(self) -> SourceConfig:
        if bool(self.path) == bool(self.shards):
            raise ValueError("needs either path or shards")
        if self.is_unindexed:
            kept = {"name", "path", "shards", "allow_pipe", "weight", "augmentation"}
            if wrong := sorted(self.model_fields_set - kept):
                raise ValueError(f"has no index ({self.addresses[0]}), so {', '.join(wrong)} cannot be asked of it")
            if isinstance(self.weight, dict):
                raise ValueError(f"has no index ({self.addresses[0]}), so its weight is one number")
        return self

    @property
    def addresses(self) -> tuple[str, ...]:
        """`path` or `shards`."""
        return self.shards or (self.path,)

    @property
    def is_unindexed(self) -> bool:
        """Whether its tars can only be read from their beginning, by webdataset."""
        return any(map(is_unindexed, self.addresses))


class DataConfig(Config):
    """What is read."""

    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    size_exponent: Share = 0.0
    """Sources count by weight times number of samples to this power: 0 by weight alone, 1 in proportion to size."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Reading processes; 0 reads in the training process, which is best on few cores."""
    max_bad: Share = 0.05
    """Stop when more than this share of the samples cannot be read."""
    cache_mb: Annotated[int, Field(ge=0)] = 256
    """Reduced pictures kept in memory by each reading process."""
    fetch: FetchConfig = FetchConfig()
    """How sources at URLs are read; changes nothing of what is learnt."""

    @field_validator("sources")
    @classmethod
    def _names_differ(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        names = [source.name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError("two sources have the same name")
        if all(source.is_unindexed for source in sources):
            raise ValueError("needs one source that can be indexed (a folder, or tars here or at https://, s3:// or hf://)"
                             " beside those that cannot")  # fmt: skip
        return sources

    def planned(self, batch_size: int) -> int:
        """Samples of a batch that the plan deals; unindexed sources make up the rest, by weight, at least one."""
        first = {False: 0.0, True: 0.0}
        for source in self.sources:
            weight = source.weight
            first[source.is_unindexed] += weight[min(weight)] if isinstance(weight, dict) else weight
        if not first[True]:
            return batch_size
        share = first[True] / (first[True] + first[False])
        return min(max(batch_size - max(round(batch_size * share), 1), 1), batch_size - 1)


class OptimConfig(Config):
    """AdamW; weights of matrices and kernels decay, vectors and scalars (norms, biases, logit scale) do not."""

    lr: Positive = 5e-4
    weight_decay: NotNegative = 0.2
    betas: tuple[Share, Share] = (0.9, 0.98)
    eps: Positive = 1e-6
    clip_norm: Positive | None = 1.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the rate from one block to the one below it; 0.7 to 0.9 keeps what the lower blocks know."""


class ScheduleConfig(Config):
    """Linear warm-up from zero, then a half cosine to `final_ratio` of the rate at `max_steps`; or constant."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_ratio: Share = 0.0


class StageConfig(Config):
    """A part of the run with smaller pictures."""

    until_step: Count
    size_px: Count


class TowersConfig(Config):
    """What of the towers is trained, and at what cost."""

    lock_image: Annotated[int, Field(ge=0)] | None = None
    """Locked image tower (LiT) but for its last so many groups; None: not locked."""
    lock_text: Annotated[int, Field(ge=0)] | None = None
    """Locked text tower but for its last so many layers; None: not locked."""
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the patches that each picture leaves out in training (FLIP); finish with a run without it."""
    stages: tuple[StageConfig, ...] = ()
    """Smaller pictures at first: `[{until_step: 8000, size_px: 112}]`; then the model's own size."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more time, a fraction of the memory."""
    compile: bool = False
    """Compile the towers with torch.compile; the first steps take minutes."""
    freeze_positions: Annotated[int, Field(ge=0)] = 0
    """The first so many text positions stay as they are: 20 in Long-CLIP, which trains only those that it stretched."""
    text_buckets: Count = 2
    """Parts by length that the texts of a batch go through the tower in, padded each to its own longest; same loss."""

    @model_validator(mode="after")
    def _stages_follow(self) -> TowersConfig:
        steps = [stage.until_step for stage in self.stages]
        if steps != sorted(set(steps)):
            raise ValueError(f"stages must end one after the other (found until_step {steps})")
        return self


class ShortCaptionsConfig(Config):
    """Long-CLIP's second loss: the first sentence of each caption against the images' primary components."""

    weight: Positive = 1.0
    """Beside the loss of the whole captions; the authors' code adds both as they are."""
    components: Count = 32
    """Principal components of the batch that the images keep (the authors' number)."""


class LossConfig(Config):
    """The contrastive loss, and what to do about pairs that are no true negatives."""

    name: Literal["clip", "siglip", "infoloob", "alip"] = "clip"
    """clip: softmax over the batch, both ways. siglip: a yes or no for each pair; the model needs a logit bias.
    infoloob: clip without the own pair in the sum, CLOOB's loss. alip: clip with samples weighted by how well their
    two captions agree."""
    hopfield_beta: Positive | None = None
    """infoloob: retrieve embeddings from the batch first, as CLOOB does (8 to 14.3 there)."""
    soft_targets: Share = 0.0
    """How far targets follow label overlap: 0 is plain CLIP, 1 shares the target fully among equal labels."""
    same_article: Literal["negative", "ignore"] = "negative"
    """Whether two figures of one article are negatives of each other; pairs that share a soft target never are."""
    same_caption: Literal["negative", "ignore"] = "negative"
    """Whether two samples with the same caption are negatives of each other."""
    max_logit_scale: Positive = 100.0
    learn_logit_scale: bool = True
    """Whether the logit scale is trained; CLOOB keeps it at 30."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """clip: share of the target that is spread evenly over the batch (0.1 in Long-CLIP)."""
    short_captions: ShortCaptionsConfig | None = None
    """clip: also match the first sentence of each caption, to what is coarse in the images (Long-CLIP)."""
    tile: Annotated[int, Field(ge=0)] = 0
    """Side of the tiles that the loss is computed in: memory grows with it, the value does not. 0: by device."""

    @property
    def second_captions(self) -> Literal["other", "first_sentence"] | None:
        """Which second text of a sample the objective needs."""
        return "other" if self.name == "alip" else "first_sentence" if self.short_captions else None

    @model_validator(mode="after")
    def _fits_together(self) -> LossConfig:
        if self.hopfield_beta and self.name != "infoloob":
            raise ValueError("hopfield_beta needs name: infoloob")
        for wanted in ("label_smoothing", "short_captions"):
            if getattr(self, wanted) and self.name != "clip":
                raise ValueError(f"{wanted} needs name: clip")
        if self.label_smoothing and (self.soft_targets or "ignore" in (self.same_article, self.same_caption)):
            raise ValueError("label_smoothing spreads the target over all pairs, so it goes with none of soft_targets, "
                             "same_article: ignore and same_caption: ignore")  # fmt: skip
        return self


class CheckpointConfig(Config):
    """When the run is saved. The last step is always saved, and SIGTERM saves before it ends the run."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """0: not by steps."""
    every_minutes: NotNegative = 10.0
    """0: not by time."""
    keep_last: Count = 2
    best: str | None = None
    """Also keep the checkpoint with the best value of this column of metrics.csv, such as
    `val_image_to_text/recall@1`; `-val_loss` takes the lowest. Saved at each validation."""


class ValidationConfig(Config):
    """Loss and retrieval on the `val` split of the sources that have one, and probes: tasks of the evaluator."""

    every_steps: Annotated[int, Field(ge=0)] = 0
    """0: never; probes are asked at step 0 and at the last step all the same."""
    max_samples: Count = 512
    probes: tuple[ProbeConfig, ...] = ()
    """What the model is asked while it trains; the answers are in validation.jsonl."""
    wise_alphas: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = ()
    """Points between the starting weights (0) and the present ones (1) that the probes are asked at too (WiSE-FT)."""


class TrainConfig(Config):
    """One training run."""

    model: ModelConfig
    data: DataConfig
    max_steps: Count
    batch_size: Annotated[int, Field(ge=2)] = 64
    """Samples of a step, over all processes."""
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    micro_batch_size: Annotated[int, Field(ge=0)] = 0
    """Samples that a process embeds at a time; 0: all of its share. The loss sees the whole batch either way, and the
    gradients are the same: memory falls, time rises by a third."""
    towers: TowersConfig = TowersConfig()
    continual: ContinualConfig | None = None
    """Methods against forgetting what the model knew: see docs/training.md."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    """Memory layout of images; twice as fast for convolutional towers on CPU and on tensor cores."""
    seed: Annotated[int, Field(ge=0)] = 0
    device: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Count = 1
    """Processes of this machine that train together, one a device."""
    num_nodes: Count = 1
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp"] = "auto"
    """How several processes share the work. auto: ddp. fsdp also shares weights, gradients and the optimizer's state,
    for models that do not fit on one device."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of torch; 0: one for each core the process may use."""
    log_every_steps: Count = 10
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where the rows of metrics.csv also go."""
    checkpoints: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    guard: GuardConfig | None = None
    """What happens to a step whose loss is a spike; None: nothing."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> TrainConfig:
        if self.schedule.warmup_steps >= self.max_steps:
            raise ValueError(f"schedule.warmup_steps must be less than max_steps {self.max_steps}")
        processes = self.devices * self.num_nodes
        if self.batch_size % processes:
            raise ValueError(f"batch_size must be a multiple of the {processes} processes (found {self.batch_size})")
        refused = (self.towers.stages, self.towers.freeze_positions, self.precision == "fp16")
        if self.strategy == "fsdp" and any(refused):
            # A stage and a frozen row need a whole table of positions, of which each process has a part.
            raise ValueError(
                "fsdp goes with none of towers.stages, towers.freeze_positions and precision fp16; take ddp, or bf16"
            )
        if self.strategy == "fsdp" and self.micro_batch_size:
            # Seen with two processes on torch 2.15: one gathers a block's weights ahead, the other reduces gradients.
            raise ValueError(
                "fsdp does not go with micro_batch_size: embedding a part twice, once without gradients, leaves the "
                "processes gathering weights in different orders, and they wait for each other; take ddp, or "
                "towers.gradient_checkpointing"
            )
        return self

    @model_validator(mode="after")
    def _second_captions_are_read(self) -> TrainConfig:
        bare = [source.name for source in self.data.sources if source.is_unindexed]
        if self.loss.second_captions and bare:
            asks = "alip" if self.loss.name == "alip" else "short_captions"
            raise ValueError(f"loss {asks} reads two texts of a sample, and source {bare[0]} without an index has one")
        return self

    @model_validator(mode="after")
    def _weights_are_whole(self) -> TrainConfig:
        wanted = self.continual is not None and self.continual.needs_whole_weights
        if self.strategy == "fsdp" and (wanted or self.validation.probes or self.guard):
            raise ValueError(
                "fsdp leaves no process with all weights, as probes, guard, l2_sp, ewc, ema and ensemble need; take ddp"
            )
        return self
