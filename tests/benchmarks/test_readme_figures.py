"""The README's figures are those of the committed JSON."""

from benchmarks.report.__main__ import main


def test_readme_says_what_the_results_say(capsys) -> None:
    assert main(["--check"]) == 0, capsys.readouterr()
