"""What the cache of compiled kernels may hold: damaged files, other people's, and what two processes make at once."""

import hashlib
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from contextual_cnn.ops.compiled_cache import load_cached
from tests.conftest import HAS_COMPILER
from tests.helpers import quick_start

NOBODY = 65534
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


class Kernels:
    """The real kernels in processes of their own, which share a cache.

    The compiler is real, once; then a stand-in gives what that one made, and counts.
    """

    def __init__(self, folder: Path, compiled: Path | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.cache, self._folder = folder / "cache", folder
        self._environment = {"XDG_CACHE_HOME": str(self.cache), "HOME": str(folder / "home")}
        if compiled is not None:
            compiler = folder / "compiler"
            compiler.write_text(
                f'#!/usr/bin/env bash\necho once >> {folder}/builds\nsleep 0.2\ncp {compiled} "${{@: -1}}"\n'
            )
            compiler.chmod(0o755)
            self._environment["CXX"] = str(compiler)

    def start(self, number: int = 0) -> quick_start.Command:
        output = self._folder / f"output_{number}"
        return quick_start.Command("tests/helpers/fresh_process.py", output=output, **self._environment)

    def compute(self) -> None:
        process = self.start()
        status = process.wait()
        assert (status, process.printed.splitlines()[-1:]) == (0, ["computed by the kernels"]), process.printed

    @property
    def builds(self) -> int:
        builds = self._folder / "builds"
        return len(builds.read_text().splitlines()) if builds.exists() else 0

    @property
    def libraries(self) -> list[Path]:
        """Wherever they are."""
        return sorted(self._folder.rglob("*.so"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """What the real compiler makes, from nothing to a layer's output."""
    kernels = Kernels(tmp_path_factory.mktemp("compiled"))
    kernels.compute()
    (library,) = kernels.libraries
    return Path(shutil.copy(library, kernels.cache / "copy"))


@pytest.fixture
def kernels(tmp_path, compiled) -> Kernels:
    made = Kernels(tmp_path, compiled)
    made.compute()
    assert made.builds == 1
    return made


DAMAGES = {
    "empty": lambda content: b"",
    "100 bytes": lambda content: content[:100],
    "5000 bytes": lambda content: content[:5000],
    "30 %": lambda content: content[: len(content) * 3 // 10],
    "60 %": lambda content: content[: len(content) * 6 // 10],
    "one bit": lambda content: content[:4321] + bytes([content[4321] ^ 1]) + content[4322:],
}


@needs_compiler
@pytest.mark.run
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_built_again_and_computes(kernels, damage):
    (library,) = kernels.libraries
    library.write_bytes(damage(library.read_bytes()))
    kernels.compute()
    assert kernels.builds == 2
    kernels.compute()
    assert kernels.builds == 2


def plant(library: Path, tmp_path: Path) -> Path:
    """Puts another user's library in the place of this one; it leaves the returned file behind when it is loaded."""
    trace, source, planted = tmp_path / "was_run", tmp_path / "planted.c", tmp_path / "planted"
    source.write_text(
        "#include <fcntl.h>\n"
        f'__attribute__((constructor)) static void run(void) {{ open("{trace}", O_CREAT, 0600); }}\n'
    )
    subprocess.run(["c++", "-x", "c", "-shared", "-fPIC", source, "-o", planted], check=True)
    name, _, digest = library.stem.rpartition("-")
    found = hashlib.sha256(planted.read_bytes()).hexdigest()
    place = library.with_name(f"{name}-{found[: len(digest)]}.so" if name else library.name)
    library.unlink()
    shutil.copy(planted, place)
    os.chown(place, NOBODY, NOBODY)
    return trace


@needs_compiler
@needs_root
@pytest.mark.run
@pytest.mark.parametrize("theirs", ["file", "folder"])
def test_a_library_planted_by_another_user_is_not_loaded(kernels, tmp_path, theirs):
    """In a cache that all may write to, as clusters have one for scratch data."""
    (library,) = kernels.libraries
    kernels.cache.chmod(0o1777)
    if theirs == "folder":
        os.chown(library.parent, NOBODY, NOBODY)
        library.parent.chmod(0o755)
    trace = plant(library, tmp_path)
    kernels.compute()
    assert not trace.exists()
    assert kernels.builds == 2
    kernels.compute()
    assert kernels.builds == 2  # there is a cache of its own from now on


@needs_compiler
@pytest.mark.run
def test_two_processes_at_once_leave_one_library(tmp_path, compiled):
    kernels = Kernels(tmp_path, compiled)
    both = [kernels.start(number) for number in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert {process.printed for process in both} == {"computed by the kernels\n"}
    assert len(kernels.libraries) == 1
    assert [path.name for path in kernels.cache.rglob("*")] == ["contextual_cnn", kernels.libraries[0].name]


class Library:
    """A build step and a loader that tell what they did."""

    def __init__(self, *unloadable: bytes) -> None:
        self.built, self.loaded, self._unloadable = 0, [], unloadable

    def build(self, path: Path) -> None:
        self.built += 1
        path.write_bytes(b"library %d" % self.built)

    def load(self, path: Path) -> None:
        if path.read_bytes() in self._unloadable:
            raise OSError("it needs another C library")
        self.loaded.append((path, path.read_bytes()))

    def use(self) -> Path:
        load_cached("name", self.build, self.load)
        return self.loaded[-1][0]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / "home"


def test_folder_and_file_are_this_users_alone_and_durable(home, monkeypatch):
    synced, library, umask = [], Library(), os.umask(0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    try:
        path = library.use()
    finally:
        os.umask(umask)
    assert path.parent == home / ".cache" / "contextual_cnn"
    assert [stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path)] == [0o700, 0o600]
    assert synced == [path.stat().st_ino, path.parent.stat().st_ino]
    assert library.use() == path
    assert library.built == 1


def test_what_does_not_load_is_made_again_beside_it(home):
    """Of two machines that share a home, each may need a library of its own."""
    library = Library(b"library 1")
    with pytest.raises(OSError, match="another C library"):
        library.use()  # the new one does not load either
    library.use()
    library.use()
    assert library.built == 2
    assert len(list((home / ".cache" / "contextual_cnn").iterdir())) == 2


def folder_of_another(folder: Path, library: Path) -> None:
    os.chown(folder, NOBODY, NOBODY)


def folder_is_a_link(folder: Path, library: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


def file_of_another(folder: Path, library: Path) -> None:
    os.chown(library, NOBODY, NOBODY)


def file_for_all(folder: Path, library: Path) -> None:
    library.chmod(0o666)


def file_of_a_group(folder: Path, library: Path) -> None:
    library.chmod(0o660)


def file_is_a_link(folder: Path, library: Path) -> None:
    library.rename(folder.parent / "elsewhere")
    library.symlink_to(folder.parent / "elsewhere")


def file_is_a_pipe(folder: Path, library: Path) -> None:
    library.unlink()
    os.mkfifo(library, 0o600)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(folder_of_another, marks=needs_root),
        folder_is_a_link,
        pytest.param(file_of_another, marks=needs_root),
        file_for_all,
        file_of_a_group,
        file_is_a_link,
        file_is_a_pipe,
    ],
)
def test_what_others_may_write_to_is_made_again(home, change):
    library = Library()
    path = library.use()
    change(path.parent, path)
    library.use()
    assert library.built == 2
    assert library.loaded[-1][1] == b"library 2"


def test_a_folder_that_others_could_write_to_is_closed_to_them(home):
    """As earlier versions left it with a umask of 002."""
    library = Library()
    path = library.use()
    path.parent.chmod(0o777)
    assert library.use() == path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("named", ["", "cache"])
def test_a_cache_is_never_looked_for_in_the_working_folder(home, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    assert Library().use().is_relative_to(home)


def test_without_a_folder_to_keep_it_in_the_library_is_made_and_gone(monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    library = Library()
    assert not library.use().parent.exists()
    library.use()
    assert library.built == 2
