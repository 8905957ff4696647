"""Measures prompt sets: by replay for one drafter, by the real loop for all contenders together.

Everything that is finished is in a journal, so that a killed evaluation goes on where it was, and
a second one of the same drafter reads what the first has measured.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from drafter.decoding import Decoded
from drafter.evaluation.journal import Journal
from drafter.evaluation.loading import LoadedDrafter
from drafter.evaluation.measure import (
    FeatureStore,
    MeasuredResponse,
    decode_alone,
    decode_by_lookup,
    decode_prompt,
    measured,
    replay_trajectory,
)
from drafter.evaluation.tallies import Tally, tally
from drafter.evaluation.trajectories import EvalPrompt, Trajectory, TrajectorySettings
from drafter.target import Target

FORMAT = 2
PROMPT_LOOKUP = "prompt lookup"
SAMPLES_PER_SET = 2
SAMPLE_TOKENS = 200
"""Response tokens shown of a sample."""


@dataclass(frozen=True)
class Sample:
    """A decoded response in pieces: (text, whether a drafter's accepted run wrote it)."""

    set_name: str
    prompt_id: int
    prompt: str
    pieces: list[tuple[str, bool]]


@dataclass
class Measured:
    """One drafter's responses, by replay or by the real loop.

    Attributes:
        tallies: In no particular order.
        samples: Of the first prompts of each set.
        ids: Response token ids by place, of the real loop.
        plain_ids: Those of the target alone.
        new_seconds: Spent in this process.
        new_tokens: Response tokens that were measured in it.
    """

    tallies: list[Tally] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    ids: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)
    plain_ids: dict[tuple[str, int, int], list[int]] = field(default_factory=dict)
    new_seconds: float = 0.0
    new_tokens: int = 0

    def take(self, row: dict[str, Any]) -> None:
        """Adds a row of a journal."""
        found = Tally.from_json(row["tally"])
        self.tallies.append(found)
        if row.get("ids") is not None:
            self.ids[found.place] = row["ids"]
            self.plain_ids[found.place] = row["plain_ids"]
        if row.get("sample"):
            sample = row["sample"]
            pieces = [(text, bool(accepted)) for text, accepted in sample["pieces"]]
            self.samples.append(
                Sample(sample["set_name"], sample["prompt_id"], sample["prompt"], pieces)
            )


