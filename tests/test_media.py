import pytest

from data_builders.pmc.media import resolve_graphic


@pytest.mark.parametrize(
    ("href", "names", "expected"),
    [
        ("f1.jpg", ["f1.jpg"], "f1.jpg"),
        ("f1", ["f1.jpg", "f1.gif"], "f1.jpg"),
        ("f1", ["f1.gif"], "f1.gif"),
        ("f1.tif", ["f1.jpg"], "f1.jpg"),
        ("F1.JPG", ["f1.jpg"], "f1.jpg"),
        ("f1.jpg", ["f1.JPG"], "f1.JPG"),
        ("f1", ["f1.webp"], "f1.webp"),
        ("f1", ["f1.tif", "f1.png"], "f1.png"),
        ("f1", ["f1.gif", "f1.jpeg"], "f1.jpeg"),
        ("f1", ["f10.jpg"], None),
        ("f1", [], None),
        (None, ["f1.jpg"], None),
        ("", ["f1.jpg"], None),
        ("484463v1_fig1", ["484463v1_fig1", "484463v1_fig2"], "484463v1_fig1"),
        ("pone.0038869.g001", ["pone.0038869.g001.tif", "pone.0038869.g002.tif"], "pone.0038869.g001.tif"),
        ("info:doi/10.1371/journal.pone.0038869.g001", ["pone.0038869.g001.tif"], "pone.0038869.g001.tif"),
        ("images/f1.png", ["f1.png"], "f1.png"),
    ],
)
def test_a_graphic_is_found_among_the_files_that_are_there(href, names, expected):
    assert resolve_graphic(href, names) == expected


def test_the_largest_of_several_sizes_wins():
    sizes = [f"pone.1.g001.PNG_{size}" for size in "SMIL"]
    assert resolve_graphic("pone.1.g001", sizes) == "pone.1.g001.PNG_L"


def test_a_thumbnail_never_wins_over_the_picture():
    assert resolve_graphic("g1.gif", ["g1.gif", "g1.jpg"]) in {"g1.gif", "g1.jpg"}
    assert resolve_graphic("g1", ["g1.gif", "g1.jpg"]) == "g1.jpg"


def test_an_alternative_stands_in_where_the_first_is_missing():
    assert resolve_graphic("f1.eps", ["other.png"], alternatives=["other"]) == "other.png"
    assert resolve_graphic("f1.eps", ["x.png"], alternatives=["other"]) is None
