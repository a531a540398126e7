"""What contextual models share (section 3.1): stages with a classification between them, whichever the backbone.

    stem -> stage 1 -> classify, merge -> stage 2 -> classify, merge -> ... -> stage 4 -> classify

The interface is timm's, with three differences that follow from it. The classes are part of the backbone: a model
without a classifier (`num_classes=0`, `features_only`) keeps the class table, as its features depend on it. What comes
before the classifier is the projection to the class embeddings, so `forward_head(pre_logits=True)` is (B, E).
Stages cannot be called one by one: intermediate features come from `forward_intermediates`, never from hooks or
from the model taken apart.

Shapes: B images, N classes, k classes of a shortlist, E embedding size, D context size (E in the
paper), C channels of a stage.
"""

from collections.abc import Iterable, Sequence

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from contextual_cnn.contracts import STAGES, StagedScores
from contextual_cnn.models.class_context import (
    ClassEmbeddings,
    Merging,
    Projection,
    check_class_counts,
    default_class_counts,
    initialize,
    scale_class_counts,
)
from contextual_cnn.models.context_options import ContextOptions
from contextual_cnn.models.valid_mean import GlobalMean, ValidMean, ValidPart


class ContextualBlock(nn.Module):
    """A block of a backbone that takes a context besides the features; otherwise the plain block, names included."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, D) -> (B, C', H', W')."""
        raise NotImplementedError


