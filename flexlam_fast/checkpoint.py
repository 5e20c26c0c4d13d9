"""Checkpoints: a directory of JSON, text and safetensors that is either complete and unchanged, or refused.

A checkpoint holds ``config.json``, ``model.safetensors``, any further ``*.safetensors`` and text files, and
``manifest.json`` (see ``manifest.py``). There is no pickle in it.

How a save stays whole under SIGKILL, at any instruction (siblings of ``runs/last`` as the example)::

    1  write and sync everything in   runs/.last.saving
    2  rename runs/last            -> runs/.last.previous      (only if runs/last exists)
    3  rename runs/.last.saving    -> runs/last
    4  rename runs/.last.previous  -> runs/.last.saving, then delete that

So ``.saving`` may be incomplete and is never read, ``last`` and ``.previous`` are always complete, and ``.previous``
counts only while ``last`` is missing (a kill between 2 and 3). One process may save to a directory at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flexlam_fast import manifest
from flexlam_fast.backend import check_weights_dtype
from flexlam_fast.errors import CheckpointError, InputError, StorageError
from flexlam_fast.manifest import CONFIG, MANIFEST, MODEL

_TENSORS = ".safetensors"


class Checkpoint(NamedTuple):
    """What a checkpoint holds: the configuration as text, the model's tensors (CPU), and whatever was saved beside."""

    config_json: str
    tensors: dict[str, Tensor]
    extra_tensors: dict[str, dict[str, Tensor]]
    extra_text: dict[str, str]


def save_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config_json: str,
    extra_tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    extra_text: Mapping[str, str] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write a checkpoint so that a kill at any moment leaves the old one or the new one, complete.

    Args:
        directory: where; missing parents are made.
        tensors: the model's tensors by name, any device and layout.
        config_json: the text of ``config.json``, kept to the byte.
        extra_tensors: file stem -> tensors, for example ``{"optimizer": {...}}``.
        extra_text: file name -> text, for example ``{"trainer.json": "..."}``.
        overwrite: replace a checkpoint that stands there; anything else that stands there is never replaced.

    Returns:
        The resolved directory.

    Raises:
        InputError: for names or tensors that a checkpoint cannot hold.
        StorageError: disk full, read-only or forbidden, or the directory holds something that is no checkpoint;
            what stood there before is intact.
    """
    target = _resolve(directory)
    files = _serialise(tensors, config_json, extra_tensors or {}, extra_text or {})
    try:
        recover_checkpoint(target)
        _check_replaceable(target, overwrite)
        try:
            _write_all(_saving(target), files)
            _swap_in(target)
        finally:
            recover_checkpoint(target)
    except StorageError:
        raise
    except OSError as error:
        cause = error.strerror or str(error)
        raise StorageError(f"{target}: expected to write the checkpoint, got: {cause}") from error
    return target


def load_checkpoint(directory: str | Path) -> Checkpoint:
    """Read and verify a checkpoint; each file is read once, and the bytes that were summed are the bytes parsed.

    Raises:
        CheckpointError: the directory or a file is missing, truncated, damaged, foreign, or of a version that this
            package does not read; the message names the file and the cause.
    """
    target = _resolve(directory)
    try:
        if not target.exists() and _previous(target).is_dir():
            target = _previous(target)
        return _load(target)
    except OSError as error:
        where, cause = error.filename or target, error.strerror or str(error)
        raise CheckpointError(f"{where}: expected to read a checkpoint, got: {cause}") from error


def holds_checkpoint(directory: str | Path) -> bool:
    """Whether a checkpoint is there to be loaded, or what claims to be one; also while a killed save left it aside."""
    target = _resolve(directory)
    return (target / MANIFEST).is_file() or (not target.exists() and _previous(target).is_dir())


def save_weights(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    config_json: str,
    dtype: torch.dtype | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """:func:`save_checkpoint` of a model's tensors alone, floating ones cast to ``dtype``; None keeps them.

    Raises:
        InputError: another ``dtype`` than float32, bfloat16 or float16.
        StorageError: as :func:`save_checkpoint`.
    """
    if dtype is not None:
        check_weights_dtype("dtype", dtype)
    cast = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()}
    return save_checkpoint(directory, cast, config_json, extra_text=notes)


def copy_tensors(file: str, ours: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Take over weights of any floating dtype, after checking that names and shapes are exactly ours.

    Raises:
        CheckpointError: naming ``file`` and the first tensor that does not fit; nothing has been copied then.
    """
    match_tensors(file, {k: t.to(found[k].dtype) if k in found else t for k, t in ours.items()}, found)
    for key in ours:
        if not found[key].is_floating_point() or not bool(torch.isfinite(found[key]).all()):
            raise CheckpointError(f"{file}: {key}: expected finite floating numbers, got others")
    for key, t in ours.items():
        t.copy_(found[key])


