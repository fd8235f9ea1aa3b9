"""The command line that the examples share. It needs none of their packages."""

import sys

import common
import pytest


def parse(*arguments):
    parser = common.make_parser("Does nothing.\n\nMore.", "do less")
    parser.add_argument("--steps", type=common.whole_number(1))
    parser.add_argument("--seed", type=common.seed, default=0)
    return parser, parser.parse_args(arguments)


def test_a_picture_is_named_by_the_settings_that_are_not_the_default(tmp_path):
    def name(*arguments):
        parser, args = parse(f"--out={tmp_path / 'new' / 'folder'}", *arguments)
        path = common.picture(parser, args, "curve", "quick", "steps", "seed")
        assert path.parent.is_dir()
        return path.name

    assert name() == name("--seed=0") == "curve.png"
    assert name("--seed=3", "--quick") == "curve-quick-seed=3.png"
    assert name("--steps=5") == "curve-steps=5.png"
    assert common.of_stopped(tmp_path / "curve-steps=5.png").name == "curve-steps=5-stopped.png"


@pytest.mark.parametrize("place", ["a file", "in a file"])
def test_a_folder_that_cannot_be_written_into_ends_the_script_in_one_line(place, tmp_path, capsys):
    folder = tmp_path / "file"
    folder.touch()
    folder /= "" if place == "a file" else "folder"
    parser, args = parse(f"--out={folder}")
    with pytest.raises(SystemExit) as stop:
        common.picture(parser, args, "curve")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--out must be a folder to write into, got {folder}: ")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "argument --steps: must be a whole number of at least 1, got '0'"),
        ("--steps=1.5", "argument --steps: must be a whole number of at least 1, got '1.5'"),
        ("--seed=-1", "argument --seed: must be a whole number from 0 to 2147483647, got '-1'"),
        (f"--seed={2**31}", "got '2147483648'"),
    ],
)
def test_whole_numbers(argument, message, capsys):
    with pytest.raises(SystemExit):
        parse(argument)
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_in_one_line(capsys):
    assert sys.excepthook is common.report
    common.report(KeyboardInterrupt, KeyboardInterrupt(), None)
    common.report(KeyboardInterrupt, KeyboardInterrupt("Stopped after 3 steps."), None)
    assert capsys.readouterr().err == "Stopped.\nStopped after 3 steps.\n"
