"""What codes know of the action: accuracy from codes at each budget beside guesses, previous actions and frames.

Frozen codes, a small network, some labels (paper 5.2 asks the same of the translator). Accuracy needs actions that are
choices; of continuous ones a data set knows nothing yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from flexlam_fast.data.store import EpisodeStore
from flexlam_fast.errors import DataError
from flexlam_fast.evaluate.fitting import InverseDynamics, Recipe, fit, scores, small_mlp
from flexlam_fast.evaluate.summary import Score, score
from flexlam_fast.lam import LatentActionModel
from flexlam_fast.train.translator import choose_labels

FRAMES_RECIPE = Recipe(steps=1500, batch=128, rate=1e-3)
#: Share of actions that frames must get right beyond the commonest action, to be something to compare with.
MIN_GAIN = 0.02
#: Labelled transitions that a probe learns from at least.
MIN_LABELS = 10
#: Words that turn into each other when a transition is played backwards.
OPPOSITES = {"LEFT": "RIGHT", "FORWARD": "BACKWARD", "UP": "DOWN", "OPEN": "CLOSE"}


class LabelCount(NamedTuple):
    """Shares of held-out actions that are right, with ``labels`` of them to learn from; intervals over seeds.

    A seed draws the labels and starts the networks; where the labels are ``every`` one there is, only the latter.
    ``codes`` by budget, from codes alone; ``together`` from all codes and the previous action; ``tasks`` from all codes
    alone, by task.
    """

    labels: int
    every: bool
    commonest: Score
    previous: Score
    frames: Score
    codes: dict[int, Score]
    together: Score
    tasks: dict[str, Score]

    def carried(self) -> float | None:
        """Which part of what frames say beyond the commonest action the codes alone say; None if that is next to
        nothing."""
        said = self.frames.mean - self.commonest.mean
        return (self.codes[max(self.codes)].mean - self.commonest.mean) / said if said >= MIN_GAIN else None


class Reversal(NamedTuple):
    """Of reversed transitions whose action has an opposite, the share for which codes say that, over seeds."""

    share: Score
    transitions: int


class ActionProbe(NamedTuple):
    """The answer for every number of labels, in ascending order; how many held-out transitions judge."""

    counts: tuple[LabelCount, ...]
    reversal: Reversal | None
    held_out: int


class Pool(NamedTuple):
    """Some transitions: global ``rows``, actions and those before, the task of each, and codes int32 ``[n, K]``."""

    rows: NDArray[np.int64]
    actions: Tensor
    previous: Tensor
    tasks: Tensor
    codes: Tensor


def probe_actions(
    lam: LatentActionModel,
    store: EpisodeStore,
    labels: Sequence[int],
    budgets: Sequence[int],
    *,
    held_out: int,
    seeds: int,
    seed: int,
    progress: bool,
) -> ActionProbe | None:
    """Ask, for every number of labels and ``seeds`` draws of them; None where the data knows no actions.

    Args:
        lam: whose codes are asked.
        store: train split to learn from, test split to judge by, evenly over tasks.
        labels: how many; more than there are is all of them.
        budgets: values of ``k`` above 0.
        held_out: transitions that judge.
        seeds: draws of labels, each with its own networks.
        seed: of the first draw.
        progress: whether to show a bar.
    """
    if not store.labelled:
        return None
    known = _labelled(store, "train")
    if known < MIN_LABELS:
        raise DataError(f"{store.path}: expected at least {MIN_LABELS} labelled train transitions, got {known}")
    wanted = sorted({min(n, known) for n in labels})
    judges = pool_of(lam, store, choose_labels(store, "test", min(held_out, _labelled(store, "test")), seed))
    runs: dict[int, list[dict[str, float]]] = {n: [] for n in wanted}
    reversals: list[float] = []
    bar = tqdm(total=len(wanted) * seeds, desc="probe", unit="fit", disable=not progress)
    for draw in range(seeds):
        for n in wanted:
            learners = pool_of(lam, store, choose_labels(store, "train", n, seed + draw))
            runs[n].append(_answers(lam, store, learners, judges, budgets, seed + draw))
            if n == wanted[-1]:
                reversals += _reversal(lam, store, learners, judges, seed + draw)
            bar.update()
    bar.close()
    reversible = len(_reversible(store, judges)[0])
    counts = tuple(_count(n, n == known, runs[n], budgets, store.tasks) for n in wanted)
    return ActionProbe(counts, Reversal(score(reversals), reversible) if reversals else None, len(judges.rows))


def pool_of(lam: LatentActionModel, store: EpisodeStore, index: NDArray[np.int64], reverse: bool = False) -> Pool:
    """Encode transitions; with ``reverse`` from the later frame to the earlier."""
    tasks = torch.tensor([store.tasks.index(store.episodes[i].task) for i in store.episode_of(index)])
    device, codes = next(lam.parameters()).device, []
    for rows in np.array_split(index, max(1, len(index) // 256)):
        now, following = (torch.from_numpy(store.take(rows + step)).to(device) for step in (0, 1))
        codes.append(lam.encode(following, now) if reverse else lam.encode(now, following))
    actions, previous = (torch.from_numpy(table[index]) for table in (store.actions, store.previous_actions))
    return Pool(index, actions, previous, tasks, torch.cat(codes).cpu())


def _labelled(store: EpisodeStore, split: str) -> int:
    return int((store.actions[store.transitions(split)] >= 0).sum())


def _latents(lam: LatentActionModel, codes: Tensor, k: int) -> Tensor:
    device = next(lam.parameters()).device
    with torch.no_grad():
        return lam.latents(codes.to(device), k).flatten(1).cpu()


def _before(pool: Pool, classes: int) -> Tensor:
    return F.one_hot(pool.previous + 1, classes + 1).float()


def _asked(inputs: Tensor, held: Tensor, learners: Pool, classes: int, seed: int, device: torch.device) -> Tensor:
    """Actions that a network says of ``held`` after learning from ``inputs``."""
    mean, deviation = inputs.mean(0), inputs.std(0, unbiased=False)
    inputs, held = ((x - mean) / deviation.clamp_min(1e-3) for x in (inputs, held))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = small_mlp(inputs.shape[1], classes)
    fit(net, lambda rows: inputs[rows], learners.actions, Recipe(), seed, device)
    return scores(net, lambda rows: held[rows], torch.arange(len(held)), device).argmax(1)


def _answers(
    lam: LatentActionModel, store: EpisodeStore, learners: Pool, judges: Pool, budgets: Sequence[int], seed: int
) -> dict[str, float]:
    """Every share of one draw of labels, by name."""
    classes, device = len(store.action_names), next(lam.parameters()).device
    right: dict[str, Tensor] = {}

    def ask(name: str, features: Callable[[Pool], Tensor]) -> None:
        said = _asked(features(learners), features(judges), learners, classes, seed, device)
        right[name] = (said == judges.actions).float()

    right["commonest"] = (judges.actions == learners.actions.mode().values).float()
    ask("previous", lambda pool: _before(pool, classes))
    for k in budgets:
        ask(f"codes {k}", lambda pool, k=k: _latents(lam, pool.codes, k))  # type: ignore[misc]
    most = max(budgets)
    ask("together", lambda pool: torch.cat([_latents(lam, pool.codes, most), _before(pool, classes)], 1))
    right["frames"] = (_seen(store, learners, judges, classes, seed, device) == judges.actions).float()
    found = {name: float(each.mean()) for name, each in right.items()}
    for i, task in enumerate(store.tasks):
        mine = judges.tasks == i
        if bool(mine.any()):
            found[f"task {task}"] = float(right[f"codes {most}"][mine].mean())
    return found


def _seen(store: EpisodeStore, learners: Pool, judges: Pool, classes: int, seed: int, device: torch.device) -> Tensor:
    """Actions that an inverse dynamics model says of held-out frames."""

    def reader(pool: Pool) -> Callable[[Tensor], Tensor]:
        return lambda rows: torch.from_numpy(store.take(_both(pool.rows[rows.numpy()])))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = InverseDynamics(store.frame_shape[0], store.frame_shape[2], classes)
    fit(net, reader(learners), learners.actions, FRAMES_RECIPE, seed, device)
    return scores(net, reader(judges), torch.arange(len(judges.rows)), device).argmax(1)


def opposites(names: Sequence[str]) -> dict[int, int]:
    """Which action undoes which, told by their names: TURN_LEFT and TURN_RIGHT."""
    swaps = {**OPPOSITES, **{new: old for old, new in OPPOSITES.items()}}
    found = {}
    for i, name in enumerate(names):
        words = name.upper().split("_")
        turned = "_".join(swaps.get(word, word) for word in words)
        upper = [other.upper() for other in names]
        if turned != "_".join(words) and turned in upper:
            found[i] = upper.index(turned)
    return found


def _reversible(store: EpisodeStore, judges: Pool) -> tuple[NDArray[np.int64], Tensor]:
    """Held-out transitions whose action has an opposite, and that opposite."""
    pairs = opposites(store.action_names)
    expected = torch.tensor([pairs.get(int(a), -1) for a in judges.actions], dtype=torch.int64)
    return judges.rows[(expected >= 0).numpy()], expected[expected >= 0]


def _reversal(lam: LatentActionModel, store: EpisodeStore, learners: Pool, judges: Pool, seed: int) -> list[float]:
    index, expected = _reversible(store, judges)
    if not len(index):
        return []
    most, device = lam.cfg.bottleneck.slots, next(lam.parameters()).device
    backwards = pool_of(lam, store, index, reverse=True)
    inputs, held = _latents(lam, learners.codes, most), _latents(lam, backwards.codes, most)
    said = _asked(inputs, held, learners, len(store.action_names), seed, device)
    return [float((said == expected).float().mean())]


def _both(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Both frames of each transition, ``[n, 2]``."""
    return np.stack([rows, rows + 1], axis=1)


def _count(
    n: int, every: bool, runs: list[dict[str, float]], budgets: Sequence[int], tasks: Sequence[str]
) -> LabelCount:
    def over(name: str) -> Score:
        return score([run[name] for run in runs])

    codes = {k: over(f"codes {k}") for k in budgets}
    by_task = {task: over(f"task {task}") for task in tasks if f"task {task}" in runs[0]}
    return LabelCount(n, every, over("commonest"), over("previous"), over("frames"), codes, over("together"), by_task)


def plain(count: LabelCount) -> dict[str, Any]:
    """For JSON: every score as mean and interval, by name."""

    def pair(value: Score) -> dict[str, float]:
        return {"mean": value.mean, "ci95": value.ci95}

    found: dict[str, Any] = {"labels": count.labels, "every": count.every, "carried": count.carried()}
    for name in ("commonest", "previous", "frames", "together"):
        found[name] = pair(getattr(count, name))
    found["codes"] = {str(k): pair(value) for k, value in count.codes.items()}
    found["tasks"] = {task: pair(value) for task, value in count.tasks.items()}
    return found