class ContextualModel(nn.Module):
    """A backbone of four stages in which the likely classes after each modulate the convolutions of the next.

    A subclass sets up the backbone's layers under their plain names and tells them by `forward_stem` and
    `stage_blocks`.

    Attributes:
        frames: of a clip, which follow one another in a batch; 1 for images.

    Args:
        feature_info: timm's, of what `forward_intermediates` gives: the stages' maps, before them the stem's or not.
        in_chans: channels of the images.
        num_classes: N1; 0 is a model without a classifier.
        context_classes: N1 where num_classes is 0.
        drop_rate: dropout before the last stage's projection.
        convolved: input channels of each stage's contextual convolutions; None is the channels of its map.

    Raises:
        ClassCountError: class counts that do not fit num_classes.
    """

    def __init__(
        self,
        feature_info: Sequence[dict],
        options: ContextOptions,
        *,
        in_chans: int,
        num_classes: int,
        context_classes: int,
        drop_rate: float,
        convolved: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.feature_info, self.in_chans, self.num_classes = list(feature_info), in_chans, num_classes
        classes, counts = num_classes or context_classes, options.class_counts
        self.class_counts = tuple(counts) if counts is not None else default_class_counts(classes)
        check_class_counts(classes, self.class_counts)
        self.selection, self.contextual_stages = options.selection, tuple(options.contextual_stages)
        self.merge, self.context_of = options.merge, options.context_of
        channels, width = [info["num_chs"] for info in feature_info[-STAGES:]], options.embedding_dim
        convolved = convolved or channels
        hidden = convolved if options.context_layers == "released" else channels
        # Keyed by the stage that they follow or precede
        self.projections = nn.ModuleDict(
            {
                str(i): Projection(channels[i - 1], width, options.projection_norm, hidden[i - 1])
                for i in self.classified_stages
            }
        )
        self.mergings = nn.ModuleDict(
            {
                str(i): Merging(width, options.context_norm, options.context_dim(convolved[i - 1]))
                for i in self.contextual_stages
            }
        )
        for steps in (self.projections, self.mergings):
            initialize(steps, options.context_init)
        self.class_embeddings = ClassEmbeddings(classes, width)
        self.head_drop = nn.Dropout(drop_rate)
        self.num_features, self.head_hidden_size = channels[-1], width
        self.global_pool = "avg"
        self.grad_checkpointing = False
        self.frames = 1

    def forward_stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> what stage 1 takes."""
        raise NotImplementedError

    def stage_blocks(self) -> Sequence[Iterable[nn.Module]]:
        """The modules of each stage, to be called one after the other; those that are ContextualBlocks with context."""
        raise NotImplementedError

    def keep_stages(self, count: int) -> None:
        """Removes the modules of the later stages; `stage_blocks` gives nothing, or empty stages, for them."""
        raise NotImplementedError

    @property
    def classified_stages(self) -> tuple[int, ...]:
        """The stage that each classification follows: those before a contextual stage, and the last."""
        return (*(stage - 1 for stage in self.contextual_stages if stage > 1), STAGES)

    @property
    def shortlist_sizes(self) -> dict[int, int]:
        """k of each classification but the last, by the stage that it follows."""
        return {stage: self.class_counts[stage - 1] for stage in self.classified_stages[:-1]}

    def forward(self, images: Tensor, staged: bool | None = None, told: Tensor | None = None) -> StagedScores | Tensor:
        """(B, 3, H, W) -> the scores of every stage in training; dense (B, N) logits in eval, as any timm model.

        Without a classifier: what `forward_head` gives, in both modes.

        Args:
            staged: True or False to choose regardless of the mode.
            told: (B,) true classes, -1 where unknown; only a model of context_of="told" looks at them.
        """
        if not self.num_classes:
            return self.forward_head(self.forward_features(images))
        scores = self.forward_stages(images, told)
        return scores if (self.training if staged is None else staged) else scores.logits[-1]

    def forward_stages(self, images: Tensor, told: Tensor | None = None) -> StagedScores:
        """(B, 3, H, W) -> logits of all classifications and the model's own shortlists after all but the last."""
        maps, logits, shortlists = self._run(images, told=told)
        last = self._select(self.forward_head(maps[-1]), shortlists)
        return StagedScores((*logits, last), tuple(shortlists), self.classified_stages)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/32, W/32), the map that the last stage classifies."""
        return self._run(images)[0][-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H/32, W/32) -> (B, N) logits of all classes; with selection "reduce" too, as a map has no shortlist.

        Args:
            pre_logits: the (B, E) vectors that are compared with the class embeddings; so too without a classifier.
        """
        if not self.global_pool:
            return x
        projected = self.projections[str(STAGES)](self.head_drop(x))
        return projected if pre_logits or not self.num_classes else self.class_embeddings(projected)

    def forward_staged_maps(self, images: Tensor) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """(B, 3, H, W) -> the maps of the four stages, and the (B, N) logits of all classifications."""
        maps, logits, shortlists = self._run(images)
        return maps[1:], (*logits, self._select(self.forward_head(maps[-1]), shortlists))

    def shortlists_of(self, images: Tensor) -> dict[int, Tensor]:
        """(B, 3, H, W) -> (B, k) classes by the stage that hands them on; needs no classifier."""
        _, _, shortlists = self._run(images)
        return dict(zip(self.shortlist_sizes, shortlists, strict=True))

    def take_means_of(self, valid: ValidPart) -> None:
        """From now on every mean over a map is of each image's own part: see `valid_mean`."""
        for module in list(self.modules()):
            if isinstance(module, Projection):
                module[0] = ValidMean(valid)
            elif isinstance(getattr(module, "pool", None), GlobalMean):
                module.pool = ValidMean(valid)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's way to intermediate features, as every model of its has it.

        Args:
            x: (B, 3, H, W).
            indices: which of `feature_info`; the last so many if an integer, all if None.
            norm: without effect, these backbones end in no norm.
            stop_early: leave out the stages after the last that is asked for.

        Returns:
            The maps asked for; before them the last map, unless intermediates_only.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"the maps are NCHW, got output_fmt={output_fmt!r}")
        take, last = feature_take_indices(len(self.feature_info), indices)
        maps, _, _ = self._run(x, last + 1 - self._stem_features if stop_early else STAGES)
        features = maps[1 - self._stem_features :]
        intermediates = [features[i] for i in take]
        return intermediates if intermediates_only else (maps[-1], intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the features asked for do not need, for good; returns their indices. As timm's models."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        kept = last + 1 - self._stem_features
        if prune_head or kept < STAGES:
            self.reset_classifier(0, "")
            del self.projections[str(STAGES)]
        self.keep_stages(kept)
        self.contextual_stages = tuple(stage for stage in self.contextual_stages if stage <= kept)
        for stage in [stage for stage in self.projections if kept <= int(stage) < STAGES]:
            del self.projections[stage]
        for stage in [stage for stage in self.mergings if int(stage) > kept]:
            del self.mergings[stage]
        self.num_features = self.feature_info[last]["num_chs"]
        return take

    @property
    def _stem_features(self) -> int:
        """1 if the stem's map is one of the features."""
        return len(self.feature_info) - STAGES

    def _run(
        self, images: Tensor, stages: int = STAGES, told: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Features -> scores -> shortlist -> context -> the next stage's features.

        Returns:
            The maps of the stem and of so many stages; logits and shortlists of the classifications between them.
        """
        maps = [self.forward_stem(images)]
        logits: list[Tensor] = []
        shortlists: list[Tensor] = []
        for stage, blocks in enumerate(self.stage_blocks()[:stages], start=1):
            x = maps[-1]
            context = self._context(stage, x, shortlists, logits, told) if stage in self.contextual_stages else None
            for block in blocks:
                x = self._forward_block(block, x, context)
            maps.append(x)
            if stage < stages and stage + 1 in self.contextual_stages:
                logits.append(self._select(self.class_embeddings(self.projections[str(stage)](x)), shortlists))
                # Unsorted, as the context is a mean and has no order; but the truth takes the place of the least likely
                ranked, k = self._ranked(logits[-1]).detach(), self.class_counts[stage - 1]
                best = ranked.topk(k, dim=1, sorted=self.context_of == "told")
                shortlists.append(best.indices)
        return maps, logits, shortlists

    def _context(
        self, stage: int, x: Tensor, shortlists: list[Tensor], logits: list[Tensor], told: Tensor | None
    ) -> Tensor:
        """(B, D), merged from the classes that the stage considers; before stage 1 those are all."""
        table = self.class_embeddings.weight
        if stage == 1 or self.context_of == "blind":
            everything = torch.arange(table.shape[0], device=x.device).expand(x.shape[0], -1)
            return self.mergings[str(stage)](table, everything)
        shortlist = shortlists[-1]
        if self.context_of == "told" and told is not None:
            shortlist = _with(told, shortlist)
        return self.mergings[str(stage)](table, shortlist, self._ranked(logits[-1]) if self.merge == "scores" else None)

    def _ranked(self, logits: Tensor) -> Tensor:
        """(B, N) logits by which a shortlist is made: an image's own, or their mean over its clip."""
        if self.context_of != "clip" or self.frames == 1:
            return logits
        clips = logits.unflatten(0, (-1, self.frames))
        return clips.mean(dim=1, keepdim=True).expand_as(clips).flatten(0, 1)

    def _select(self, scores: Tensor, shortlists: Sequence[Tensor]) -> Tensor:
        """The stage's (B, N) logits; with "reduce", -inf where the classification before dropped the class."""
        if self.selection == "rerank" or not shortlists:
            return scores
        dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(1, shortlists[-1], False)
        return scores.masked_fill(dropped, -torch.inf)

    def _forward_block(self, block: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
        inputs = (x, context) if isinstance(block, ContextualBlock) else (x,)
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def get_classifier(self) -> nn.Module:
        """The class embeddings, which the stages before use too; Identity without a classifier."""
        return self.class_embeddings if self.num_classes else nn.Identity()

    @property
    def last_projection(self) -> nn.Module:
        """What maps the last stage's features to the class embeddings; it is trained with the classifier's rate."""
        return self.projections[str(STAGES)]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New class embeddings for other classes, the class counts scaled to their number; 0 removes the classifier.

        Without a classifier the class table stays as it is, as the context of the features.

        Args:
            global_pool: "" gives unpooled maps, only without a classifier; None changes nothing.

        Raises:
            ValueError: too few classes for shortlists that shrink three times, or another kind of pooling.
        """
        global_pool = self.global_pool if global_pool is None else global_pool
        if global_pool not in (("avg",) if num_classes else ("avg", "")):
            raise ValueError(f"global_pool={global_pool!r} with num_classes={num_classes}: only 'avg' is classified")
        if num_classes:
            table = self.class_embeddings.weight
            counts = scale_class_counts(self.class_counts, table.shape[0], num_classes)
            check_class_counts(num_classes, counts)
            self.class_counts = counts
            self.class_embeddings = ClassEmbeddings(num_classes, table.shape[1]).to(table.device, table.dtype)
        self.num_classes, self.global_pool = num_classes, global_pool

    def no_weight_decay(self) -> set[str]:
        """What timm's optimizer factory spares besides biases and norms (offset biases are biases)."""
        return {"class_embeddings.weight", "class_embeddings.log_inverse_temperature"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the blocks' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable


def _with(told: Tensor, shortlist: Tensor) -> Tensor:
    """(B, k), best first: the last class makes room for the true one where that is missing and known."""
    told = told.unsqueeze(1)
    missing = ~(shortlist == told).any(dim=1, keepdim=True) & (told >= 0)
    return torch.cat([shortlist[:, :-1], torch.where(missing, told, shortlist[:, -1:])], dim=1)


def staged_scores(model: nn.Module, images: Tensor) -> StagedScores:
    """The scores of every stage whatever the mode; of a model without stages, its logits as the only stage."""
    return StagedScores.of(model(images, staged=True) if isinstance(model, ContextualModel) else model(images))
