"""What a fuzzer has reached: each input is read, or refused by an error of ours, and the model stays as it was."""

import zipfile
from pathlib import Path

import pytest
from readers import READERS, read, starts


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name: str) -> None:
    assert all(read(READERS[name], data) for data in starts(name))


@pytest.mark.parametrize("file", sorted((Path(__file__).parent / "corpus").glob("*.zip")), ids=lambda file: file.stem)
def test_the_corpus(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        answers = [read(READERS[file.stem], archive.read(entry)) for entry in archive.namelist()]
    assert {True, False} == set(answers)
