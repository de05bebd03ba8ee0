"""Prompt learning: the words around a class name become vectors that are trained (CoOp), with or without labels.

Zhou et al. 2022, section 3: a prompt is [v_1 .. v_M] class name, the v shared by all classes, trained by cross entropy
through the frozen text tower while image embeddings stay cached. Without labels the most confident zero-shot answers
on training images take their place (UPL, Huang et al. 2022). The context words are tokenized as usual and a forward
hook on the token embedding puts the vectors in their places: this works for every tower that has one, of CLIP's or
BERT's kind, and at the start gives exactly the prompt that the words stand for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from biomedclip.errors import CheckpointError, ConfigError, DataError
from biomedclip.evaluation.adapters.features import (
    Adapted,
    Choice,
    Features,
    Logits,
    Params,
    Selection,
    Vectors,
    zero_shot_logits,
)
from biomedclip.evaluation.metrics import softmax

if TYPE_CHECKING:
    import torch

Tokenizer = Callable[[list[str]], "torch.Tensor"]


def fit_prompts(
    support: Features, selection: Selection, *, model: torch.nn.Module, tokenizer: Tokenizer,
    class_names: Sequence[str], context: str = "a photo of a", epochs: int = 50, learning_rate: float = 2e-3,
    batch_size: int = 32, seed: int = 0, logit_scale: float = 100.0, device: str = "cpu", **_: Any,
) -> Adapted:  # fmt: skip
    """CoOp with `context` as the start of the learnt vectors; the epoch is chosen, 0 being the words themselves.

    Only the vectors are trained: the model is as before afterwards. Raises ConfigError for a context that the
    tokenizer does not keep apart from the class name, DataError where names and classes differ in number.
    """
    if len(class_names) != support.num_classes:
        raise DataError(support.split, f"has {support.num_classes} classes", found=f"{len(class_names)} names")
    facts = (model, tokenizer, class_names, context, epochs, learning_rate, batch_size, seed, logit_scale, device)

    def candidates(train: Features, held_out: Features) -> Iterator[tuple[Params, Logits]]:
        for epoch, weights in enumerate(train_context(train, *facts)):
            yield {"epoch": epoch}, zero_shot_logits(held_out.vectors, weights, logit_scale)

    choice = selection.choose(support, candidates)
    last = choice.hparams["epoch"]
    chosen = next(weights for epoch, weights in enumerate(train_context(support, *facts)) if epoch == last)
    return Adapted(method="coop", logits=lambda v: zero_shot_logits(v, chosen, logit_scale), choice=choice)


def fit_pseudo_labels(
    unlabelled: Features, selection: Selection, *, text: Vectors, per_class: int = 16, logit_scale: float = 100.0,
    **facts: Any,
) -> Adapted:  # fmt: skip
    """CoOp on the zero-shot classifier's most confident answers; the labels of `unlabelled` are not looked at.

    Raises ConfigError for images of the split that is scored, unless the selection allows it: fitting to them, even
    without labels, is fitting to the test set.
    """
    touches_test = unlabelled.split == selection.scored_split
    if touches_test and not selection.allow_test:
        raise ConfigError("unlabelled", f"are images of the split that is scored ('{unlabelled.split}')",
                          todo="use training images, or allow_test, which tags the result")  # fmt: skip
    rows, labels = pseudo_label(zero_shot_logits(unlabelled.vectors, text, logit_scale), per_class)
    support = Features(vectors=unlabelled.vectors[rows], y=labels, num_classes=unlabelled.num_classes,
                       split=unlabelled.split)  # fmt: skip
    adapted = fit_prompts(support, selection, logit_scale=logit_scale, **facts)
    choice = adapted.choice
    if touches_test:
        choice = Choice(hparams=choice.hparams, split=choice.split, on_test=True, metric=choice.metric,
                        score=choice.score, table=choice.table)  # fmt: skip
    return Adapted(method="pseudo_labels", logits=adapted.logits, choice=choice)


def pseudo_label(logits: Logits, per_class: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and labels of the `per_class` most confident samples of each predicted class, by class; fewer where fewer
    are predicted. The same number of each class, so that a class the model is fond of does not take over."""
    p = softmax(logits)
    guess, sure = p.argmax(1), p.max(1)
    rows = [
        own[np.argsort(-sure[own], kind="stable")[:per_class]]
        for own in (np.flatnonzero(guess == c) for c in range(p.shape[1]))
    ]
    chosen = np.concatenate(rows)
    return chosen, guess[chosen]


