"""The token of an engine: its server answers those who have it, and no others, since they may change the weights."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from dapo_megatron.config import Config
from dapo_megatron.errors import ConfigError

TOKEN = "DAPO_MEGATRON_ENGINE_TOKEN"
"""Environment variable that tells it to an engine's processes: unlike a command line, others cannot read it."""


def make_token() -> str:
    return secrets.token_urlsafe(32)


def authorization(token: str) -> str:
    """Spell the header of a request.

    >>> authorization("s3cret")
    'Bearer s3cret'
    """
    return f"Bearer {token}"


def token_file(config: Config) -> Path:
    """Where the token is kept of engines that run on their own."""
    return config.engine.token_file or engines_folder(config) / "token"


def engines_folder(config: Config) -> Path:
    """What `dapo-megatron engines` writes: not into the run's folder, which many may read."""
    return config.run.folder.with_name(f"{config.run.name}-engines")


def given_token(config: Config, inherited: Mapping[str, str] = os.environ) -> str | None:
    """The token in the environment, or else in `token_file`; None where neither is there.

    Raises:
        ConfigError: where others may read the file, or it holds no token.
    """
    path = token_file(config)
    if TOKEN in inherited:
        return _checked(inherited[TOKEN], f"{TOKEN} in the environment")
    try:
        mode, text = path.stat().st_mode, path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read the token of the engines (engine.token_file): {error}") from error
    if mode & 0o077:
        raise ConfigError(
            f"{path} may be read by others than its owner (mode {mode & 0o777:o}), and whoever has the token can "
            f"change the weights: remove it for another one, or chmod 600 it where nobody has read it"
        )
    return _checked(text.strip(), str(path))


def need_token(config: Config) -> str:
    """Return the given token.

    Raises:
        ConfigError: as `given_token`, and where there is none.
    """
    if token := given_token(config):
        return token
    raise ConfigError(
        f"engine.urls name engines that run already, but their token is not here: neither is {TOKEN} in the "
        f"environment nor {token_file(config)} a file (engine.token_file); copy the one that `dapo-megatron engines` "
        f"has written where they run"
    )


def keep_token(config: Config) -> str:
    """Return the given token, or a new one that `token_file` holds from now on, for its owner only.

    Raises:
        ConfigError: as `given_token`, and where the file cannot be written.
    """
    if token := given_token(config):
        return token
    token, path = make_token(), token_file(config)
    mine = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{token}\n")
        # The name is there at once with all of it, and for the first of several machines only.
        os.link(mine, path)
    except FileExistsError:
        return need_token(config)
    except OSError as error:
        raise ConfigError(
            f"cannot write the token of the engines: {error}; choose another place (engine.token_file, or run.dir)"
        ) from error
    finally:
        with suppress(OSError):
            mine.unlink()
    return token


def _checked(token: str, where: str) -> str:
    if not re.fullmatch(r"[!-~]{16,}", token):
        raise ConfigError(
            f"{where}: a token has at least 16 characters of ASCII and no spaces, this has {len(token)} characters; "
            f"`openssl rand -hex 32` makes one"
        )
    return token
