"""Tiny packages for the real pip to install without a network: wheels by hand, a package index in a folder."""

import hashlib
import os
import tarfile
import zipfile
from pathlib import Path


def make_wheel(folder: Path, name: str, version: str, *, requires: str = "") -> Path:
    """A pure Python wheel of one module that knows its version."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": metadata + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, content)
    return wheel


def make_sdist(folder: Path, name: str, version: str, *, build_requires: str) -> Path:
    """A source archive whose build copies a wheel that lies in it; says to need another package for that."""
    source = folder / f"{name}-{version}"
    wheel = make_wheel(source, name, version)
    (source / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (source / "pyproject.toml").write_text(
        f'[build-system]\nrequires = ["{build_requires}"]\nbuild-backend = "copying"\nbackend-path = ["."]\n'
    )
    (source / "copying.py").write_text(
        "import shutil\n"
        "def build_wheel(folder, config_settings=None, metadata_directory=None):\n"
        f"    shutil.copy({wheel.name!r}, folder)\n"
        f"    return {wheel.name!r}\n"
    )
    archive = folder / f"{name}-{version}.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(source, source.name)
    return archive


def hash_line(package: Path) -> str:
    """A wheel's or source archive's line in setup/hashes.txt."""
    name, version = package.name.removesuffix(".tar.gz").split("-")[:2]
    return f"{name}=={version} \\\n    --hash=sha256:{hashlib.sha256(package.read_bytes()).hexdigest()}\n"


def install_by_hand(site_packages: Path, name: str, version: str) -> None:
    """What installing a wheel leaves behind, as a container or a cluster's module has it."""
    with zipfile.ZipFile(make_wheel(site_packages.parent / "wheels", name, version)) as archive:
        archive.extractall(site_packages)


def make_index(folder: Path, wheel: Path) -> str:
    """A package index that holds one wheel, whose hash it tells as indexes do; returns its URL."""
    name = wheel.name.split("-")[0]
    (folder / name).mkdir(parents=True)
    (folder / "index.html").write_text(f'<a href="{name}/">{name}</a>')
    link = f"{wheel.resolve().as_uri()}#sha256={hashlib.sha256(wheel.read_bytes()).hexdigest()}"
    (folder / name / "index.html").write_text(f'<a href="{link}">{wheel.name}</a>')
    return folder.resolve().as_uri()


def pip_environment(wheels: Path, index_url: str) -> dict[str, str]:
    """This process's environment, with a pip that knows nothing but a folder of wheels and one index."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "MAKE", "MFLAGS"))}
    return environment | {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(wheels),
        "PIP_INDEX_URL": index_url,
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "0",
    }
