from biomedclip.progress import silent, terminal


def test_silent_shows_nothing(capsys):
    with silent("reading", 3) as advance:
        advance()
        advance(2, note="x")
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_a_line_on_stderr_and_nothing_on_stdout(capsys):
    with terminal("reading figures", 3) as advance:
        advance(3, note="loss 1.2")
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading figures: 3 done in" in err
    assert "loss 1.2" in err
