"""Checkpoints by orbax: trainable leaves, optimizer, step, configuration, and the identity of the frozen base."""

import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jaxft.errors import UserError
from jaxft.hub.folder import is_full
from jaxft.models import segments
from jaxft.models.hashing import STRIDE, mixed, places
from jaxft.overrides import flat
from jaxft.train.background import silence
from jaxft.train.gap import Gap
from jaxft.train.state import State

# Fields that may change between a run and its continuation: they don't change what the run computes.
FREE = (
    "eval.",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.loggers",
    "data.cache",
    "train.patience",
    "optimizer.offload",
)
TEST = "data.test"  # free where the set isn't cut from the training rows


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a run knows beside its state; plain JSON."""

    config: dict[str, Any]  # the resolved configuration
    base: str  # fingerprint of the frozen leaves
    before: dict[str, float]  # the evaluation before training
    data: dict[str, str] = dataclasses.field(default_factory=dict)  # of each set, the digest of its examples
    best: float | None = None  # best validation metric so far
    best_step: int | None = None
    stale: int = 0  # evaluations since then
    seconds: float = 0.0  # of training steps, the first one of each start left out
    tokens: int = 0  # that those seconds trained on
    elapsed: float = 0.0  # seconds of the starts before this one, all included
    train_loss: float | None = None  # of the last step
    answer_end: int | None = None  # the special token that ends the answers trained on, None where they end with text
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of `load_pretrained`, that the training rows gave: labels
    gap: Gap = dataclasses.field(default_factory=Gap)  # between the losses on training and on validation rows


def fingerprint(frozen: Any) -> str:
    """Returns a digest of the frozen leaves: names, shapes, types and every bit of their values, computed where they lie."""
    digest = hashlib.sha256()
    sums = _mixes(frozen)
    for leaf, total in zip(segments.leaves(frozen), jax.device_get(jax.tree.leaves(sums)), strict=True):
        digest.update(f"{leaf.title} {leaf.value.shape} {leaf.value.dtype} {total.tolist()}\n".encode())
    return digest.hexdigest()


@jax.jit
def _mixes(tree: Any) -> Any:
    """What `_mix` says of each leaf; one program serves all runs of a process on one base."""
    return jax.tree.map(_mix, tree)


def _mix(leaf: jax.Array) -> jax.Array:
    """Two sums, (2,) uint32, of hashes of the leaf's bits and their places, each by another hash."""
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]).astype(jnp.uint32)
    place = mixed((places(bits.shape) + 1) * jnp.uint32(STRIDE))
    first = mixed(bits ^ place)
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(mixed(first + place), dtype=jnp.uint32)])


