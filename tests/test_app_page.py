"""The page without a browser: what its tabs say, what its gate refuses, and that it asks nobody outside."""

import gc
import io
import json
import os
import re
import socket
import stat
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
from layout_sets import write_dicom
from page_server import write_results
from PIL import Image
from synthetic_shards import write_articles, write_colours
from test_report import HOSTILE, build_dataset
from tiny_model import write_tiny_model

from biomedclip.app import asked, gate, serve, tab_dataset, tab_reports
from biomedclip.app.cards import RESEARCH_ONLY, write_cards, write_frame
from biomedclip.app.chosen import Chosen, describe, shrink
from biomedclip.app.classify import Classified
from biomedclip.app.holdings import Holdings, name_folders, open_holdings
from biomedclip.app.tab_classify import classify_picture, explain_label
from biomedclip.app.tab_search import find_figures
from biomedclip.errors import ConfigError, DataError
from biomedclip.page.gallery import SampleFigure
from biomedclip.shards import DatasetFolder

# Gradio opens a temporary file for every upload and leaves it to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def nothing_left_open():
    """Gradio's event loops, sockets and uploads go here, and not in the middle of another module's test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


LINES = "normal: a normal chest X-ray\npneumonia: pneumonia\npneumonia: lungs with pneumonia"


class Tags(HTMLParser):
    """Tags and their attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def names(self):
        return {tag for tag, _ in self.found}


