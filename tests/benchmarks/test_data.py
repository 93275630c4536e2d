"""The pairs that figures in the README are about."""

from benchmarks.data import files
from benchmarks.data.make_pairs import pairs_of_source

from octavo.sources import DataKind, open_data


def test_the_files_are_those_whose_sums_were_written_down():
    assert set(files.check_sums()) == {files.TEST.name, files.CALIBRATION.name, files.DRAWS.name}


def test_no_text_is_in_two_pairs_and_none_in_two_files():
    test, calibration, draws = open_data(files.TEST), open_data(files.CALIBRATION), open_data(files.DRAWS)
    assert (len(test), len(calibration), len(draws)) == (1000, 32, 288)
    assert test.kind is DataKind.TEXT_PAIRS
    texts = [text for data in (test, calibration, draws) for sample in data.samples for text in sample.texts]
    assert len(set(texts)) == 2 * (1000 + 32 + 288)
    assert max(map(len, texts)) <= 400


def test_a_pair_is_the_first_line_of_the_docstring_and_the_source_without_it():
    source = '''class A:
    @property
    def size(self):
        """How many there are.

        More about it.
        """
        return len(self.items)

    def undocumented(self):
        return 0

    def only_documented(self):
        """Nothing else."""
'''
    (pair,) = pairs_of_source(source)
    assert pair.query == "How many there are."
    assert pair.document == "def size(self):\n    return len(self.items)"
