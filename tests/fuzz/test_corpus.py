"""Nearly whole files, of a seed and of a fuzzer: each is read, or refused by an error of ours, and the model stays as
it was."""

import zipfile
from pathlib import Path
from random import Random

import pytest
from mutate import damaged
from readers import READERS, read, starts

CASES = 1000
pytestmark = pytest.mark.usefixtures("without_type_checks")


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name: str) -> None:
    assert all(read(READERS[name], data) for data in starts(name))


@pytest.mark.parametrize("name", READERS)
def test_a_thousand_damaged_files(name: str) -> None:
    random, whole = Random(name), list(starts(name))
    answers = [read(READERS[name], damaged(random.choice(whole), random)) for _ in range(CASES)]
    assert 0 < sum(answers) < CASES


@pytest.mark.parametrize("name", READERS)
def test_the_corpus(name: str) -> None:
    with zipfile.ZipFile(Path(__file__).parent / "corpus" / f"{name}.zip") as archive:
        assert archive.namelist()
        for entry in archive.namelist():
            read(READERS[name], archive.read(entry))