def png(size=(64, 48), colour=(200, 40, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("page")
    write_colours(root / "colours")
    write_articles(root / "articles")
    build_dataset(root / "hostile")
    write_results(root / "results", "before", "after")
    write_tiny_model(root / "model")
    (root / "results" / "notes.html").write_text("<h1>notes</h1><script>parent.x = 1</script>")
    return root


@pytest.fixture(scope="module")
def holdings(root):
    folders = [root / name for name in ("colours", "articles", "hostile")]
    return open_holdings(folders, [root / "results"], str(root / "model"))


@pytest.fixture(scope="module")
def page(holdings, tmp_path_factory):
    """(client, private folder, outside addresses that were asked) of the page in this process."""
    from starlette.testclient import TestClient

    asked_outside, connect = [], socket.socket.connect

    def watch(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not serve.is_loopback(address[0]):
            asked_outside.append(address)
        return connect(self, address)

    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch, serve.private_folder() as folder:
        patch.setattr(socket.socket, "connect", watch)
        with TestClient(serve.make_app(holdings, folder, max_upload_mb=1), base_url="http://127.0.0.1") as client:
            yield client, folder, asked_outside
    os.environ.clear()
    os.environ.update(before)


def call(client, name, data):
    """The output of one event of the page through Gradio's queue, by the name of its function."""
    config = client.get("/config").json()
    numbers = [d["id"] for d in config["dependencies"] if d["api_name"] == name]
    body = {"fn_index": numbers[0], "data": data, "session_hash": "abc123"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    lines = client.get("/gradio_api/queue/data", params={"session_hash": "abc123"}).text.split("\n")
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return next(m["output"] for m in told if m["msg"] == "process_completed")


# ---- what the tabs say


def test_labels_become_lines_of_prompts_and_come_back_as_the_question():
    lines = asked.prompts_of_labels("normal, pneumonia")
    assert lines.split("\n")[0].startswith("normal: ")
    question = asked.read_prompts(lines)
    assert question.labels == ("normal", "pneumonia")
    assert asked.write_prompts(question) == lines


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "names no label"), ("a: x", "one label"), ("a: x\nA : y", "twice"), ("just words\nb: y", "no `label"),
     ("a:\nb: y", "no `label")],
)  # fmt: skip
def test_prompts_that_ask_nothing_are_one_line(text, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        asked.read_prompts(text)
    assert "--" not in asked.say(caught.value)


def test_a_label_with_a_colon_is_refused_where_it_would_be_misread():
    with pytest.raises(ConfigError, match="colon"):
        asked.prompts_of_labels("stage: I, stage: II")


def test_the_untouched_lines_of_a_task_ask_the_task_itself():
    name = "pneumoniamnist"
    lines = asked.write_prompts(asked.ask_task(name))
    assert asked.read_prompts(lines, name).where == f"task {name}"
    assert asked.read_prompts(lines.replace("pneumonia", "lung infection"), name).where == "prompts"


def test_every_task_that_is_offered_can_be_asked_through_its_lines():
    offered = [name for _, name in asked.list_questions() if name]
    assert len(offered) > 20
    for name in offered:
        question = asked.ask_task(name)
        assert asked.read_prompts(asked.write_prompts(question), name).labels == question.labels


@pytest.mark.parametrize(("flag", "word"), [("uncertain", "Uncertain"), ("out of scope", "Out of scope"), ("", None)])
def test_an_answer_says_its_flag_in_words(flag, word):
    found = Classified(name="x.png", probabilities=np.array([0.25, 0.75]), flag=flag, reason="too close")
    html = asked.write_answer(found, ("a", "<b>"), "how")
    assert ('role="alert"' in html) == bool(flag)
    assert word is None or f"{word}: too close" in html
    assert html.index("&lt;b&gt;") < html.index(">a<")
    assert "75.0 %" in html
    assert "b" not in Tags(html).names()


def test_a_text_file_called_jpg_and_deep_grey_without_a_window_say_what_to_do(tmp_path):
    (tmp_path / "x.jpg").write_text("no picture at all")
    with pytest.raises(DataError, match="is no picture, whatever its name says"):
        Chosen(tmp_path / "x.jpg", "x.jpg").read()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16).save(tmp_path / "deep.png")
    with pytest.raises(DataError) as caught:
        Chosen(tmp_path / "deep.png", "deep.png").read()
    assert "list of windows" in asked.say(caught.value)
    assert "--window" not in asked.say(caught.value)
    _, image = Chosen(tmp_path / "deep.png", "deep.png", "percentile").read()
    assert image.getextrema()[0] == (0, 255)


def test_frames_of_a_dicom_are_numbered_and_shown(tmp_path):
    frames = np.stack([np.full((8, 8), 40 * n, np.uint8) for n in range(3)])
    chosen = Chosen(write_dicom(tmp_path / "loop.dcm", frames, Modality="US"), "loop.dcm")
    assert chosen.frames() == [0, 1, 2]
    picture, image = chosen.read(2)
    assert "frame 2" in describe(picture, image)
    with pytest.raises(DataError, match="has no picture 4"):
        chosen.read(3)


def test_pictures_are_shown_no_larger_and_tiny_ones_enlarged():
    assert max(shrink(Image.new("RGB", (4000, 100))).size) == 640
    assert shrink(Image.new("RGB", (28, 28))).size == (308, 308)


def test_a_picture_is_classified_and_explained_with_the_models_own_words(holdings, tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    picture, image = Chosen(tmp_path / "x.png", "x.png").read()
    html, order = classify_picture(holdings, picture, LINES, "")
    assert sorted(order) == ["normal", "pneumonia"]
    shares = [float(text) for text in re.findall(r"([\d.]+) %</td>", html)]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    assert holdings.encoder() is holdings.encoder()
    overlay, check = explain_label(holdings, image, LINES, "pneumonia", "normal")
    assert min(overlay.size) > 100
    assert "hiding the hottest tenth" in check
    with pytest.raises(DataError, match="no such label"):
        explain_label(holdings, image, LINES, "fracture", "")
    with pytest.raises(DataError, match="no label is chosen"):
        explain_label(holdings, image, LINES, "", "")


def test_a_figure_is_found_by_its_own_picture_and_cards_say_licence_and_article(holdings, monkeypatch, tmp_path):
    monkeypatch.setenv("BIOMEDCLIP_CACHE", str(tmp_path / "cache"))
    sample = next(holdings.dataset("articles").samples())
    (tmp_path / "query.jpg").write_bytes(sample.image)
    html = find_figures(holdings, "articles", "", str(tmp_path / "query.jpg"), 4)
    first = html[html.index("<figure") :]
    assert first.index(sample.key) < first.index("</figure>")
    assert first.count("CC BY") == 4
    assert html.count("<figure") == find_figures(holdings, "articles", "noise", None, 4).count("<figure") == 4
    with pytest.raises(DataError, match="nothing was asked"):
        find_figures(holdings, "articles", "  ", None, 4)
    with pytest.raises(DataError, match="not one of the folders"):
        find_figures(holdings, "../articles", "noise", None, 4)


def test_the_funnel_is_counted_from_the_ledger_and_adds_up(holdings, root, tmp_path):
    seen, kept, dropped = tab_dataset.count_ledger(holdings.dataset("hostile"))
    assert (seen, kept, dropped) == (13, 8, {"no_caption": 4, "broken_image": 1})
    assert "13 seen = 8 kept + 5 dropped" in tab_dataset.describe_dataset(holdings.dataset("hostile"))
    copy = build_dataset(tmp_path / "copy").folder
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["ledger"]["dropped"]["no_caption"] = 3
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not agree with the manifest"):
        tab_dataset.describe_dataset(DatasetFolder(copy))


def test_samples_are_filtered_by_fields(holdings):
    colours = holdings.dataset("colours")
    choose = tab_dataset.choose_rows
    assert len(choose(colours, tab_dataset.Fields())) == 36
    red = choose(colours, tab_dataset.Fields(split="val", label="red"))
    assert red["key"].to_pylist() == [f"val-red-{n}" for n in range(6)]
    assert len(choose(colours, tab_dataset.Fields(words="TRAIN-blue"))) == 6
    assert len(choose(colours, tab_dataset.Fields(licence="CC BY"))) == 0
    assert len(choose(holdings.dataset("hostile"), tab_dataset.Fields(words="no doi"))) == 2
    assert tab_dataset.list_choices(colours)["label"][0] == ("any", "")
    assert ("blue (12)", "blue") in tab_dataset.list_choices(colours)["label"]
    assert tab_dataset.show_samples(colours, choose(colours, tab_dataset.Fields()), 2).count("<figure") == 12
    assert "25 to 36 of 36" in tab_dataset.describe_place(36, 2)


def test_what_others_wrote_stays_text(holdings):
    rows = holdings.dataset("hostile").index
    page = Tags(tab_dataset.show_samples(holdings.dataset("hostile"), rows, 0))
    assert page.names() <= {"div", "figure", "figcaption", "img", "span", "b", "a"}
    for tag, attributes in page.found:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/jpeg")
        assert tag != "a" or re.match(r"https://(doi\.org|pmc\.ncbi\.nlm\.nih\.gov)/", attributes["href"])
        assert tag != "a" or attributes["rel"] == "noopener noreferrer"
    figure = SampleFigure(key="k", image=b"no picture", caption=HOSTILE, source="s", licence="CC BY")
    assert "does not decode" in write_cards([figure])


def test_results_are_tables_and_the_better_model_is_called_better(holdings):
    folder = holdings.results_folder("results")
    html = tab_reports.describe_results(folder)
    assert all(f">{name}<" in html for name in ("before", "after", "Blood cells (BCCD)"))
    models = tab_reports.list_models(holdings)
    assert list(models) == ["before", "after"]
    assert ">better<" in tab_reports.compare_sets(models["before"], models["after"])


def test_reports_stand_in_a_frame_that_may_nothing(holdings):
    folder = holdings.results_folder("results")
    assert tab_reports.list_reports(folder) == [tab_reports.OVERVIEW, "notes.html"]
    for name in tab_reports.list_reports(folder):
        html = tab_reports.read_report(folder, name)
        ((tag, attributes),) = Tags(write_frame(html, name)).found
        assert (tag, attributes["sandbox"], attributes["srcdoc"]) == ("iframe", "", html)


def test_no_report_outside_of_the_folder_is_read(root, tmp_path):
    folder = write_results(tmp_path / "results", "one")
    (tmp_path / "secret.html").write_text("secret")
    (folder / "link.html").symlink_to(tmp_path / "secret.html")
    (folder / "deep").symlink_to(tmp_path, target_is_directory=True)
    assert tab_reports.list_reports(folder) == [tab_reports.OVERVIEW]
    for name in ("../secret.html", str(tmp_path / "secret.html"), "link.html", "deep/secret.html", ""):
        with pytest.raises(DataError, match="not a report of this folder"):
            tab_reports.read_report(folder, name)


def test_results_that_lack_or_leave_something_are_one_line(tmp_path):
    folder = write_results(tmp_path / "results", "one")
    path = folder / "results" / "one" / "bccd.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"scores_file": "../../../etc/passwd"}))
    with pytest.raises(DataError, match="scores outside of its folder"):
        tab_reports.read_folder(folder)
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "baselines"}))
    with pytest.raises(DataError, match="no result of this project"):
        tab_reports.describe_results(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no results"):
        tab_reports.describe_results(tmp_path / "empty")


def test_folders_have_names_of_their_own_and_must_exist(tmp_path):
    for name in ("a/pmc", "b/pmc", "c"):
        (tmp_path / name).mkdir(parents=True)
    found = name_folders([tmp_path / "a/pmc", tmp_path / "b/pmc", tmp_path / "c", tmp_path / "c"], "--dataset")
    assert list(found) == [str(tmp_path / "a/pmc"), str(tmp_path / "b/pmc"), "c"]
    with pytest.raises(ConfigError, match="there is no such folder"):
        name_folders([tmp_path / "d"], "--dataset")
    with pytest.raises(DataError, match="no finished dataset"):
        open_holdings([tmp_path / "c"], [], "m")


# ---- the gate


def test_the_page_stands_with_its_line_and_asks_no_other_host(page):
    client, _, outside = page
    html = client.get("/").text
    assert RESEARCH_ONLY in html
    for tag, attributes in Tags(html).found:
        for name in ("src", "href") if tag != "base" else ():
            assert "//" not in attributes.get(name, ""), f"{tag} asks {attributes[name]}"
    assert not re.search(r"fonts\.g|cdnjs|@import|gstatic", html + client.get("/theme.css").text)
    policy = client.get("/").headers["content-security-policy"]
    sources = {word for part in policy.split(";") for word in part.split()[1:]}
    assert sources <= {"'self'", "'unsafe-inline'", "'unsafe-eval'", "data:", "blob:", "'none'"}
    assert outside == []


def test_gradio_neither_counts_nor_documents_nor_shares(page):
    client, _, _ = page
    config = client.get("/config").json()
    assert not config["enable_queue"] or not config["analytics_enabled"]
    assert config["footer_links"] == []
    assert {d["api_visibility"] for d in config["dependencies"]} == {"private"}
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"]


@pytest.mark.parametrize(
    "path",
    ["/docs", "/redoc", "/openapi.json", "/gradio_api/openapi.json", "/gradio_api/info", "/gradio_api/runs",
     "/gradio_api/proxy=https://x.hf.space/a", "/gradio_api/mcp/sse", "/monitoring", "/login", "/gradio_api/vibe-code",
     "/gradio_api/deep_link", "/gradio_api/dev/reload"],
)  # fmt: skip
def test_what_the_page_does_not_need_is_not_there(page, path):
    assert page[0].get(path).status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "..%2f..%2f..%2f..%2fetc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "a%00b", "http:/x", "",
     "https://example.org/x.png", "file:///etc/passwd", "pyproject.toml", "biomedclip/app/page.py"],
)  # fmt: skip
def test_only_files_of_the_private_folder_are_served(page, path):
    client, _, outside = page
    assert client.get(f"/gradio_api/file={path}").status_code == 403
    assert outside == []


