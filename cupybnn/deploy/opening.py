"""A network from whatever file it is in: a run folder, a checkpoint or a packed network."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cupybnn.backends.devices import resolve
from cupybnn.deploy.network import PackedNetwork
from cupybnn.errors import CheckpointError, SettingError
from cupybnn.npz import open_npz
from cupybnn.paths import user_path

__all__ = ["is_packed_file", "open_network"]


def is_packed_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like what `PackedNetwork.save` writes; its header alone is looked at."""
    with contextlib.suppress(OSError, ValueError), open_npz(user_path(path)) as archive:
        # A checkpoint's header is text, that of a packed network is bytes.
        return archive.header("header")[1].kind == "u"
    return False


def open_network(
    path: str | os.PathLike[str], *, which: str | None = None, device: str = "auto"
) -> PackedNetwork:
    """Open a trained network to predict with.

    Parameters
    ----------
    path : path-like
        A run folder or a checkpoint, whose model is packed, or a file of a packed network.
    which : {"newest", "best"}, optional
        Which checkpoint of a run folder; default: the newest.
    device : str
        Where the network is to be: "auto", "cpu", "cuda" or "cuda:N".

    Raises
    ------
    CheckpointError
        If there is no network at `path`, it is damaged, or its model cannot be packed.
    SettingError
        If `which` is given for a file.

    Examples
    --------
    >>> import tempfile
    >>> import cupybnn
    >>> from cupybnn.deploy import open_network
    >>> result = cupybnn.train(dataset="digits", binary=True, max_steps=5, device="cpu")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cupybnn.PackedNetwork.from_model(result.model).save(f"{folder}/net.npz")
    ...     open_network(f"{folder}/net.npz").inputs.features
    64
    """
    target = user_path(path)
    if which is not None and not target.is_dir():
        raise SettingError(
            f"The 'which' chooses a checkpoint of a run folder; got {which!r} for {target}, which "
            f"is not a folder. Leave it out."
        )
    if not target.exists():
        raise CheckpointError(f"The model {target} does not exist.")
    where = str(resolve(device))
    if is_packed_file(target):
        try:
            return PackedNetwork.load(target, where)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    _check_kind(target)
    try:
        return PackedNetwork.from_run(target, which or "newest", device=where)
    except SettingError:
        raise
    except ValueError as error:
        raise CheckpointError(f"The model of {target} cannot be packed. {error}") from error


def _check_kind(path: Path) -> None:
    """Refuse a file that is no .npz file in words that fit any model, not a checkpoint alone."""
    if not path.is_file():
        return
    try:
        with open_npz(path):
            return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{path} is neither a packed network nor a checkpoint: {reason}."
        ) from error