class _KeepBest(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint of one step: the best one as the run's progress names it, whatever ties there are."""

    def __init__(self) -> None:
        self.step: int | None = None

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        return [found.step == self.step for found in checkpoints]


_REASON = 160  # characters of a library's error, that a message repeats
_UNFINISHED = "*.orbax-checkpoint-tmp"  # folders of checkpoints that aren't whole


def newest_step(folder: pathlib.Path) -> int | None:
    """Returns the step of the newest checkpoint in a run's `checkpoints/` folder, without opening it; None where there is none."""
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


class Checkpoints:
    """The `checkpoints/` folder of a run: the newest `keep`, and the best one by the validation metric."""

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        silence()
        self.folder = folder.absolute()
        self._best = _KeepBest()
        policy = preservation_policy
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy.AnyPreservationPolicy([policy.LatestN(max(keep, 1)), self._best]),
            enable_async_checkpointing=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, item_names=("state", "progress"), options=options)

    def latest(self) -> int | None:
        """Returns the newest whole checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, state: State, progress: Progress) -> None:
        """Writes a checkpoint in the background; raises `UserError` where an earlier one could not be written."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._best.step = progress.best_step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_named(state)), progress=ocp.args.JsonSave(dataclasses.asdict(progress))
                ),
            )
        except Exception as error:
            raise self._explained(error) from error

    def wait(self) -> None:
        """Returns once all checkpoints are whole on disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._explained(error) from error

    def progress(self, step: int) -> Progress:
        """Returns what the run knew at a step; raises `UserError` where its files can't be read."""
        with self._reading(step):
            return self._progress(step)

    def _progress(self, step: int) -> Progress:
        found = self._manager.restore(step, args=ocp.args.Composite(progress=ocp.args.JsonRestore()))
        held = found["progress"]
        return Progress(**{**held, "gap": Gap(**held.get("gap", {}))})

    def restore(self, step: int, like: State, sharding: State) -> State:
        """Returns the state of a step, of the structure of `like`, placed by `sharding`; raises `UserError` where it can't be read."""
        abstract = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), like, sharding)
        with self._reading(step):
            found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_named(abstract))))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in _named(like)])

    def restore_trained(self, step: int, trainable: Any, averaged: bool = False) -> State:
        """Returns a step's weights, of the shapes and places of `trainable`, in a state without anything else: the average where it has.

        Raises `UserError` where the step's files can't be read.
        """
        step_like: Any = jax.ShapeDtypeStruct((), jnp.int32)
        weights = jax.tree.map(_float32_like, trainable)
        like = State(step_like, None, None, weights) if averaged else State(step_like, weights, None)
        named = _named(like)
        args = ocp.args.PyTreeRestore(named, ocp.checkpoint_utils.construct_restore_args(named), partial_restore=True)
        with self._reading(step):
            found = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in named])

    def close(self) -> None:
        """Waits and lets go of the folder."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Explains what goes wrong where a step's files are read; the memory that they need is another matter."""
        try:
            yield
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            older = next((found for found in sorted(self._manager.all_steps(), reverse=True) if self._goes_on_from(found, step)), None)
            damaged = [str(found) for found in sorted(self._manager.all_steps()) if found > (older or 0)]
            then = "begins anew" if older is None else f"goes on from step {older}"
            reason = textwrap.shorten(f"{type(error).__name__}: {error}", _REASON)
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} can't be read ({reason}): its files are damaged, not all there, or of "
                f"another version. Delete {', '.join(damaged)} in that folder; the same command then {then}."
            ) from error

    def _goes_on_from(self, older: int, step: int) -> bool:
        """Whether a run could go on from an older step if all later ones were gone: it can be read, and the best one is there."""
        if older >= step:
            return False
        try:
            best = self._progress(older).best_step
        except Exception:
            return False
        return best is None or best in self._manager.all_steps()

    def _explained(self, error: Exception) -> Exception:
        if not is_full(error):
            return error
        for path in self.folder.glob(_UNFINISHED):
            shutil.rmtree(path, ignore_errors=True)
        self._manager.reload()
        newest = self.latest()
        left = (
            "No checkpoint was written."
            if newest is None
            else f"The checkpoint of step {newest} is whole; the same command goes on from there."
        )
        return UserError(f"The disk of {self.folder} is full, or a quota is. {left} Free some space, or take another --workdir.")


def _float32_like(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)


def _named(state: State) -> dict[str, Any]:
    """The state's leaves by name, in the order of its leaves."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {".".join(segments.path_of(keys)): leaf for keys, leaf in flat}


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], folder: pathlib.Path, trains: bool = True) -> None:
    """Raises `UserError` where a checkpoint was written under another configuration, naming the fields.

    Args:
      saved: the configuration of the checkpoint.
      now: the one that is given.
      folder: of the run, for the message.
      trains: whether the run goes on, so that the training rows must stay the same; else the test set may be any.
    """
    before, after = dict(flat(saved)), dict(flat(now))
    free = FREE if trains and (_cuts_test(before) or _cuts_test(after)) else (*FREE, TEST)
    changed = [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted(before | after)
        if before.get(name) != after.get(name) and not name.startswith(free)
    ]
    if changed:
        raise UserError(
            f"{folder} holds a run of another configuration: {'; '.join(changed)}. Go on with the configuration of its config.json, "
            "or choose another --workdir."
        )


def _cuts_test(fields: Mapping[str, Any]) -> bool:
    """Whether the test set is cut from the training rows, which are then fewer than with a test set of its own."""
    return not fields.get(TEST) and bool(fields.get("data.split", (0.0,))[-1])