def test_links_out_of_the_private_folder_are_not_followed(page, tmp_path):
    client, folder, _ = page
    (tmp_path / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    assert client.get(f"/gradio_api/file={folder}/link.png").status_code == 403
    assert client.get(f"/gradio_api/file={folder}/../{tmp_path.name}/secret.png").status_code == 403


def test_other_hosts_and_other_sites_are_refused(page):
    client, _, _ = page
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/", headers={"host": "127.0.0.1.evil.example:7860"}).status_code == 403
    assert client.get("/", headers={"host": "localhost:7860"}).status_code == 200
    for origin in ("http://evil.example", "null"):
        answer = client.post("/gradio_api/upload", headers={"origin": origin}, files={"files": ("x.png", png())})
        assert answer.status_code == 403


def test_uploads_are_limited_and_lie_in_the_private_folder(page):
    client, folder, _ = page
    (path,) = client.post("/gradio_api/upload", files={"files": ("x.png", png())}).json()
    assert path.startswith(str(folder))
    assert client.post("/gradio_api/upload", files={"files": ("x.png", bytes(1_100_000))}).status_code == 413
    (path,) = client.post("/gradio_api/upload", files={"files": ("../../up.png", png())}).json()
    assert path.startswith(str(folder))


def test_calls_are_small_json_and_name_no_address(page):
    client, _, outside = page
    join = "/gradio_api/queue/join"
    assert client.post(join, content=b"x" * 2_000_000).status_code == 413
    assert client.post(join, content=b"no json").status_code == 400
    data = [{"path": "http://example.org/a.png", "meta": {"_type": "gradio.FileData"}}]
    body = {"fn_index": 0, "session_hash": "abc", "data": data}
    assert client.post(join, json=body).status_code == 400
    assert outside == []
    assert gate.refuse_call(json.dumps({"data": ["see http://x.org"]}).encode()) == (0, "")


def test_a_picture_goes_through_the_pages_own_endpoints(page):
    client, _, outside = page
    (path,) = client.post("/gradio_api/upload", files={"files": ("x.png", png())}).json()
    upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
    taken = call(client, "take_upload", [upload, ""])["data"]
    assert "64 x 48 px" in json.dumps(taken)
    answer = call(client, "classify", [None, 0, "", "a, b", "a: x\nb: y", "a, b"])["data"][0]
    assert 'class="bc-top"' in str(answer)
    for name, wanted in (("x.txt", "x"), ("/etc/passwd", None)):
        if wanted:
            (path,) = client.post("/gradio_api/upload", files={"files": (name, b"text")}).json()
        else:
            path = name
        assert "error" in call(client, "take_upload", [{**upload, "path": path}, ""])
    assert outside == []


# ---- serving


def test_a_busy_port_and_a_strange_host_are_one_line():
    with (
        serve.listen("127.0.0.1", 0) as first,
        pytest.raises(ConfigError, match="--port: is in use by another program"),
        serve.listen("127.0.0.1", first.getsockname()[1]),
    ):
        pass
    for host in ("203.0.113.7", "no such host", "a" * 300):
        with pytest.raises(ConfigError, match="--host"), serve.listen(host, 0):
            pass


@pytest.mark.parametrize(
    ("host", "own"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
                      ("10.0.0.1", False), ("example.org", False)]
)  # fmt: skip
def test_loopback_is_told_from_the_rest(host, own):
    assert serve.is_loopback(host) is own


def test_another_host_is_warned_of(monkeypatch):
    served, warned, said = [], [], []
    monkeypatch.setattr(serve, "make_app", lambda *args, **kw: kw["host"])
    monkeypatch.setattr(serve, "_serve", lambda app, listener: served.append(app))
    for host in ("127.0.0.1", "0.0.0.0"):
        serve.open_page(Holdings(), host=host, port=0, say=said.append, warn=warned.append)
    assert served == ["127.0.0.1", "0.0.0.0"]
    assert len(warned) == 1
    assert "opens the page to other machines" in warned[0]
    assert all(re.search(r"http://[\d.]+:\d+", text) for text in said)


def test_the_folder_is_private_and_goes_away():
    with serve.private_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "x").write_text("x")
    assert not folder.exists()


def test_a_page_without_folders_says_what_to_do():
    from biomedclip.app.page import build_page

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = json.dumps(build_page(Holdings()).get_config_file()["components"], default=str)
    for words in ("No dataset was given", "No results were given", "No answer yet", "biomedclip app --dataset"):
        assert words in shown
