"""A graphic's `xlink:href` and the article's real file names in, the file that shows the figure out.

An href may lack the extension, differ in case, carry a folder or a DOI prefix, or name a thumbnail; the article's own
list of files is the only truth. Matching goes from the whole name over the whole name without case to the stem, and
of several files with one stem the best picture wins: JPEG first, because that is the web-size image PMC makes of
every figure, GIF late, because there it is a thumbnail. Only known extensions are cut off: the dots of
`pone.0038869.g001` belong to the name.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import unquote

RASTER_RANK = {
    "jpg": 0,
    "jpeg": 1,
    "png": 2,
    "webp": 3,
    "tif": 4,
    "tiff": 5,
    "gif": 6,
    "": 7,
    "bmp": 8,
    "jp2": 9,
    "png_l": 2,
    "png_m": 2,
    "png_i": 2,
    "png_s": 2,
}
"""Extension -> preference, lower first; the empty one is a file without extension."""
_SIZE_RANK = {"png_l": 0, "png_m": 1, "png_i": 2, "png_s": 3}
"""PLOS files each figure in four sizes; the largest comes first."""
_PREVIEWS = ("gif", "png_m", "png_i", "png_s")
_NOT_PICTURES = frozenset(("pdf", "eps", "svg", "svgz", "ps", "ai", "emf", "wmf", "ppt", "pptx", "cdr", "psd"))
"""Extensions that an href may carry while the file beside the XML is a picture of the same stem."""
_JOURNAL_PREFIX = "journal."


def resolve_graphic(href: str | None, media_names: Iterable[str], alternatives: Iterable[str] = ()) -> str | None:
    """The name among `media_names` that shows the figure, spelled as it is there, or None where there is none.

    `alternatives` are further hrefs of the same picture; they are asked where `href` finds nothing, or nothing better
    than a GIF or a file that is no raster picture. Vector files and PDFs come back only where an href names them whole.
    """
    stems, names = _index(media_names if isinstance(media_names, tuple) else tuple(media_names))
    best: tuple[int, str] | None = None
    for candidate in (href, *alternatives):
        found = _match(candidate, stems, names) if candidate else None
        if found is None:
            continue
        rank = rank_extension(found)
        if rank < RASTER_RANK["gif"]:
            return found
        if best is None or rank < best[0]:
            best = (rank, found)
    return best[1] if best else None


def rank_extension(name: str) -> int:
    """How good a picture a file name promises: 0 for `.jpg`, more for worse, 99 for what is no raster picture."""
    return RASTER_RANK.get(split_extension(name)[1], 99)


def split_extension(name: str) -> tuple[str, str]:
    """Stem and lower-case extension of a file name; the extension is '' unless it is a known one."""
    stem, dot, extension = name.rpartition(".")
    extension = extension.lower()
    if dot and stem and (extension in RASTER_RANK or extension in _NOT_PICTURES or extension in _OTHER_FILES):
        return stem, extension
    return name, ""


_OTHER_FILES = frozenset(
    "xml nxml json txt csv tsv xls xlsx doc docx zip gz tar rar mp4 mov avi mpg mpeg wmv flv mp3 wav htm html".split()
)


def _base_name(href: str) -> str:
    """The last part of a path, URL or DOI: `journal.x.g001` of `info:doi/10.1371/journal.x.g001`."""
    return unquote(href.strip()).replace("\\", "/").rstrip("/").rpartition("/")[2]


@lru_cache(maxsize=16)
def _index(media_names: tuple[str, ...]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Lower-case stem -> names, best first, and lower-case base name -> names. Kept for the figures that follow."""
    stems: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for name in media_names:
        base = _base_name(name).lower()
        names.setdefault(base, []).append(name)
        stem, extension = split_extension(base)
        if extension in RASTER_RANK:
            stems.setdefault(stem, []).append(name)
    for group in stems.values():
        group.sort(key=_preference)
    for group in names.values():
        group.sort()
    return stems, names


def _preference(name: str) -> tuple[int, int, str]:
    extension = split_extension(_base_name(name))[1]
    return RASTER_RANK[extension], _SIZE_RANK.get(extension, 0), name


def _match(href: str, stems: dict[str, list[str]], names: dict[str, list[str]]) -> str | None:
    base = _base_name(href)
    whole = base.lower()
    spellings = [whole]
    if whole.startswith(_JOURNAL_PREFIX):
        spellings.append(whole.removeprefix(_JOURNAL_PREFIX))
    for spelling in spellings:
        same_name = names.get(spelling, [])
        # Of names that differ in folder or case, the one written like the href.
        exact = next((n for n in same_name if n == href), None) or next(
            (n for n in same_name if _base_name(n) == base), next(iter(same_name), None)
        )
        stem, extension = split_extension(spelling)
        of_stem = stems.get(stem) or stems.get(spelling)
        if exact is not None and extension not in _PREVIEWS and extension not in _NOT_PICTURES:
            if extension or not of_stem or of_stem[0] == exact:
                return exact
            return of_stem[0]
        if of_stem:
            return of_stem[0]
        if exact is not None:
            return exact
    return None
