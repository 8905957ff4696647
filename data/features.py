"""Gives batches the target's hidden states, and keeps them where that is asked for.

Legend: B rows, S tokens per row, T tokens of a document, L tapped layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.sharing import DocumentFeatures, KeptDocument, KeptFeatures
from drafter.arriving import Arriving
from drafter.blocks import PADDING_DOCUMENT, DraftBatch
from drafter.head import FrozenHead
from drafter.layer_ids import assert_finite_features
from drafter.packing import place
from drafter.soft_labels import soft_labels
from drafter.target import Features, Target

if TYPE_CHECKING:
    from data.cache_fill import CacheFilling


class FiniteCheck:
    """Looks whether a target's features are finite; on a GPU one look late.

    The answer of a GPU is read when the next one is asked for: waiting for it at once would keep
    the host from preparing the step.
    """

    def __init__(self) -> None:
        self._pending: tuple[Arriving, Tensor, tuple[int, ...], Tensor] | None = None

    def look(self, states: Tensor, layer_ids: tuple[int, ...], sample_ids: Tensor) -> None:
        """Asks about states (B, S, L*D) of rows called `sample_ids` (B,).

        Raises:
            UserError: A state of an earlier look (on a CPU: of this one) is NaN or infinite; names
                row, layer and position.
        """
        self.settle()
        finite = Arriving(torch.isfinite(states).all())
        self._pending = (finite, states, layer_ids, sample_ids)
        if not finite.from_device:
            self.settle()

    def settle(self) -> None:
        """Reads the last answer; raises as `look` does."""
        pending, self._pending = self._pending, None
        if pending is not None and not pending[0].read():
            assert_finite_features(*pending[1:])


class Request:
    """What a batch needs of the target, and how to get it.

    Args:
        check: Looks at what the target gives.
        batch: On the target's device.
        target: Runs on the documents.
        layer_ids: Tapped layers.
        last_hidden: Whether what the head reads is needed.
        row_set: Which row set the sample ids count in.
    """

    def __init__(
        self,
        check: FiniteCheck,
        batch: DraftBatch,
        target: Target,
        layer_ids: tuple[int, ...],
        last_hidden: bool,
        row_set: str,
    ) -> None:
        self.check = check
        self.batch = batch
        self.target = target
        self.layer_ids = layer_ids
        self.last_hidden = last_hidden
        self.row_set = row_set

    def run(self, input_ids: Tensor, document_ids: Tensor, sample_ids: Tensor) -> Features:
        """Returns the target's states of right-padded rows, which `check` looks at."""
        features = self.target.features(
            input_ids,
            document_ids,
            self.layer_ids,
            last_hidden=self.last_hidden,
            packed=None if self.batch.spans is None else False,
        )
        self.check.look(features.hidden_states, self.layer_ids, sample_ids)
        return features

    def documents(self, which: Sequence[int]) -> list[DocumentFeatures]:
        """Returns features (T, L*D) and last_hidden (T, D) or None of documents of the batch."""
        spans = self.batch.document_spans()
        ids = [self.batch.input_ids[spans[i].row, spans[i].first : spans[i].last] for i in which]
        states, last = self.run(
            pad_sequence(ids, batch_first=True),
            pad_sequence(
                [torch.zeros_like(own) for own in ids],
                batch_first=True,
                padding_value=PADDING_DOCUMENT,
            ),
            self.batch.sample_ids[list(which)],
        )
        return [
            (states[i, : len(own)], None if last is None else last[i, : len(own)])
            for i, own in enumerate(ids)
        ]

    def all_documents(self) -> list[DocumentFeatures]:
        """Returns `documents` of all of them."""
        return self.documents(range(len(self.batch.sample_ids)))


class Keeper(Protocol):
    """Decides where features come from."""

    softens: bool
    """Whether what it gives in last_hidden's place are packed `SoftLabels`."""

    def features(self, request: Request) -> list[DocumentFeatures] | None:
        """Returns each document's features, or None to run the target on the batch as it is."""
        ...


class NothingKept:
    """Runs the target on every batch."""

    softens = False

    def features(self, request: Request) -> list[DocumentFeatures] | None:
        """See `Keeper`."""
        return request.all_documents() if request.batch.packed else None