def train_context(
    support: Features, model: torch.nn.Module, tokenizer: Tokenizer, class_names: Sequence[str], context: str,
    epochs: int, learning_rate: float, batch_size: int, seed: int, logit_scale: float, device: str,
) -> Iterator[Vectors]:  # fmt: skip
    """Class weights (C, D) before training, and after each epoch."""
    import torch

    tokens, length = _tokenize(tokenizer, class_names, context)
    tokens = tokens.to(device)
    table = token_embedding(model)
    with torch.no_grad():
        start = table(tokens[:1, 1 : 1 + length])[0]
    vectors = torch.nn.Parameter(start.clone().float())
    images, labels = torch.tensor(support.vectors).to(device), torch.tensor(support.y).to(device)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD([vectors], lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    with _frozen(model):
        with torch.no_grad():
            yield encode_with_context(model, table, tokens, vectors).cpu().numpy()
        for _ in range(epochs):
            for rows in torch.randperm(len(labels), generator=draw).split(batch_size):
                weights = encode_with_context(model, table, tokens, vectors)
                loss = torch.nn.functional.cross_entropy(logit_scale * images[rows] @ weights.T, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
            with torch.no_grad():
                yield encode_with_context(model, table, tokens, vectors).cpu().numpy()


def encode_with_context(
    model: torch.nn.Module, table: torch.nn.Module, tokens: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """(C, D) unit text embeddings of the tokens, positions 1 to M holding `vectors` (M, width)."""
    import torch

    def replace(_module: Any, _args: Any, embedded: torch.Tensor) -> torch.Tensor:
        middle = vectors.to(embedded.dtype).expand(len(embedded), -1, -1)
        return torch.cat([embedded[:, :1], middle, embedded[:, 1 + len(vectors) :]], dim=1)

    hook = table.register_forward_hook(replace)
    try:
        return torch.nn.functional.normalize(model.encode_text(tokens).float(), dim=-1)  # type: ignore[operator]
    finally:
        hook.remove()


def token_embedding(model: torch.nn.Module) -> torch.nn.Module:
    """The module that turns token ids into vectors. Raises CheckpointError for a text tower without one."""
    for owner in (model, getattr(model, "text", None)):
        found = getattr(owner, "token_embedding", None)
        if found is not None:
            return found
        find = getattr(getattr(owner, "transformer", None), "get_input_embeddings", None)
        if find is not None:
            return find()
    raise CheckpointError(type(model).__name__, "has no token embedding in its text tower",
                          todo="prompt learning needs a tower of CLIP's or BERT's kind")  # fmt: skip


def _tokenize(tokenizer: Tokenizer, class_names: Sequence[str], context: str) -> tuple[torch.Tensor, int]:
    """Tokens (C, L) of "context name." and the number of tokens of the context."""
    empty, words = tokenizer(["", context])
    end = int(empty[1])
    length = int((words == end).nonzero()[0]) - 1 if bool((words == end).any()) else 0
    if length < 1 or length + 2 >= len(words):
        raise ConfigError("context", "must hold words that the tokenizer knows and fit its length", found=repr(context))
    tokens = tokenizer([f"{context} {name}." for name in class_names])
    if not bool((tokens[:, 1 : 1 + length] == words[1 : 1 + length]).all()):
        raise ConfigError("context", "runs into the class name when tokenized", found=repr(context),
                          todo="end it with a whole word")  # fmt: skip
    return tokens, length


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """No gradients of weights, no dropout; afterwards as before."""
    was_training, wanted = model.training, [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(was_training)
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
