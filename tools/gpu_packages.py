"""Gives an interpreter that has torch for CUDA the other packages of a requirements file, and leaves torch as it is.

    python tools/gpu_packages.py requirements/gpu-smoke.txt --into .gpu/smoke [--wheels DIR]
    python tools/gpu_packages.py requirements/gpu-smoke.txt --download DIR

The first installs what is missing, or is there in a version that does not fit, into a folder for PYTHONPATH: neither
the interpreter nor its packages are changed, whatever kind of environment they are in. With --wheels it takes them
from there, and needs no network. The second, on a machine with a network, fetches the wheels for Python 3.12 on Linux;
torch, which is large and on the images that this is for, is left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ModuleNotFoundError:  # it may be what is to be installed
    from pip._vendor.packaging.requirements import Requirement

TARGET = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
"""Of downloads."""
_GLIBC = range(5, 36)
"""2.N of the manylinux wheels that are taken; pip wants each named."""


def read(file: Path) -> list[Requirement]:
    """Return the requirements of a file that holds one a line, and comments."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def fits(requirement: Requirement) -> bool:
    """Return whether this interpreter has it. A local version, such as +cu130, does not count."""
    found = version(requirement.name)
    return found is not None and requirement.specifier.contains(found, prereleases=True)


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def install(
    requirements: list[Requirement], folder: Path, wheels: Path | None, also: Path | None, given: list[str]
) -> None:
    for requirement in requirements:
        if requirement.name in given and not fits(requirement):
            sys.exit(f"{sys.executable} must have {requirement}, and has {version(requirement.name)}; name another one")
    kept = [requirement for requirement in requirements if fits(requirement)]
    missing = [str(requirement) for requirement in requirements if requirement not in kept]
    print(f"{folder}: {len(missing)} packages to install; {len(kept)} are there: {', '.join(r.name for r in kept)}")
    if missing:
        source = ["--no-index"] if wheels else []
        source += [f"--find-links={place}" for place in (wheels, also) if place]
        options = ["--no-deps", "--upgrade", "--target", str(folder), "--quiet", "--disable-pip-version-check"]
        pip("install", *options, *source, *missing)


def download(requirements: list[Requirement], folder: Path) -> None:
    platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in _GLIBC]
    platforms += [f"--platform=manylinux{n}_x86_64" for n in (1, 2010, 2014)]
    wanted = [str(requirement) for requirement in requirements if requirement.name != "torch"]
    pip("download", "--no-deps", "--quiet", *TARGET, *platforms, "--dest", str(folder), *wanted)
    size = sum(wheel.stat().st_size for wheel in folder.iterdir())
    print(f"{folder}: {len(wanted)} packages, {size / 2**20:.1f} MiB")


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("requirements", type=Path)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--into", type=Path, metavar="DIR", help="install there what is missing")
    action.add_argument("--download", type=Path, metavar="DIR", help="fetch wheels for Python 3.12 on Linux")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="with --into: take packages from here only")
    parser.add_argument("--also", type=Path, metavar="DIR", help="with --into: look here besides the package index")
    parser.add_argument("--given", nargs="*", default=[], metavar="NAME", help="with --into: must be there already")
    arguments = parser.parse_args()
    if not arguments.requirements.is_file():
        parser.error(f"there is no file {arguments.requirements}")
    if arguments.wheels and not any(arguments.wheels.glob("*.whl")):
        parser.error(f"there are no wheels in {arguments.wheels.absolute()}; `make gpu-wheels` fetches some")
    requirements = read(arguments.requirements)
    try:
        if arguments.download:
            download(requirements, arguments.download)
        else:
            install(requirements, arguments.into, arguments.wheels, arguments.also, arguments.given)
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip failed with exit code {error.returncode}; see above")


if __name__ == "__main__":
    main()
