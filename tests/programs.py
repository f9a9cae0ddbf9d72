"""What the tests of the examples' programs share."""

import pytest


def assert_fails(capsys, code, words, main, *arguments):
    """The program ends with this exit code and one line on stderr that has these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in arguments])
    message = capsys.readouterr().err
    assert exit.value.code == code
    assert message.count("\n") == 1 and message.endswith("\n")
    for word in words.split():
        assert word in message