def match_tensors(file: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Check that ``found`` has exactly the names, shapes and dtypes of ``expected`` (for example a ``state_dict``).

    Raises:
        CheckpointError: naming ``file``, the first tensor that differs, and how.
    """
    for name, want in expected.items():
        if name not in found:
            raise CheckpointError(f"{file}: expected tensor {name!r} {_describe(want)}, got no such tensor")
        have = found[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            raise CheckpointError(f"{file}: {name}: expected {_describe(want)}, got {_describe(have)}")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{file}: expected {len(expected)} known tensors, got the unknown {name!r} as well")


def recover_checkpoint(directory: str | Path) -> None:
    """Tidy what a killed save left: put the previous checkpoint back if the kill fell between the two renames.

    Saving does this by itself, and loading needs no tidying; call it to clear the leftovers without either.
    """
    target = _resolve(directory)
    saving, previous = _saving(target), _previous(target)
    if saving.exists():
        shutil.rmtree(saving)
    if not previous.exists():
        return
    if target.exists():
        os.rename(previous, saving)  # from here on it may be incomplete, and must not bear the name that is read
        shutil.rmtree(saving)
    else:
        os.rename(previous, target)
    _sync_directory(target.parent)


def _resolve(directory: str | Path) -> Path:
    # A link to a checkpoint stands for the checkpoint: it is the folder behind the link that gets renamed.
    return Path(os.path.realpath(directory))


def _saving(target: Path) -> Path:
    return target.parent / f".{target.name}.saving"


def _previous(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an empty directory or a checkpoint: replacing deletes what was there."""
    if not target.exists():
        return
    if not target.is_dir():
        raise StorageError(f"{target}: expected a directory or nothing, got a file")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise StorageError(f"{target}: expected a new directory, got one that holds files")
    try:
        manifest.check_strangers(target, manifest.read_manifest(target))
    except CheckpointError as error:
        raise StorageError(f"{target}: expected a checkpoint to replace, got other files: {error}") from error


def _serialise(
    tensors: Mapping[str, Tensor],
    config_json: str,
    extra_tensors: Mapping[str, Mapping[str, Tensor]],
    extra_text: Mapping[str, str],
) -> dict[str, bytes]:
    tensor_files = {stem + _TENSORS: group for stem, group in extra_tensors.items()}
    for name in (*tensor_files, *extra_text):
        reserved = name in (CONFIG, MODEL, MANIFEST) or (name in extra_text and name.endswith(_TENSORS))
        if reserved or not manifest.is_plain_name(name):
            raise InputError(f"checkpoint: expected a plain, unreserved file name, got {name!r}")
    files = {name: text.encode() for name, text in {CONFIG: config_json, **extra_text}.items()}
    for name, group in {MODEL: tensors, **tensor_files}.items():
        for key, value in group.items():
            storable = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
            if not isinstance(key, str) or key == "__metadata__" or not storable:
                kind = _describe(value) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"{name}: expected named dense tensors with data, got {kind} for {key!r}")
        # Cloning parts tensors that share storage (tied weights, views), which safetensors refuses.
        parted = {key: value.detach().cpu().contiguous().clone() for key, value in group.items()}
        files[name] = safetensors.torch.save(parted)
    files[MANIFEST] = manifest.manifest_text({name: manifest.entry_of(data) for name, data in files.items()}).encode()
    return files


def _write_all(folder: Path, files: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for name, data in files.items():
        with open(folder / name, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    _sync_directory(folder)


def _swap_in(target: Path) -> None:
    if target.exists():
        os.rename(target, _previous(target))
    os.rename(_saving(target), target)
    _sync_directory(target.parent)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _load(target: Path) -> Checkpoint:
    if not target.is_dir():
        got = "a file" if target.exists() else "nothing there"
        raise CheckpointError(f"{target}: expected a checkpoint directory, got {got}")
    entries = manifest.read_manifest(target)
    manifest.check_strangers(target, entries)
    tensors: dict[str, dict[str, Tensor]] = {}
    texts: dict[str, str] = {}
    for name, entry in entries.items():
        path = target / name
        data = manifest.read_verified(path, entry)
        try:
            if name.endswith(_TENSORS):
                tensors[name.removesuffix(_TENSORS)] = safetensors.torch.load(data)
            else:
                texts[name] = data.decode()
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: expected {name} of a checkpoint, got other content: {error}") from error
    return Checkpoint(texts.pop(CONFIG), tensors.pop(MODEL.removesuffix(_TENSORS)), tensors, texts)


def _describe(tensor: Tensor) -> str:
    return f"[{','.join(map(str, tensor.shape))}] {str(tensor.dtype).removeprefix('torch.')}"