@dataclass
class Bench:
    """A target, its settings, and where what is measured on it is kept.

    Args:
        target: Frozen.
        settings: Of the trajectories and of the loop.
        folder: Of journals; None keeps nothing.
        fresh: Measure again what is in a journal.
        progress: Show bars.
        anchors_per_chunk: Blocks denoised at once in replay.
        features: Kept between drafters.
    """

    target: Target
    settings: TrajectorySettings
    folder: Path | None = None
    fresh: bool = False
    progress: bool = True
    anchors_per_chunk: int = 128
    features: FeatureStore = field(default_factory=FeatureStore)

    def replay(self, loaded: LoadedDrafter, trajectories: Sequence[Trajectory]) -> Measured:
        """Returns a drafter's rounds on the target's own responses.

        Args:
            loaded: Fits the target.
            trajectories: Of any sets and turns.
        """
        journal = self._journal("replay", [loaded.contender])
        drafter = loaded.drafter.to(device=self.target.device, dtype=self.target.dtype)
        samples = _sample_places([t.prompt for t in trajectories])
        out = Measured()
        title = f"replay {Path(loaded.name).name}"
        with tqdm(total=len(trajectories), desc=title, disable=not self.progress) as bar:
            for group in by_set(trajectories):
                names = [_trajectory_name(trajectory) for trajectory in group]
                done = [i for i, name in enumerate(names) if name in journal]
                for i in done:
                    out.take(journal[names[i]])
                bar.update(len(done))
                begun = time.perf_counter()
                layer_ids = drafter.config.target_layer_ids
                for batch in self.features.each(self.target, group, layer_ids, done):
                    responses = [
                        replay_trajectory(
                            drafter,
                            self.target,
                            group[i],
                            self.settings,
                            states,
                            search=loaded.search,
                            length=loaded.length,
                            anchors_per_chunk=self.anchors_per_chunk,
                        )
                        for i, states in batch
                    ]
                    seconds = time.perf_counter() - begun  # features of the batch included
                    tokens = sum(len(response.ids) for response in responses)
                    rows = {}
                    for (i, _), response in zip(batch, responses, strict=True):
                        share = {"replay": seconds * len(response.ids) / tokens}
                        rows[names[i]] = self._row(response, share, samples)
                    journal.add(rows)
                    for row in rows.values():
                        out.take(row)
                    out.new_seconds += seconds
                    out.new_tokens += tokens
                    bar.update(len(rows))
                    begun = time.perf_counter()
        return out

    def decode(
        self, drafters: Sequence[LoadedDrafter], prompts: Sequence[EvalPrompt]
    ) -> dict[str, Measured]:
        """Returns, by name, what the real loop did with each drafter and with prompt lookup.

        Prompt by prompt, every contender and the target alone are timed one after the other in
        this process; what a killed process measured of a prompt is kept as a whole or not at all.

        Args:
            drafters: All fit the target.
            prompts: Of any sets and turns.
        """
        journal = self._journal("decode", [loaded.contender for loaded in drafters])
        for loaded in drafters:
            loaded.drafter.to(device=self.target.device, dtype=self.target.dtype)
        names = [loaded.name for loaded in drafters] + [PROMPT_LOOKUP]
        out = {name: Measured() for name in names}
        samples = _sample_places(prompts)
        waiting = [prompt for prompt in prompts if _prompt_name(prompt) not in journal]
        for prompt in prompts:
            if _prompt_name(prompt) in journal:
                for name, row in zip(names, journal[_prompt_name(prompt)], strict=True):
                    out[name].take(row)
        if waiting:  # every loop once, untimed: the first passes on a device are slow
            few = replace(self.settings, max_new_tokens=min(8, self.settings.max_new_tokens))
            self._contest(drafters, waiting[0], few)
        for prompt in tqdm(waiting, desc="decode", unit="prompt", disable=not self.progress):
            begun = time.perf_counter()
            plain, loops = self._contest(drafters, prompt, self.settings)
            rows = []
            trajectory = Trajectory(prompt, [], [], False)
            for loop, drafted in loops:
                response = measured(trajectory, loop, drafted)
                seconds = {**loop.seconds, "plain": sum(plain.seconds.values())}
                row = self._row(response, seconds, samples, len(plain.ids))
                rows.append({**row, "ids": loop.ids, "plain_ids": plain.ids})
            journal.add({_prompt_name(prompt): rows})
            for name, row in zip(names, rows, strict=True):
                out[name].take(row)
                out[name].new_seconds += time.perf_counter() - begun
                out[name].new_tokens += out[name].tallies[-1].response_tokens
        return out

    def _contest(
        self,
        drafters: Sequence[LoadedDrafter],
        prompt: EvalPrompt,
        settings: TrajectorySettings,
    ) -> tuple[Decoded, list[tuple[Decoded, int]]]:
        """Returns the target alone, and (the loop's result, N) of every contender."""
        target, key = self.target, prompt.key
        block_size = max(loaded.drafter.config.block_size for loaded in drafters)
        plain = decode_alone(target, prompt.ids, settings, key=key)
        loops = [
            (
                decode_prompt(
                    loaded.drafter,
                    target,
                    prompt.ids,
                    settings,
                    key=key,
                    search=loaded.search,
                    length=loaded.length,
                ),
                loaded.drafter.config.num_drafted,
            )
            for loaded in drafters
        ]
        lookup = decode_by_lookup(target, prompt.ids, settings, block_size, key=key)
        return plain, [*loops, (lookup, block_size - 1)]

    def _row(
        self,
        response: MeasuredResponse,
        seconds: dict[str, float],
        samples: set[tuple[str, int]],
        plain_tokens: int = 0,
    ) -> dict[str, Any]:
        prompt = response.trajectory.prompt
        row: dict[str, Any] = {"tally": tally(response, seconds, plain_tokens).to_json()}
        if prompt.turn == 0 and (prompt.set_name, prompt.prompt_id) in samples:
            row["sample"] = asdict(make_sample(response, self.target.tokenizer))
        return row

    def _journal(self, mode: str, fingerprints: list[str], reading: bool = False) -> Journal:
        target = self.target
        device = str(target.device.type)
        if mode == "decode" and device == "cuda":
            device = torch.cuda.get_device_name(target.device)
        identity = {
            "format": FORMAT,
            "mode": mode,
            "drafters": fingerprints,
            "target": target.fingerprint,
            "ends": target.eos_token_ids,
            "dtype": str(target.dtype),
            "device": device,
            "settings": asdict(self.settings),
        }
        return Journal(self.folder, identity, self.fresh, reading)

    def missing(self, loaded: LoadedDrafter, trajectories: Sequence[Trajectory]) -> int:
        """Returns how many of the trajectories are still to be replayed."""
        journal = self._journal("replay", [loaded.contender], reading=True)
        return sum(_trajectory_name(trajectory) not in journal for trajectory in trajectories)


def make_sample(response: MeasuredResponse, tokenizer: Any) -> Sample:
    """Returns a response's text in pieces, with the runs that were accepted marked."""
    prompt, ids = response.trajectory.prompt, response.ids[:SAMPLE_TOKENS]
    edges, at = [(1, False)], 1  # the first token is prefill's
    counts = response.drawn
    for length, accepted in zip(counts.round_lengths, counts.round_accepted, strict=True):
        edges += [(at + accepted, True), (at + length, False)]
        at += length
    pieces: list[tuple[str, bool]] = []
    begun = 0
    for end, accepted_run in edges:
        # decoded from the start: a token alone may be half a character
        text = tokenizer.decode(ids[:end])
        piece = text[begun:].rstrip("�")
        if piece:
            pieces.append((piece, accepted_run))
            begun += len(piece)
        if end >= len(ids):
            break
    return Sample(prompt.set_name, prompt.prompt_id, tokenizer.decode(prompt.ids), pieces)


def by_set(trajectories: Sequence[Trajectory]) -> list[list[Trajectory]]:
    """Returns sets and turns apart: what runs together depends on nothing else that is measured."""
    groups: dict[tuple[str, int], list[Trajectory]] = {}
    for trajectory in trajectories:
        prompt = trajectory.prompt
        groups.setdefault((prompt.set_name, prompt.turn), []).append(trajectory)
    return list(groups.values())


def _sample_places(prompts: Sequence[EvalPrompt]) -> set[tuple[str, int]]:
    found: set[tuple[str, int]] = set()
    for name in {prompt.set_name for prompt in prompts}:
        own = sorted({prompt.prompt_id for prompt in prompts if prompt.set_name == name})
        found |= {(name, prompt_id) for prompt_id in own[:SAMPLES_PER_SET]}
    return found


def _trajectory_name(trajectory: Trajectory) -> str:
    return _name(trajectory.prompt, [trajectory.prompt.ids, trajectory.ids])


def _prompt_name(prompt: EvalPrompt) -> str:
    return _name(prompt, [prompt.ids])


def _name(prompt: EvalPrompt, content: list[list[int]]) -> str:
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return f"{prompt.set_name}/{prompt.prompt_id}/{prompt.turn}/{digest}"
