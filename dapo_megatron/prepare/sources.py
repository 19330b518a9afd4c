"""Where the rows come from: a named set, a repository on the hub, or a file; as files on this machine."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dapo_megatron.errors import ConfigError, DapoError
from dapo_megatron.prepare.sets import SETS, DataSet

_HUB = re.compile(r"hub:(?P<repository>[^/:@]+/[^/:@]+):(?P<files>[^@]+)(?:@(?P<revision>.+))?")
_SUFFIXES = (".parquet", ".jsonl")
_LICENCE = re.compile(r"^license: *(\S.*)$", re.MULTILINE)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    """dapo-math-17k; of a file its name without the suffix, of a repository the part after the slash."""
    files: tuple[Path, ...]
    known: DataSet | None = None
    """None for somebody's own data."""
    repository: str | None = None
    revision: str | None = None
    """The commit that the files were downloaded at."""
    licence: str | None = None
    """What is said about it, if anything."""


def find(word: str, folder: Path | None, say: Say) -> Source:
    """Find the files of one source, or download them.

    Files go to the cache of the Hugging Face hub: those that are there are not downloaded again.

    Args:
        word: a name of `SETS`, hub:OWNER/NAME:FILES with a pattern of files, each with @REVISION or without; or a
            .parquet or .jsonl file.
        folder: where named sets lie, so that nothing is downloaded; None means the hub.

    Raises:
        ConfigError: where there is no such set, file, repository or revision.
        DapoError: where the hub cannot be reached, or the disk takes no more.
    """
    name, _, revision = word.partition("@")
    if known := SETS.get(name):
        if folder:
            if revision:
                raise ConfigError(f"{word}: what lies in --from {folder} has no revision; leave @{revision} away")
            return _laid_out(name, known, folder)
        return _download(name, known.repository, known.files, revision or None, known, say)
    if match := _HUB.fullmatch(word):
        if folder:
            raise ConfigError(f"{word} is on the hub, and --from {folder} is for use without it; give a file instead")
        repository = match["repository"]
        return _download(repository.partition("/")[2], repository, match["files"], match["revision"], None, say)
    path = Path(word)
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            f"no data set {word!r}: give one of {', '.join(SETS)}, hub:OWNER/NAME:FILES, such as "
            f"hub:math-ai/aime25:test*.jsonl, or a {' or '.join(_SUFFIXES)} file"
        )
    if not path.is_file():
        raise ConfigError(f"cannot read {path}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    return Source(path.stem, (path,))


def _laid_out(name: str, known: DataSet, folder: Path) -> Source:
    if not folder.is_dir():
        raise ConfigError(f"--from {folder} is no folder")
    snapshot = folder / known.repository
    places = [[file for suffix in _SUFFIXES if (file := folder / f"{name}{suffix}").is_file()]]
    places.append(_numbered(file for suffix in _SUFFIXES for file in folder.glob(f"{name}.part*{suffix}")))
    places.append(_matching(snapshot, known.files))
    found = [files for files in places if files]
    if not found:
        raise ConfigError(
            f"--from {folder} has no {name}: looked for {name}.parquet, {name}.jsonl, {name}.part*.jsonl and "
            f"{known.repository}/{known.files}; where there is a network, `hf download {known.repository} --repo-type "
            f"dataset --local-dir DIR/{known.repository}` makes the last"
        )
    if len(found) > 1 or len(places[0]) > 1:
        names = ", ".join(str(file.relative_to(folder)) for files in found for file in files)
        raise ConfigError(f"--from {folder} has {name} more than once: {names}; leave one of them there")
    in_snapshot = found[0] is places[2]
    licence = _licence(snapshot) if in_snapshot else None
    return Source(
        name, tuple(found[0]), known, known.repository if in_snapshot else None, None, licence or known.licence
    )


def _numbered(files: Iterable[Path]) -> list[Path]:
    """Part 2 before part 10."""
    return sorted(files, key=lambda file: (len(file.name), file.name))


def _matching(folder: Path, pattern: str) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.suffix in _SUFFIXES)
    return sorted(file for file in files if fnmatchcase(file.relative_to(folder).as_posix(), pattern))


def _download(
    name: str, repository: str, pattern: str, revision: str | None, known: DataSet | None, say: Say
) -> Source:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(repository, revision=revision)
        there = [sibling.rfilename for sibling in info.siblings or ()]
        wanted = [file for file in there if fnmatchcase(file, pattern) and Path(file).suffix in _SUFFIXES]
        if not wanted:
            raise ConfigError(f"{repository} has no {pattern} on the hub; it has {', '.join(there) or 'no files'}")
        say(f"{name}: {repository} at {info.sha}")
        # One after the other, in this thread: Ctrl-C ends a download at once.
        files = [
            Path(hf_hub_download(repository, file, repo_type="dataset", revision=info.sha))
            for file in (*wanted, *(["README.md"] if "README.md" in there else ()))
        ]
    except ConfigError:
        raise
    except GatedRepoError as error:
        raise ConfigError(f"{repository} wants its terms agreed to on the hub first, and `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"the hub has no data set {repository}, or it is private: `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ConfigError(f"{repository} has no revision {revision} on the hub") from error
    except Exception as error:  # network, proxies, certificates: each library beneath has errors of its own
        raise DapoError(_why(error, repository)) from error
    licence = _licence(files[0].parents[wanted[0].count("/")])
    return Source(
        name,
        tuple(files[: len(wanted)]),
        known,
        repository,
        info.sha,
        licence or (known.licence if known else None),
    )


def _why(error: Exception, repository: str) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        from huggingface_hub.constants import HF_HUB_CACHE

        there = next(path for path in (Path(HF_HUB_CACHE), *Path(HF_HUB_CACHE).parents) if path.exists())
        return (
            f"cannot keep {repository} in {HF_HUB_CACHE}: {error.strerror} ({shutil.disk_usage(there).free:,} bytes "
            "free); set HF_HOME to a folder on another disk"
        )
    return (
        f"cannot get {repository} from the Hugging Face hub: {error}. Started again, it goes on with what it has not "
        "got. Without a network, give --from DIR with the files (docs/data.md has how they are laid out)"
    )


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    begin, _, rest = card.read_text(encoding="utf-8", errors="replace").partition("---\n")
    match = None if begin else _LICENCE.search(rest.partition("\n---")[0])
    return f"{match[1].strip()} by its data card" if match else None