class RememberedFeatures:
    """Computes a document's features when it is first asked for.

    Args:
        kept: What is remembered.
        on_device: On the accelerator, not in host memory.
        head: The target's, to keep of last_hidden the soft labels that it makes, which cost a pass
            of the head; None to keep it as it is.
    """

    def __init__(self, kept: KeptFeatures, on_device: bool, head: FrozenHead | None) -> None:
        self._kept = kept
        self._on_device = on_device
        self._head = head
        self.softens = head is not None

    def features(self, request: Request) -> list[DocumentFeatures]:
        """See `Keeper`."""
        samples = request.batch.sample_ids.tolist()
        keys = [(request.row_set, request.layer_ids, sample) for sample in samples]
        kind = self._kind(request.last_hidden)
        missing = [i for i, key in enumerate(keys) if not self._holds(key, kind)]
        if missing:
            to = request.batch.input_ids.device if self._on_device else "cpu"
            states, lasts = zip(*request.documents(missing), strict=True)
            request.check.settle()  # before they are kept
            # copies: a view would keep the whole padded batch alive
            for i, own in zip(missing, states, strict=True):
                if keys[i] not in self._kept:
                    self._kept[keys[i]] = KeptDocument(own.to(to, copy=True), {})
            if kind is not None:
                for i, own in zip(missing, self._read_of(lasts), strict=True):
                    self._kept[keys[i]].last[kind] = own.to(to, copy=True)
        kept = [self._kept[key] for key in keys]
        return [(own.states, None if kind is None else own.last[kind]) for own in kept]

    def holds(
        self, row_set: str, layer_ids: tuple[int, ...], samples: Sequence[int], last_hidden: bool
    ) -> bool:
        """Whether it remembers what a `Request` of these samples would ask for."""
        kind = self._kind(last_hidden)
        return all(self._holds((row_set, layer_ids, sample), kind) for sample in samples)

    def keep_only(self, last_hidden: bool) -> None:
        """Forgets what a device remembers of last_hidden in another form than is asked for now.

        Runs that share what is remembered may differ in it, and a device has no room for both.
        """
        kind = self._kind(last_hidden)
        if kind is not None and self._on_device:
            for document in self._kept.values():
                for other in document.last.keys() - {kind}:
                    del document.last[other]

    def _kind(self, last_hidden: bool) -> str | None:
        return ("soft_labels" if self.softens else "states") if last_hidden else None

    def _holds(self, key: Hashable, kind: str | None) -> bool:
        return key in self._kept and (kind is None or kind in self._kept[key].last)

    def _read_of(self, lasts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns what losses read of documents' last_hidden; the head runs on all at once."""
        if self._head is None:
            return lasts
        labels = soft_labels(self._head, torch.cat(list(lasts))).packed()
        return list(labels.split([len(last) for last in lasts]))


class RoundedFeatures:
    """Features as a cache holds them, so that training on them is training from it.

    Args:
        dtype: Of the cache.
        filling: Takes training rows' features; None once the cache is complete.
    """

    softens = False

    def __init__(self, dtype: torch.dtype, filling: CacheFilling | None) -> None:
        self._dtype = dtype
        self._filling = filling

    def features(self, request: Request) -> list[DocumentFeatures]:
        """See `Keeper`."""
        wanted = request.last_hidden
        filling = self._filling if request.row_set == "train" else None
        if request.batch.num_slots == 0:  # the row is another rank's
            filling = None
        request.last_hidden = wanted or filling is not None
        found = request.all_documents()
        if filling is not None:
            request.check.settle()  # before they are written
            states, lasts = zip(*found, strict=True)
            filling.add(request.batch.sample_ids.tolist(), states, lasts)
        return [
            (states.to(self._dtype), last.to(self._dtype) if wanted and last is not None else None)
            for states, last in found
        ]


def fill_batch(
    batch: DraftBatch,
    target: Target,
    layer_ids: tuple[int, ...],
    last_hidden: bool,
    row_set: str,
    keeper: Keeper,
    check: FiniteCheck,
) -> DraftBatch:
    """Fills a batch's `hidden_states` (B, S, L*D) and, if asked, `last_hidden` (B, S, D).

    A keeper that softens has it fill `soft_labels` instead of `last_hidden`.

    Args:
        batch: On the target's device.
        target: Gives them.
        layer_ids: Tapped layers.
        last_hidden: Whether what the head reads is needed.
        row_set: Which row set the sample ids count in.
        keeper: Where features come from and go.
        check: Looks at what the target gives.

    Raises:
        UserError: As `FiniteCheck.look`.
    """
    request = Request(check, batch, target, layer_ids, last_hidden, row_set)
    parts = keeper.features(request)
    if parts is None:
        batch.hidden_states, batch.last_hidden = request.run(
            batch.input_ids, batch.document_ids, batch.sample_ids
        )
        return batch
    device, shape = batch.input_ids.device, (batch.document_spans(), *batch.input_ids.shape)
    states = [own.to(device, non_blocking=True) for own, _ in parts]
    batch.hidden_states = place(states, *shape)
    if last_hidden:
        lasts = [own.to(device, non_blocking=True) for _, own in parts if own is not None]
        name = "soft_labels" if keeper.softens else "last_hidden"
        setattr(batch, name, place(lasts, *shape))
    return batch
